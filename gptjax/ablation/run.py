"""Runs the fine-tuning runs of an ablation, such as the paper's (Radford et al. 2018, section 5).

A variant changes one thing in the fine-tuning of a task. All variants of all tasks start from one
pretrained model, and each of them is trained with N seeds. The table has the median, the lowest and
the highest score, the score of the majority-class baseline (for regression, of the mean), the score
of a linear model, and the paper's score if the paper has the same variant of the same task.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import os
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax import mesh as mesh_lib
from gptjax.ablation import report
from gptjax.cluster import stop as stop_lib
from gptjax.cluster.stop import StopRequest
from gptjax.config import paper_tasks, schema, validation
from gptjax.config.schema import AblationConfig, Experiment, FinetuneConfig, MeshConfig
from gptjax.data import splits
from gptjax.errors import Preempted, StopRequested, TrainingDiverged, UserError, require
from gptjax.evaluate import metrics
from gptjax.evaluate.formatting import format_score
from gptjax.io import files
from gptjax.io.remote import exists
from gptjax.train import final, stages
from gptjax.train import run as run_lib
from gptjax.train.progress import Reporter, TerminalReporter

_RESULTS = "ablation.json"


@dataclasses.dataclass(frozen=True)
class Job:
    """One fine-tuning run: one task with one variant and one seed."""

    task: str
    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.task} {self.variant} seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Ablation:
    """The fine-tuning runs that one command asks for."""

    experiment: Experiment
    workdir: str
    tasks: dict[str, FinetuneConfig]
    """Name of a task -> its fine-tuning configuration without a variant's change."""
    variants: tuple[str, ...]
    """Names of the variants, which the function `variant` accepts."""
    seeds: range
    """The seeds of each variant."""

    @property
    def jobs(self) -> list[Job]:
        """All fine-tuning runs, in the order in which they start."""
        order = itertools.product(self.seeds, self.tasks, self.variants)
        return [Job(task, name, seed) for seed, task, name in order]


def variant(config: FinetuneConfig, name: str) -> FinetuneConfig:
    """Returns a fine-tuning configuration with the one change that a variant makes.

    Args:
      config: the fine-tuning configuration of a task.
      name: the name of the variant: full, no_pretraining, no_lm, layers=N or lambda=X.

    >>> variant(FinetuneConfig(), "lambda=0.25").lm_weight
    0.25

    Raises:
      UserError: there is no such variant.
    """
    return dataclasses.replace(config, **_changes(config, name))


def _changes(config: FinetuneConfig, name: str) -> dict[str, Any]:
    """Returns name of a field of the fine-tuning -> its value in a variant."""
    known: dict[str, dict[str, Any]] = {
        "full": {},
        # Layers that are not pretrained are not frozen.
        "no_pretraining": {"transfer": "none", "freeze": 0},
        "no_lm": {"lm_weight": 0.0},
    }
    if name in known:
        return known[name]
    kind, _, value = name.partition("=")
    try:
        if kind == "layers" and value.isdecimal():
            frozen = min(config.freeze, int(value))
            return {"transfer": value, "freeze": frozen}
        if kind == "lambda" and float(value) >= 0:
            return {"lm_weight": float(value)}
    except ValueError:
        pass
    raise UserError(
        f"`ablation.variants`: no variant {name!r}; it is full, no_pretraining, no_lm, "
        "layers=N or lambda=X"
    )


def run(experiment: Experiment, workdir: str, seeds: int, given: Collection[str] = ()) -> None:
    """Pretrains if the experiment has a pretrain part, then fine-tunes and writes the tables.

    Results are kept in WORKDIR/ablation.json. The same command continues a stopped ablation. More
    variants or seeds can be added to the command later.

    Args:
      experiment: the configuration. Its field `ablation` lists the tasks and the variants. If no
        tasks are listed, the only task is its field `finetune`.
      workdir: folder of the ablation.
      seeds: the number of seeds. The first seed is `experiment.seed`, and each later seed is one
        higher.
      given: names of the fields that the user set by flag. If the ablation starts from the
        checkpoint `init_from`, a field of the tokenizer, or a size of the model that differs from
        the checkpoint, raises a `UserError`.

    Raises:
      UserError: the configuration or the data is wrong, or the workdir has another experiment.
      Preempted: the process was asked to stop. The results so far are saved.
      TrainingDiverged: the pretraining diverged.
    """
    require(seeds > 0, f"`seeds`={seeds}: must be greater than 0")
    require(jax.process_count() == 1, "`mode`=ablate: runs in one process, on its devices")
    experiment = validation.validate(experiment)
    reporter = TerminalReporter()
    _plan(experiment, workdir, seeds)  # wrong fields are found before the download
    options = run_lib.Options(given=given, reporter=reporter)
    experiment = run_lib.pin_hub_model(experiment, workdir, _RESULTS, options)
    ablation = _plan(experiment, workdir, seeds)
    _check(ablation, options)
    meshes = _meshes(experiment)
    run_lib.check_workdir(experiment, workdir, _RESULTS)
    with StopRequest() as stop:
        check_stop = stop_lib.make_check(stop)
        options = dataclasses.replace(options, check_stop=check_stop)
        pretrained = _pretrain(ablation, options)
        # The flags are compared with a checkpoint that the user named, but not with the model that
        # was pretrained here, because the flags have set its fields.
        checked = () if experiment.pretrain else given
        runner = _Runner(ablation, pretrained, checked, reporter, check_stop)
        runner.run(meshes)
    reporter.say(report.write(workdir))


def _plan(experiment: Experiment, workdir: str, seeds: int) -> Ablation:
    """Returns the fine-tuning runs of an experiment.

    Raises:
      UserError: the experiment has no task, no variant or no pretrained model.
    """
    config = experiment.ablation or AblationConfig()
    tasks = config.chosen
    if not tasks and experiment.finetune:
        name = experiment.name.removeprefix(paper_tasks.EXPERIMENTS)
        tasks = {name if name in paper_tasks.TASKS else "finetune": experiment.finetune}
    require(tasks, "`config`: nothing to ablate; the experiment needs a finetune or ablation part")
    require(
        experiment.pretrain or experiment.init_from,
        "`mode`=ablate: needs a pretrained model: `init_from`, or a pretrain part",
    )
    variants = tuple(dict.fromkeys(schema.split_names(config.variants)))
    require(variants, "`ablation.variants`: is empty; write full,no_pretraining,no_lm")
    seed = experiment.seed
    return Ablation(experiment, workdir, tasks, variants, range(seed, seed + seeds))


def _check(ablation: Ablation, options: run_lib.Options) -> None:
    """Raises `UserError` for a wrong variant, metric, file or column, before the long training."""
    experiment = ablation.experiment
    layers = experiment.model.num_layers
    if not experiment.pretrain:
        layers = run_lib.open_init_from(experiment, options).meta.model.num_layers
    for config in ablation.tasks.values():
        metrics.parse(config.metrics, config.task)
        for name in ablation.variants:
            transfer = variant(config, name).transfer
            require(
                not transfer.isdecimal() or int(transfer) <= layers,
                f"`ablation.variants`: {name}: the model has {layers} layers",
            )
        splits.labelled_splits(config, experiment.seed)


def _pretrain(ablation: Ablation, options: run_lib.Options) -> str:
    """Pretrains if the experiment has a pretrain part. Returns the path of the pretrained model."""
    experiment = ablation.experiment
    if not experiment.pretrain:
        return experiment.init_from
    folder = os.path.join(ablation.workdir, "pretrain")
    stage = validation.validate(dataclasses.replace(experiment, finetune=None, ablation=None))
    run_lib.train(stage, folder, mesh_lib.make_mesh(experiment.mesh), options)
    return folder


def job_experiment(ablation: Ablation, job: Job, pretrained: str) -> Experiment:
    """Returns the experiment of one fine-tuning run.

    Args:
      ablation: the ablation that the run belongs to.
      job: the task, the variant and the seed of the run.
      pretrained: the path of the checkpoint from which it starts.
    """
    config = ablation.tasks[job.task]
    changes = _changes(config, job.variant)
    experiment = dataclasses.replace(
        ablation.experiment,
        name=str(job),
        seed=job.seed,
        pretrain=None,
        ablation=None,
        init_from=pretrained,
        finetune=dataclasses.replace(config, **changes, compare_from_scratch=False),
        # A variant sets its fields, so the data does not choose them.
        choose=ablation.experiment.not_set(f"finetune.{name}" for name in changes),
    )
    if ablation.experiment.pretrain:  # then the model is in a folder, and not on the hub
        experiment.init_from_commit, experiment.tokenizer = "", schema.TokenizerConfig()
    return experiment


@dataclasses.dataclass
class _Runner:
    """Runs the fine-tuning runs that have no result yet, several at the same time.

    Attributes:
      ablation: the fine-tuning runs.
      pretrained: path of the checkpoint from which they start.
      given: names of the fields that the user set by flag and that are compared with the
        checkpoint. A field of the tokenizer, or a size of the model that differs, raises a
        `UserError`.
      reporter: the object that gets a line for each result.
      check_stop: a function that raises `StopRequested` if the process was asked to stop.
    """

    ablation: Ablation
    pretrained: str
    given: Collection[str]
    reporter: Reporter
    check_stop: Callable[[], None]

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._failed = False
        self._path = os.path.join(self.ablation.workdir, _RESULTS)
        old = files.read_json(self._path) if exists(self._path) else {}
        self._seconds_before, self._began = old.get("seconds", 0.0), time.monotonic()
        # Results of variants and seeds that this command leaves out stay in the file.
        self._records = {Job(r["task"], r["variant"], r["seed"]): r for r in old.get("runs", ())}
        # Name of a task -> the entry of its linear model, as in the summary of a run.
        self._linear: dict[str, Any] = old.get("linear", {})

    def run(self, meshes: list[Mesh]) -> None:
        """Runs the fine-tuning runs. Each mesh has one of them at a time.

        After an error in one fine-tuning run, the other runs stop. The same command starts these
        runs again from the beginning.

        Raises:
          Preempted: the process was asked to stop.
          Exception: the first error of a fine-tuning run.
        """
        path = os.path.join(self.ablation.workdir, "config.json")
        files.write_json(path, schema.to_dict(self.ablation.experiment))
        self._write_results()
        jobs = self.ablation.jobs
        free = collections.deque(meshes)

        def work(job: Job) -> None:
            self._check_stop_or_failure()
            mesh = free.pop()
            try:
                self._run_job(job, mesh)
            except BaseException:
                self._failed = True
                raise
            finally:
                free.append(mesh)

        with concurrent.futures.ThreadPoolExecutor(len(meshes)) as pool:
            futures = [pool.submit(work, job) for job in jobs if job not in self._records]
            # Ctrl-C may interrupt this call. At the end of the block it would interrupt the join of
            # a thread, after which Python (before 3.13) takes the thread for ended (gh-90882).
            concurrent.futures.wait(futures)
        errors = [error for future in futures if (error := future.exception())]
        for error in errors:
            if not isinstance(error, Preempted | StopRequested):
                raise error
        try:
            if errors:
                raise StopRequested
            self._fit_linear_models()
        except StopRequested:
            done = sum(job in self._records for job in jobs)
            raise Preempted(
                f"ablate: asked to stop after {done} of {len(jobs)} fine-tunings; the "
                "same command goes on"
            ) from None

    def _fit_linear_models(self) -> None:
        """Fits the linear model of each task that has none yet, on the rows of the first seed.

        A model that was left out, for lack of time or by an error, is tried again.
        """
        for task, config in self.ablation.tasks.items():
            fitted = task in self._linear and "left_out" not in self._linear[task]
            if fitted or config.baseline == schema.Baseline.NONE:
                continue
            data = splits.labelled_splits(config, self.ablation.experiment.seed)
            spec = stages.with_labels(splits.task_spec(config), data)
            names = metrics.parse(config.metrics, config.task)
            seconds = [r["seconds"] for job, r in self._records.items() if job.task == task]
            limit = final.linear_seconds(sum(seconds))
            self._linear[task] = final.linear_entry(spec, data, names, limit, self.check_stop)
            self.reporter.say(f"{task}: {final.describe(self._linear[task])}")
            self._write_results()

    def _check_stop_or_failure(self) -> None:
        """Raises `StopRequested` if the process was asked to stop or another job has failed."""
        if self._failed:
            raise StopRequested
        self.check_stop()

    def _run_job(self, job: Job, mesh: Mesh) -> None:
        """Runs one fine-tuning run, then writes and reports its result."""
        ablation = self.ablation
        experiment = job_experiment(ablation, job, self.pretrained)
        config = experiment.finetune
        assert config is not None
        folder = os.path.join(ablation.workdir, "runs", job.task, job.variant, f"seed_{job.seed}")
        options = run_lib.Options(
            given=self.given, reporter=Reporter(), trial=True,
            check_stop=self._check_stop_or_failure,
        )  # fmt: skip
        began = time.monotonic()
        try:
            summary = run_lib.train(validation.validate(experiment), folder, mesh, options)
        except UserError as error:
            raise UserError(f"{job}: {error}") from error
        except TrainingDiverged:
            # If the training of one seed diverges, this is a result and not an error.
            summary = {"finetune": {"diverged": True}}
        record = _record(job, config, summary["finetune"]) | {"seconds": time.monotonic() - began}
        with self._lock:
            self._records[job] = record
            self._write_results()
            self._report(job, record)

    def _report(self, job: Job, record: dict[str, Any]) -> None:
        jobs = self.ablation.jobs
        done = sum(each in self._records for each in jobs)
        score = f"{record['split']} {format_score(record['metric'], record['score'], '')}"
        text = "diverged" if record["score"] is None else score
        self.reporter.say(
            f"[{done}/{len(jobs)}] {job}: {text} ({record['metric']}), {record['seconds']:.0f} s"
        )

    def _write_results(self) -> None:
        results = {
            "name": self.ablation.experiment.name,
            "pretrained": self.pretrained,
            "machine": mesh_lib.describe_machine(),
            # The elapsed time of all commands. The sum of the seconds of the runs can be larger,
            # because several of them run at the same time.
            "seconds": self._seconds_before + time.monotonic() - self._began,
            "runs": list(self._records.values()),
            "linear": self._linear,
        }
        files.write_json(self._path, results)


def _record(job: Job, config: FinetuneConfig, part: dict[str, Any]) -> dict[str, Any]:
    """Returns the entry of a fine-tuning run in ablation.json.

    The entry has no scores if the training diverged.

    Args:
      job: the fine-tuning run.
      config: the configuration of the run.
      part: the entry of the fine-tuning stage in the summary of the run.
    """
    split = "test" if "test" in part else "validation"
    metric = metrics.parse(config.metrics, config.task)[0]
    return {
        **dataclasses.asdict(job),
        "metric": metric,
        "split": split,
        "score": part.get(split, {}).get(metric),
        "floor": part.get("floor", {}).get(split, {}).get(metric),
        "scores": {name: part[name] for name in ("validation", "test") if name in part},
    }


def _meshes(experiment: Experiment) -> list[Mesh]:
    """Returns one mesh for each of the fine-tuning runs that are active at the same time.

    By default each device gets one fine-tuning run. A single CPU device gets two fine-tuning runs,
    because one small model leaves the device idle between operations. If the experiment sets a
    mesh, all devices of the mesh work on one fine-tuning run at a time.
    """
    parallel = experiment.ablation.parallel if experiment.ablation else 0
    devices = jax.devices()
    own_mesh = experiment.mesh != MeshConfig()
    require(
        parallel < 2 or not own_mesh,
        f"`ablation.parallel`={parallel}: each would have one device; leave "
        "`mesh` as it is, or parallel at 1",
    )
    count = parallel or (len(devices) if len(devices) > 1 else 1 + (devices[0].platform == "cpu"))
    if own_mesh or count == 1:
        return [mesh_lib.make_mesh(experiment.mesh)]
    one = MeshConfig(data=1)
    return [mesh_lib.make_mesh(one, [devices[i % len(devices)]]) for i in range(count)]
