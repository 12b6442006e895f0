"""One run: the stages of an experiment, with checkpoints, scores and a summary."""

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
from jax.sharding import Mesh

from gptjax import mesh as mesh_lib
from gptjax import state as state_lib
from gptjax.checkpoint import load
from gptjax.checkpoint.memory import MemoryStore, Store
from gptjax.checkpoint.meta import Meta
from gptjax.checkpoint.store import CheckpointStore
from gptjax.cluster import stop as stop_lib
from gptjax.cluster.processes import (
    broadcast,
    require_same,
    require_shared,
    synchronised_stop,
)
from gptjax.cluster.stop import StopRequest
from gptjax.config import schema, validation
from gptjax.config.schema import INHERITED_SIZES, Experiment, ModelConfig
from gptjax.data import splits
from gptjax.data.tokens import tokenizer as tokenizer_lib
from gptjax.data.tokens.tokenizer import Tokenizer
from gptjax.errors import Preempted, StopRequested, require
from gptjax.evaluate import probes
from gptjax.evaluate.score import never_stop
from gptjax.io import files
from gptjax.io.remote import exists, is_folder, is_remote, require_workdir
from gptjax.mesh import Params
from gptjax.model import flops
from gptjax.parameters import TASK_HEAD
from gptjax.state import TrainState
from gptjax.train import stages as stages_lib
from gptjax.train.context import RunContext, Setup
from gptjax.train.log import MetricsLog
from gptjax.train.loop import Trainer
from gptjax.train.progress import Reporter, TerminalReporter
from gptjax.train.stages import Scores, Stage
from gptjax.train.step import initial_state

if TYPE_CHECKING:
    from datasets import Dataset

Tables: TypeAlias = Mapping[str, Mapping[str, "Dataset"]]
"""Stage -> split -> rows in memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a run besides its experiment."""

    given: Collection[str] = ()
    """Fields ("model.width") that the user set by flag. They may not be overruled silently."""
    tables: Tables = dataclasses.field(default_factory=dict)
    """Rows to train on, instead of files or a data set in the experiment."""
    profile: int = 0
    """Number of steps of each stage to write a profiler trace of; 0 means none."""
    reporter: Reporter = dataclasses.field(default_factory=TerminalReporter)
    """Receives messages and progress."""
    trial: bool = False
    """Whether the best parameters are kept in memory, and no checkpoints are written."""


def run(
    experiment: Experiment,
    workdir: str,
    given: Collection[str] = (),
    profile: int = 0,
    tables: Tables | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Trains the experiment's stages in order. A run that was stopped continues where it was.

    Args:
      experiment: the configuration.
      workdir: folder of the run.
      given: fields ("model.width") that the user set by flag. They may not be overruled silently.
      profile: the number of steps of each stage to write a profiler trace of, below
        WORKDIR/profile. The first steps of a stage, which compile, are left out. 0 means no trace.
      tables: stage -> split -> rows to train on, instead of files or a data set in the experiment.
        The splits are "train" and, if there are such, "validation" and "test".
      reporter: receives messages and progress; None means stdout and stderr.

    Returns:
      The summary, which is also written to WORKDIR/summary.json.

    Raises:
      UserError: wrong configuration or data, or a workdir of another experiment.
      Preempted: the run was asked to stop; the state is saved.
      TrainingDiverged: several updates in a row were not finite.
    """
    tables = tables or {}
    for stage in tables:
        known = stage in (schema.Stage.PRETRAIN, schema.Stage.FINETUNE)
        require(
            known and getattr(experiment, stage),
            f"`tables`: the experiment has no stage {stage!r}",
        )
    experiment = validation.validate(experiment, tables)
    require(profile >= 0, f"`profile`={profile}: must not be negative")
    require(
        not (profile and is_remote(workdir)),
        f"`profile`={profile}: a trace is written to a folder, and `workdir`={workdir} is in a "
        "bucket",
    )
    require(
        experiment.pretrain or experiment.finetune,
        "`config`: the experiment has nothing to train, only an ablation; use `mode`=ablate",
    )
    # Before the mesh is made, which may fail in some of the processes if their meshes differ.
    require_same({"config": schema.to_dict(experiment)})
    with StopRequest() as stop:
        mesh = mesh_lib.make_mesh(experiment.mesh)
        check_stop = stop_lib.make_check(synchronised_stop(stop))
        options = Options(
            given=given, tables=tables, profile=profile,
            reporter=reporter or TerminalReporter(),
        )  # fmt: skip
        try:
            return train(experiment, workdir, mesh, check_stop, options)
        except Preempted as error:
            error.interrupted = stop.interrupted
            raise


def train(
    experiment: Experiment,
    workdir: str,
    mesh: Mesh,
    check_stop: Callable[[], None],
    options: Options,
) -> dict[str, Any]:
    """Trains a validated experiment on a mesh; returns the summary.

    Args:
      experiment: the configuration.
      workdir: folder of the run.
      mesh: the devices.
      check_stop: as in `Setup`.
      options: the other options.

    Raises:
      The exceptions of `run`.
    """
    is_main = jax.process_index() == 0
    check_workdir(experiment, workdir, "checkpoints")
    setup, stages = prepare(experiment, workdir, mesh, options, check_stop)
    # Nothing is written before the data is known to be valid, and the same in all processes.
    facts = {
        stage.name: {"data": stage.fingerprint, "steps": stage.total_steps} for stage in stages
    }
    devices = jax.local_device_count()
    require_same({"tokenizer": setup.tokenizer.hash, "devices": devices, **facts})
    with MetricsLog(workdir, enabled=is_main) as log:
        reporter = options.reporter if is_main else Reporter()
        context = RunContext(
            experiment, workdir, setup, log, reporter, is_main, options.trial, options.profile
        )
        _write_configuration(context)
        return _train_stages(context, stages)


def prepare(
    experiment: Experiment,
    workdir: str,
    mesh: Mesh,
    options: Options = Options(),
    check_stop: Callable[[], None] = never_stop,
) -> tuple[Setup, list[Stage]]:
    """Loads the data of a validated experiment and builds its stages.

    Nothing is written to `workdir`. Arguments and errors are those of `train`.
    """
    data = _load_data(experiment, options.tables)
    tokenizer, model = _choose_tokenizer_and_sizes(experiment, workdir, data, options.given)
    setup = Setup(model, tokenizer, mesh, experiment.seed, check_stop)
    return setup, _build_stages(experiment, setup, data)


def check_workdir(experiment: Experiment, workdir: str, product: str) -> None:
    """Refuses a workdir that cannot be written to, or that holds another experiment.

    Args:
      experiment: the configuration.
      workdir: folder of the run.
      product: name of the file or folder with the results of a run. A workdir without it has no
        results yet, and is accepted with any configuration.
    """
    require_workdir(workdir)
    path = os.path.join(workdir, "config.json")
    if not (exists(path) and exists(os.path.join(workdir, product))):
        return
    # Converted to a configuration and back, because a file of an older version lacks new fields.
    old = schema.from_dict(Experiment, files.read_json(path), path)
    changes = schema.differences(schema.to_dict(old), schema.to_dict(experiment))
    more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
    require(
        not changes,
        f"`workdir`={workdir}: holds another experiment ({'; '.join(changes[:3])}{more}); "
        "choose another `workdir` or give the same configuration",
    )


def _load_data(experiment: Experiment, tables: Tables) -> dict[str, Any]:
    """Returns stage -> split -> texts or labelled rows."""
    data: dict[str, Any] = {}
    if experiment.pretrain:
        rows = tables.get(schema.Stage.PRETRAIN)
        data["pretrain"] = splits.text_splits(experiment.pretrain, rows)
    if experiment.finetune:
        rows = tables.get(schema.Stage.FINETUNE)
        data["finetune"] = splits.labelled_splits(experiment.finetune, experiment.seed, rows)
    return data


def _choose_tokenizer_and_sizes(
    experiment: Experiment, workdir: str, data: dict[str, Any], given: Collection[str]
) -> tuple[Tokenizer, ModelConfig]:
    """Returns the tokenizer, and the model's configuration with the tokenizer's vocabulary size.

    The tokenizer is that of `init_from`, else that of the workdir, else a new one.
    """
    model = experiment.model
    if experiment.init_from:
        meta = load.open_checkpoint(experiment.init_from, "init_from").meta
        _refuse_overruled(experiment, meta, given)
        model = dataclasses.replace(
            model, **{name: getattr(meta.model, name) for name in INHERITED_SIZES}
        )
        # Other fields of the experiment may not fit the sizes of the checkpoint.
        validation.validate_model(model)
        if experiment.finetune:
            validation.validate_head(experiment.finetune, model)
        return tokenizer_lib.from_json(meta.tokenizer_json), model
    saved = os.path.join(workdir, "tokenizer.json")
    if exists(saved) and is_folder(os.path.join(workdir, "checkpoints")):
        tokenizer = tokenizer_lib.load(saved)
    else:
        if experiment.pretrain:
            texts = stages_lib.pretrain_texts(data["pretrain"])
            tokenizer = tokenizer_lib.build(experiment.tokenizer, texts, texts.fingerprint)
        else:
            assert experiment.finetune is not None
            labelled = stages_lib.finetune_texts(data["finetune"], experiment.finetune)
            tokenizer = tokenizer_lib.build(experiment.tokenizer, labelled)
    size = model.vocab_size or len(tokenizer)
    require(
        size >= len(tokenizer),
        f"`model.vocab_size`={size}: the tokenizer has {len(tokenizer)} ids",
    )
    return tokenizer, dataclasses.replace(model, vocab_size=size)


def _refuse_overruled(experiment: Experiment, meta: Meta, given: Collection[str]) -> None:
    """Refuses fields, set by flag, that differ from the checkpoint in `init_from`."""
    own = f"is that of `init_from`={experiment.init_from}"
    for name in sorted(given):
        part, _, field = name.partition(".")
        require(part != "tokenizer", f"`{name}`: the tokenizer {own}; leave this flag out")
        if part != "model" or field not in INHERITED_SIZES:
            continue
        ours, theirs = getattr(experiment.model, field), getattr(meta.model, field)
        # The meaning of 0 in these fields.
        default = {"vocab_size": meta.model.vocab_size, "ffn_width": 4 * meta.model.width}
        require(
            (ours or default.get(field)) == (theirs or default.get(field)),
            f"`{name}`={ours}: the size {own}, {theirs}; leave this flag out",
        )


def _build_stages(experiment: Experiment, setup: Setup, data: dict[str, Any]) -> list[Stage]:
    """Builds the stages in the order in which they are trained."""
    stages = []
    if experiment.pretrain:
        built_probes = [
            probes.build(name, config, setup.tokenizer, setup.model.context_length)
            for name, config in experiment.probes.items()
        ]
        stages.append(
            stages_lib.pretrain(experiment.pretrain, data["pretrain"], setup, built_probes)
        )
    if experiment.finetune:
        stage = stages_lib.finetune(experiment.finetune, data["finetune"], setup)
        stages.append(stage)
        if experiment.finetune.compare_from_scratch:
            name = schema.Stage.FINETUNE_FROM_SCRATCH
            stages.append(dataclasses.replace(stage, name=name, notes=()))
    return stages


def _write_configuration(context: RunContext) -> None:
    """Writes config.json and tokenizer.json, and checks that all processes share the workdir."""
    if context.is_main:
        path = os.path.join(context.workdir, "config.json")
        files.write_json(path, schema.to_dict(context.experiment))
        path = os.path.join(context.workdir, "tokenizer.json")
        files.write_atomically(path, context.setup.tokenizer.to_json().encode())
    if not context.trial:
        require_shared(context.workdir)


def _train_stages(context: RunContext, stages: list[Stage]) -> dict[str, Any]:
    """Trains the stages in order; returns the summary."""
    path = os.path.join(context.workdir, "summary.json")
    old = broadcast("summary.json", lambda: files.read_json(path) if exists(path) else {})
    summary: dict[str, Any] = {}
    pretrained: Params | None = None
    context.reporter.say(mesh_lib.describe_machine())
    for stage in stages:
        for note in stage.notes:
            context.reporter.say(note)
        from_scratch = stage.name == schema.Stage.FINETUNE_FROM_SCRATCH or stage.transfer == "none"
        start = None if from_scratch else _pretrained_params(context, pretrained)
        params, summary[stage.name] = _train_stage(context, stage, start, old.get(stage.name))
        if stage.name == schema.Stage.PRETRAIN:
            pretrained = params
        if context.is_main:
            # Entries of later stages stay: this run may be stopped before it reaches them.
            later = {stage.name: old[stage.name] for stage in stages if stage.name in old}
            files.write_json(path, later | summary)
    return summary


def _pretrained_params(
    context: RunContext, pretrained: Params | None
) -> Callable[[], Params] | None:
    """Returns a function that returns the pretrained parameters; None if there are none.

    A function, because a stage that continues from a checkpoint does not need them.
    """
    if pretrained is not None:
        return lambda: pretrained
    path, mesh = context.experiment.init_from, context.setup.mesh
    if not path:
        return None
    return lambda: load.open_checkpoint(path, "init_from").load_params(mesh)


def _train_stage(
    context: RunContext,
    stage: Stage,
    pretrained: Callable[[], Params] | None,
    old: dict[str, Any] | None,
) -> tuple[Params, dict[str, Any]]:
    """Trains one stage to its end.

    Args:
      context: the run.
      stage: the stage.
      pretrained: returns the parameters to start from; None means random parameters.
      old: the stage's entry in the summary of an earlier run.

    Returns:
      The best parameters, and the stage's entry in the summary.
    """
    meta = _make_meta(context, stage)
    with _open_checkpoints(context, stage) as checkpoints:
        make, mesh = initial_state(stage.model, stage.optimizer), context.setup.mesh
        key = jax.random.key(context.setup.seed)
        like = state_lib.abstract(make, mesh, key)
        restored = checkpoints.restore_newest(like, lambda other: _require_same_run(meta, other))
        if restored is None:
            state, start = _first_state(make, mesh, key, pretrained, stage.transfer), 0
        else:
            state, start = restored
            context.reporter.say(
                f"{stage.name}: continuing at step {start:,} of {stage.total_steps:,}"
            )
        finished = old if start == stage.total_steps else None
        if not finished:
            context.log.rewind(stage.name, start)
        trainer = Trainer(context, stage, checkpoints, meta, state, start)
        speed = trainer.train()
        del state, restored, trainer  # they hold the buffers of the training state
        best, params = checkpoints.restore_best_params(like.params)
        scores = checkpoints.metrics(best)
    # If all steps were done before this run, the earlier summary has the speed.
    measured = speed or old or {}
    speed = {name: measured.get(name, 0.0) for name in ("tokens_per_second", "input_wait")}
    return params, finished or _summarise_stage(context, stage, params, scores, speed)


def _open_checkpoints(context: RunContext, stage: Stage) -> Store:
    if context.trial:
        return MemoryStore(context.workdir, stage.metric)
    policy = context.experiment.checkpoint
    return CheckpointStore(context.workdir, stage.name, policy, stage.metric)


def _first_state(
    make: Callable[[jax.Array], TrainState],
    mesh: Mesh,
    key: jax.Array,
    pretrained: Callable[[], Params] | None,
    transfer: str,
) -> TrainState:
    """Returns the state before the first step.

    Args:
      make: from `initial_state`.
      mesh: the devices.
      key: of the random parameters.
      pretrained: returns the parameters to start from, all but the task head; None: random ones.
      transfer: the layers that are used of them, as in `FinetuneConfig.transfer`.
    """
    state = state_lib.born_sharded(make, mesh, key)
    if pretrained is None:
        return state
    params = state_lib.merge_params(pretrained(), state.params, (TASK_HEAD,))
    if transfer != "all":
        params = state_lib.transfer_layers(params, state.params, int(transfer))
    return state.replace(params=params)


def _make_meta(context: RunContext, stage: Stage) -> Meta:
    """Returns the metadata of the stage's checkpoints, without a ledger."""
    tokenizer = context.setup.tokenizer
    return Meta(
        stage=stage.name,
        model=context.setup.model,
        tokenizer_json=tokenizer.to_json(),
        tokenizer_hash=tokenizer.hash,
        task=stage.spec,
        metric=stage.metric,
        experiment=schema.to_dict(context.experiment),
        data_fingerprint=stage.fingerprint,
    )


def _require_same_run(ours: Meta, other: Meta) -> None:
    """Refuses to continue from a checkpoint of another tokenizer, task or training data."""
    for name, text in (
        ("tokenizer_hash", "tokenizer"),
        ("task", "task"),
        ("data_fingerprint", "training data"),
    ):
        require(
            getattr(ours, name) == getattr(other, name),
            f"`workdir`: its {ours.stage} checkpoint was made with another {text}; "
            "restore what it was, or choose another `workdir`",
        )


def _summarise_stage(
    context: RunContext, stage: Stage, params: Params, scores: Scores, speed: dict[str, float]
) -> dict[str, Any]:
    """Returns the stage's entry in the summary; scores the test split if there is one.

    Args:
      context: the run.
      stage: the stage.
      params: its best parameters.
      scores: their validation scores.
      speed: from `Trainer.train`.

    Raises:
      Preempted: the run was asked to stop.
    """
    if stage.spec is None:
        return _summarise_pretraining(context, stage, scores, speed)
    summary: dict[str, Any] = {"steps": stage.total_steps, "validation": scores}
    if stage.test is not None:
        try:
            summary["test"] = stage.test(params)
        except StopRequested:
            text = f"{stage.name}: asked to stop; saved; the same command tests it"
            raise Preempted(text) from None
        context.log.write(stage.name, "test", stage.total_steps, summary["test"])
    return summary | {"floor": stage.baselines, **speed}


def _summarise_pretraining(
    context: RunContext, stage: Stage, scores: Scores, speed: dict[str, float]
) -> dict[str, Any]:
    model = context.setup.model
    window = context.experiment.pretrain.window if context.experiment.pretrain else 0
    per_token = flops.train_flops_per_token(model, window or model.context_length)
    # Virtual CPU devices share the cores, which the matrix products of one device use in full.
    devices = 1 if jax.default_backend() == "cpu" else context.setup.mesh.size
    ceiling = flops.matmul_ceiling(model.dtype) * devices
    return {
        "steps": stage.total_steps,
        "validation_loss": scores["loss"],
        "validation_perplexity": scores["perplexity"],
        **speed,
        "mfu": per_token * speed["tokens_per_second"] / ceiling,
        **{name: score for name, score in scores.items() if name.startswith("probe_")},
    }
