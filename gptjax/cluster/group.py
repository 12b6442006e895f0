"""The group of running processes: exchanged values, the agreed stop, and lost processes.

If a process is lost, then JAX aborts the others (SIGABRT and a stack trace) without an exception in
Python. Here each process has a connection to process 0. A process that ends closes it, however it
ends, and one that hangs sends no heartbeats, so the others can name it in one line. The steps of a
training do not wait for these messages.
"""

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from gptjax.cluster.rendezvous import LOST, Link, Message
from gptjax.io.console import tell

# Time that a process has to end by itself when another one has ended with an error.
_GRACE_SECONDS = 5.0
# Time that process 0 waits for the ends of the others, which need JAX's services in it until then.
_LAST_SECONDS = 30.0
# Time between two messages that tell the user for whom a process waits.
_PATIENCE_SECONDS = 60.0


class Group:
    """The running processes of a run, seen from one of them."""

    def __init__(self, index: int, hosts: list[str], links: dict[int, Link], silence: float):
        """Starts the threads that read the links and send heartbeats.

        Args:
          index: of this process.
          hosts: the host of each process.
          links: in process 0 to all others by index; in another process to process 0.
          silence: seconds without a message after which a process counts as lost.
        """
        self.index, self.hosts, self.count = index, hosts, len(hosts)
        self._links = links
        self._change = threading.Condition(threading.RLock())
        # `gather`: the number of its calls in this process; in process 0 the values that have come,
        # by call and process; and the complete values by call.
        self._rounds = 0
        self._received: dict[int, dict[int, Any]] = {}
        self._complete: dict[int, list[Any]] = {}
        # The processes that have ended, and whether this one ends, or ends because of another.
        self._left: set[int] = set()
        self._ending = self._following = False
        # `synchronised_stop`: the number of calls of the function in this process; whether this
        # process has a request to stop; whether calls wait for the decision of process 0; in
        # process 0 the number of calls of each process; and the call that is the first to be true.
        self._calls, self._asked, self._undecided = 0, False, False
        self._calls_by_process: dict[int, int] = {}
        self._stop_at_call: int | None = None
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
        """Sends to process 0, or from process 0 to all others."""
        for link in self._links.values():
            link.send(message)

    def _listen(self, peer: int, link: Link) -> None:
        for message in link.messages():
            with self._change:
                self._receive(peer, message)
                self._change.notify_all()
        with self._change:
            over = self._ending or self._following or peer in self._left
            self._left.add(peer)
            self._change.notify_all()
        if not over:
            self._lose(peer)

    def _receive(self, peer: int, message: Message) -> None:
        kind, value = message.get("kind"), message.get("value")  # type: str | None, Any
        if kind == "put":
            self._collect(peer, message["number"], value)
        elif kind == "all":
            self._complete[message["number"]] = value
        elif kind == "lost":
            self._lose(int(value))
        elif kind == "bye":
            self._left.add(peer)
            self._end_after(peer, *value)
        elif kind == "after":
            self._end_after(*value)
        else:
            self._receive_stop(peer, kind, value)

    def _collect(self, peer: int, number: int, value: Any) -> None:
        """Stores a value in process 0; when the last has come, sends all of them to the others."""
        values = self._received.setdefault(number, {})
        values[peer] = value
        if len(values) == self.count:
            self._complete[number] = [values[index] for index in range(self.count)]
            del self._received[number]
            self._send({"kind": "all", "number": number, "value": self._complete[number]})

    def gather(self, what: str, value: Any) -> list[Any]:
        """Returns the values of all processes in order, and waits until all have called it.

        Args:
          what: describes the values, in the message to the user while it waits for long.
          value: of this process, a plain value for JSON.

        Raises:
          RuntimeError: another process gathers something else.
        """
        with self._change:
            number, self._rounds = self._rounds, self._rounds + 1
            if self.index == 0:
                self._collect(0, number, [what, value])
            else:
                self._send({"kind": "put", "number": number, "value": [what, value]})
            start = time.monotonic()
            while not self._change.wait_for(lambda: number in self._complete, _PATIENCE_SECONDS):
                waited = time.monotonic() - start
                tell(f"{what}: waiting for {self._whom(number)} for {waited:.0f} s")
            found = self._complete.pop(number)
        for index, (other, _) in enumerate(found):
            if other != what:
                raise RuntimeError(f"{self.name(index)} is at {other!r}, this one at {what!r}")
        return [each for _, each in found]

    def _whom(self, number: int) -> str:
        if self.index:
            return "the other processes"
        here = self._received.get(number, {})
        return ", ".join(self.name(index) for index in range(self.count) if index not in here)

    def _receive_stop(self, peer: int, kind: str | None, value: Any) -> None:
        if kind == "stop" and not self._calls_by_process:
            self._calls_by_process[0] = self._calls
            self._undecided = True
            self._send({"kind": "calls?"})
        elif kind == "calls?":  # calls of the function wait until process 0 has decided
            self._undecided = True
            self._send({"kind": "calls", "value": self._calls})
        elif kind == "calls":
            self._calls_by_process[peer] = value
        elif kind == "stop at":
            self._stop_at_call, self._undecided = value, False
        known = self._calls_by_process.keys() | self._left
        if self._undecided and self.index == 0 and len(known) == self.count:
            self._stop_at_call, self._undecided = max(self._calls_by_process.values()) + 1, False
            self._send({"kind": "stop at", "value": self._stop_at_call})

    def synchronised_stop(self, asked: Callable[[], bool]) -> Callable[[], bool]:
        """Returns a function that becomes true at the same call in all processes.

        All processes have to call it equally often. Until a process has a request to stop, a call
        takes no more than a lock. Then process 0 compares the numbers of calls, and the function
        becomes true at the call after the largest of them.

        Args:
          asked: returns whether this process has a request to stop.
        """

        def stop() -> bool:
            with self._change:
                self._calls += 1
                if not self._asked and asked():
                    self._asked = True
                    if self.index == 0:
                        # This call has not returned yet, so it may become the true one.
                        self._calls -= 1
                        self._receive_stop(0, "stop", None)
                        self._calls += 1
                    else:
                        self._send({"kind": "stop"})
                while self._undecided:
                    self._change.wait()
                return self._stop_at_call is not None and self._calls >= self._stop_at_call

        return stop

    def _lose(self, peer: int) -> None:
        self._send({"kind": "lost", "value": peer})
        self._end(
            f"{self.name(peer)} was lost: killed, crashed, or without connection; the same command "
            "in all processes continues at the last checkpoint", LOST,
        )  # fmt: skip

    def _end_after(self, peer: int, code: int, text: str) -> None:
        """Ends this process some seconds after another one failed, with the same exit code."""
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
        with self._change:  # no second thread may print a line before the exit
            self._ending = True
            tell(f"error: {text}")
            os._exit(code)

    def leave(self, code: int, text: str = "") -> None:
        """Tells the others this process's exit code and why; process 0 waits until they end."""
        self._ending = True
        self._send({"kind": "bye", "value": [code, text]})
        if self.index == 0:
            with self._change:
                self._change.wait_for(lambda: len(self._left) == self.count - 1, _LAST_SECONDS)

    def wait_for_news(self) -> None:
        """Waits after an error that the loss of another process may have caused.

        If one was lost, then this process ends here, with a line that names it.
        """
        time.sleep(_GRACE_SECONDS + 1)
