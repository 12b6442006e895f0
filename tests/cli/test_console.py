"""Messages of the library as the command line prints them."""

import sys

import pytest

from gptjax.cli import console
from gptjax.cli.flags import MODES


@pytest.mark.parametrize(
    ("mode", "name", "flag"),
    [
        # Flags of some modes, and fields of the experiment.
        ("generate", "seed", "--seed"),
        ("train", "seed", "--config.seed"),
        ("ablate", "seed", "--config.seed"),
        ("evaluate", "probes", "--probes"),
        ("train", "probes", "--config.probes"),
        ("predict", "checkpoint", "--checkpoint"),
        ("train", "checkpoint", "--config.checkpoint"),
        ("bench", "checkpoint", "--config.checkpoint"),
        ("bench", "steps", "--steps"),
        # Fields.
        ("train", "pretrain.window", "--config.pretrain.window"),
        ("predict", "init_from", "--config.init_from"),
        ("evaluate", "probes.cola.kind", "--config.probes.cola.kind"),
        ("ablate", "ablation.tasks.rte-2.epochs", "--config.ablation.tasks.rte-2.epochs"),
        # Flags of all modes, and of another mode.
        ("train", "mode", "--mode"),
        ("compile", "config", "--config"),
        ("ablate", "num_processes", "--num_processes"),
        # Neither.
        ("train", "rows", "`rows`"),
        ("train", "verbosity", "`verbosity`"),
        ("train", "pretrain.windows", "`pretrain.windows`"),
    ],
)
def test_a_name_becomes_the_flag_of_the_mode(mode, name, flag):
    assert console.with_flags(f"a `{name}`=1: no", mode) == f"a {flag}=1: no"


@pytest.mark.parametrize("mode", MODES)
def test_the_flags_of_a_mode_come_before_fields(mode):
    for name in MODES[mode].names:
        if "." not in name:
            assert console.with_flags(f"`{name}`", mode) == f"--{name}"


@pytest.mark.parametrize(
    ("argv0", "program"),
    [
        ("launch.py", "python launch.py"),
        ("/work/gptjax/launch.py", "python /work/gptjax/launch.py"),
        ("/venv/bin/gptjax", "gptjax"),
        ("/venv/lib/site-packages/gptjax/__main__.py", "python -m gptjax"),
    ],
)
def test_the_command_that_started_the_program(monkeypatch, argv0, program):
    monkeypatch.setattr(sys, "argv", [argv0, "predict"])
    assert console.program() == program
