"""The whole model against Hugging Face's transformers: states, logits, both losses, all gradients.

Tolerance. Both sides compute in float32; 1e-4 of the largest value of an array is asked, and the
worst array, printed with `-s`, comes to about a hundredth of that.
"""

import jax
import numpy as np
import parity
import pytest
import small

from gptjax.interop import arrays
from gptjax.parameters import TASK_HEAD_BIAS

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def ours():
    """Returns our values, computed from packed rows, in the shapes of `parity.double_heads`."""
    task = parity.task()
    data, count = task.examples, task.examples.num_candidates
    batch, index = small.packed(data, 128, task.shape)
    found = jax.device_get(task.measure(task.params, batch))
    shape = (len(data), count, max(map(len, data.tokens)))
    config = task.model.config
    states = np.zeros((*shape, config.width), np.float32)
    logits = np.zeros((*shape, config.vocab_size), np.float32)
    answers = np.zeros(shape[:2], np.float32)
    for row, slot in np.argwhere(index >= 0):
        example = index[row, slot]
        answers[example] = found["task_logits"][row, slot]
        for c in range(count):
            end = batch.extract[row, slot, c]
            places = np.flatnonzero(batch.segment_ids[row] == batch.segment_ids[row, end])
            states[example, c, : len(places)] = found["states"][row, places]
            logits[example, c, : len(places)] = found["lm_logits"][row, places]
    sums = found["sums"]
    return {
        "states": states, "lm_logits": logits, "task_logits": answers,
        "lm_loss": sums.lm.total / sums.lm.weight,
        "task_loss": sums.task.total / sums.task.weight,
    } | {f"d {name}": x for name, x in arrays.flatten(found["gradients"]).items()}  # fmt: skip


def compare(ours, theirs):
    """Compares all arrays; returns for each its largest difference over its largest value."""
    assert ours.keys() == theirs.keys()
    ratios = {}
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape, name
        if name == f"d {TASK_HEAD_BIAS}":
            # All answers share this bias, so that the softmax does not depend on it: its gradient
            # is 0, apart from rounding.
            assert max(abs(ours[name]), abs(expected)) < 1e-6
            continue
        ratios[name] = float(np.abs(ours[name] - expected).max() / np.abs(expected).max())
    worst = max(ratios, key=lambda name: ratios[name])
    print(f"\nworst of {len(ratios)} arrays: {worst}, {ratios[worst]:.1e}")
    assert ratios[worst] < TOLERANCE, f"{worst}: {ratios[worst]:.1e}"
    return ratios


def test_the_golden_values_of_transformers(ours):
    ratios = compare(ours, dict(np.load(parity.GOLDEN)))
    assert len(ratios) == 5 + 2 + len(arrays.BLOCK_PARAMETERS) + 1


def test_transformers_itself(ours):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    found = parity.double_heads(parity.weights_of(parity.task()), parity.task())
    compare(ours, found)
    # The golden file has the values that transformers computes now.
    golden = np.load(parity.GOLDEN)
    for name, array in found.items():
        np.testing.assert_allclose(
            golden[name], array, rtol=0, atol=1e-5 * np.abs(array).max() + 1e-6
        )


def test_a_wrong_gradient_is_noticed(ours):
    golden = dict(np.load(parity.GOLDEN))
    golden["d blocks/norm1/bias"] = golden["d blocks/norm1/bias"] * 1.001
    with pytest.raises(AssertionError, match="norm1/bias"):
        compare(ours, golden)
