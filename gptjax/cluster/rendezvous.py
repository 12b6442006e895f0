"""The rendezvous of the processes of a run: each opens one TCP connection to process 0.

If a process does not start, then JAX aborts the others (SIGABRT and a stack trace) without an
exception in Python. The processes therefore meet here first, at the coordinator's address, where a
missing one can be named in one line. `group` keeps the connections. Messages are lines of JSON.
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
"""Exit code of a process that ends because another one was lost."""
# Time that a new connection has for its first message.
_HELLO_SECONDS = 10.0
# Time that process 0 has for its answer, after the time to wait for all processes.
_ANSWER_SECONDS = 10.0
# Largest message in bytes, so that a foreign program cannot fill the memory.
_MAX_MESSAGE = 1 << 24

Message = dict[str, Any]


class Link:
    """A connection to another process."""

    def __init__(self, connection: socket.socket, timeout: float):
        """Args: connection; timeout, seconds without a message after which `read` gives up."""
        connection.settimeout(timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._lock = connection, threading.Lock()
        self._lines = connection.makefile("rb")

    def send(self, message: Message) -> None:
        """Sends a message. A broken connection is no error here: the reading thread notices it."""
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> Message | None:
        """Returns the next message; None if the connection has ended or is silent for too long."""
        with contextlib.suppress(OSError, ValueError):
            message = json.loads(self._lines.readline(_MAX_MESSAGE))
            return message if isinstance(message, dict) else None
        return None

    def messages(self) -> Iterator[Message]:
        """Yields the messages until the connection ends."""
        while (message := self.read()) is not None:
            yield message

    def ended(self) -> bool:
        """Returns whether the other side has closed the connection and all was read."""
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
    """Waits in process 0 for the other processes.

    Args:
      address: "HOST:PORT"; process 0 listens at this port.
      count: number of processes, with this one.
      facts: what the processes tell each other about themselves, with the key "host".
      timeout: seconds to wait for the others.
      silence: seconds without a message after which a process counts as lost.

    Returns:
      The links to the other processes by their index, and the facts of all processes in order.

    Raises:
      ProcessLost: names the processes that did not come.
      UserError: the port cannot be used, or a process was started with other numbers.
    """
    port = int(address.rpartition(":")[2])
    end = time.monotonic() + timeout
    links: dict[int, Link] = {}
    found = {0: facts}
    problem, hellos = "", queue.SimpleQueue[tuple[Link, Message]]()
    try:
        # IPv6 sockets accept IPv4 too, on systems that have both.
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
    """Tells the processes that have come so far why the run does not start, and an exit code."""
    for link in links.values():
        link.send({"problem": problem, "code": code})


def _greet(
    server: socket.socket,
    silence: float,
    hellos: "queue.SimpleQueue[tuple[Link, Message]]",
    over: threading.Event,
) -> None:
    """Accepts connections until `over` is set, each in a thread: a silent one delays no other."""

    def listen(connection: socket.socket) -> None:
        link = Link(connection, _HELLO_SECONDS)
        hello = link.read() or {}
        if isinstance(hello.get("process_id"), int) and isinstance(hello.get("facts"), dict):
            connection.settimeout(silence)
            hellos.put((link, hello))
        else:
            link.close()  # a foreign program

    server.settimeout(0.1)
    with server:
        while not over.is_set():
            with contextlib.suppress(OSError):
                threading.Thread(target=listen, args=(server.accept()[0],), daemon=True).start()


def _admit(
    link: Link, hello: Message, count: int, links: dict[int, Link], found: dict[int, Message]
) -> str:
    """Adds a process to `links` and `found`; returns what is wrong with it, or ""."""
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
    """Connects a process other than 0 to process 0, and waits for its answer.

    Args:
      address: "HOST:PORT" of process 0.
      index: of this process.
      count, facts, timeout, silence: as in `host_rendezvous`.

    Returns:
      The link to process 0, and the message that it sends to all when they have come.

    Raises:
      ProcessLost: process 0 did not start or has ended, or another process did not come.
      UserError: the address is wrong, or a process was started in another way than process 0.
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
        except OSError as error:  # process 0 may start later
            if time.monotonic() > end:
                raise ProcessLost(
                    f"process 0 of {count} did not come up at `coordinator_address`={address} "
                    f"within {timeout:g} s ({error.strerror or error})"
                ) from error
            time.sleep(min(0.2, timeout / 10))
    # Process 0 may have started last. It decides when it is too late, and names who is missing.
    link = Link(connection, timeout + _ANSWER_SECONDS)
    link.send({"process_id": index, "num_processes": count, "facts": facts})
    answer = link.read()
    if answer is None:
        raise ProcessLost(f"process 0 of {count} at `coordinator_address`={address} has ended")
    if "problem" in answer:
        raise (ProcessLost if answer.get("code") == LOST else UserError)(answer["problem"])
    connection.settimeout(silence)
    return link, answer
