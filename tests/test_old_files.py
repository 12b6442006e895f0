"""Files of earlier versions: an interrupted run goes on, and an export is read again.

`golden/v0.1.0.tar.gz` holds a workdir that SIGTERM stopped in its fine-tuning, its data, and an
export of the finished run, all written by commit 8dc7f44. `golden/v0.1.0.json` holds the results of
that commit. The kinds of values, and how exactly they must return:

- the ledger, a hash of all batches: to the last bit, on every machine;
- losses and probabilities: to 1e-5, because processors round sums in different orders;
- the arrays of the last checkpoint: to the last bit, on the kind of processor that wrote them
  (GPTJAX_SAME_MACHINE=1).
"""

import hashlib
import json
import os
import pathlib
import tarfile

import numpy as np
import pytest
import runs

import gptjax

GOLDEN = pathlib.Path(__file__).with_name("golden")
EXPECTED = json.loads((GOLDEN / "v0.1.0.json").read_text())
SAME_MACHINE = os.environ.get("GPTJAX_SAME_MACHINE") == "1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """The files, the run taken up again by the command that began it."""
    place = tmp_path_factory.mktemp("v0.1.0")
    with tarfile.open(GOLDEN / "v0.1.0.tar.gz") as archive:
        archive.extractall(place, filter="data")
    assert runs.steps(str(place / "run"), "finetune")[-1] < EXPECTED["step"]
    flags = json.loads((place / "flags.json").read_text())
    # The quickstart has other values now, so the command names those of the earlier version.
    flags += ["--config.finetune.head=extract", "--config.finetune.epochs=3"]
    # With the compiler's usual optimisations, as the run began.
    result = runs.finish(runs.start(*flags, cwd=place, env=os.environ | {"XLA_FLAGS": ""}))
    assert result.code == 0, result.err
    assert "finetune: continuing at step 16 of 40" in result.out
    return place


def without_calibration(scores):
    """Removes from dictionaries of scores those that are newer than the earlier version."""
    found = list(scores)
    for each in found:
        each.pop("calibrated_task_loss", None)
        each.pop("temperature", None)
    return found


def assert_close(found, expected):
    """Compares two JSON values: numbers to 1e-5, all else exactly."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(found[name], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=2e-6)
    else:
        assert found == expected


def test_an_interrupted_run_continues_with_the_same_batches_and_losses(folder):
    found = without_calibration(runs.records(str(folder / "run")))
    assert_close(found, EXPECTED["records"])
    assert [each["ledger"] for each in found if "ledger" in each]
    if SAME_MACHINE:
        assert found == EXPECTED["records"]


def test_its_scores_are_those_of_the_earlier_version(folder):
    summaries = [runs.summary(str(folder / "run")), json.loads(json.dumps(EXPECTED["summary"]))]
    # Intervals and baselines are newer than that version.
    assert {"intervals", "baselines"} <= summaries[0]["finetune"].keys()
    for stage in (part for each in summaries for part in each.values()):
        for name in ("tokens_per_second", "input_wait", "mfu", "intervals", "baselines"):
            stage.pop(name, None)
        stage.pop("calibration", None)
        without_calibration(part for part in stage.values() if isinstance(part, dict))
    assert_close(*summaries)


@pytest.mark.skipif(not SAME_MACHINE, reason="GPTJAX_SAME_MACHINE is not 1")
def test_its_arrays_are_equal_bit_for_bit(folder):
    found = {
        name: [dtype, list(shape), hashlib.blake2b(data, digest_size=8).hexdigest()]
        for name, (dtype, shape, data) in runs.arrays(
            str(folder / "run"), "finetune", EXPECTED["step"]
        ).items()
    }
    assert found == EXPECTED["arrays"]


def test_the_workdir_predicts_and_generates_the_same(folder):
    rows = [line.split(",")[0] for line in (folder / "test.csv").read_text().splitlines()[1:]]
    found = gptjax.load(folder / "run").predict({"text": rows})
    assert found.labels == [row["prediction"] for row in EXPECTED["predictions"]]
    expected = [[row["probability_no"], row["probability_yes"]] for row in EXPECTED["predictions"]]
    np.testing.assert_allclose(found.probabilities, expected, rtol=0, atol=2e-6)
    language_model = gptjax.load(folder / "run" / "checkpoints" / "pretrain")
    text = language_model.generate("the cat", max_new_tokens=8, temperature=0)
    assert text == [EXPECTED["generated"].removesuffix("\n")]


def test_an_export_is_read_again_and_predicts_the_same(folder):
    result = runs.main("--mode=import", f"--input={folder}/export", f"--output={folder}/imported")
    assert result.code == 0, result.err
    rows = [line.split(",")[0] for line in (folder / "test.csv").read_text().splitlines()[1:]]
    found = gptjax.load(folder / "imported").predict({"text": rows})
    expected = [[row["probability_no"], row["probability_yes"]] for row in EXPECTED["predictions"]]
    np.testing.assert_allclose(found.probabilities, expected, rtol=0, atol=2e-6)
