"""The start of the processes of a run: each process opens one TCP connection to process 0.

If a process does not start, then JAX aborts the other processes (SIGABRT and a stack trace) without
an exception in Python. Therefore all processes first connect here, at the coordinator's address,
and process 0 can name a missing process in one line. The module `group` uses the connections
afterwards. A message is one line of JSON.
"""

import contextlib
import json
import queue
import select
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from gptjax.errors import ProcessLost, UserError

LOST = 1
"""The exit code of a process that ends because another process was lost."""
# The time within which a new connection must send its first message.
_HELLO_SECONDS = 10.0
# The time that process 0 has for its answer, after the time that it may wait for all processes.
_ANSWER_SECONDS = 10.0
# The size of the largest message in bytes. The limit keeps a foreign program from filling the
# memory.
_MAX_MESSAGE = 1 << 24

Message = dict[str, Any]


class Link:
    """A connection to another process."""

    def __init__(self, connection: socket.socket, timeout: float):
        """Wraps a connection.

        Args:
          connection: an open TCP connection.
          timeout: the number of seconds without a message after which `read` returns None.
        """
        connection.settimeout(timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._lock = connection, threading.Lock()
        self._lines = connection.makefile("rb")

    def send(self, message: Message) -> None:
        """Sends a message. It ignores a broken connection, which the reading thread notices."""
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> Message | None:
        """Returns the next message. None means that the connection has closed or timed out."""
        with contextlib.suppress(OSError, ValueError):
            message = json.loads(self._lines.readline(_MAX_MESSAGE))
            return message if isinstance(message, dict) else None
        return None

    def messages(self) -> Iterator[Message]:
        """Yields the messages until the connection closes or times out."""
        while (message := self.read()) is not None:
            yield message

    def ended(self) -> bool:
        """Returns whether the other process has closed the connection and no message is unread."""
        try:
            readable = select.select([self._socket], [], [], 0)[0]
            return bool(readable) and not self._socket.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def close(self) -> None:
        """Closes the connection."""
        with contextlib.suppress(OSError):
            self._socket.close()


def host_rendezvous(
    address: str, count: int, facts: Message, timeout: float, silence: float
) -> tuple[dict[int, Link], list[Message]]:
    """Waits in process 0 until all other processes have connected.

    Args:
      address: "HOST:PORT". Process 0 listens at this port.
      count: the number of processes, process 0 included.
      facts: the facts about process 0, such as versions. The key "host" is required.
      timeout: the number of seconds to wait for the other processes.
      silence: the number of seconds without a message after which a process counts as lost.

    Returns:
      Two values: a dictionary of index -> link for the other processes, and a list with the facts
      of all processes in the order of their indices.

    Raises:
      ProcessLost: some processes did not connect in time. The message names them.
      UserError: the port cannot be used, a process has another `num_processes`, or two processes
        have the same `process_id`.
    """
    port = int(address.rpartition(":")[2])
    end = time.monotonic() + timeout
    links: dict[int, Link] = {}
    found = {0: facts}
    problem, hellos = "", queue.SimpleQueue[tuple[Link, Message]]()
    try:
        # If the system supports both, an IPv6 socket also accepts IPv4 connections.
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        server = socket.create_server(
            ("", port), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=count
        )
    except OSError as error:
        raise UserError(
            f"`coordinator_address`={address}: cannot listen there ({error})"
        ) from error
    over = threading.Event()
    threading.Thread(target=_greet, args=(server, silence, hellos, over), daemon=True).start()
    while len(found) < count and not problem and (left := end - time.monotonic()) > 0:
        with contextlib.suppress(queue.Empty):
            problem = _admit(*hellos.get(timeout=left), count, links, found)
    over.set()
    if problem:
        reject_all(links, problem)
        raise UserError(problem)
    if missing := [str(index) for index in range(count) if index not in found]:
        here = ", ".join(f"{index} ({found[index]['host']})" for index in sorted(found))
        problem = (
            f"process {', '.join(missing)} of {count} did not come up within {timeout:g} s; here "
            f"are {here}; see the output of the missing, or raise `initialization_timeout`"
        )
        reject_all(links, problem, LOST)
        raise ProcessLost(problem)
    return links, [found[index] for index in range(count)]


def reject_all(links: dict[int, Link], problem: str, code: int = 2) -> None:
    """Tells the processes that have connected so far that the run does not start.

    Args:
      links: index of a process -> the link to it.
      problem: the message for the user.
      code: the exit code for these processes.
    """
    for link in links.values():
        link.send({"problem": problem, "code": code})


def _greet(
    server: socket.socket,
    silence: float,
    hellos: "queue.SimpleQueue[tuple[Link, Message]]",
    over: threading.Event,
) -> None:
    """Accepts connections until `over` is set, and puts their first messages into `hellos`.

    Each connection has its own thread, so a silent connection does not delay the other connections.
    """

    def listen(connection: socket.socket) -> None:
        link = Link(connection, _HELLO_SECONDS)
        hello = link.read() or {}
        if isinstance(hello.get("process_id"), int) and isinstance(hello.get("facts"), dict):
            connection.settimeout(silence)
            hellos.put((link, hello))
        else:
            link.close()  # the connection came from a foreign program

    server.settimeout(0.1)
    with server:
        while not over.is_set():
            with contextlib.suppress(OSError):
                threading.Thread(target=listen, args=(server.accept()[0],), daemon=True).start()


def _admit(
    link: Link, hello: Message, count: int, links: dict[int, Link], found: dict[int, Message]
) -> str:
    """Adds a process to `links` and `found`.

    Returns:
      A message if the process does not fit into the run, otherwise "".
    """
    index, facts, theirs = hello["process_id"], hello["facts"], hello.get("num_processes")
    host, problem = facts.get("host", "?"), ""
    if theirs != count or not 0 <= index < count:
        problem = (
            f"process {index} ({host}) was started with `num_processes`={theirs}, process 0 with "
            f"{count}; give all processes the same"
        )
    elif index in found and not (index in links and links[index].ended()):
        problem = (
            f"two processes have `process_id`={index}, on {found[index].get('host')} and on {host}"
        )
    if problem:
        reject_all({index: link}, problem)
        return problem
    links[index], found[index] = link, facts
    return ""


def join_rendezvous(
    address: str, index: int, count: int, facts: Message, timeout: float, silence: float
) -> tuple[Link, Message]:
    """Connects this process, which is not process 0, to process 0, and waits for the answer.

    Args:
      address: "HOST:PORT" of process 0.
      index: the index of this process.
      count: the number of processes, process 0 included.
      facts: the facts about this process, such as versions. The key "host" is required.
      timeout: the number of seconds to wait for process 0.
      silence: the number of seconds without a message after which a process counts as lost.

    Returns:
      The link to process 0, and the message that process 0 sends when all processes have connected.

    Raises:
      ProcessLost: process 0 did not start or has ended, or another process did not connect.
      UserError: the address is wrong, or a process differs from process 0 in its options, version
        or code.
    """
    host, _, port = address.rpartition(":")
    end = time.monotonic() + timeout
    while True:
        try:
            left = max(0.1, end - time.monotonic())
            connection = socket.create_connection((host.strip("[]"), int(port)), left)
            break
        except UnicodeError as error:
            raise UserError(
                f"`coordinator_address`={address}: {host} is no name of a host ({error})"
            ) from error
        except OSError as error:  # the loop tries again, because process 0 may start later
            if time.monotonic() > end:
                raise ProcessLost(
                    f"process 0 of {count} did not come up at `coordinator_address`={address} "
                    f"within {timeout:g} s ({error.strerror or error})"
                ) from error
            time.sleep(min(0.2, timeout / 10))
    # Process 0 may have started last, and waits `timeout` seconds from its own start. So this
    # process waits for the answer, which names the missing processes if there are any.
    link = Link(connection, timeout + _ANSWER_SECONDS)
    link.send({"process_id": index, "num_processes": count, "facts": facts})
    answer = link.read()
    if answer is None:
        raise ProcessLost(f"process 0 of {count} at `coordinator_address`={address} has ended")
    if "problem" in answer:
        raise (ProcessLost if answer.get("code") == LOST else UserError)(answer["problem"])
    connection.settimeout(silence)
    return link, answer
