"""The running processes, by their connections to process 0: agreement, and their ends.

JAX ends a process (SIGABRT, a stack trace) when another is lost, and says nothing to Python. Here a
process that ends closes its connection, however it ends, and one that hangs stops beating. No step
of a training waits here.
"""

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from gptjax.cluster.rendezvous import LOST, Link, Message
from gptjax.io.console import tell

# Time to end by itself for a process that learns that another has ended.
_GRACE_SECONDS = 5.0
# Process 0 goes last: the others need its services until they have ended.
_LAST_SECONDS = 30.0
# How often a process that waits for others says so.
_PATIENCE_SECONDS = 60.0


class Group:
    """The running processes: exchanges values, agrees on when to stop, and notices who is lost."""

    def __init__(self, index: int, hosts: list[str], links: dict[int, Link], silence: float):
        """Args: this process; host of each; links of process 0 to all, of others to 0; silence."""
        self.index, self.hosts, self.count = index, hosts, len(hosts)
        self._links = links
        self._change = threading.Condition(threading.RLock())
        # Of the gatherings: how many this process has begun, what has come of each, and all of it.
        self._gatherings = 0
        self._put: dict[int, dict[int, Any]] = {}
        self._results: dict[int, list[Any]] = {}
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
            self._collect(peer, message["number"], value)
        elif kind == "all":
            self._results[message["number"]] = value
        elif kind == "lost":
            self._lose(int(value))
        elif kind == "bye":
            self._left.add(peer)
            self._after(peer, *value)
        elif kind == "after":
            self._after(*value)
        else:
            self._take_stop(peer, kind, value)

    def _collect(self, peer: int, number: int, value: Any) -> None:
        """In process 0: hands out the values when the last has come."""
        values = self._put.setdefault(number, {})
        values[peer] = value
        if len(values) == self.count:
            self._results[number] = [values[index] for index in range(self.count)]
            del self._put[number]
            self._send({"kind": "all", "number": number, "value": self._results[number]})

    def gather(self, what: str, value: Any) -> list[Any]:
        """Returns the value (plain, for JSON) of every process; waits for all of them.

        Args:
          what: is being compared; said on stderr while it waits for long.
          value: of this process.

        Raises:
          RuntimeError: another process is at something else.
        """
        with self._change:
            number, self._gatherings = self._gatherings, self._gatherings + 1
            if self.index == 0:
                self._collect(0, number, [what, value])
            else:
                self._send({"kind": "put", "number": number, "value": [what, value]})
            start = time.monotonic()
            while not self._change.wait_for(lambda: number in self._results, _PATIENCE_SECONDS):
                waited = time.monotonic() - start
                tell(f"{what}: waiting for {self._whom(number)} for {waited:.0f} s")
            found = self._results.pop(number)
        for index, (other, _) in enumerate(found):
            if other != what:
                raise RuntimeError(f"{self.name(index)} is at {other!r}, this one at {what!r}")
        return [each for _, each in found]

    def _whom(self, number: int) -> str:
        if self.index:
            return "the other processes"
        here = self._put.get(number, {})
        return ", ".join(self.name(index) for index in range(self.count) if index not in here)

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

    def synchronised_stop(self, asked: Callable[[], bool]) -> Callable[[], bool]:
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
            tell(f"error: {text}")
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
