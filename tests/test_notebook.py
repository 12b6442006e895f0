"""deploy/colab.ipynb, executed without a browser."""

import importlib.metadata
import json
import pathlib
import re

import nbclient
import nbformat
import pandas as pd
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"

# A hundredth of the quickstart.
PRETRAIN = {
    "model.num_layers": 1, "model.width": 16, "model.num_heads": 2, "model.context_length": 32,
    "tokenizer.vocab_size": 400, "pretrain.steps": 4, "pretrain.eval_every": 4,
}  # fmt: skip
FINETUNE = {"finetune.steps": 4}


@pytest.fixture
def notebook():
    return nbformat.read(DEPLOY / "colab.ipynb", as_version=4)


def test_the_notebook_is_valid_and_clear(notebook):
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell for cell in cells if cell.outputs or cell.execution_count]
    for cell in cells:
        compile(cell.source, "cell", "exec")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_notebook_runs_from_its_first_cell_to_its_last(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    place = next(
        i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])
    )
    workdir = tmp_path / "run"
    own = f"WORKDIR = {str(workdir)!r}\nPRETRAIN = {PRETRAIN!r}\nFINETUNE = {FINETUNE!r}"
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(own))
    resources = {"metadata": {"path": str(DEPLOY)}}
    nbclient.NotebookClient(notebook, timeout=500, resources=resources).execute()
    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    text = "\n".join(output.get("text", "") for output in outputs)
    assert f"jax {importlib.metadata.version('jax')} kept" in text
    assert "installed" not in text.replace("already installed", "")
    assert "WARNING" not in text
    pretrain, finetune = (
        json.loads((workdir / stage / "summary.json").read_text())[stage]
        for stage in ("pretrain", "finetune")
    )
    assert pretrain["steps"] == finetune["steps"] == 4
    assert f"perplexity after pretraining {pretrain['validation_perplexity']:.1f}" in text
    assert f"test accuracy                {finetune['test']['accuracy']:.1%}" in text
    assert any("image/png" in output.get("data", {}) for output in outputs), "the curve"
    # The command line gives the predictions that Python gave.
    shown = re.findall(r"^(\w+) +(0\.\d{3})  (\S.*)$", text, re.MULTILINE)
    assert len(shown) == 3
    table = pd.read_csv(workdir / "predictions.csv")
    assert table["prediction"].tolist() == [label for label, _, _ in shown]
    best = table.filter(like="probability_").max(axis=1)
    assert (best - [float(value) for _, value, _ in shown]).abs().max() < 2e-3
    assert text.count("return the ") >= 3
