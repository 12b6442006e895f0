"""One run: the stages of an experiment, with checkpoints, scores and a summary."""

import dataclasses
import os
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax import mesh as mesh_lib
from gptjax import state as state_lib
from gptjax.checkpoint import load
from gptjax.checkpoint.memory import MemoryStore, Store
from gptjax.checkpoint.meta import Meta
from gptjax.checkpoint.store import CheckpointStore
from gptjax.cluster import processes
from gptjax.cluster.stop import StopRequest, make_check
from gptjax.config import schema, validation
from gptjax.config.schema import Experiment, ModelConfig
from gptjax.data import splits
from gptjax.data.tokens import tokenizer as tokenizer_lib
from gptjax.errors import Preempted, StopRequested, require
from gptjax.evaluate import probes
from gptjax.io import files, remote
from gptjax.mesh import Params
from gptjax.model import flops
from gptjax.parameters import TASK_HEAD
from gptjax.train import stages as stages_lib
from gptjax.train.context import Options, RunContext, Setup
from gptjax.train.log import MetricsLog
from gptjax.train.loop import Trainer
from gptjax.train.progress import Reporter
from gptjax.train.stages import Scores, Stage
from gptjax.train.step import initial_state


def run(experiment: Experiment, workdir: str, options: Options | None = None) -> dict[str, Any]:
    """Trains the experiment's stages in order. A run that was stopped continues where it was.

    Args:
      experiment: the configuration.
      workdir: folder of the run.
      options: its other options; None means the defaults.

    Returns:
      The summary, which is also written to WORKDIR/summary.json.

    Raises:
      UserError: wrong configuration or data, or a workdir of another experiment.
      Preempted: the run was asked to stop; the state is saved.
      TrainingDiverged: several updates in a row were not finite.
    """
    options = options or Options()
    for stage in options.tables:
        known = stage in (schema.Stage.PRETRAIN, schema.Stage.FINETUNE)
        require(
            known and getattr(experiment, stage),
            f"`tables`: the experiment has no stage {stage!r}",
        )
    experiment = validation.validate(experiment, options.tables)
    require(options.profile >= 0, f"`profile`={options.profile}: must not be negative")
    require(
        not (options.profile and remote.is_remote(workdir)),
        f"`profile`={options.profile}: a trace is written to a folder, and `workdir`={workdir} is "
        "in a bucket",
    )
    require(
        experiment.pretrain or experiment.finetune,
        "`config`: the experiment has nothing to train, only an ablation; use `mode`=ablate",
    )
    # Before the mesh is made, which may fail in some of the processes if their meshes differ.
    processes.require_same({"config": schema.to_dict(experiment)})
    with StopRequest() as stop:
        mesh = mesh_lib.make_mesh(experiment.mesh)
        check_stop = make_check(processes.synchronised_stop(stop))
        try:
            options = dataclasses.replace(options, check_stop=check_stop)
            return train(experiment, workdir, mesh, options)
        except Preempted as error:
            error.interrupted = stop.interrupted
            raise


def train(experiment: Experiment, workdir: str, mesh: Mesh, options: Options) -> dict[str, Any]:
    """Trains a validated experiment on a mesh; returns the summary.

    Args:
      experiment: the configuration.
      workdir: folder of the run.
      mesh: the devices.
      options: its other options.

    Raises:
      The exceptions of `run`.
    """
    check_workdir(experiment, workdir, "checkpoints")
    setup, stages = prepare(experiment, workdir, mesh, options)
    # Nothing is written before the data is known to be valid, and the same in all processes.
    facts = {
        stage.name: {"data": stage.fingerprint, "steps": stage.total_steps} for stage in stages
    }
    devices = jax.local_device_count()
    processes.require_same({"tokenizer": setup.tokenizer.hash, "devices": devices, **facts})
    is_main = jax.process_index() == 0
    if not is_main:
        options = dataclasses.replace(options, reporter=Reporter(), profile=0)
    with MetricsLog(workdir, enabled=is_main) as log:
        if is_main:
            files.write_json(os.path.join(workdir, "config.json"), schema.to_dict(experiment))
            tokenizer_path = os.path.join(workdir, "tokenizer.json")
            files.write_atomically(tokenizer_path, setup.tokenizer.to_json().encode())
        if not options.trial:
            processes.require_shared(workdir)
        return _train_stages(RunContext(experiment, workdir, setup, log, options), stages)


def prepare(
    experiment: Experiment, workdir: str, mesh: Mesh, options: Options
) -> tuple[Setup, list[Stage]]:
    """Loads the data of a validated experiment and builds its stages.

    Nothing is written to `workdir`. Arguments and errors are those of `train`.
    """
    data: dict[str, Any] = {}  # stage -> split -> texts or labelled rows
    if experiment.pretrain:
        data["pretrain"] = splits.text_splits(experiment.pretrain, options.tables.get("pretrain"))
    if experiment.finetune:
        rows = options.tables.get("finetune")
        data["finetune"] = splits.labelled_splits(experiment.finetune, experiment.seed, rows)
    tokenizer, model = _choose_tokenizer_and_sizes(experiment, workdir, data, options)
    setup = Setup(model, tokenizer, mesh, experiment.seed, options.check_stop)
    return setup, _build_stages(experiment, setup, data)


def check_workdir(experiment: Experiment, workdir: str, product: str) -> None:
    """Refuses a workdir that cannot be written to, or that holds another experiment.

    Args:
      experiment: the configuration.
      workdir: folder of the run.
      product: name of the file or folder with the results of a run. A workdir without it has no
        results yet, and is accepted with any configuration.
    """
    remote.require_workdir(workdir)
    path = os.path.join(workdir, "config.json")
    if not (remote.exists(path) and remote.exists(os.path.join(workdir, product))):
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


def _choose_tokenizer_and_sizes(
    experiment: Experiment, workdir: str, data: dict[str, Any], options: Options
) -> tuple[tokenizer_lib.Tokenizer, ModelConfig]:
    """Returns the tokenizer, and the model's configuration with the tokenizer's vocabulary size.

    The tokenizer is that of `init_from`, else that of the workdir, else a new one.
    """
    model = experiment.model
    if experiment.init_from:
        meta = load.open_checkpoint(experiment.init_from, "init_from").meta
        _refuse_overruled(experiment, meta, options)
        model = meta.with_sizes(model)
        # Other fields of the experiment may not fit the sizes of the checkpoint.
        validation.validate_model(model)
        if experiment.finetune:
            validation.validate_head(experiment.finetune, model)
        return tokenizer_lib.from_json(meta.tokenizer_json), model
    saved = os.path.join(workdir, "tokenizer.json")
    if remote.exists(saved) and remote.is_folder(os.path.join(workdir, "checkpoints")):
        tokenizer = tokenizer_lib.load(saved)
    else:
        if experiment.pretrain:
            texts = data["pretrain"]["train"]
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


def _refuse_overruled(experiment: Experiment, meta: Meta, options: Options) -> None:
    """Refuses fields, set by flag, that differ from the checkpoint in `init_from`."""
    own = f"is that of `init_from`={experiment.init_from}"
    for name in sorted(options.given):
        part, _, field = name.partition(".")
        require(part != "tokenizer", f"`{name}`: the tokenizer {own}; leave this flag out")
        if part != "model" or field not in schema.INHERITED_SIZES:
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


def _train_stages(context: RunContext, stages: list[Stage]) -> dict[str, Any]:
    """Trains the stages in order; returns the summary."""
    path = os.path.join(context.workdir, "summary.json")
    old = processes.broadcast(
        "summary.json", lambda: files.read_json(path) if remote.exists(path) else {}
    )
    summary: dict[str, Any] = {}
    pretrained: Params | None = None
    context.options.reporter.say(mesh_lib.describe_machine())
    for stage in stages:
        for note in stage.notes:
            context.options.reporter.say(note)
        params, summary[stage.name] = _train_stage(context, stage, pretrained, old.get(stage.name))
        if stage.name == schema.Stage.PRETRAIN:
            pretrained = params
        if jax.process_index() == 0:
            # Entries of later stages stay: this run may be stopped before it reaches them.
            later = {stage.name: old[stage.name] for stage in stages if stage.name in old}
            files.write_json(path, later | summary)
    return summary


def _train_stage(
    context: RunContext, stage: Stage, pretrained: Params | None, old: dict[str, Any] | None
) -> tuple[Params, dict[str, Any]]:
    """Trains one stage to its end.

    Args:
      context: the run.
      stage: the stage.
      pretrained: the parameters of the run's pretraining; None if it has none.
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
            state, start = state_lib.born_sharded(make, mesh, key), 0
            state = state.replace(params=_first_params(context, stage, pretrained, state.params))
        else:
            state, start = restored
            context.options.reporter.say(
                f"{stage.name}: continuing at step {start:,} of {stage.total_steps:,}"
            )
        finished = old if start == stage.total_steps else None
        if not finished:
            context.log.rewind(stage.name, start)
        trainer = Trainer(context, stage, checkpoints, meta, state)
        speed = trainer.train()
        del state, restored, trainer  # they hold the buffers of the training state
        best, params = checkpoints.restore_best_params(like.params)
        scores = checkpoints.metrics(best)
    # If all steps were done before this run, the earlier summary has the speed.
    measured = speed or old or {}
    speed = {name: measured.get(name, 0.0) for name in ("tokens_per_second", "input_wait")}
    return params, finished or _summarise_stage(context, stage, params, scores, speed)


def _open_checkpoints(context: RunContext, stage: Stage) -> Store:
    if context.options.trial:
        return MemoryStore(context.workdir, stage.metric)
    policy = context.experiment.checkpoint
    return CheckpointStore(context.workdir, stage.name, policy, stage.metric)


def _first_params(
    context: RunContext, stage: Stage, pretrained: Params | None, fresh: Params
) -> Params:
    """Returns the parameters before the first step.

    Args:
      context: the run. Its `init_from` is read if there are no other pretrained parameters.
      stage: says which layers of the pretrained parameters are used.
      pretrained: parameters to start from, all but the task head; None: those of `init_from`.
      fresh: random parameters, for what has no pretrained ones.
    """
    from_scratch = stage.name == schema.Stage.FINETUNE_FROM_SCRATCH or stage.transfer == "none"
    path = context.experiment.init_from
    if from_scratch or (pretrained is None and not path):
        return fresh
    if pretrained is None:
        pretrained = load.open_checkpoint(path, "init_from").load_params(context.setup.mesh)
    params = state_lib.merge_params(pretrained, fresh, (TASK_HEAD,))
    if stage.transfer != "all":
        params = state_lib.transfer_layers(params, fresh, int(stage.transfer))
    return params


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
