"""Times one epoch of joint fine-tuning with gptjax, transformers and PyTorch, reading included.

python benchmarks/finetune.py --size=tutorial --train_file=msr_paraphrase_train.txt \
    '--text=#1 String' '--text_pair=#2 String' --label=Quality

gptjax packs. The others make batches of examples of about equal length, and pad each example to the
longest of its batch. All start from random weights, read the same CSV file, use the same tokenizer
file, make the same sequences and minimise task + 0.5 * LM over all sequences. None of them
validates or saves. gptjax runs full batches only, and fills the last one with examples of the next
epoch. The last batch of the others is smaller. Without --train_file the rows are synthetic, with
the lengths of MRPC.
"""

import dataclasses
import pathlib
import sys
import tempfile
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np
from absl import flags

from benchmarks import harness, rows, sizes, summary
from benchmarks.harness import FLAGS
from gptjax.errors import require

flags.DEFINE_string(
    "train_file", "", "CSV, TSV, JSON lines or Parquet; empty: synthetic rows.", flag_values=FLAGS
)
flags.DEFINE_string("text_pair", "text_pair", "Column with the second text.", flag_values=FLAGS)
flags.DEFINE_string("label", "label", "Column with the label.", flag_values=FLAGS)
flags.DEFINE_enum(
    "task", "similarity", ("classification", "entailment", "similarity"),
    "similarity: both orders of the two texts, their last states summed.",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer("batch_size", 32, "Examples a step.", flag_values=FLAGS)

CASES: dict[str, dict[str, Any]] = {
    f"{implementation}-{dtype}": {"implementation": implementation, "dtype": dtype}
    for implementation, dtype in (
        ("ours", "bfloat16"),
        ("ours", "float32"),
        ("transformers", "float32"),
        ("transformers", "autocast"),
        ("pytorch", "float32"),
        ("pytorch", "autocast"),
        ("pytorch", "bfloat16"),
    )
}
_VALIDATION_ROWS = 32
_EXTRA = {
    "start_seconds": "start-up s",
    "data_seconds": "read + tokenise s",
    "model_seconds": "build model s",
    "compile_seconds": "compile s",
    "steps_seconds": "steps s",
    "steps": "steps",
    "last_losses": "mean loss of last 5 steps",
}


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Runs an epoch in a worker; "seconds" is one number, from process start to last step."""
    run = _ours if spec["implementation"] == "ours" else _peer
    marks, seconds, shapes, losses = run(spec)
    compile_seconds = _compile_seconds(seconds, shapes)
    end = time.time()
    return {
        "seconds": [end - spec["started"]], "first_seconds": seconds[0],
        "start_seconds": marks[0] - spec["started"], "data_seconds": marks[1] - marks[0],
        "model_seconds": marks[2] - marks[1], "compile_seconds": compile_seconds,
        "steps_seconds": sum(seconds) - compile_seconds, "step_seconds": seconds,
        "steps": len(seconds), "units": spec["examples"], "losses": losses,
        "last_losses": float(np.mean(losses[-5:])),
    }  # fmt: skip


def _compile_seconds(seconds: list[float], shapes: list[Any]) -> float:
    """Returns the time that the first step of each shape takes more than later ones of the shape.

    A shape that occurs once is compared with the median of all steps.
    """
    total = 0.0
    for shape in set(shapes):
        own = [each for each, other in zip(seconds, shapes, strict=False) if other == shape]
        total += max(0.0, own[0] - float(np.median(own[1:] or seconds)))
    return total


def _ours(spec: dict[str, Any]) -> tuple[list[float], list[float], list[Any], list[float]]:
    """Runs an epoch with gptjax.

    Returns:
      The times at which the run had started, the data was ready and the model was ready; and the
      seconds, shapes and losses of the steps.
    """
    from benchmarks import with_gptjax
    from gptjax import mesh as mesh_lib
    from gptjax.config.schema import MeshConfig, TokenizerConfig
    from gptjax.data import splits
    from gptjax.data.tokens import tokenizer
    from gptjax.train import stages
    from gptjax.train.context import Setup

    marks = [time.time()]
    config = rows.finetune_config(spec)
    data = splits.labelled_splits(config, 0)
    own = tokenizer.build(TokenizerConfig(file=spec["tokenizer"]), [])
    model_config = sizes.model_config(sizes.Size(**spec["model"]), spec["dtype"])
    mesh = mesh_lib.make_mesh(MeshConfig())
    stage = stages.finetune(config, data, Setup(model_config, own, mesh, seed=0))
    marks.append(time.time())
    training = with_gptjax.Training(model_config, stage.objective, model=stage.model)
    marks.append(time.time())
    seconds, shapes, losses = [], [], []
    before = time.perf_counter()
    for batch in stage.batches.iterate(0, stage.total_steps):
        sums = training.update(batch).losses
        assert sums.task is not None
        means = [float(part.total) / float(part.weight) for part in (sums.task, sums.lm)]
        losses.append(stage.objective.total(*means))
        shapes.append(batch.tokens.shape)
        # The time includes the wait for the batch.
        now = time.perf_counter()
        seconds.append(now - before)
        before = now
    return marks, seconds, shapes, losses


def _peer(spec: dict[str, Any]) -> tuple[list[float], list[float], list[Any], list[float]]:
    """Runs an epoch with transformers or PyTorch; returns the same as `_ours`."""
    from benchmarks import with_torch, with_transformers

    marks = [time.time()]
    size = sizes.Size(**spec["model"])
    tokenizer = with_transformers.fast_tokenizer(spec["tokenizer"])
    sequences, labels, classes = with_transformers.read_examples(
        spec["train_file"], tokenizer, spec["finetune_task"], size.context_length
    )
    marks.append(time.time())
    model = with_transformers.JointModel(size, spec["implementation"], classes)
    model.train()
    training = with_torch.Training(
        model, model.loss, spec["dtype"], fused=spec["implementation"] == "pytorch"
    )
    marks.append(time.time())
    seconds, losses = [], []
    before = time.perf_counter()
    for batch in with_transformers.batches(
        sequences, labels, spec["batch_size"], tokenizer.pad_token_id
    ):
        losses.append(training.update(*batch))
        now = time.perf_counter()
        seconds.append(now - before)
        before = now
    # Without shapes the compile time is 0, because nothing is compiled.
    return marks, seconds, [], losses


def prepare(folder: pathlib.Path) -> tuple[dict[str, Any], str]:
    """Writes the files that all variants read; returns their common spec and what the data is."""
    pair = "" if FLAGS.task == "classification" else FLAGS.text_pair
    data = rows.load(FLAGS.train_file, FLAGS.text, pair, FLAGS.label, FLAGS.rows)
    batch = FLAGS.batch_size
    require(0 < batch <= len(data), f"--batch_size={batch}: must be 1 to {len(data)}, the rows")
    size = sizes.find(FLAGS.size)
    tokenizer = rows.make_tokenizer(data, size.vocab_size)
    tokenizer.save(folder / "tokenizer.json")
    size = dataclasses.replace(size, vocab_size=max(size.vocab_size, len(tokenizer)))
    source = FLAGS.train_file and pathlib.Path(FLAGS.train_file).name
    what = f"{len(data):,} {f'rows of {source}' if source else 'synthetic rows'}"
    return {
        "train_file": rows.write_csv(data, folder / "train.csv"),
        "validation_file": rows.write_csv(data[:_VALIDATION_ROWS], folder / "validation.csv"),
        "tokenizer": str(folder / "tokenizer.json"), "finetune_task": FLAGS.task,
        "batch_size": batch, "lm_weight": sizes.LM_WEIGHT, "examples": len(data),
        "model": dataclasses.asdict(size), "size": size.name,
    }, what  # fmt: skip


def main() -> None:
    """Measures all variants and writes the results."""
    size = sizes.find(FLAGS.size)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        common, what = prepare(pathlib.Path(folder))
        every = harness.variants("finetune", CASES, common)
        about = summary.About(
            name=f"finetune_{size.name}",
            title=f"One epoch of joint fine-tuning ({FLAGS.task}), end to end, {what}, batch "
            f"{FLAGS.batch_size}: {size.num_layers} layers x {size.width}, {size.num_heads} heads, "
            f"{common['model']['vocab_size']:,} tokens",
            unit="example",
            what="epoch, end to end",
            extra=_EXTRA,
            notes=(
                "From the start of the process to the last step. 'a, then b': the first round, and "
                "the median of the later ones, which find their programs in the compilation cache.",
                "No validation and no checkpoint in any of them.",
            ),
            single=True,
        )
        summary.run(about, every)


if __name__ == "__main__":
    harness.command(main)
