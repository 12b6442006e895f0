"""The group of running processes: exchanged values, the agreed stop, and lost processes.

A process is lost if it has crashed, was killed, is frozen as a whole, or cannot be reached. JAX
then aborts all other processes (SIGABRT and a stack trace) without an exception in Python. Here
each process has a connection to process 0. The connection closes when the process ends for any
reason, and a frozen process sends no heartbeats. So the other processes can name the lost process
in one line. A thread sends the heartbeats, so a process whose main thread hangs is not noticed. The
training steps do not wait for these messages.
"""

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from gptjax.cluster.rendezvous import LOST, Link, Message
from gptjax.io.console import tell

# The time that a process has to end by itself after another process has ended with an error.
_GRACE_SECONDS = 5.0
# The longest time that process 0 waits until the other processes have ended. They need the services
# of JAX that run in process 0.
_LAST_SECONDS = 30.0
# The time between two messages that tell the user which processes this process waits for.
_PATIENCE_SECONDS = 60.0


class Group:
    """The running processes of a run. Each process has one object of this class."""

    def __init__(self, index: int, hosts: list[str], links: dict[int, Link], silence: float):
        """Starts the threads that read the links and send heartbeats.

        Args:
          index: the index of this process.
          hosts: the host name of each process, in the order of the indices.
          links: index of another process -> the connection to it. Process 0 has a connection to
            each other process. Every other process has only the connection to process 0.
          silence: the number of seconds without a message after which a process counts as lost.
        """
        self.index, self.hosts, self.count = index, hosts, len(hosts)
        self._links = links
        self._change = threading.Condition(threading.RLock())
        # The next three variables belong to `gather`. `_rounds` is the number of its calls in this
        # process.
        self._rounds = 0
        # In process 0: number of a call -> index of a process -> the value that has arrived.
        self._received: dict[int, dict[int, Any]] = {}
        # Number of a call -> the values of all processes.
        self._complete: dict[int, list[Any]] = {}
        # The indices of the processes that have ended.
        self._left: set[int] = set()
        # `_ending`: whether this process is ending. `_following`: whether another process has
        # failed, so that this process has to end soon.
        self._ending = self._following = False
        # The next variables belong to the function that `synchronised_stop` returns. `_calls`: the
        # number of its calls in this process. `_asked`: whether this process was asked to stop.
        # `_undecided`: whether calls have to wait, because process 0 has yet to decide which call
        # returns True first.
        self._calls, self._asked, self._undecided = 0, False, False
        # In process 0: index of a process -> the number of its calls.
        self._calls_by_process: dict[int, int] = {}
        # The number of the first call that returns True. None means that it is not decided.
        self._stop_at_call: int | None = None
        for peer, link in links.items():
            self._thread(self._listen, peer, link)
        self._thread(self._beat, min(5.0, silence / 4))

    @staticmethod
    def _thread(run: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=run, args=arguments, daemon=True).start()

    def name(self, index: int) -> str:
        """Returns the name of a process for messages, such as "process 1 of 4 (HOST)"."""
        return f"process {index} of {self.count} ({self.hosts[index]})"

    def _beat(self, seconds: float) -> None:
        while True:
            time.sleep(seconds)
            self._send({"kind": "beat"})

    def _send(self, message: Message) -> None:
        """Sends a message to process 0. In process 0: sends it to all other processes."""
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
        """Stores a value of `gather` in process 0. The last value makes it send all values."""
        values = self._received.setdefault(number, {})
        values[peer] = value
        if len(values) == self.count:
            self._complete[number] = [values[index] for index in range(self.count)]
            del self._received[number]
            self._send({"kind": "all", "number": number, "value": self._complete[number]})

    def gather(self, what: str, value: Any) -> list[Any]:
        """Waits until all processes have called `gather`, and returns the values of all processes.

        Args:
          what: a description of the values. During a long wait the user sees it in a message.
          value: the value of this process, which JSON must be able to represent.

        Returns:
          The values in the order of the processes.

        Raises:
          RuntimeError: another process called `gather` with another `what`.
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
        elif kind == "calls?":  # from now on calls wait until process 0 has decided
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
        """Returns a function that first returns True at the same call in all processes.

        All processes must call this function equally often. It returns False until a process is
        asked to stop, and such a call only acquires a lock. After a request to stop, process 0
        collects the number of calls that each process has made, and new calls wait. If N is the
        largest of these numbers, then call N + 1 and all later calls return True in all processes.

        Args:
          asked: a function that returns whether this process was asked to stop.
        """

        def stop() -> bool:
            with self._change:
                self._calls += 1
                if not self._asked and asked():
                    self._asked = True
                    if self.index == 0:
                        # The call that is running here is not counted, because it has not returned
                        # yet and may be the first call that returns True.
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
        """Ends this process some seconds after another process failed, with the same exit code."""
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
        with self._change:  # the lock keeps a second thread from printing another error
            self._ending = True
            tell(f"error: {text}")
            os._exit(code)

    def leave(self, code: int, text: str = "") -> None:
        """Tells the other processes that this process ends. Process 0 waits until they have ended.

        Args:
          code: the exit code of this process. The other processes follow if it is not 0.
          text: the reason of the end, for the messages of the other processes.
        """
        self._ending = True
        self._send({"kind": "bye", "value": [code, text]})
        if self.index == 0:
            with self._change:
                self._change.wait_for(lambda: len(self._left) == self.count - 1, _LAST_SECONDS)

    def wait_for_news(self) -> None:
        """Waits some seconds after an error that the loss of another process may have caused.

        If another process was lost, then this process ends here, and prints a line that names the
        lost process.
        """
        time.sleep(_GRACE_SECONDS + 1)
