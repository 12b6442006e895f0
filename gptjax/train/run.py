"""One run: it trains the stages of an experiment, and writes checkpoints, scores and a summary.

"The summary" is the dictionary in WORKDIR/summary.json, which has one entry for each stage.
"""

import contextlib
import dataclasses
import os
import time
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax import mesh as mesh_lib
from gptjax import state as state_lib
from gptjax.checkpoint import load
from gptjax.checkpoint.load import Checkpoint
from gptjax.checkpoint.memory import MemoryStore, Store
from gptjax.checkpoint.meta import Meta
from gptjax.checkpoint.store import CheckpointStore
from gptjax.cluster import processes
from gptjax.cluster.stop import StopRequest, make_check
from gptjax.config import schema, validation
from gptjax.config.schema import Experiment, ModelConfig
from gptjax.data import splits
from gptjax.data.tokens import tokenizer as tokenizer_lib
from gptjax.errors import Preempted, StopRequested, UserError, require
from gptjax.evaluate import probes
from gptjax.interop import hub
from gptjax.interop.hub import HubModel
from gptjax.io import files, remote
from gptjax.mesh import Params
from gptjax.model import flops, frozen
from gptjax.parameters import TASK_HEAD
from gptjax.train import choices, final
from gptjax.train import stages as stages_lib
from gptjax.train.context import Options, RunContext, Setup
from gptjax.train.log import MetricsLog
from gptjax.train.loop import Trainer, has_ended
from gptjax.train.progress import Reporter
from gptjax.train.stages import Scores, Stage
from gptjax.train.step import initial_state


def run(experiment: Experiment, workdir: str, options: Options | None = None) -> dict[str, Any]:
    """Trains the stages of the experiment in order.

    If an earlier run in this workdir was stopped, the training continues at its last checkpoint.

    Args:
      experiment: the configuration.
      workdir: the folder of the run.
      options: the other options of the run. None means the defaults.

    Returns:
      The summary, which is also written to WORKDIR/summary.json.

    Raises:
      UserError: the configuration or the data is wrong, or the workdir has another experiment.
      Preempted: the run was asked to stop, and the state has been saved.
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
    # The processes compare their configurations before they make the mesh, because making it could
    # fail in only some of the processes if their meshes differed.
    processes.require_same({"config": schema.to_dict(experiment)})
    experiment = pin_hub_model(experiment, workdir, "checkpoints", options)
    if experiment.choose and (earlier := _earlier_experiment(workdir, "checkpoints")):
        experiment = choices.keep_earlier(experiment, earlier, options.tables)
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
    """Trains a validated experiment on a mesh, and returns the summary.

    Args:
      experiment: the configuration, from `validation.validate`.
      workdir: the folder of the run.
      mesh: the devices.
      options: the other options of the run.

    Raises:
      UserError: the data is wrong, or the workdir has another experiment.
      Preempted: the run was asked to stop, and the state has been saved.
      TrainingDiverged: several updates in a row were not finite.
    """
    check_workdir(experiment, workdir, "checkpoints")
    experiment, setup, stages = prepare(experiment, workdir, mesh, options)
    # The run writes nothing before it knows that the data is valid and equal in all processes.
    facts = {
        stage.name: {"data": stage.fingerprint, "steps": stage.total_steps} for stage in stages
    }
    devices = jax.local_device_count()
    config = schema.to_dict(experiment)
    processes.require_same(
        {"config": config, "tokenizer": setup.tokenizer.hash, "devices": devices, **facts}
    )
    is_main = jax.process_index() == 0
    if not is_main:
        options = dataclasses.replace(options, reporter=Reporter(), profile=0)
    with MetricsLog(workdir, enabled=is_main) as log:
        if is_main:
            files.write_json(os.path.join(workdir, "config.json"), config)
            tokenizer_path = os.path.join(workdir, "tokenizer.json")
            files.write_atomically(tokenizer_path, setup.tokenizer.to_json().encode())
        if not options.trial:
            processes.require_shared(workdir)
        return _train_stages(RunContext(experiment, workdir, setup, log, options), stages)


def prepare(
    experiment: Experiment, workdir: str, mesh: Mesh, options: Options
) -> tuple[Experiment, Setup, list[Stage]]:
    """Loads the data of a validated experiment and builds its stages.

    It writes nothing to `workdir`.

    Args:
      experiment: the configuration, from `validation.validate`.
      workdir: the folder of the run. If it has checkpoints, then its tokenizer is used, except if
        the experiment sets `init_from`.
      mesh: the devices.
      options: the other options of the run.

    Returns:
      The experiment with the values that the data has chosen (`Experiment.choose`), the values
      that all stages share, and the stages in the order of their training.

    Raises:
      UserError: the data is wrong, or a field contradicts the checkpoint in `init_from`.
    """
    data: dict[str, Any] = {}  # name of a stage -> name of a split -> texts or labelled rows
    if experiment.pretrain:
        data["pretrain"] = splits.text_splits(experiment.pretrain, options.tables.get("pretrain"))
    if experiment.finetune:
        rows = options.tables.get("finetune")
        data["finetune"] = splits.labelled_splits(experiment.finetune, experiment.seed, rows)
    tokenizer, model = _choose_tokenizer_and_sizes(experiment, workdir, data, options)
    lines: tuple[str, ...] = ()
    if experiment.choose:
        experiment, model, lines = choices.choose(
            experiment, model, tokenizer, data["finetune"], options.tables
        )
    setup = Setup(model, tokenizer, mesh, experiment.seed, options.check_stop)
    first, *others = _build_stages(experiment, setup, data)
    first = dataclasses.replace(first, notes=(*lines, *first.notes))
    return experiment, setup, [first, *others]


def check_workdir(experiment: Experiment, workdir: str, product: str) -> None:
    """Requires that the workdir can be written to, and does not have another experiment.

    Args:
      experiment: the configuration.
      workdir: the folder of the run.
      product: the name of the file or folder in the workdir that has the results of a run. If it is
        missing, the workdir has no results yet, and is accepted with any configuration.

    Raises:
      UserError: the workdir cannot be written to, or has results of another configuration.
    """
    old = _earlier_experiment(workdir, product)
    if old is None:
        return
    # Both are compared as dictionaries. A file of an older version lacks new fields, which have got
    # their defaults.
    changes = schema.differences(schema.to_dict(old), schema.to_dict(experiment))
    more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
    require(
        not changes,
        f"`workdir`={workdir}: holds another experiment ({'; '.join(changes[:3])}{more}); "
        "choose another `workdir` or give the same configuration",
    )


def _earlier_experiment(workdir: str, product: str) -> Experiment | None:
    """Returns the configuration with which the run in the workdir began; None if there is no run.

    Args:
      workdir: the folder of the run.
      product: the name of the results in the workdir. If they are missing, there was no run.

    Raises:
      UserError: the workdir cannot be written to.
    """
    remote.require_workdir(workdir)
    path = os.path.join(workdir, "config.json")
    if not (remote.exists(path) and remote.exists(os.path.join(workdir, product))):
        return None
    return schema.from_dict(Experiment, files.read_json(path), path)


def pin_hub_model(
    experiment: Experiment, workdir: str, product: str, options: Options
) -> Experiment:
    """Returns the experiment with the commit of the model of the hub in `init_from`.

    The processes of a run get the same commit. A run that is continued gets the commit with which
    it began, also if the branch has a newer one. If `init_from` is not a model of the hub, the
    experiment is not changed.

    Args:
      experiment: the configuration, from `validation.validate`.
      workdir: the folder of the run.
      product: the name of the results in the workdir, as in `check_workdir`.
      options: the options of the run. If `options.given` lacks `tokenizer.words`, it becomes exact.

    Raises:
      UserError: the model cannot be downloaded.
    """
    address, commit = schema.hub_address(experiment.init_from), experiment.init_from_commit
    if not address:
        return experiment
    tokenizer = experiment.tokenizer
    if not commit and "tokenizer.words" not in options.given:
        tokenizer = dataclasses.replace(tokenizer, words=schema.Words.EXACT.value)
    # Process 0 downloads the model before the other processes, which may share its disk.
    commit = commit or processes.broadcast(
        "the model of `init_from`",
        lambda: (
            _commit_of_workdir(address, workdir, product)
            or hub.pin(experiment.init_from, "init_from", options.reporter.say)
        ),
    )
    pinned = dataclasses.replace(
        experiment, init_from=address, init_from_commit=commit, tokenizer=tokenizer
    )
    return validation.validate(pinned, options.tables)


def _commit_of_workdir(address: str, workdir: str, product: str) -> str:
    """Returns the commit with which a run began; "" if the workdir holds no run of this model."""
    old = _earlier_experiment(workdir, product)
    return old.init_from_commit if old and old.init_from == address else ""


def _choose_tokenizer_and_sizes(
    experiment: Experiment, workdir: str, data: dict[str, Any], options: Options
) -> tuple[tokenizer_lib.Tokenizer, ModelConfig]:
    """Returns the tokenizer, and the model's configuration with all sizes.

    If the experiment sets `init_from`, the tokenizer and the sizes come from this checkpoint.
    Otherwise the tokenizer comes from the workdir if the workdir has checkpoints, or else it is
    built from the training texts. A vocabulary size of 0 becomes the size of the tokenizer.
    """
    model = experiment.model
    if experiment.init_from:
        own = _meta_of_workdir(workdir) if experiment.init_from_commit else None
        meta = own or open_init_from(experiment, options).meta
        _refuse_overruled(experiment, meta, options)
        model = meta.with_sizes(model)
        # The fields of the model are checked again, because the sizes of the checkpoint might not
        # fit the other fields of the experiment.
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


def _meta_of_workdir(workdir: str) -> Meta | None:
    """Returns the metadata of a checkpoint of the workdir; None if there is none.

    It has the tokenizer and the sizes of `init_from`. So a run goes on if the hub cannot be reached
    and its cache is gone.
    """
    with contextlib.suppress(UserError):  # damaged checkpoints are dealt with later
        return load.open_checkpoint(workdir).meta
    return None


def open_init_from(experiment: Experiment, options: Options) -> Checkpoint | HubModel:
    """Opens the model in `init_from` of an experiment.

    Raises:
      UserError: there is no such model, or it is damaged.
    """
    words = experiment.tokenizer.words
    commit, say = experiment.init_from_commit, options.reporter.say
    return hub.open_checkpoint(experiment.init_from, "init_from", commit, words, say)


def _refuse_overruled(experiment: Experiment, meta: Meta, options: Options) -> None:
    """Requires that no field set by flag contradicts the checkpoint in `init_from`.

    Args:
      experiment: the configuration.
      meta: the metadata of the checkpoint.
      options: the options of the run. `options.given` names the fields that were set by flag.

    Raises:
      UserError: a flag sets a field of the tokenizer, or a size of the model that differs from the
        checkpoint.
    """
    own = f"is that of `init_from`={experiment.init_from}"
    for name in sorted(options.given):
        part, _, field = name.partition(".")
        # A model of the hub can have GPT-1's tokenizer, which divides text in two ways.
        taken = part == "tokenizer" and not (experiment.init_from_commit and field == "words")
        require(not taken, f"`{name}`: the tokenizer {own}; leave this flag out")
        if part != "model" or field not in schema.INHERITED_SIZES:
            continue
        ours, theirs = getattr(experiment.model, field), getattr(meta.model, field)
        # Field -> the size that 0 stands for in this field. A vocabulary size of 0 stands for the
        # size of the checkpoint.
        default = {"vocab_size": meta.model.vocab_size, "ffn_width": 4 * meta.model.width}
        require(
            (ours or default.get(field)) == (theirs or default.get(field)),
            f"`{name}`={ours}: the size {own}, {theirs}; leave this flag out",
        )


def _build_stages(experiment: Experiment, setup: Setup, data: dict[str, Any]) -> list[Stage]:
    """Builds the stages in the order in which they are trained.

    Args:
      experiment: the configuration.
      setup: the values that all stages share.
      data: name of a stage -> name of a split -> texts or labelled rows.
    """
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
            if experiment.finetune.freeze:
                # Frozen random blocks would be no fair comparison.
                config = dataclasses.replace(experiment.finetune, freeze=0)
                stage = stages_lib.finetune(config, data["finetune"], setup)
            # The linear model of the same rows is that of the first stage.
            stages.append(dataclasses.replace(stage, name=name, notes=(), tables={}))
    return stages


def _train_stages(context: RunContext, stages: list[Stage]) -> dict[str, Any]:
    """Trains the stages in order, and returns the summary."""
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
            # The entries of later stages stay in the file, because this run may be stopped before
            # it reaches those stages.
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
      pretrained: the parameters of the pretraining in this run. None means that the run has no
        pretraining before this stage.
      old: the entry of the stage in the summary of an earlier run. None means that there is none.

    Returns:
      The best parameters, and the entry of the stage in the summary.
    """
    meta, began = _make_meta(context, stage), time.monotonic()
    with _open_checkpoints(context, stage) as checkpoints:
        make, mesh = initial_state(stage.model, stage.optimizer), context.setup.mesh
        key = jax.random.key(context.setup.seed)
        like = state_lib.abstract(make, mesh, key)
        restored = checkpoints.restore_newest(like, lambda other: _require_same_run(meta, other))
        if restored is None:
            state, start = state_lib.born_sharded(make, mesh, key), 0
            first = _first_params(context, stage, pretrained, state.params)
            state = state_lib.with_first_params(
                state, first, frozen.trained_part(first, stage.frozen)
            )
        else:
            state, start = restored
            context.options.reporter.say(
                f"{stage.name}: continuing at step {start:,} of {stage.total_steps:,}"
            )
        finished = old if has_ended(stage, checkpoints, start) else None
        if not finished:
            context.log.rewind(stage.name, start)
        complete = finished and final.is_complete(stage, finished)
        if not (complete and checkpoints.metrics(start)):
            stage = _with_states(context, stage, state.params)
        trainer = Trainer(context, stage, checkpoints, meta, state)
        speed = trainer.train()
        steps = trainer.steps
        # These variables hold the buffers of the training state. Without them the memory is free.
        del state, restored, trainer
        best, params = checkpoints.restore_best_params(like.params)
        scores = checkpoints.metrics(best)
    # If earlier runs did all steps, this run measured no speed, and the earlier summary has it.
    measured = speed or old or {}
    speed = {name: measured.get(name, 0.0) for name in ("tokens_per_second", "input_wait")}
    if finished and complete:
        return params, finished
    if stage.spec is None:
        return params, _summarise_pretraining(context, stage, scores, speed)
    seconds = time.monotonic() - began
    summary = final.summarise(context, stage, params, scores, steps, seconds) | speed
    if finished:  # its numbers stay, and what it lacks is added
        summary |= finished | {"baselines": summary["baselines"]}
    return params, summary


def _with_states(context: RunContext, stage: Stage, params: Params) -> Stage:
    """Returns the stage with the hidden states of its frozen blocks, if it has frozen blocks.

    Raises:
      Preempted: the run was asked to stop.
    """
    if stage.read_states is None:
        return stage
    say, experiment = context.options.reporter.say, context.experiment
    pretrained = (experiment.pretrain or experiment.init_from) and stage.transfer != "none"
    if not pretrained or (stage.transfer.isdecimal() and int(stage.transfer) < stage.frozen):
        say(
            f"{stage.name}: the frozen layers have random weights and are not trained; set "
            "`init_from`, or `finetune.freeze`=0"
        )
    try:
        return stage.read_states(params, say)
    except StopRequested:
        text = "asked to stop before the first step; the same command starts again"
        raise Preempted(f"{stage.name}: {text}") from None


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
      context: the run. Its experiment may name a checkpoint in `init_from`.
      stage: the stage. Its name and `transfer` decide which pretrained parameters are used.
      pretrained: the parameters of the pretraining in this run. None means the parameters of
        `init_from`. A task head is not taken from them.
      fresh: random parameters. They are used for the task head and the layers that are not
        pretrained, and for all parameters if the stage starts from scratch.
    """
    from_scratch = stage.name == schema.Stage.FINETUNE_FROM_SCRATCH or stage.transfer == "none"
    path = context.experiment.init_from
    if from_scratch or (pretrained is None and not path):
        return fresh
    if pretrained is None:
        start = open_init_from(context.experiment, context.options)
        pretrained = start.load_params(context.setup.mesh)
    params = state_lib.merge_params(pretrained, fresh, (TASK_HEAD,))
    if stage.transfer != "all":
        params = state_lib.transfer_layers(params, fresh, int(stage.transfer))
    return params


def _make_meta(context: RunContext, stage: Stage) -> Meta:
    """Returns the metadata of the stage's checkpoints. Its ledger is empty."""
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
    """Requires that a checkpoint has the tokenizer, task and training data of this run.

    Args:
      ours: the metadata of this run.
      other: the metadata of the checkpoint.

    Raises:
      UserError: one of the three differs.
    """
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


def _summarise_pretraining(
    context: RunContext, stage: Stage, scores: Scores, speed: dict[str, float]
) -> dict[str, Any]:
    model = context.setup.model
    window = context.experiment.pretrain.window if context.experiment.pretrain else 0
    per_token = flops.train_flops_per_token(model, window or model.context_length)
    # The highest possible speed grows with the number of devices, except on a CPU. Virtual CPU
    # devices share the same cores, and the matrix products of one device use all these cores.
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
