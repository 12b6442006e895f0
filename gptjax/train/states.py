"""Computes the hidden states of frozen blocks once for each text (see `gptjax.model.frozen`).

The states are computed without dropout, so they are the same in each epoch. They are kept in the
cache (`gptjax.data.states`), and a later run with the same frozen weights and texts reads them. The
name of an entry is a hash of the frozen weights, the sequences, the fields of the model that change
the states, and all that changes their rounding (devices, version of JAX). So a run that is resumed
on the same machine trains on the same bits, even if somebody has deleted the cache.

If a run has several processes, each process computes all states on its own devices and keeps them
in its own cache. So no process waits for the cache of another process.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax import mesh as mesh_lib
from gptjax.batch import Batch
from gptjax.checkpoint.checksum import checksums
from gptjax.cluster import processes
from gptjax.config.schema import MeshConfig
from gptjax.data import cache, fingerprints, loader
from gptjax.data import states as store
from gptjax.data.packing import Packer
from gptjax.data.tasks import Examples
from gptjax.evaluate.score import never_stop
from gptjax.mesh import Params
from gptjax.model import frozen as frozen_lib
from gptjax.model.gpt import GPT, run

_VERSION = 1  # raise it when equal weights and sequences give other states or other files
# The number of tokens in a batch, about. It is a constant, so that the shape of the batches, and
# with it the rounding, depends only on the texts. Each batch casts all weights again.
_BATCH_TOKENS = 4096
# The fields of the model that change only the training, the heads, or the speed.
_IRRELEVANT: dict[str, Any] = {
    "embedding_dropout": 0.0, "attention_dropout": 0.0, "residual_dropout": 0.0,
    "head_dropout": 0.0, "head_dropout_shared": False, "remat": "none", "one_matrix": False,
}  # fmt: skip

Splits = dict[str, Examples]
"""Name of a split -> its examples."""


@dataclasses.dataclass(frozen=True)
class Frozen:
    """The frozen blocks of a stage."""

    model: GPT
    """The whole model."""
    count: int
    """The number of frozen blocks, at least 1."""
    mesh: Mesh
    """The devices of the run."""
    check_stop: Callable[[], None] = never_stop
    """A function that is called before each batch. It raises `StopRequested` if the run was asked
    to stop."""

    def with_states(self, params: Params, splits: Splits, say: Callable[[str], None]) -> Splits:
        """Returns the examples with `Examples.hidden`.

        All processes must call it, because they tell each other whether it has failed.

        Args:
          params: the parameters of the whole model.
          splits: the examples.
          say: a function that gets the lines for the user: the size of the states before they are
            computed, and the source of the states.

        Raises:
          UserError: the disk of the cache is full.
          StopRequested: the run was asked to stop.
        """
        if processes.count() == 1:
            return self._with_states(params, splits, say)
        # Each process computes on its own devices. Therefore the processes do not agree on a stop
        # between two batches here.
        everywhere = jax.jit(lambda x: x, out_shardings=mesh_lib.replicated(self.mesh))
        lower = jax.device_get(everywhere(frozen_lib.lower_params(params, self.count)))
        local = mesh_lib.make_mesh(MeshConfig(), jax.local_devices())
        alone = dataclasses.replace(self, mesh=local, check_stop=never_stop)
        placed = jax.device_put(lower, mesh_lib.replicated(local))
        return processes.run_everywhere(
            "the hidden states of the frozen blocks",
            lambda: alone._with_states(placed, splits, say),
        )

    def _with_states(self, params: Params, splits: Splits, say: Callable[[str], None]) -> Splits:
        lower = frozen_lib.lower_params(params, self.count)
        weights = fingerprints.of_values(*map(str, sorted(checksums(lower).items())))
        entries = {name: self._entry(lower, weights, split) for name, split in splits.items()}
        size = store.readable(sum(entry.bytes for entry in entries.values()))
        place = cache.entries_folder() or "memory"
        layers = self.model.config.num_layers
        found = all(entry.stored for entry in entries.values())
        source = "are read from" if found else "are computed once and kept in"
        say(
            f"finetune: the first {self.count} of {layers} layers are frozen; their states "
            f"({size}) {source} {place}"
        )
        store.require_space(list(entries.values()))
        return {
            name: dataclasses.replace(split, hidden=store.load(entries[name]))
            for name, split in splits.items()
        }

    def _entry(self, lower: Params, weights: str, examples: Examples) -> store.Entry:
        config = self._lower_model(examples).config
        shown = sorted((name, str(value)) for name, value in dataclasses.asdict(config).items())
        shape = (int(examples.lengths.sum()), config.width)
        device = jax.tree.leaves(lower)[0].devices()
        kinds = sorted({each.device_kind for each in device})
        name = fingerprints.of_values(
            "states", _VERSION, weights, store.fingerprint(examples), str(shown), *kinds,
            str(dict(self.mesh.shape)), jax.__version__,
        )  # fmt: skip
        compute = functools.partial(self._compute, lower, examples)
        return store.Entry(name, shape, np.dtype(jnp.dtype(config.dtype)), compute)

    def _lower_model(self, examples: Examples) -> GPT:
        model = frozen_lib.lower_model(self.model, self.count)
        config = dataclasses.replace(model.config, **_IRRELEVANT)
        # The longest sequence of the split, and not of the stage, so that the program does not
        # depend on other splits.
        longest = examples.max_sequence_length
        return model.clone(config=config, mesh=self.mesh, max_sequence_length=longest)

    def _compute(self, lower: Params, examples: Examples) -> store.Pieces:
        """Yields the states of each example, and the index of its first token in the array."""
        step = _jit_states(self._lower_model(examples))
        divisor = mesh_lib.batch_divisor(self.mesh)
        wanted = max(1, round(_BATCH_TOKENS / float(examples.lengths.mean())))
        packer = Packer(examples.lengths, min(wanted, len(examples)), divisor=divisor)
        waiting: list[tuple[np.ndarray, jax.Array]] = []
        for batch, index in loader.every_example(examples, packer):
            self.check_stop()
            waiting.append((index, step(lower, mesh_lib.to_devices(batch, self.mesh))))
            # The states of a batch are fetched after the next batch has started, so that the
            # device never waits for the host.
            if len(waiting) > 1:
                yield from _unpacked(examples, *waiting.pop(0))
        for each in waiting:
            yield from _unpacked(examples, *each)


def _unpacked(examples: Examples, index: np.ndarray, states: jax.Array) -> store.Pieces:
    """Yields the states of each example of a packed batch.

    Args:
      examples: all examples.
      index: int [B, E], the index of the example in each slot, -1 for an empty slot.
      states: [B, T, D], the hidden states of the batch.
    """
    states_BTD = jax.device_get(states)
    for b, row in enumerate(index):
        start = 0
        for i in row[row >= 0]:
            stop = start + int(examples.lengths[i])
            yield int(examples.starts[i]), states_BTD[b, start:stop]
            start = stop


@functools.cache
def _jit_states(model: GPT) -> Callable[[Params, Batch], jax.Array]:
    """Returns the jitted function (params, batch) -> hidden states, without dropout."""

    def states(params: Params, batch: Batch) -> jax.Array:
        ids = (batch.tokens, batch.segment_ids, batch.positions, batch.token_types)
        return run(model, params, *ids, method="hidden")

    return jax.jit(states)
