"""The rendezvous of processes, their communication and their common end, without JAX."""

import os
import pathlib
import signal
import sys
import time

import pytest
import runs

from gptjax.cluster import rendezvous
from gptjax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
LOST = 1

# The program of a process. argv: port, number of processes, index, number of earlier processes of
# this index.
_MEMBER = """
import os, sys, time
from gptjax.errors import ProcessLost, UserError
from gptjax.cluster.group import Group
from gptjax.cluster.rendezvous import join_rendezvous, host_rendezvous
port, count, index = map(int, sys.argv[1:4])
address, facts = f"localhost:{port}", {"host": f"host{index}"}
try:
    if index == 0:
        links, everyone = host_rendezvous(address, count, facts, WAIT, 3.0)
        hosts = [each["host"] for each in everyone]
        for link in links.values():
            link.send({"hosts": hosts})
    else:
        link, answer = join_rendezvous(address, index, count, facts, WAIT, 3.0)
        links, hosts = {0: link}, answer["hosts"]
except (ProcessLost, UserError) as error:
    print(error)
    sys.exit(2 if isinstance(error, UserError) else 1)
group = Group(index, hosts, links, 3.0)
"""


def members(
    count: int, present, body: str, wait: float = 60.0, before: str = ""
) -> list[runs.Result]:
    """Runs a group without JAX.

    Args:
      count: of processes that each of them expects.
      present: the indices of those that are started.
      body: code that each runs as a member of the group.
      wait: seconds that they wait for each other.
      before: code that each runs before the rendezvous.
    """
    port, code = str(runs.free_port()), _MEMBER.replace("WAIT", str(wait)) + body
    code = code.replace("try:\n", before + "try:\n", 1)
    before = [present[:n].count(index) for n, index in enumerate(present)]
    processes = [
        runs.spawn(
            [sys.executable, "-c", code, port, str(count), str(index), str(lives)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        for index, lives in zip(present, before, strict=True)
    ]  # fmt: skip
    return [runs.finish(process) for process in processes]


def test_a_process_that_does_not_come_up_is_named_in_all():
    for result in members(4, (0, 1, 3), "", wait=4.0):
        assert result.code == LOST, result.err  # another try may go better
        assert "process 2 of 4 did not come up within 4 s" in result.out
        assert "0 (host0), 1 (host1), 3 (host3)" in result.out


def test_a_missing_process_0_is_named():
    (result,) = members(2, (1,), "", wait=1.0)
    assert result.code == LOST
    assert "process 0 of 2 did not come up at `coordinator_address`=localhost:" in result.out


def test_a_process_0_that_ends_is_named():
    """A scheduler may evict it while it waits for the others."""
    before = "if not index:\n    import threading; threading.Timer(2, os._exit, (9,)).start()\n"
    ended, result = members(3, (0, 1), "", before=before)
    assert (ended.code, result.code) == (9, LOST)
    assert result.out.startswith("process 0 of 3 at `coordinator_address`=localhost:")


@pytest.mark.slow
def test_process_0_may_come_up_last_and_wait_for_others():
    """The others then wait as long as process 0 waits, not only as long as they planned."""
    before = (
        "from gptjax.cluster import rendezvous\nrendezvous._ANSWER_SECONDS = 0.5\n"
        "time.sleep((7, 0, 11)[index])\n"
    )
    for result in members(3, (0, 1, 2), "print(hosts); group.leave(0)", wait=9.0, before=before):
        assert (result.code, result.out) == (0, "['host0', 'host1', 'host2']\n"), result


@pytest.mark.slow
def test_one_that_is_started_again_takes_its_place():
    """Process 1 ends during the rendezvous and starts again: `life` counts its starts."""
    before = (
        "import threading\n"
        "first = sys.argv[4] == '0'\n"
        "if index == 1 and first: threading.Timer(1, os._exit, (9,)).start()\n"
        "time.sleep(8 if index == 2 else 0 if first else 4)\n"
        "facts['host'] += f' life {sys.argv[4]}'\n"
    )
    body = "print(group.hosts); group.leave(0)"
    results = members(3, (0, 1, 1, 2), body, before=before)
    assert sorted(result.code for result in results) == [0, 0, 0, 9], results
    said = {result.out for result in results if result.code == 0}
    assert said == {"['host0 life 0', 'host1 life 1', 'host2 life 0']\n"}


def test_strangers_at_the_door_are_no_members():
    """Programs that send something else, or nothing, neither join nor delay the rendezvous."""
    said = (
        b"", b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"process_id": "x"}\n',
        b'{"process_id": 1, "num_processes": 2, "facts": 3}\n',
    )  # fmt: skip
    before = (
        "import socket\n"
        f"for said in {said!r} if index else ():\n"
        "    for _ in range(200):\n"
        "        try: stranger = socket.create_connection(('localhost', port)); break\n"
        "        except OSError: time.sleep(0.05)\n"
        "    stranger.sendall(said); stranger.close()\n"
        "strangers = [socket.create_connection(('localhost', port)) for _ in range(9 * index)]\n"
    )
    start = time.monotonic()
    body = "print(group.gather('a', index)); group.leave(0)"
    for result in members(2, (0, 1), body, before=before):
        assert (result.code, result.out) == (0, "[0, 1]\n"), result.err
    assert time.monotonic() - start < 9


def test_another_number_of_processes_is_named_in_all():
    """This includes a process whose index is too large for the number that process 0 has."""
    for index in (1, 2):
        for result in members(2, (0, index), "", before="count += index\n"):
            assert result.code == 2, result.err
            assert f"process {index} (host{index}) was started with `num_processes`=" in result.out
            assert f"={2 + index}, process 0 with 2" in result.out


def test_two_of_one_number_are_named_in_all():
    before = "index = min(index, 1); facts['host'] = f'host{sys.argv[3]}'\n"
    for result in members(3, (0, 1, 2), "", before=before):
        assert result.code == 2, result.err
        assert "two processes have `process_id`=1, on host" in result.out


def test_a_host_that_cannot_be_a_name_is_one_line():
    with pytest.raises(UserError, match=r"a\.\.b is no name of a host"):
        rendezvous.join_rendezvous("a..b:1", 1, 2, {}, 5.0, 5.0)


def test_values_are_gathered_in_order_and_all_end():
    body = "print(group.gather('a', index * 10), group.gather('b', [index])); group.leave(0)"
    for result in members(3, (0, 1, 2), body):
        assert (result.code, result.out) == (0, "[0, 10, 20] [[0], [1], [2]]\n"), result.err


def test_processes_at_different_places_do_not_answer_each_other():
    body = (
        "try:\n"
        "    group.gather('data' if index else 'tokenizer', index)\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
        "group.leave(1)\n"
    )
    results = members(3, (0, 1, 2), body)
    assert results[0].out == "process 1 of 3 (host1) is at 'data', this one at 'tokenizer'\n"
    for result in results[1:]:
        assert result.out == "process 0 of 3 (host0) is at 'tokenizer', this one at 'data'\n"


def test_what_one_sees_late_is_waited_for():
    """So it is with checkpoints on a network disk. A lasting difference is the user's error."""
    body = (
        "from gptjax.cluster import processes as distributed\n"
        "distributed._group = group\n"
        "distributed._SEEN_SECONDS = 3.0\n"
        "looks = [1]\n"
        "late = lambda: list(range(min(looks[0], 3) if index else 3))\n"
        "distributed.wait_until_same('steps', late, lambda: looks.append(looks.pop() + 1))\n"
        "print(late(), looks)\n"
        "try:\n"
        "    distributed.wait_until_same('steps', lambda: index, lambda: None)\n"
        "except UserError as error:\n"
        "    print(error)\n"
        "group.leave(0)\n"
    )
    for result in members(2, (0, 1), body):
        seen, _, different = result.out.partition("\n")
        assert seen == "[0, 1, 2] [3]"
        message = "process 1 of 2 (host1) differs from process 0: steps 1, not 0; start all"
        assert different.startswith(message)


def test_one_that_waits_for_long_says_for_whom():
    body = (
        "import gptjax.cluster.group\n"
        "gptjax.cluster.group._PATIENCE_SECONDS = 1.5\n"
        "if index == 2: time.sleep(4)\n"
        "group.gather('data', 0); group.leave(0)\n"
    )
    results = members(3, (0, 1, 2), body)
    first = [result.err.partition("\n")[0] for result in results]
    whom = ("process 2 of 3 (host2)", "the other processes")
    assert first == [*(f"data: waiting for {each} for 2 s" for each in whom), ""]


@pytest.mark.parametrize("asked", [0, 2])
def test_all_stop_at_the_same_call(asked):
    """The processes have made different numbers of calls when one of them is asked to stop."""
    body = (
        f"stop = group.synchronised_stop(lambda: index == {asked} and calls > 5)\n"
        "calls = 1\n"
        "while not stop():\n"
        "    time.sleep(0.02 * (index + 1)); calls += 1\n"
        "print(calls); assert stop(); group.leave(75)\n"
    )
    results = members(3, (0, 1, 2), body)
    assert {result.code for result in results} == {0}, results
    (calls,) = {int(result.out) for result in results}
    assert calls > 5


def test_where_none_is_asked_none_stops():
    body = "stop = group.synchronised_stop(lambda: False); print(any(stop() for _ in range(99)))"
    for result in members(2, (0, 1), body + "; group.leave(0)"):
        assert (result.code, result.out) == (0, "False\n"), result.err


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_is_named_by_the_others(lost):
    body = f"group.gather('up', 0); index == {lost} and os.kill(os.getpid(), 9); time.sleep(60)"
    results = members(3, (0, 1, 2), body)
    assert results.pop(lost).code == -signal.SIGKILL
    for result in results:
        assert result.code == LOST
        assert result.err.startswith(f"error: process {lost} of 3 (host{lost}) was lost: ")
        assert result.err.count("\n") == 1


def test_one_whose_output_nobody_reads_ends_too():
    """Nobody reads it after the end of a `tee`, or of the connection to a terminal."""
    body = (
        "if index == 0:\n"
        "    unread, end = os.pipe()\n"
        "    os.dup2(end, 2); os.close(unread)\n"
        "group.gather('up', 0)\n"
        "if index == 1: os.kill(os.getpid(), 9)\n"
        "time.sleep(60); os._exit(9)\n"
    )
    results = members(2, (0, 1), body)
    assert [result.code for result in results] == [LOST, -signal.SIGKILL]


def test_a_process_that_hangs_is_lost_too():
    """If a machine loses its power, the connection stays open, and no message comes."""
    body = (
        "group.gather('up', 0)\n"
        "if index == 1:\n"
        "    group._send = lambda message: None\n"
        "    time.sleep(20); os._exit(9)\n"
        "time.sleep(60)\n"
    )
    results = members(3, (0, 1, 2), body)
    for result in (results[0], results[2]):
        assert result.code == LOST
        assert "process 1 of 3 (host1) was lost" in result.err


def test_an_error_of_one_ends_all_with_its_code():
    body = (
        "if index == 1:\n"
        "    group.leave(2, 'a.csv: no such file'); os._exit(2)\n"
        "group.gather('never', 0)\n"
    )
    for index, result in enumerate(members(3, (0, 1, 2), body)):
        assert result.code == 2
        if index != 1:
            assert result.err == "error: process 1 of 3 (host1) ended: a.csv: no such file\n"
