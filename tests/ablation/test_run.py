"""An ablation: fine-tunings that differ in one thing, and a table of their scores."""

import itertools
import json
import pathlib
import sys

import numpy as np
import pytest
import runs

from gptjax.ablation import report
from gptjax.ablation import run as run_lib
from gptjax.config import paper_tasks
from gptjax.config.schema import Experiment, FinetuneConfig
from gptjax.errors import UserError

EXPERIMENT = pathlib.Path(__file__).parents[1] / "two_tasks.py"
FINETUNE = FinetuneConfig(lm_weight=0.5)
# Without the flags of the tokenizer, which comes from the checkpoint.
TINY = [flag for flag in runs.TINY if "tokenizer" not in flag]


def finetune() -> list[str]:
    """Returns the flags of the shared fine-tuning with fewer steps."""
    return [flag.replace("steps=40", "steps=16") for flag in runs.files().finetune]


def command(workdir, *more: str) -> tuple[str, ...]:
    """Returns the arguments of an ablation of two tasks that starts from a shared model."""
    flags = [f.replace("finetune.", "ablation.tasks.one.") for f in finetune()]
    flags = [flag for flag in flags if "compare_from_scratch" not in flag]
    return (
        "--mode=ablate", f"--config={EXPERIMENT}", *TINY,
        f"--config.init_from={runs.trained()}/checkpoints/pretrain",
        *flags, *(flag.replace("tasks.one", "tasks.two") for flag in flags),
        "--config.ablation.tasks.one.baseline=linear",
        f"--workdir={workdir}", "--config.ablation.parallel=1", *more,
    )  # fmt: skip


def results(workdir) -> dict[tuple[str, str, int], dict]:
    found = json.loads(pathlib.Path(workdir, "ablation.json").read_text())["runs"]
    return {(r["task"], r["variant"], r["seed"]): r for r in found}


def assert_equal_to_rounding(workdir, other) -> None:
    """Compares runs of several fine-tunings at a time with the same ones, one at a time."""
    for key, record in results(workdir).items():
        expected = results(other)[key]["scores"]
        for split, scores in record["scores"].items():
            assert scores == pytest.approx(expected[split], rel=1e-3, abs=1e-3)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Runs two tasks, three variants and two seeds; returns the workdir and stdout."""
    workdir = tmp_path_factory.mktemp("ablation")
    result = runs.main(*command(workdir), "--seeds=2")
    assert (result.code, result.err) == (0, "")
    return workdir, result.out


@pytest.mark.slow
def test_every_variant_of_every_task_is_run_with_every_seed(done):
    workdir, out = done
    wanted = itertools.product(("one", "two"), ("full", "no_pretraining", "no_lm"), (0, 1))
    assert set(results(workdir)) == set(wanted)
    assert "[12/12]" in out
    assert not list(workdir.rglob("checkpoints")), "an ablation would fill the disk"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("full", []),
        ("no_lm", ["--config.finetune.lm_weight=0"]),
        ("no_pretraining", ["--config.finetune.transfer=none"]),
    ],
)
def test_a_job_scores_what_the_same_training_alone_scores(done, tmp_path, name, flags):
    alone = runs.main(
        f"--config={EXPERIMENT}", "--config.ablation=none", "--config.finetune=build",
        *TINY, *finetune(), "--config.seed=1", *flags,
        f"--config.init_from={runs.trained()}/checkpoints/pretrain", f"--workdir={tmp_path}",
    )  # fmt: skip
    assert alone.code == 0, alone.err
    summary = runs.summary(tmp_path)["finetune"]
    ours = results(done[0])["one", name, 1]["scores"]
    assert ours == {split: summary[split] for split in ("validation", "test")}


@pytest.mark.slow
def test_two_at_a_time_score_what_one_at_a_time_scores(done, tmp_path):
    one = command(tmp_path, "--config.ablation.only=one", "--config.ablation.variants=full")
    result = runs.main(*one, "--config.ablation.parallel=2", "--seeds=2")
    assert result.code == 0, result.err
    assert_equal_to_rounding(tmp_path, done[0])


@pytest.mark.slow
def test_the_same_command_runs_nothing_again_and_a_new_variant_only(done):
    workdir, _ = done
    before = results(workdir)
    again = runs.main(*command(workdir), "--seeds=2")
    assert again.code == 0
    assert "seed" not in again.out.split("#")[0]
    assert "linear model with" not in again.out
    variants = "--config.ablation.variants=full,layers=0,layers=1,lambda=2"
    more = runs.main(*command(workdir, "--config.ablation.only=one"), "--seeds=1", variants)
    assert more.code == 0, more.err
    after = results(workdir)
    assert {key: after[key] for key in before} == before
    assert set(after) - set(before) == {
        ("one", "layers=0", 0), ("one", "layers=1", 0), ("one", "lambda=2", 0)
    }  # fmt: skip
    # The model has one layer, so that one transferred layer is all of them.
    assert after["one", "layers=1", 0]["scores"] == before["one", "full", 0]["scores"]
    assert after["one", "layers=0", 0]["scores"] != before["one", "full", 0]["scores"]


@pytest.mark.slow
def test_asked_to_stop_it_keeps_what_is_done_and_goes_on_there(done, tmp_path, monkeypatch):
    class StopsAfterAWhile:
        def __init__(self):
            self.calls = 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def __call__(self):
            self.calls += 1
            return self.calls > 60

    one = command(tmp_path, "--config.ablation.only=one")
    with monkeypatch.context() as patch:
        patch.setattr(run_lib, "StopRequest", StopsAfterAWhile)
        stopped = runs.main(*one, "--seeds=2")
    assert stopped.code == 75
    assert "asked to stop after" in stopped.err
    kept = results(tmp_path)
    assert 0 < len(kept) < 6
    assert runs.main(*one, "--seeds=2").code == 0
    expected = {key: value for key, value in results(done[0]).items() if key[0] == "one"}
    found = results(tmp_path)
    assert {key: each["scores"] for key, each in found.items()} == {
        key: each["scores"] for key, each in expected.items() if "=" not in key[1]
    }
    assert {key: found[key] for key in kept} == kept


INTERRUPTED = """
import concurrent.futures, os, signal, tempfile, threading, time
from gptjax.ablation import run
from gptjax.config import experiments
from gptjax.train.progress import Reporter

def job(self, job, mesh):
    all_submitted.wait()
    both_run.wait()
    if threading.current_thread().name.endswith("_0"):
        os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1 if threading.current_thread().name.endswith("_0") else 3)
    print("a job has ended", flush=True)

def wait_and_say(futures, wait=concurrent.futures.wait):
    all_submitted.set()
    return wait(futures)

# An interrupt while the pool starts a thread is another case: the pool forgets that thread.
concurrent.futures.wait = wait_and_say
all_submitted = threading.Event()
both_run = threading.Barrier(2)
run._Runner._run_job = job
experiment = experiments.load("gpt1_task:rte")
tasks = {"rte": experiment.finetune}
ablation = run.Ablation(experiment, tempfile.mkdtemp(), tasks, ("full", "no_lm"), range(1))
try:
    run._Runner(ablation, "checkpoint", (), Reporter(), lambda: None).run([None, None])
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_waits_for_the_jobs_that_run():
    done = runs.finish(runs.spawn([sys.executable, "-c", INTERRUPTED]))
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == ["a job has ended", "a job has ended", "interrupted"]


def test_the_table_holds_the_medians_and_the_paper_s_numbers_apart():
    def run(task, variant, seed, score, metric="accuracy"):
        return {
            "task": task, "variant": variant, "seed": seed, "score": score, "metric": metric,
            "split": "test", "floor": 0.5,
        }  # fmt: skip

    scores = [0.9, 0.7, 0.75]
    found = [run("sst2", "full", i, score) for i, score in enumerate(scores)]
    found += [run("mine", "full", i, score, "pearson") for i, score in enumerate([0.2, None, 0.4])]
    lines = report.table(found).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["variant", "sst2, test accuracy", "mine, test pearson", "average"]
    average = 100 * np.mean([np.median(scores), 0.3])
    assert cells[2] == [
        "full", "75.0 (70.0 to 90.0)", "0.300 (0.200 to 0.400), 2 of 3 seeds", f"{average:.1f}",
    ]  # fmt: skip
    assert cells[3][:3] == ["*constant answer*", "50.0", "0.500"]
    paper = f"{100 * paper_tasks.PUBLISHED['full']['sst2']:.1f}"
    assert cells[4][:3] == ["*the paper's full*", paper, "-"]
    linear = {"sst2": {"test": {"accuracy": 0.8}}, "mine": {"left_out": "no words"}}
    assert report.table(found, linear).splitlines()[4].split("|")[1:4] == [
        " *linear model* ", " 80.0 ", " - "
    ]  # fmt: skip
    # The paper's score is left out where ours is another metric.
    assert "paper" not in report.table([run("sst2", "full", 0, 0.9, "macro_f1")])


def test_a_published_average_is_that_of_its_tasks():
    """The expected values are the averages that the paper prints."""
    # Approximately, because the paper counts the two parts of MNLI as one task.
    averages = {"full": 74.7, "no_pretraining": 59.9, "no_lm": 75.0}
    for variant, average in averages.items():
        scores = paper_tasks.PUBLISHED[variant]
        assert set(scores) <= set(paper_tasks.TASKS)
        assert 100 * np.mean(list(scores.values())) == pytest.approx(average, abs=0.5)


@pytest.mark.slow
def test_what_is_written_is_a_table_and_a_picture(done):
    workdir, out = done
    text = (workdir / "ablation.md").read_text()
    assert "| variant | one, test accuracy | two, test accuracy | average |" in text
    assert "Medians over the seeds 0, 1" in out
    assert (workdir / "ablation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_each_task_has_one_linear_model_unless_it_wants_none(done):
    workdir, out = done
    assert out.count("linear model with C=") == 1
    found = json.loads((workdir / "ablation.json").read_text())["linear"]
    assert list(found) == ["one"]
    assert found["one"].keys() == {"validation", "test", "C", "seconds", "reduced"}
    score = f"{100 * found['one']['test']['accuracy']:.1f}"
    assert f"| *linear model* | {score} | - |  |" in (workdir / "ablation.md").read_text()


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("full", {}), ("no_pretraining", {"transfer": "none"}), ("no_lm", {"lm_weight": 0.0}),
        ("layers=2", {"transfer": "2"}), ("lambda=0.25", {"lm_weight": 0.25}),
    ],
)  # fmt: skip
def test_a_variant_changes_one_thing(name, changed):
    assert vars(run_lib.variant(FINETUNE, name)) == vars(FINETUNE) | changed


@pytest.mark.parametrize("name", ["", "ful", "layers", "layers=-1", "layers=x", "lambda=-1", "x=1"])
def test_no_other_variant_is_known(name):
    with pytest.raises(UserError, match="no variant"):
        run_lib.variant(FINETUNE, name)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.ablation.variants=full,none", "--config.ablation.variants: no variant 'none'"),
        ("--config.ablation.variants=", "--config.ablation.variants: is empty"),
        ("--config.ablation.variants=layers=7", "layers=7: the model has 1 layers"),
        ("--config.ablation.tasks.nosuch.epochs=1", "the experiment has no entry 'nosuch'"),
        ("--config.ablation.tasks.two.metrics=bleu", "no metric 'bleu'"),
        ("--config.mesh.fsdp=7", "--config.mesh: 7 does not divide"),
        ("--config.ablation.only=tow", "did you mean 'two'?"),
        ("--config.ablation.tasks.two.epochs=0", "--config.ablation.tasks.two.epochs"),
        ("--config.ablation.tasks.two.epoch=1", "--config.ablation.tasks.two.epoch"),
        ("--config.ablation.tasks.two.text=body", "column"),
        ("--config.init_from=", "needs a pretrained model"),
        ("--config.init_from=nowhere", "--config.init_from=nowhere"),
        ("--seeds=0", "--seeds=0"),
        ("--workdir=s3://bucket/x", "--workdir=s3://bucket/x: orbax"),
    ],
)
def test_wrong_use_is_one_line(tmp_path, flag, words):
    extra = ["--config.ablation.tasks.two.steps=0"] if "epochs" in flag else []
    result = runs.main(*command(tmp_path / "w"), flag, *extra)
    assert words in result.error
    assert not list(tmp_path.rglob("ablation.md"))


@pytest.mark.slow
def test_a_mesh_of_one_s_own_is_for_one_at_a_time(tmp_path):
    flags = ("--config.mesh.fsdp=8", "--config.ablation.parallel=2")
    assert "each would have one device" in runs.main(*command(tmp_path), *flags).error


@pytest.mark.slow
def test_a_seed_that_diverges_is_a_result_and_not_the_end(tmp_path):
    one = command(tmp_path, "--config.ablation.only=one")
    result = runs.main(
        *one, "--seeds=1", "--config.ablation.variants=full,full,no_lm",
        "--config.ablation.tasks.one.optimizer.learning_rate=1e38",
        "--config.ablation.tasks.one.optimizer.clip_norm=0",
    )  # fmt: skip
    assert result.code == 0, result.err
    found = results(tmp_path)
    assert set(found) == {("one", "full", 0), ("one", "no_lm", 0)}, "a variant is run once"
    assert {each["score"] for each in found.values()} == {None}
    assert "full seed 0: diverged" in result.out
    assert "| full | - |" in result.out


@pytest.mark.slow
def test_the_paper_s_tasks_are_known_by_their_experiment(tmp_path):
    result = runs.main(
        "--mode=ablate", "--config=experiments/gpt1_task.py:sst2", *TINY,
        "--config.model.dtype=float32", "--config.finetune.dataset=",
        f"--config.finetune.train_file={runs.files().train}", "--config.finetune.text=text",
        "--config.finetune.steps=2", "--config.ablation=build", "--config.ablation.parallel=1",
        f"--config.init_from={runs.trained()}/checkpoints/pretrain", f"--workdir={tmp_path}",
        "--seeds=1", "--config.ablation.variants=full",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "| *the paper's full* | 91.3 |" in result.out


@pytest.mark.slow
def test_two_on_one_device_score_what_one_scores(done, tmp_path):
    """The process has a single CPU device, as on a laptop, which two fine-tunings share."""
    one = command(tmp_path, "--config.ablation.only=one", "--config.ablation.variants=full")
    one = [flag for flag in one if "parallel" not in flag]
    process = runs.start(*one, "--seeds=2")
    out, err = process.communicate(timeout=200)
    assert (process.returncode, err) == (0, "")
    assert "[2/2]" in out
    assert_equal_to_rounding(tmp_path, done[0])


@pytest.mark.slow
def test_another_experiment_is_not_mixed_into_a_table(done):
    workdir, _ = done
    changed = runs.main(*command(workdir), "--config.ablation.tasks.one.batch_size=4")
    assert "holds another experiment (ablation.tasks.one.batch_size: 8 -> 4)" in changed.error


@pytest.mark.parametrize(
    ("variant", "chosen"),
    [
        ("full", {"finetune.lm_weight", "finetune.epochs"}),
        ("lambda=0.5", {"finetune.epochs"}),  # also if it is the value that the field had
        ("no_lm", {"finetune.epochs"}),
    ],
)
def test_the_data_does_not_choose_what_a_variant_sets(variant, chosen):
    experiment = Experiment(choose="finetune.lm_weight,finetune.epochs", finetune=FINETUNE)
    plan = run_lib.Ablation(experiment, "w", {"one": FINETUNE}, (variant,), range(1))
    found = run_lib.job_experiment(plan, plan.jobs[0], "start")
    assert set(found.choose.split(",")) == chosen
    assert vars(found.finetune) == vars(run_lib.variant(FINETUNE, variant))
    assert (found.init_from, found.seed) == ("start", 0)
