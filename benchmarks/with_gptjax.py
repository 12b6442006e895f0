"""gptjax, as `gptjax/train/loop.py` and `gptjax/infer/predictor.py` run it."""

from typing import Any

import jax
import numpy as np

from benchmarks import sizes
from benchmarks.sizes import Size
from gptjax import mesh, state
from gptjax.config.schema import MeshConfig, ModelConfig
from gptjax.data import loader
from gptjax.infer import generate
from gptjax.model import gpt
from gptjax.model.objective import Objective
from gptjax.train import step as step_lib
from gptjax.train.optimizer import Optimizer
from gptjax.train.step import StepOutput

# Total steps of the schedule. It is constant, so that any number above the steps that run will do.
_STEPS = 1_000_000


class Training:
    """The jitted train step and its state."""

    def __init__(
        self,
        config: ModelConfig,
        objective: Objective | None = None,
        params: Any = None,
        model: Any = None,
    ):
        """Builds model, optimizer and state.

        Args:
          config: of the model.
          objective: the objective to minimise; None means the LM loss.
          params: weights to start from; None means random ones.
          model: a model with a task head; None means one for language modelling alone.
        """
        self.mesh = mesh.make_mesh(MeshConfig(), jax.devices()[:1])
        self.objective = objective or Objective()
        model = model or gpt.make_model(config, None)
        optimizer = Optimizer(sizes.optimizer_config(), _STEPS)
        make = step_lib.initial_state(model, optimizer, params)
        self._state = state.born_sharded(make, self.mesh, jax.random.key(0))
        self._step = step_lib.jit_train_step(self.mesh, model, self.objective, optimizer)

    def update(self, batch: Any) -> StepOutput:
        """Runs one step on a host batch to its end; returns the output of the step, on the host."""
        placed = mesh.to_devices(batch, self.mesh)
        self._state, output = self._step(self._state, placed, np.uint32(0))
        jax.block_until_ready(self._state)
        return jax.device_get(output)

    def step(self, tokens: np.ndarray) -> float:
        """Runs one language modelling step on int [B, T]; returns its loss in nats per token."""
        sums = self.update(lm_batch(tokens)).losses.lm
        return float(sums.total) / float(sums.weight)


def lm_batch(tokens: np.ndarray) -> Any:
    """Returns the pretraining batch of int [B, T]; it predicts every token but the first."""
    rows, length = tokens.shape
    return loader.lm_batch([row.astype(np.int32) for row in tokens], length, rows)


def pretraining(size: Size, dtype: str, dropout: float, params: Any = None) -> Training:
    """Returns the pretraining of a size in "float32" or "bfloat16"."""
    return Training(sizes.model_config(size, dtype, dropout), params=params)


class Generation:
    """Greedy generation with the key/value cache."""

    def __init__(self, size: Size, dtype: str, params: Any = None):
        """Args: size; dtype, float32 or bfloat16; params, None means random weights."""
        model = gpt.make_model(sizes.model_config(size, dtype), None)
        if params is None:
            params = jax.jit(lambda key: gpt.init_params(model, key))(jax.random.key(0))
        self._decoder = generate.prepare(model, params)
        self._banned = np.zeros(size.vocab_size, bool)

    def __call__(self, prompt: np.ndarray, batch: int, tokens: int) -> np.ndarray:
        """Returns int [batch, tokens]: continuations of int [T]."""
        sampler = generate.make_sampler(self._banned, temperature=0.0)
        return generate.generate(self._decoder, prompt, tokens, batch, sampler)
