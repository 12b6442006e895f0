"""The paper's ablation and transfer tables: fine-tunings that differ in one thing, over N seeds.

(Radford et al. 2018, section 5.) Every variant of every task starts from one pretrained model and
is trained with each seed; medians, with the lowest and the highest, go into a table beside the
score of the constant answer and, where the paper has the same variant of the same task, the paper's
number.
"""

import concurrent.futures
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax import mesh as mesh_lib
from gptjax.ablation import report
from gptjax.checkpoint import load
from gptjax.cluster.stop import StopRequest
from gptjax.config import paper_tasks, schema, validation
from gptjax.config.schema import AblationConfig, Experiment, FinetuneConfig, MeshConfig
from gptjax.data import splits
from gptjax.errors import Preempted, TrainingDiverged, UserError, require
from gptjax.evaluate import metrics
from gptjax.io import files
from gptjax.io.remote import exists
from gptjax.train import run as run_lib

_RESULTS = "ablation.json"


@dataclasses.dataclass(frozen=True)
class Job:
    """One fine-tuning."""

    task: str
    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.task} {self.variant} seed {self.seed}"


def variant(config: FinetuneConfig, name: str) -> FinetuneConfig:
    """Returns the fine-tuning with the one change that the variant's name says.

    >>> variant(FinetuneConfig(), "lambda=0.25").lm_weight
    0.25

    Raises:
      UserError: there is no such variant.
    """
    known: dict[str, dict[str, Any]] = {
        "full": {}, "no_pretraining": {"transfer": "none"}, "no_lm": {"lm_weight": 0.0},
    }  # fmt: skip
    if name in known:
        return dataclasses.replace(config, **known[name])
    kind, _, value = name.partition("=")
    try:
        if kind == "layers" and value.isdecimal():
            return dataclasses.replace(config, transfer=value)
        if kind == "lambda" and float(value) >= 0:
            return dataclasses.replace(config, lm_weight=float(value))
    except ValueError:
        pass
    raise UserError(
        f"`ablation.variants`: no variant {name!r}; it is full, no_pretraining, no_lm, "
        "layers=N or lambda=X"
    )


def run(experiment: Experiment, workdir: str, seeds: int, given: Collection[str] = ()) -> None:
    """Pretrains where the experiment says so, fine-tunes every job, and writes the tables.

    What is done stands in WORKDIR/ablation.json: the same command goes on there, and variants or
    seeds may be added.

    Args:
      experiment: tasks and variants in its `ablation`; without one its `finetune`.
      workdir: folder of the run.
      seeds: how many, from the experiment's on.
      given: fields that the user asked for by flag.

    Raises:
      UserError, Preempted, TrainingDiverged: as in `loop.run`.
    """
    require(seeds > 0, f"`seeds`={seeds}: must be greater than 0")
    require(jax.process_count() == 1, "`mode`=ablate: runs in one process, on its devices")
    experiment = validation.validate(experiment)
    ablation = experiment.ablation or AblationConfig()
    tasks = ablation.chosen
    if not tasks and experiment.finetune:
        own = experiment.name.removeprefix(paper_tasks.EXPERIMENTS)
        tasks = {own if own in paper_tasks.TASKS else "finetune": experiment.finetune}
    require(tasks, "`config`: nothing to ablate; the experiment needs a finetune or ablation part")
    require(
        experiment.pretrain or experiment.init_from,
        "`mode`=ablate: needs a pretrained model: `init_from`, or a pretrain part",
    )
    names = tuple(dict.fromkeys(schema.split_names(ablation.variants)))
    require(names, "`ablation.variants`: is empty; write full,no_pretraining,no_lm")
    _check(experiment, tasks, names)
    meshes = _meshes(experiment, ablation.parallel)
    run_lib.check_workdir(experiment, workdir, _RESULTS)
    with StopRequest() as stop:
        start = _pretrained(experiment, workdir, stop, given)
        all_seeds = range(experiment.seed, experiment.seed + seeds)
        jobs = [Job(t, name, seed) for seed in all_seeds for t in tasks for name in names]
        # Sizes and tokenizer of a checkpoint are not silently overruled.
        checked = () if experiment.pretrain else given
        _Runner(experiment, tasks, start, workdir, jobs, checked).run(meshes, stop)
    print(report.write(workdir))


def _check(
    experiment: Experiment, tasks: dict[str, FinetuneConfig], names: tuple[str, ...]
) -> None:
    """Finds what is wrong with a variant, a file or a column before hours of training."""
    layers = experiment.model.num_layers
    if not experiment.pretrain:
        meta = load.open_checkpoint(experiment.init_from, "init_from").meta
        layers = meta.model.num_layers
    for config in tasks.values():
        metrics.parse(config.metrics, config.task)
        for name in names:
            transfer = variant(config, name).transfer
            require(
                not transfer.isdecimal() or int(transfer) <= layers,
                f"`ablation.variants`: {name}: the model has {layers} layers",
            )
        splits.labelled_splits(config, experiment.seed)


def _pretrained(
    experiment: Experiment, workdir: str, stop: Callable[[], bool], given: Collection[str]
) -> str:
    """Trains the pretraining stage to its end; returns what the fine-tunings start from."""
    if not experiment.pretrain:
        return experiment.init_from
    folder = os.path.join(workdir, "pretrain")
    alone = dataclasses.replace(experiment, finetune=None, ablation=None)
    mesh = mesh_lib.make_mesh(experiment.mesh)
    run_lib.train(validation.validate(alone), folder, mesh, stop, given)
    return folder


class _Runner:
    """Runs the jobs that have no result yet, several at a time."""

    def __init__(
        self,
        experiment: Experiment,
        tasks: dict[str, FinetuneConfig],
        start: str,
        workdir: str,
        jobs: list[Job],
        given: Collection[str],
    ):
        self._experiment, self._tasks, self._start, self._workdir, self._given = (
            experiment, tasks, start, workdir, given
        )  # fmt: skip
        self._lock = threading.Lock()
        self._path = os.path.join(workdir, _RESULTS)
        old = files.read_json(self._path) if exists(self._path) else {}
        done = {Job(r["task"], r["variant"], r["seed"]): r for r in old.get("runs", ())}
        self._spent, self._began = old.get("seconds", 0.0), time.monotonic()
        # Results of variants and seeds that this command leaves out stay in the file.
        self._records, self._jobs, self._failed = done, jobs, False

    def run(self, meshes: list[Mesh], stop: Callable[[], bool]) -> None:
        """Runs what waits; the first error ends the others, which the next time begin anew."""
        path = os.path.join(self._workdir, "config.json")
        files.write_json(path, schema.to_dict(self._experiment))
        self._save()
        waiting = [job for job in self._jobs if job not in self._records]
        if not waiting:
            return
        free = list(meshes)

        def work(job: Job) -> None:
            if stop() or self._failed:
                return
            with self._lock:
                mesh = free.pop()
            try:
                self._run_job(job, mesh, lambda: stop() or self._failed)
            except BaseException:
                self._failed = True
                raise
            finally:
                with self._lock:
                    free.append(mesh)

        with concurrent.futures.ThreadPoolExecutor(len(meshes)) as pool:
            futures = [pool.submit(work, job) for job in waiting]
            concurrent.futures.wait(futures)
        errors = [error for future in futures if (error := future.exception())]
        # Those that were asked to stop because another failed are not the cause.
        errors.sort(key=lambda error: isinstance(error, Preempted))
        if errors and not isinstance(errors[0], Preempted):
            raise errors[0]
        if stop():
            raise Preempted(
                f"ablate: asked to stop after {self._done} of {len(self._jobs)} fine-tunings; the "
                "same command goes on"
            )

    @property
    def _done(self) -> int:
        return sum(job in self._records for job in self._jobs)

    def _run_job(self, job: Job, mesh: Mesh, stop: Callable[[], bool]) -> None:
        config = dataclasses.replace(
            variant(self._tasks[job.task], job.variant), compare_from_scratch=False
        )
        one = dataclasses.replace(
            self._experiment, name=str(job), seed=job.seed, pretrain=None, ablation=None,
            init_from=self._start, finetune=config,
        )  # fmt: skip
        folder = os.path.join(self._workdir, "runs", job.task, job.variant, f"seed_{job.seed}")
        began = time.monotonic()
        try:
            summary, _ = run_lib.train(
                validation.validate(one), folder, mesh, stop, self._given, trial=True
            )
        except UserError as error:
            raise UserError(f"{job}: {error}") from error
        except TrainingDiverged:
            # Of one seed in many it is a result.
            summary = {"finetune": {"diverged": True}}
        record = _record(job, config, summary["finetune"]) | {"seconds": time.monotonic() - began}
        with self._lock:
            self._records[job] = record
            self._save()
            score = report.shown(record["metric"], record["score"])
            what = "diverged" if record["score"] is None else f"{record['split']} {score}"
            print(
                f"[{self._done}/{len(self._jobs)}] {job}: {what} ({record['metric']}), "
                f"{record['seconds']:.0f} s",
                flush=True,
            )

    def _save(self) -> None:
        results = {
            "name": self._experiment.name,
            "pretrained": self._start,
            "machine": mesh_lib.describe_machine(),
            # Of all fine-tunings together; several run at a time.
            "seconds": self._spent + time.monotonic() - self._began,
            "runs": list(self._records.values()),
        }
        files.write_json(self._path, results)


def _record(job: Job, config: FinetuneConfig, part: dict[str, Any]) -> dict[str, Any]:
    """What ablation.json keeps of a fine-tuning; without scores where it diverged."""
    split = "test" if "test" in part else "validation"
    metric = metrics.parse(config.metrics, config.task)[metrics.PRIMARY]
    return {
        **dataclasses.asdict(job), "metric": metric, "split": split,
        "score": part.get(split, {}).get(metric),
        "floor": part.get("floor", {}).get(split, {}).get(metric),
        "scores": {name: part[name] for name in ("validation", "test") if name in part},
    }  # fmt: skip


def _meshes(experiment: Experiment, parallel: int) -> list[Mesh]:
    """Returns a mesh for each of the fine-tunings that run at a time.

    One device each, as small models leave most of a device idle between their operations; on a
    single CPU device several share it. With a mesh of its own, one at a time on all devices.
    """
    devices = jax.devices()
    if experiment.mesh != MeshConfig():
        require(
            parallel < 2,
            f"`ablation.parallel`={parallel}: each would have one device; leave "
            "`mesh` as it is, or parallel at 1",
        )
        return [mesh_lib.make_mesh(experiment.mesh)]
    count = parallel or (len(devices) if len(devices) > 1 else 1 + (devices[0].platform == "cpu"))
    if count == 1:
        return [mesh_lib.make_mesh(experiment.mesh)]
    one = MeshConfig(data=1)
    return [mesh_lib.make_mesh(one, [devices[i % len(devices)]]) for i in range(count)]
