"""The number of operations against a count by hand, and against the count of XLA."""

import jax
import numpy as np
import pytest
import small

from gptjax.config.schema import ModelConfig
from gptjax.data import loader
from gptjax.model import flops, gpt, losses
from gptjax.model.gpt import GPT
from gptjax.ops.cross_entropy import LMHeadWeights


def test_tiny_model_by_hand():
    """The multiply-adds of each matrix product for a row: L = 1, D = 4, F = 16, V = 10, T = 3."""
    config = small.config(num_layers=1, width=4, num_heads=2, vocab_size=10, context_length=3)
    qkv, out = 3 * 3 * 4 * 4, 3 * 4 * 4
    ffn = 2 * 3 * 4 * 16
    keys = 1 + 2 + 3  # of queries 1, 2 and 3
    scores_and_values = 2 * keys * 4
    head = 3 * 4 * 10
    forward = 2 * (qkv + out + ffn + scores_and_values + head)
    assert flops.train_flops_per_token(config, 3) * 3 == pytest.approx(3 * forward)


def test_gpt1_is_near_six_times_its_matrices():
    """A token takes 6 operations for each weight of a matrix, and those of the attention."""
    config = ModelConfig(vocab_size=40478)
    matrices = 12 * 12 * 768**2 + 40478 * 768
    attention = 3 * 2 * 2 * 12 * 768 * 513 / 2
    got = flops.train_flops_per_token(config, 512)
    assert got == pytest.approx(6 * matrices + attention)


@pytest.mark.parametrize("train", [False, True])
def test_xla_counts_the_same(train):
    """The model has one layer, no loop, and is so wide that matrix products dominate.

    XLA computes all T keys of a query, which the expected number includes here, and counts
    element-wise operations too, which the tolerance of 4% allows for.
    """
    length = 64
    config = small.config(
        num_layers=1,
        width=256,
        num_heads=4,
        vocab_size=512,
        context_length=length,
        activation="relu",
    )
    model = GPT(config)
    shapes = jax.eval_shape(lambda key: gpt.init_params(model, key), jax.random.key(0))
    batch = loader.lm_batch([np.zeros(length, np.int32)] * 2, length, 2)

    def loss(params):
        x = gpt.run(
            model, params, batch.tokens, batch.segment_ids, batch.positions, method="hidden"
        )
        head = LMHeadWeights(params["token_embedding"])
        return losses.lm_loss(x, head, batch, model.ops).total

    run = jax.value_and_grad(loss) if train else loss
    counted = small.fast_jit(run).lower(shapes).compile().cost_analysis()["flops"]
    masked = 6 * 2 * config.width * (length - 1) / 2
    expected = (flops.train_flops_per_token(config, length) + masked) * 2 * length
    expected = expected if train else expected / 3
    assert counted == pytest.approx(expected, rel=0.04)
