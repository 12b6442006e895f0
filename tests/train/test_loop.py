"""The training loop's transfers between the host and the devices."""

import threading

import jax
import jax.numpy as jnp
import pytest
from memory_runs import Recorder, experiment, finetuning, tables

from gptjax.train import log as log_lib
from gptjax.train import run
from gptjax.train.loop import Trainer
from gptjax.train.optimizer import Optimizer
from gptjax.train.progress import Progress

READS = ("__array__", "__bool__", "__float__", "__index__", "__int__", "item", "tolist")


@pytest.fixture
def only_explicit_transfers(monkeypatch):
    """Makes implicit transfers fail while a `Trainer` trains, in its thread.

    On a CPU, JAX's own guard does not notice that an array is read, because nothing is copied.
    Therefore the methods that read an array fail too, unless `jax.device_get` calls them.
    """
    train, device_get = Trainer.train, jax.device_get
    state = threading.local()

    def guarded_train(trainer):
        with jax.transfer_guard("disallow"):
            state.guarded = True
            try:
                return train(trainer)
            finally:
                state.guarded = False

    def explicit_get(tree):
        before, state.guarded = getattr(state, "guarded", False), False
        try:
            return device_get(tree)
        finally:
            state.guarded = before

    def guarded_read(name, read):
        def method(array, *args, **kwargs):
            assert not getattr(state, "guarded", False), f"{name} reads an array from its device"
            return read(array, *args, **kwargs)

        return method

    cls = type(jnp.zeros(()))
    for name in READS:
        monkeypatch.setattr(cls, name, guarded_read(name, getattr(cls, name)))
    monkeypatch.setattr(jax, "device_get", explicit_get)
    monkeypatch.setattr(Trainer, "train", guarded_train)


def train(workdir, steps: int) -> Recorder:
    recorder = Recorder()
    config = finetuning(steps=steps, save_every=2)
    options = run.Options(tables=tables(), reporter=recorder)
    run.run(experiment(finetune=config), str(workdir), options)
    return recorder


@pytest.mark.usefixtures("only_explicit_transfers")
def test_steps_transfer_nothing_implicitly(tmp_path):
    recorder = train(tmp_path, 6)
    assert [status.step for status in recorder.statuses] == [1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("only_explicit_transfers")
@pytest.mark.parametrize(
    ("implicit", "error"),
    [
        (lambda rate: float(rate), "__float__ reads an array from its device"),
        (lambda rate: rate * 2.0, "Disallowed host-to-device transfer"),
    ],
)
def test_an_implicit_transfer_is_seen(tmp_path, monkeypatch, implicit, error):
    """The test above can fail: it does if the loop has an implicit transfer."""
    rate = jnp.float32(0.1)
    monkeypatch.setattr(Optimizer, "rate_at", lambda self, update: implicit(rate))
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError), match=error):
        train(tmp_path, 1)


def test_what_is_slow_once_comes_before_the_measured_steps(tmp_path, monkeypatch):
    """The import of tensorboardX and the compilation of the schedule are no time of a step."""
    calls = []

    def noted(owner, name):
        function = getattr(owner, name)

        def method(*args):
            calls.append(name)
            return function(*args)

        monkeypatch.setattr(owner, name, method)

    noted(log_lib, "_open_events")
    noted(Optimizer, "rate_at")
    noted(Progress, "update")
    train(tmp_path, 2)
    assert calls[: calls.index("update")] == ["_open_events", "rate_at"]
    assert calls.count("_open_events") == 1
    assert calls.count("update") == 2
