"""The processes of a run, joined by one TCP connection each to process 0.

JAX ends a process (SIGABRT, a stack trace) when another does not come up or is lost, and says
neither to Python. So the processes first call the roll here, on the coordinator's address, and keep
the connections: a process that ends closes its own, however it ends, and one that hangs stops
beating. Messages are lines of JSON, none of them ever executed. No step of a training waits here.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from gptjax.errors import UserError

LOST = 1
"""Exit code of a process that ends because another was lost."""
# Time to end by itself for a process that learns that another has ended.
_GRACE_SECONDS = 5.0
# Process 0 goes last: the others need its services until they have ended.
_LAST_SECONDS = 30.0
# A stray connection may not fill the memory.
_LONGEST = 1 << 24

Message = dict[str, Any]


class Link:
    """A connection to another process."""

    def __init__(self, connection: socket.socket, timeout: float):
        """Args: connection; timeout, seconds without a message after which it counts as lost."""
        connection.settimeout(timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._lock = connection, threading.Lock()
        self._lines = connection.makefile("rb")

    def send(self, message: Message) -> None:
        """Sends a message; a broken connection shows where it is read."""
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> Message | None:
        """Returns the next message, or None where no more will come."""
        with contextlib.suppress(OSError, ValueError):
            message = json.loads(self._lines.readline(_LONGEST))
            return message if isinstance(message, dict) else None
        return None

    def messages(self) -> Iterator[Message]:
        """Yields the messages until the connection ends."""
        while (message := self.read()) is not None:
            yield message

    def close(self) -> None:
        """Closes the connection."""
        with contextlib.suppress(OSError):
            self._socket.close()


def call_roll(
    address: str, count: int, facts: Message, timeout: float, silence: float
) -> tuple[dict[int, Link], list[Message]]:
    """In process 0: waits for the others; returns their links, and the facts of all processes.

    Args:
      address: "host:port" to listen at.
      count: of processes.
      facts: of this process, with "host".
      timeout: seconds to wait for the others.
      silence: seconds after which a silent process counts as lost.

    Raises:
      UserError: names the processes that did not come.
    """
    port = int(address.rpartition(":")[2])
    end = time.monotonic() + timeout
    links: dict[int, Link] = {}
    found = {0: facts}
    problem = ""
    try:
        # Of both families where the system has both.
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        server = socket.create_server(
            ("", port), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=count
        )
    except OSError as error:
        raise UserError(
            f"--coordinator_address={address}: cannot listen there ({error})"
        ) from error
    with server:
        while len(found) < count and not problem and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(TimeoutError):
                link = Link(server.accept()[0], min(left, 10.0))
                problem = _admit(link, count, links, found)
                link._socket.settimeout(silence)
    missing = [str(index) for index in range(count) if index not in found]
    if missing and not problem:
        here = ", ".join(f"{index} ({found[index]['host']})" for index in sorted(found))
        problem = (
            f"process {', '.join(missing)} of {count} did not come up within {timeout:g} s; here "
            f"are {here}; see the output of the missing, or raise --initialization_timeout"
        )
    if problem:
        for link in links.values():
            link.send({"problem": problem})
        raise UserError(problem)
    return links, [found[index] for index in range(count)]


def _admit(link: Link, count: int, links: dict[int, Link], found: dict[int, Message]) -> str:
    """Takes one more process in; returns what is wrong with it."""
    hello = link.read()
    index, facts = (hello or {}).get("process_id"), (hello or {}).get("facts")
    if hello is None or not isinstance(index, int) or not isinstance(facts, dict):
        link.close()  # not one of us
        return ""
    host, problem = facts.get("host", "?"), ""
    theirs = hello.get("num_processes")
    if theirs != count or not 0 <= index < count:
        problem = (
            f"process {index} ({host}) was started with --num_processes={theirs}, process 0 with "
            f"{count}; give all processes the same"
        )
    elif index in found:
        problem = (
            f"two processes have --process_id={index}, on {found[index].get('host')} and on {host}"
        )
    if problem:
        link.send({"problem": problem})
        return problem
    links[index], found[index] = link, facts
    return ""


def answer_roll(
    address: str, index: int, count: int, facts: Message, timeout: float, silence: float
) -> tuple[Link, Message]:
    """In the others: tells process 0 that this one is up; returns the link and its answer.

    Arguments as in `call_roll`; `index` is this process.
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
                f"--coordinator_address={address}: {host} is no name of a host ({error})"
            ) from error
        except OSError as error:  # it may come up later
            if time.monotonic() > end:
                raise UserError(
                    f"process 0 of {count} did not come up at --coordinator_address={address} "
                    f"within {timeout:g} s ({error.strerror or error})"
                ) from error
            time.sleep(min(0.2, timeout / 10))
    # Process 0 decides when it is too late, and says who is missing.
    link = Link(connection, max(0.1, end - time.monotonic()) + 10)
    link.send({"process_id": index, "num_processes": count, "facts": facts})
    answer = link.read()
    if answer is None:
        raise UserError(f"process 0 of {count} at --coordinator_address={address} has ended")
    if "problem" in answer:
        raise UserError(answer["problem"])
    connection.settimeout(silence)
    return link, answer


class Group:
    """The running processes: exchanges values, agrees on when to stop, and notices who is lost."""

    def __init__(self, index: int, hosts: list[str], links: dict[int, Link], silence: float):
        """Args: this process; host of each; links of process 0 to all, of others to 0; silence."""
        self.index, self.hosts, self.count = index, hosts, len(hosts)
        self._links = links
        self._change = threading.Condition(threading.RLock())
        self._put: dict[str, dict[int, Any]] = {}
        self._results: dict[str, list[Any]] = {}
        self._left: set[int] = set()
        self._ending = self._following = False
        # Of the agreement to stop: calls so far, those of each process, the call that says yes.
        self._calls, self._asked, self._held = 0, False, False
        self._calls_of: dict[int, int] = {}
        self._stop_at: int | None = None
        for peer, link in links.items():
            self._thread(self._listen, peer, link)
        self._thread(self._beat, min(5.0, silence / 4))

    @staticmethod
    def _thread(run: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=run, args=arguments, daemon=True).start()

    def name(self, index: int) -> str:
        """Returns "process 1 of 4 (its host)"."""
        return f"process {index} of {self.count} ({self.hosts[index]})"

    def _beat(self, seconds: float) -> None:
        while True:
            time.sleep(seconds)
            self._send({"kind": "beat"})

    def _send(self, message: Message) -> None:
        """To process 0, or from it to all."""
        for link in self._links.values():
            link.send(message)

    def _listen(self, peer: int, link: Link) -> None:
        for message in link.messages():
            with self._change:
                self._take(peer, message)
                self._change.notify_all()
        with self._change:
            over = self._ending or self._following or peer in self._left
            self._left.add(peer)
            self._change.notify_all()
        if not over:
            self._lose(peer)

    def _take(self, peer: int, message: Message) -> None:
        kind, value = message.get("kind"), message.get("value")  # type: str | None, Any
        if kind == "put":
            self._collect(peer, message["name"], value)
        elif kind == "all":
            self._results[message["name"]] = value
        elif kind == "lost":
            self._lose(int(value))
        elif kind == "bye":
            self._left.add(peer)
            self._after(peer, *value)
        elif kind == "after":
            self._after(*value)
        else:
            self._take_stop(peer, kind, value)

    def _collect(self, peer: int, name: str, value: Any) -> None:
        """In process 0: hands out the values when the last has come."""
        values = self._put.setdefault(name, {})
        values[peer] = value
        if len(values) == self.count:
            self._results[name] = [values[index] for index in range(self.count)]
            del self._put[name]
            self._send({"kind": "all", "name": name, "value": self._results[name]})

    def gather(self, name: str, value: Any) -> list[Any]:
        """Returns the value (plain, for JSON) of every process; waits for all of them."""
        with self._change:
            if self.index == 0:
                self._collect(0, name, value)
            else:
                self._send({"kind": "put", "name": name, "value": value})
            while name not in self._results:
                self._change.wait()
            return self._results.pop(name)

    def _take_stop(self, peer: int, kind: str | None, value: Any) -> None:
        if kind == "stop" and not self._calls_of:
            self._calls_of[0] = self._calls
            self._held = True
            self._send({"kind": "calls?"})
        elif kind == "calls?":  # and go no further before process 0 has decided
            self._held = True
            self._send({"kind": "calls", "value": self._calls})
        elif kind == "calls":
            self._calls_of[peer] = value
        elif kind == "stop at":
            self._stop_at, self._held = value, False
        if self._held and self.index == 0 and len(self._calls_of.keys() | self._left) == self.count:
            self._stop_at, self._held = max(self._calls_of.values()) + 1, False
            self._send({"kind": "stop at", "value": self._stop_at})

    def agreed(self, asked: Callable[[], bool]) -> Callable[[], bool]:
        """Returns a function that becomes true at the same call in all processes.

        All have to call it equally often. It costs a lock until one is asked to stop; then the
        calls so far are compared, and all stop at the next one after the furthest.

        Args:
          asked: whether this process was asked to stop.
        """

        def stop() -> bool:
            with self._change:
                self._calls += 1
                if not self._asked and asked():
                    self._asked = True
                    if self.index == 0:
                        # This call is not answered yet: it may be the one.
                        self._calls -= 1
                        self._take_stop(0, "stop", None)
                        self._calls += 1
                    else:
                        self._send({"kind": "stop"})
                while self._held:
                    self._change.wait()
                return self._stop_at is not None and self._calls >= self._stop_at

        return stop

    def _lose(self, peer: int) -> None:
        self._send({"kind": "lost", "value": peer})
        self._end(
            f"{self.name(peer)} was lost: killed, crashed, or without connection; the same command "
            "in all processes continues at the last checkpoint", LOST,
        )  # fmt: skip

    def _after(self, peer: int, code: int, text: str) -> None:
        """Follows a process that has ended with an exit code, unless this one does so by itself."""
        if not code:
            return
        self._following = True
        if self.index == 0:
            self._send({"kind": "after", "value": [peer, code, text]})

        def follow() -> None:
            time.sleep(_GRACE_SECONDS)
            if not self._ending:
                self._end(f"{self.name(peer)} ended: {text or 'see its output'}", code)

        self._thread(follow)

    def _end(self, text: str, code: int) -> None:
        with self._change:  # one thread, one line
            self._ending = True
            # Not print: the main thread may be in the middle of one.
            os.write(2, f"error: {text}\n".encode())
            os._exit(code)

    def leave(self, code: int, text: str = "") -> None:
        """Tells the others how this process ends, and in process 0 waits for their ends."""
        self._ending = True
        self._send({"kind": "bye", "value": [code, text]})
        if self.index == 0:
            with self._change:
                self._change.wait_for(lambda: len(self._left) == self.count - 1, _LAST_SECONDS)

    def wait_for_news(self) -> None:
        """After a failure that another process may have caused: waits until that is known.

        Where one was lost this process ends here.
        """
        time.sleep(_GRACE_SECONDS + 1)
