"""deploy/colab.ipynb, executed without a browser."""

import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"


# A hundredth of the quickstart; flags of the same kind as a user's.
SMALL = [
    "--config.model.num_layers=1", "--config.model.width=16", "--config.model.num_heads=2",
    "--config.model.context_length=32", "--config.tokenizer.vocab_size=400",
    "--config.pretrain.steps=4", "--config.pretrain.eval_every=4",
    "--config.finetune.steps=4",
]  # fmt: skip


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
    own = f"WORKDIR = {str(tmp_path / 'run')!r}\nFLAGS = {SMALL!r}"
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(own))
    resources = {"metadata": {"path": str(DEPLOY)}}
    nbclient.NotebookClient(notebook, timeout=500, resources=resources).execute()
    text = "\n".join(
        output.get("text", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    assert f"jax {importlib.metadata.version('jax')} kept" in text
    assert "installed" not in text.replace("already installed", "")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["pretrain"]["steps"] == summary["finetune"]["steps"] == 4
    assert f"test accuracy                {summary['finetune']['test']['accuracy']:.1%}" in text
    # What the notebook said of each text is what the command line says.
    shown = re.findall(r"^(\w+) +(0\.\d{3})  (\S.*)$", text, re.MULTILINE)
    assert len(shown) == 3
    source, target = tmp_path / "rows.jsonl", tmp_path / "predictions.jsonl"
    source.write_text("".join(json.dumps({"text": row[2]}) + "\n" for row in shown))
    done = subprocess.run(
        [
            sys.executable, "launch.py", "--mode=predict", f"--checkpoint={tmp_path}/run",
            f"--input={source}", f"--output={target}",
        ],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for row, line in zip(shown, target.read_text().splitlines(), strict=True):
        record = json.loads(line)
        assert record["prediction"] == row[0]
        best = max(value for name, value in record.items() if name.startswith("probability_"))
        assert abs(best - float(row[1])) < 2e-3
    assert text.count("return the ") >= 3
