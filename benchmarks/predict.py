"""Times the prediction of labels for all rows of a file: gptjax, and the pipeline of transformers.

python benchmarks/predict.py --size=gpt1 --input=test.tsv --text=sentence

Both have the same random weights. gptjax exports a model for transformers, and imports it again for
itself. The table shows how many labels are equal. Without --input the rows are synthetic.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import flags

from benchmarks import harness, rows, sizes, summary
from benchmarks.harness import FLAGS
from gptjax.errors import require

flags.DEFINE_string(
    "input", "", "CSV, TSV, JSON lines or Parquet; empty: synthetic rows.", flag_values=FLAGS
)

CASES: dict[str, dict[str, Any]] = {
    # This case is the first, because the labels of the others are compared with its labels.
    "ours-float32": {"implementation": "ours", "dtype": "float32"},
    "ours-bfloat16": {"implementation": "ours", "dtype": "bfloat16"},
} | {
    f"transformers-{dtype}-batch{batch}": {
        "implementation": "transformers", "dtype": dtype, "batch": batch,
    }
    for dtype in ("float32", "bfloat16")
    for batch in (1, 8, 32)
}  # fmt: skip
_EXTRA = {
    "load_seconds": "load s",
    "compile_seconds": "compile s",
    "agree": "labels as ours in float32",
}


def make_model(spec: dict[str, Any], folder: pathlib.Path) -> dict[str, str]:
    """Writes a random classifier for transformers, and imports it; returns the folders of both."""
    import jax
    import numpy as np

    from gptjax.config.schema import TaskKind, TaskSpec
    from gptjax.data.tokens import tokenizer as tokenizer_lib
    from gptjax.interop import arrays as arrays_lib
    from gptjax.interop import convert, huggingface
    from gptjax.model import gpt as gpt_lib
    from gptjax.parameters import TASK_HEAD_KERNEL

    config = sizes.model_config(sizes.Size(**spec["model"]), "float32")
    task = TaskSpec(TaskKind.CLASSIFICATION, "text", labels=("0", "1"))
    model = gpt_lib.make_model(config, task)
    arrays = arrays_lib.flatten(gpt_lib.init_params(model, jax.random.key(0)))
    # The last states have a norm of sqrt(width), so that these logits differ from text to text.
    arrays[TASK_HEAD_KERNEL] = np.random.default_rng(0).normal(
        size=arrays[TASK_HEAD_KERNEL].shape
    ).astype(np.float32) / np.sqrt(config.width)  # fmt: skip
    tokenizer = tokenizer_lib.load(spec["tokenizer"])
    theirs, ours = folder / "transformers", folder / "ours"
    theirs.mkdir()
    huggingface.write(arrays_lib.Weights(config, arrays, tokenizer, task), theirs)
    convert.import_weights(str(theirs), str(ours), "huggingface")
    return {"transformers": str(theirs), "ours": str(ours)}


def classifier(spec: dict[str, Any]) -> Any:
    """Returns a function of the implementation: texts -> labels."""
    folder = spec["folders"][spec["implementation"]]
    if spec["implementation"] == "transformers":
        from benchmarks import with_transformers

        return with_transformers.classifier(folder, spec["dtype"], spec["batch"])
    from gptjax.infer import predictor

    loaded = predictor.load(folder)
    gpt = dataclasses.replace(
        loaded, config=dataclasses.replace(loaded.config, dtype=spec["dtype"])
    )
    return lambda texts: [str(label) for label in gpt.predict({"text": texts}).labels]


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Times predictions of all texts in a worker, or makes the model."""
    if spec["implementation"] == "prepare":
        return make_model(spec, pathlib.Path(spec["folder"]))
    texts = json.loads(pathlib.Path(spec["texts"]).read_text(encoding="utf-8"))
    start = time.perf_counter()
    run = classifier(spec)
    load = time.perf_counter() - start
    seconds, labels = [], []
    for _ in range(1 + spec["steps"]):
        start = time.perf_counter()
        labels = run(texts)
        seconds.append(time.perf_counter() - start)
    compile_seconds = max(0.0, seconds[0] - sorted(seconds[1:])[len(seconds[1:]) // 2])
    known = pathlib.Path(spec["labels"])
    if spec["implementation"] == "ours" and spec["dtype"] == "float32":
        known.write_text(json.dumps(labels), encoding="utf-8")
    agree = None
    if known.exists():
        others = json.loads(known.read_text(encoding="utf-8"))
        same = sum(a == b for a, b in zip(labels, others, strict=True))
        agree = f"{same:,} of {len(labels):,}"
    return {
        "seconds": seconds[1:], "first_seconds": seconds[0], "load_seconds": load,
        "compile_seconds": compile_seconds, "units": len(texts), "agree": agree,
    }  # fmt: skip


def prepare(folder: pathlib.Path) -> dict[str, Any]:
    """Writes texts, tokenizer and models; returns the workers' common spec."""
    data = rows.load(FLAGS.input, FLAGS.text, "", "", FLAGS.rows)
    size = sizes.find(FLAGS.size)
    tokenizer = rows.make_tokenizer(data, size.vocab_size)
    tokenizer.save(folder / "tokenizer.json")
    size = dataclasses.replace(size, vocab_size=len(tokenizer))
    (folder / "texts.json").write_text(json.dumps([row["text"] for row in data]), encoding="utf-8")
    common = {
        "size": size.name, "model": dataclasses.asdict(size), "steps": FLAGS.steps,
        "texts": str(folder / "texts.json"), "labels": str(folder / "labels.json"),
        "tokenizer": str(folder / "tokenizer.json"), "folder": str(folder),
    }  # fmt: skip
    spec = {"task": "predict", "implementation": "prepare", **common}
    # Another process makes the model, because this one starts workers and should hold no memory.
    done = subprocess.run(
        [sys.executable, str(harness.WORKER), json.dumps(spec)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return common | {"folders": json.loads(done.stdout.strip().splitlines()[-1])}


def main() -> None:
    """Measures all variants and writes the results."""
    require(FLAGS.steps > 0, f"--steps={FLAGS.steps}: must be greater than 0")
    size = sizes.find(FLAGS.size)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        common = prepare(pathlib.Path(folder))
        every = harness.variants("predict", CASES, common)
        source = pathlib.Path(FLAGS.input).name if FLAGS.input else "synthetic rows"
        about = summary.About(
            name=f"predict_{size.name}",
            title=f"Classification of {source}: {size.num_layers} layers x {size.width}, "
            f"{size.num_heads} heads, {common['model']['vocab_size']:,} tokens",
            unit="row",
            what="file",
            extra=_EXTRA,
            notes=(
                "The pipeline gets its texts sorted by length, so that little is padding; "
                "loading is not part of the timings.",
            ),
        )
        summary.run(about, every)


if __name__ == "__main__":
    harness.command(main)
