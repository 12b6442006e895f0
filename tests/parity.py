"""GPT-1 as Hugging Face's transformers has it, in torch: an independent reference.

`python tests/parity.py` writes tests/golden/double_heads.npz, so that a test needs neither.
"""

import pathlib
import tempfile
from typing import Any

import numpy as np
import small

from gptjax.interop import arrays, huggingface
from gptjax.interop.arrays import Arrays, Weights
from gptjax.parameters import TASK_HEAD_BIAS, TASK_HEAD_KERNEL, TOKEN_EMBEDDING

GOLDEN = pathlib.Path(__file__).with_name("golden") / "double_heads.npz"
LM_WEIGHT = 0.5


def task() -> small.Task:
    """A multiple choice of three answers, six examples, texts of odd lengths."""
    return small.task("multiple_choice")


def weights_of(task: small.Task) -> Weights:
    """A task's random model, as what travels."""
    spare = task.model.config.vocab_size - len(small.small_tokenizer())
    assert spare >= 0
    return Weights(
        task.model.config, arrays.flatten(task.params), small.small_tokenizer(), task.spec
    )


def double_heads(weights: Weights, task: small.Task) -> Arrays:
    """What OpenAIGPTDoubleHeadsModel makes of exported weights and a task's examples.

    Returns:
      "states" [n, C, T, D], "lm_logits" [n, C, T, V], "task_logits" [n, C] with zeros in padding;
      "lm_loss", "task_loss"; and the gradients of task + 0.5 * LM by our names, "d TASK/kernel".
    """
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        huggingface.write(weights, pathlib.Path(folder))
        model = transformers.OpenAIGPTDoubleHeadsModel.from_pretrained(folder)
    model.eval()
    data = task.examples
    shape = (len(data), data.num_candidates, max(map(len, data.tokens)))
    tokens, labels = np.zeros(shape, np.int64), np.full(shape, -100)
    ends = np.zeros(shape[:2], np.int64)
    for i, sequence in enumerate(data.tokens):
        place = divmod(i, shape[1])
        tokens[place][: len(sequence)] = labels[place][: len(sequence)] = sequence
        ends[place] = len(sequence) - 1
    found = model(
        input_ids=torch.tensor(tokens), mc_token_ids=torch.tensor(ends),
        labels=torch.tensor(labels), mc_labels=torch.tensor(data.labels.astype(np.int64)),
        output_hidden_states=True,
    )  # fmt: skip
    (found.mc_loss + LM_WEIGHT * found.loss).backward()
    real = (np.arange(shape[2]) <= ends[..., None])[..., None]
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    return {
        "states": found.hidden_states[-1].detach().numpy().reshape(*shape, -1) * real,
        "lm_logits": found.logits.detach().numpy() * real,
        "task_logits": found.mc_logits.detach().numpy(),
        "lm_loss": found.loss.detach().numpy(),
        "task_loss": found.mc_loss.detach().numpy(),
    } | {f"d {name}": array for name, array in _by_our_names(gradients, weights).items()}


def _by_our_names(gradients: Arrays, weights_: Weights) -> Arrays:
    """Gradients by transformers' names, stacked like our parameters."""
    ours: dict[str, Any] = {
        huggingface.our_name(name.removeprefix("transformer.")): array
        for name, array in gradients.items()
    }
    output = ours.pop("lm_head.weight", None)  # tied: torch names the one parameter after either
    if output is not None:
        ours[TOKEN_EMBEDDING] = output
    head = {
        TASK_HEAD_KERNEL: ours.pop("multiple_choice_head.summary.weight").T,
        TASK_HEAD_BIAS: ours.pop("multiple_choice_head.summary.bias"),
    }
    return arrays.stack_layers(ours, weights_.model, "gradients") | head


if __name__ == "__main__":
    found = double_heads(weights_of(task()), task())
    # In half the bytes of raw float32, and still to more digits than any tolerance.
    np.savez_compressed(GOLDEN, **found)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size:,} bytes")
