"""Three training steps of a tiny model against float64 NumPy, and against numbers written down.

The reference computes gradients by complex steps: the imaginary part of loss(p + ih) / h is the
derivative, and no difference of losses is rounded. Adam, clipping, weight decay and the schedule
are written as their formulas. The reference uses no code of gptjax.
"""

import math

import jax
import numpy as np
import pytest
import reference
import small

from gptjax import state
from gptjax.batch import Batch
from gptjax.config.schema import OptimizerConfig, TaskKind, TaskSpec
from gptjax.model import gpt
from gptjax.model.objective import Objective
from gptjax.train import step as step_lib
from gptjax.train.optimizer import Optimizer

STEPS, TOTAL = 3, 10
# Epsilon is far above the rounding errors of gradients. With a tiny epsilon Adam's first update
# would be the sign of each gradient, even of gradients that are 0 apart from rounding errors.
CONFIG = OptimizerConfig(
    learning_rate=0.02, schedule="linear", warmup_steps=2, epsilon=1e-2, weight_decay=0.1,
    beta1=0.9, beta2=0.98, clip_norm=0.5,
)  # fmt: skip
LM_WEIGHT = 0.5
# Four sequences in two rows of eight tokens.
TOKENS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7], [9, 3]]
LABELS = [1, 0, 2, 1]


def problem():
    """Returns the model, its parameters, and a packed batch."""
    config = small.config(vocab_size=11, context_length=6, width=4, num_heads=2)
    spec = TaskSpec(TaskKind.CLASSIFICATION, "text", labels=("a", "b", "c"))
    model = gpt.make_model(config, spec)

    def rows(of_sequence):
        flat = np.concatenate([of_sequence(i, len(tokens)) for i, tokens in enumerate(TOKENS)])
        return flat.reshape(2, 8)

    ones, zeros = np.ones((2, 2), np.float32), np.zeros((2, 8), np.int32)
    batch = Batch(
        tokens=np.concatenate(TOKENS).reshape(2, 8).astype(np.int32),
        segment_ids=rows(lambda i, length: np.full(length, i % 2 + 1, np.int32)),
        positions=rows(lambda i, length: np.arange(length, dtype=np.int32)),
        token_types=zeros,
        lm_weights=rows(lambda i, length: np.float32(np.arange(length) < length - 1)),
        extract=np.array([[4, 7], [5, 7]], np.int32)[..., None],
        candidate_mask=ones[..., None],
        example_mask=ones,
        labels=np.array(LABELS, np.int32).reshape(2, 2),
    )
    return model, small.params(model), batch


def joint(params):
    """Returns the reference's task loss, LM loss, and their weighted sum."""
    examples = [
        ([(np.array(tokens), None)], label) for tokens, label in zip(TOKENS, LABELS, strict=True)
    ]
    _, _, task, lm = reference.run(params, "classification", examples)
    return task, lm, task + LM_WEIGHT * lm


def gradients(params):
    """Returns the gradient of the reference's joint loss."""
    leaves, tree = jax.tree.flatten(reference.cast(params, np.complex128))
    found = []
    for leaf in leaves:
        gradient = np.zeros(leaf.shape)
        for index in np.ndindex(leaf.shape):
            value, leaf[index] = leaf[index], leaf[index] + 1e-30j
            gradient[index] = joint(jax.tree.unflatten(tree, leaves))[2].imag / 1e-30
            leaf[index] = value
        found.append(gradient)
    return jax.tree.unflatten(tree, found)


def norm(tree):
    return math.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(tree)))


@pytest.fixture(scope="module")
def expected():
    """Returns losses and gradient norms before each step, and the parameters after the last."""
    _, params, _ = problem()
    params = reference.cast(params)
    m, v = (jax.tree.map(np.zeros_like, params) for _ in range(2))
    losses, norms = [], []
    for step in range(STEPS):
        losses.append(joint(params))
        g = gradients(params)
        norms.append(norm(g))
        scale = min(1, CONFIG.clip_norm / norms[-1])
        g = jax.tree.map(lambda x, scale=scale: x * scale, g)
        m = jax.tree.map(lambda m, g: CONFIG.beta1 * m + (1 - CONFIG.beta1) * g, m, g)
        v = jax.tree.map(lambda v, g: CONFIG.beta2 * v + (1 - CONFIG.beta2) * g * g, v, g)
        # The rate rises to the peak in two warm-up steps, then falls to 0 in eight steps.
        rate = CONFIG.learning_rate * min((step + 1) / 2, 1 - (step - 2) / 8)

        def update(path, p, m, v, rate=rate, t=step + 1):
            mean, square = m / (1 - CONFIG.beta1**t), v / (1 - CONFIG.beta2**t)
            direction = mean / (np.sqrt(square) + CONFIG.epsilon)
            decay = 0 if path[-1].key in ("bias", "scale") else CONFIG.weight_decay
            return p - rate * (direction + decay * p)

        params = jax.tree_util.tree_map_with_path(update, params, m, v)
    return losses, norms, params


def test_three_steps_are_those_of_the_reference(expected):
    """Compares losses, gradient norms, and the change of each parameter in all three steps.

    A parameter of about 1 changes by about 0.04, so that float32 sums round the change by 2^-24 /
    0.04 = 1.5e-6 of it in each step. The gradients are exact to 2e-5 of the largest of their array
    (test_gpt.py). The tolerance of 1e-4 covers both.
    """
    model, start, batch = problem()
    optimizer = Optimizer(CONFIG, TOTAL)
    objective = Objective(TaskKind.CLASSIFICATION, LM_WEIGHT)
    step = small.fast_jit(
        lambda current: step_lib.train_step(current, batch, 0, model, objective, optimizer)
    )
    current = state.create(start, optimizer.transformation)
    for (task, lm, _), gradient_norm in zip(*expected[:2], strict=True):
        current, output = step(current)
        sums = output.losses
        assert float(sums.task.total / sums.task.weight) == pytest.approx(task, rel=2e-6)
        assert float(sums.lm.total / sums.lm.weight) == pytest.approx(lm, rel=2e-6)
        assert float(output.gradient_norm) == pytest.approx(gradient_norm, rel=1e-5)
    assert int(current.step) == STEPS
    moved, wanted = (
        jax.tree.map(lambda x, y: np.asarray(x, np.float64) - np.asarray(y), end, start)
        for end in (current.params, expected[2])
    )
    small.assert_trees_close(moved, wanted, 1e-4)


def test_the_reference_gives_the_numbers_written_down(expected):
    """If reference and model changed in the same way, only this test would notice."""
    losses, norms, params = expected
    task, lm, joint = np.transpose(losses)
    np.testing.assert_allclose(task, [1.244631239569, 1.099984429316, 0.876619451994], rtol=1e-9)
    np.testing.assert_allclose(lm, [2.691112416603, 2.681086956702, 2.652008970620], rtol=1e-9)
    np.testing.assert_allclose(joint, task + 0.5 * lm, rtol=1e-12)
    np.testing.assert_allclose(norms, [2.131697772715, 1.804128318774, 1.317973644450], rtol=1e-9)
    assert norm(params) == pytest.approx(7.583510702769, rel=1e-9)
