"""The orchestrator of training: data -> stages -> steps, checkpoints, scores, report."""

import dataclasses
import os
from collections.abc import Callable, Collection
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax import mesh as mesh_lib
from gptjax import state
from gptjax.checkpoint import load
from gptjax.checkpoint.memory import MemoryStore, Store
from gptjax.checkpoint.meta import Meta
from gptjax.checkpoint.store import CheckpointStore
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
from gptjax.errors import Preempted, require
from gptjax.evaluate import probes
from gptjax.io import files
from gptjax.io.remote import exists, is_folder, require_workdir
from gptjax.mesh import Params
from gptjax.model import flops, gpt
from gptjax.parameters import TASK_HEAD
from gptjax.state import TrainState
from gptjax.train import log as log_lib
from gptjax.train import optimizer as optimizer_lib
from gptjax.train import stages as stages_lib
from gptjax.train.loop import Run, Trainer
from gptjax.train.stages import Scores, Stage


def run(experiment: Experiment, workdir: str, given: Collection[str] = ()) -> dict[str, Any]:
    """Trains the experiment's stages in order, continuing where `workdir` stands.

    Args:
      experiment: what to train.
      workdir: folder of the run.
      given: the fields ("model.width") that the user asked for by flag: not silently overruled.

    Returns:
      The summary, also written to WORKDIR/summary.json.

    Raises:
      UserError: wrong configuration, data, or a workdir of another experiment.
      Preempted: asked to stop; the state is saved.
      TrainingDiverged: several updates in a row were not finite.
    """
    experiment = validation.validate(experiment)
    require(
        experiment.pretrain or experiment.finetune,
        "`config`: the experiment has nothing to train, only an ablation; use `mode`=ablate",
    )
    # Before the devices: those of a process that has another mesh would differ too.
    require_same({"config": schema.to_dict(experiment)})
    with StopRequest() as stop:
        mesh = mesh_lib.make_mesh(experiment.mesh)
        summary, _ = train(experiment, workdir, mesh, synchronised_stop(stop), given)
    return summary


def train(
    experiment: Experiment,
    workdir: str,
    mesh: Mesh,
    stop: Callable[[], bool],
    given: Collection[str] = (),
    trial: bool = False,
) -> tuple[dict[str, Any], list[Stage]]:
    """Trains a validated experiment on a mesh until `stop`; returns the summary and the stages.

    Arguments and errors besides these as in `run`; a `trial` prints nothing and keeps its best
    weights in memory only.
    """
    is_main = jax.process_index() == 0
    check_workdir(experiment, workdir, "checkpoints")
    tokenizer, model, stages = prepare(experiment, workdir, mesh, given)
    # What decides the steps. Nothing is written before all of the input has been found good.
    facts = {each.name: {"data": each.fingerprint, "steps": each.total_steps} for each in stages}
    devices = jax.local_device_count()
    require_same({"tokenizer": tokenizer.hash, "devices": devices, **facts})
    with log_lib.MetricsLog(workdir, enabled=is_main) as log:
        context = Run(experiment, workdir, mesh, tokenizer, model, log, stop, is_main, trial)
        _write_start(context)
        return _train_stages(context, stages), stages


def prepare(
    experiment: Experiment, workdir: str, mesh: Mesh, given: Collection[str] = ()
) -> tuple[Tokenizer, ModelConfig, list[Stage]]:
    """Loads the data of a validated experiment; returns tokenizer, sizes and stages.

    Arguments and errors as in `run`. Nothing is written to `workdir`.
    """
    data = _load_data(experiment)
    tokenizer, model = _tokenizer_and_model(experiment, workdir, data, given)
    return tokenizer, model, _build_stages(experiment, model, tokenizer, mesh, data)


def check_workdir(experiment: Experiment, workdir: str, product: str) -> None:
    """Refuses a place that cannot be written, or whose `product` has another configuration."""
    require_workdir(workdir)
    path = os.path.join(workdir, "config.json")
    if not (exists(path) and exists(os.path.join(workdir, product))):
        return
    # Through the configuration: a file of an older version lacks newer fields.
    old = schema.from_dict(Experiment, files.read_json(path), path)
    found = schema.differences(schema.to_dict(old), schema.to_dict(experiment))
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    require(
        not found,
        f"`workdir`={workdir}: holds another experiment ({'; '.join(found[:3])}{more}); "
        "choose another `workdir` or give the same configuration",
    )


def _load_data(experiment: Experiment) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if experiment.pretrain:
        data["pretrain"] = splits.text_splits(experiment.pretrain)
    if experiment.finetune:
        data["finetune"] = splits.labelled_splits(experiment.finetune, experiment.seed)
    return data


def _tokenizer_and_model(
    experiment: Experiment, workdir: str, data: dict[str, Any], given: Collection[str]
) -> tuple[Tokenizer, ModelConfig]:
    """The tokenizer (of `init_from`, the workdir, or new) and the sizes that go with it."""
    model = experiment.model
    if experiment.init_from:
        meta = load.open_checkpoint(experiment.init_from, "init_from").meta
        _refuse_overruled(experiment, meta, given)
        model = dataclasses.replace(
            model, **{name: getattr(meta.model, name) for name in INHERITED_SIZES}
        )
        # What suited the experiment's own sizes may not suit these.
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
    """Refuses a flag that asks for another tokenizer or size than the checkpoint's."""
    own = f"is that of `init_from`={experiment.init_from}"
    for name in sorted(given):
        part, _, field = name.partition(".")
        require(part != "tokenizer", f"`{name}`: the tokenizer {own}; leave this flag out")
        if part != "model" or field not in INHERITED_SIZES:
            continue
        ours, theirs = getattr(experiment.model, field), getattr(meta.model, field)
        # What a 0 stands for.
        usual = {"vocab_size": meta.model.vocab_size, "ffn_width": 4 * meta.model.width}.get(field)
        require(
            (ours or usual) == (theirs or usual),
            f"`{name}`={ours}: the size {own}, {theirs}; leave this flag out",
        )


def _build_stages(
    experiment: Experiment,
    model: ModelConfig,
    tokenizer: Tokenizer,
    mesh: Mesh,
    data: dict[str, Any],
) -> list[Stage]:
    shared = (tokenizer, mesh, experiment.seed)
    stages = []
    if experiment.pretrain:
        asked = [
            probes.build(name, each, tokenizer, model.context_length)
            for name, each in experiment.probes.items()
        ]
        stages.append(
            stages_lib.pretrain(experiment.pretrain, model, data["pretrain"], *shared, asked)
        )
    if experiment.finetune:
        stage = stages_lib.finetune(experiment.finetune, model, data["finetune"], *shared)
        stages.append(stage)
        if experiment.finetune.compare_from_scratch:
            name = schema.Stage.FINETUNE_FROM_SCRATCH
            stages.append(dataclasses.replace(stage, name=name, notes=()))
    for stage in stages:
        part = schema.Stage.FINETUNE if stage.spec else schema.Stage.PRETRAIN
        warmup = stage.optimizer.warmup_steps
        require(
            warmup < stage.total_steps,
            f"`{part}.optimizer.warmup_steps`={warmup}: must be below the "
            f"{stage.total_steps} steps",
        )
        require(
            not stage.transfer.isdecimal() or int(stage.transfer) <= model.num_layers,
            f"`finetune.transfer`={stage.transfer}: the model has {model.num_layers} layers",
        )
    return stages


def _write_start(context: Run) -> None:
    """Writes what describes the run."""
    if context.is_main:
        path = os.path.join(context.workdir, "config.json")
        files.write_json(path, schema.to_dict(context.experiment))
        path = os.path.join(context.workdir, "tokenizer.json")
        files.write_atomically(path, context.tokenizer.to_json().encode())
    if not context.trial:
        require_shared(context.workdir)


def _train_stages(context: Run, stages: list[Stage]) -> dict[str, Any]:
    path = os.path.join(context.workdir, "summary.json")
    old = broadcast("summary.json", lambda: files.read_json(path) if exists(path) else {})
    summary: dict[str, Any] = {}
    pretrained: Params | None = None
    context.say(mesh_lib.describe_machine())
    for stage in stages:
        for note in stage.notes:
            context.say(note)
        alone = stage.name == schema.Stage.FINETUNE_FROM_SCRATCH or stage.transfer == "none"
        start_from = None if alone else _starting_point(context, pretrained)
        params, summary[stage.name] = _train_stage(context, stage, start_from, old.get(stage.name))
        if stage.name == schema.Stage.PRETRAIN:
            pretrained = params
        if context.is_main:
            # Later stages that are done stay in the file, should this run not reach them.
            later = {each.name: old[each.name] for each in stages if each.name in old}
            files.write_json(path, later | summary)
    return summary


def _starting_point(context: Run, pretrained: Params | None) -> Callable[[], Params] | None:
    """Where a stage's weights come from, asked only by a stage that has no checkpoint yet."""
    if pretrained is not None:
        return lambda: pretrained
    path = context.experiment.init_from
    if not path:
        return None
    return lambda: load.open_checkpoint(path, "init_from").load_params(context.mesh)


def _initial_state(context: Run, stage: Stage) -> Callable[[jax.Array], TrainState]:
    optimizer = optimizer_lib.build(stage.optimizer, stage.total_steps)
    return lambda key: state.create(gpt.init_params(stage.model, key), optimizer)


def _train_stage(
    context: Run,
    stage: Stage,
    pretrained: Callable[[], Params] | None,
    old: dict[str, Any] | None,
) -> tuple[Params, dict[str, Any]]:
    """Trains one stage to its end; returns its best parameters and its part of the summary."""
    make = _initial_state(context, stage)
    meta = _meta(context, stage)
    checkpoints: Store
    if context.trial:
        checkpoints = MemoryStore(context.workdir, stage.metric)
    else:
        checkpoints = CheckpointStore(
            context.workdir, stage.name, context.experiment.checkpoint, stage.metric
        )
    with checkpoints:
        key = jax.random.key(context.experiment.seed)
        like = state.abstract(make, context.mesh, key)
        found = checkpoints.restore_newest(like, lambda other: _same_run(meta, other))
        if found is None:
            train_state = _begin(make, context.mesh, key, pretrained, stage.transfer)
            start = 0
        else:
            train_state, start = found
            context.say(f"{stage.name}: continuing at step {start:,} of {stage.total_steps:,}")
        finished = old if start == stage.total_steps else None
        if not finished:
            context.log.rewind(stage.name, start)
        speed = Trainer(context, stage, checkpoints, meta).train(train_state, start)
        del train_state
        best, params = checkpoints.restore_best_params(like.params)
        scores = checkpoints.metrics(best)
    # A run that was stopped after its last step has nothing left to measure.
    measured = speed or old or {}
    speed = {name: measured.get(name, 0.0) for name in ("tokens_per_second", "input_wait")}
    return params, finished or _stage_summary(context, stage, params, scores, speed)


def _begin(
    make: Callable[[jax.Array], TrainState],
    mesh: Mesh,
    key: jax.Array,
    pretrained: Callable[[], Params] | None,
    transfer: str,
) -> TrainState:
    """A state at step 0, from random weights or (all but the task head) from `pretrained` ones."""
    fresh = state.born_sharded(make, mesh, key)
    if pretrained is None:
        return fresh
    params = state.merge_params(pretrained(), fresh.params, (TASK_HEAD,))
    if transfer != "all":
        params = state.keep_layers(params, fresh.params, int(transfer))
    return fresh.replace(params=params)


def _meta(context: Run, stage: Stage) -> Meta:
    return Meta(
        stage=stage.name,
        model=context.model,
        tokenizer_json=context.tokenizer.to_json(),
        tokenizer_hash=context.tokenizer.hash,
        task=stage.spec,
        metric=stage.metric,
        experiment=schema.to_dict(context.experiment),
        data_fingerprint=stage.fingerprint,
    )


def _same_run(ours: Meta, other: Meta) -> None:
    """Refuses to continue a checkpoint of another tokenizer, task or training data."""
    for name, what in (
        ("tokenizer_hash", "tokenizer"),
        ("task", "task"),
        ("data_fingerprint", "training data"),
    ):
        require(
            getattr(ours, name) == getattr(other, name),
            f"`workdir`: its {ours.stage} checkpoint was made with another {what}; "
            "restore what it was, or choose another `workdir`",
        )


def _stage_summary(
    context: Run, stage: Stage, params: Params, scores: Scores, speed: dict[str, float]
) -> dict[str, Any]:
    if stage.spec is None:
        window = context.experiment.pretrain.window if context.experiment.pretrain else 0
        per_token = flops.train_flops_per_token(
            context.model, window or context.model.context_length
        )
        # Virtual CPU devices share the cores that one device's products already use in full.
        devices = 1 if jax.default_backend() == "cpu" else context.mesh.size
        ceiling = flops.matmul_ceiling(context.model.dtype) * devices
        found = {name: score for name, score in scores.items() if name.startswith("probe_")}
        return {
            "steps": stage.total_steps,
            "validation_loss": scores["loss"],
            "validation_perplexity": scores["perplexity"],
            **speed,
            "mfu": per_token * speed["tokens_per_second"] / ceiling,
            **found,
        }
    summary: dict[str, Any] = {"steps": stage.total_steps, "validation": scores}
    if stage.test is not None:
        summary["test"] = stage.test(params, context.stop)
        if summary["test"] is None:
            raise Preempted(f"{stage.name}: asked to stop; saved; the same command tests it")
        context.log.write(stage.name, "test", stage.total_steps, summary["test"])
    return summary | {"floor": stage.floors, **speed}
