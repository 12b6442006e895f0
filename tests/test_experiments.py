"""Every experiment that is shipped loads, passes its own checks, and says how to run it."""

import json
import pathlib

import jax
import pytest
import runs

from gptjax.config import schema, validation
from gptjax.errors import UserError
from gptjax.model import gpt
from gptjax.train import run

FOLDER = pathlib.Path(runs.LAUNCH).parent / "experiments"
# What a user must add, besides files that exist.
NEEDED = {
    "finetune_file": ["--config.finetune.train_file=rows.csv"],
    "pretrain_file": ["--config.pretrain.train_files=a.txt"],
    "gpt1_pretrain": ["--config.pretrain.train_files=a.txt"],
    "larger": ["--config.pretrain.train_files=a.txt"],
    "ablation": [
        "--config.ablation.only=rte",
        "--config.ablation.tasks.rte.train_file=rte.tsv",
        "--config.pretrain.train_files=a.txt",
    ],
    "probes": ["--config.pretrain.train_files=a.txt"],
    "tutorial": ["--config.finetune.train_file=rows.tsv"],
    "gpt1_finetune": ["--config.init_from=runs/x", "--config.finetune.train_file=rows.tsv"],
}


@pytest.fixture
def seen(monkeypatch):
    """(experiment, workdir) of each run that would have been started."""
    calls = []
    monkeypatch.setattr(
        run, "run", lambda experiment, workdir, _: calls.append((experiment, workdir))
    )
    return calls


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_every_experiment_loads_and_validates(seen, name):
    path = FOLDER / f"{name}.py"
    result = runs.main(f"--config={path}", *NEEDED.get(name, []))
    assert (result.code, result.err) == (0, "")
    [(experiment, workdir)] = seen
    name = {"gpt1_task": "gpt1_sst2", "larger": "gpt_350m"}.get(name, name)
    assert (experiment.name, workdir) == (name, f"runs/{name}")
    validation.validate(experiment)
    values = json.loads(json.dumps(schema.to_dict(experiment)))
    assert schema.from_dict(schema.Experiment, values, "here") == experiment


@pytest.mark.parametrize("name", sorted(NEEDED))
def test_what_an_experiment_needs_is_named(seen, name):
    runs.main(f"--config={FOLDER / name}.py")
    with pytest.raises(UserError) as info:
        validation.validate(seen[0][0])
    assert "--config." in str(info.value)


def test_no_flag_is_the_quickstart(seen):
    assert runs.main().code == 0
    [(experiment, workdir)] = seen
    assert (experiment.name, workdir) == ("quickstart", "runs/quickstart")
    validation.validate(experiment)
    assert experiment.pretrain.dataset == "builtin"
    assert experiment.finetune.compare_from_scratch


def test_a_stage_is_dropped_and_a_field_is_changed_by_flags(seen):
    runs.main("--config.finetune=none", "--config.pretrain.steps=200", "--workdir=w")
    [(experiment, workdir)] = seen
    validation.validate(experiment)
    assert experiment.finetune is None
    assert (experiment.pretrain.steps, workdir) == (200, "w")


def test_the_paper_s_model_has_its_size(seen):
    runs.main(f"--config={FOLDER}/gpt1_pretrain.py", *NEEDED["gpt1_pretrain"])
    experiment = seen[0][0]
    model = experiment.model
    model.vocab_size = 40478 + 4  # the four special tokens
    validation.validate(experiment)
    shapes = jax.eval_shape(lambda key: gpt.init_params(gpt.GPT(model), key),
                            jax.random.key(0))  # fmt: skip
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    width = 768
    block = 4 * width * width + 4 * width + 8 * width * width + 5 * width + 4 * width
    assert count == (40482 + 512) * width + 12 * block


@pytest.mark.parametrize(("size", "millions"), [("350m", 346.3), ("1b3", 1296.7), ("6b7", 6620.3)])
def test_the_larger_have_as_many_parameters_as_they_say(seen, size, millions):
    """12 w^2 + 13 w of a block (its biases and gains), and the rows of tokens and positions."""
    result = runs.main(f"--config={FOLDER / 'larger.py'}:{size}", *NEEDED["larger"])
    assert result.code == 0, result.err
    [(experiment, _)] = seen
    model = experiment.model
    rows = experiment.tokenizer.vocab_size + 4 + model.context_length
    count = model.num_layers * (12 * model.width**2 + 13 * model.width) + rows * model.width
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def test_a_size_that_is_not_there_is_one_line(seen):
    error = runs.main(f"--config={FOLDER / 'larger.py'}:350M").error
    assert "larger.py:350M: must be one of 350m, 1b3, 6b7" in error
