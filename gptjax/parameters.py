"""The parameters of the model: one table of their paths, shapes, shardings and foreign names.

All code that depends on the name of a parameter reads this table: the sharding on a mesh
(`gptjax.mesh`), weight decay (`gptjax.train.optimizer`), the copy of a model for generation
(`gptjax.infer.generate`), and the formats of OpenAI and Hugging Face (`gptjax.interop`). A
parameter that is added to `gptjax.model.gpt` needs a row in this table. A test compares the table
with the model.

A block is a layer of the Transformer. A kernel is the weight matrix of a linear layer.
"""

import dataclasses
import enum

TOKEN_EMBEDDING = "token_embedding"
POSITION_EMBEDDING = "position_embedding"
BLOCKS = "blocks"
"""The key of the parameters of all blocks. Each array has a leading axis of size L, the layers."""
SEGMENT_EMBEDDING = "segment_embedding"
EMBEDDINGS = (TOKEN_EMBEDDING, POSITION_EMBEDDING, SEGMENT_EMBEDDING)
"""The keys of the embeddings."""
TASK_HEAD = "task_head"
TASK_HEAD_KERNEL = "task_head/kernel"
TASK_HEAD_BIAS = "task_head/bias"


class Role(enum.StrEnum):
    """The use of a parameter."""

    EMBEDDING = "embedding"
    """A matrix with one row for each id."""
    KERNEL = "kernel"
    """A weight matrix that is multiplied with the activations."""
    BIAS = "bias"
    SCALE = "scale"
    """The gain of a layer norm."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter, which is a row of the table."""

    path: str
    """The keys in the parameter tree, joined by slashes."""
    shape: str
    """One letter for each axis (see `gptjax.batch`), without the axis L of the layers."""
    mesh_axes: tuple[str | None, ...] = ()
    """The mesh axis that each axis of `shape` is sharded over. None means an axis that is not
    sharded, and () means that no axis is sharded."""
    openai: int | None = None
    """The index of the array in OpenAI's release, from 0. For an embedding it is the index among
    all arrays. For a parameter of a block it is the index among the twelve arrays of a layer. The
    layers come after the embeddings. None means that the array is not in the release."""
    huggingface: str | None = None
    """The name in Hugging Face's `openai-gpt` models, without its prefix. The prefix is
    "transformer.h.LAYER." for a parameter of a block, and "transformer." for other parameters. None
    means that these models have no common name for the parameter."""

    @property
    def stacked(self) -> bool:
        """Whether the array holds all layers, on a leading axis of size L."""
        return self.path.startswith(f"{BLOCKS}/")

    @property
    def path_in_block(self) -> str:
        """The path without its beginning "blocks/"."""
        return self.path.removeprefix(f"{BLOCKS}/")

    @property
    def role(self) -> Role:
        """The role of the parameter, which is the end of the path."""
        return next(role for role in Role if self.path.endswith(role))

    @property
    def decayed(self) -> bool:
        """Whether weight decay applies, that is, whether this is an embedding or a kernel."""
        return self.role in (Role.EMBEDDING, Role.KERNEL)


_ROWS = (
    Parameter(POSITION_EMBEDDING, "TD", (), 0, "positions_embed.weight"),
    Parameter(TOKEN_EMBEDDING, "VD", ("tensor", "fsdp"), 1, "tokens_embed.weight"),
    # Y is the number of token types, which is `ModelConfig.segment_types`.
    Parameter(SEGMENT_EMBEDDING, "YD"),
    # The axis of size 3 holds query, key and value.
    Parameter(
        "blocks/attention/qkv/kernel", "D3HK", ("fsdp", None, "tensor", None),
        0, "attn.c_attn.weight",
    ),
    Parameter("blocks/attention/qkv/bias", "3HK", (None, "tensor", None), 1, "attn.c_attn.bias"),
    Parameter(
        "blocks/attention/out/kernel", "HKD", ("tensor", None, "fsdp"), 2, "attn.c_proj.weight"
    ),
    Parameter("blocks/attention/out/bias", "D", (), 3, "attn.c_proj.bias"),
    Parameter("blocks/norm1/scale", "D", (), 4, "ln_1.weight"),
    Parameter("blocks/norm1/bias", "D", (), 5, "ln_1.bias"),
    Parameter("blocks/ffn_in/kernel", "DF", ("fsdp", "tensor"), 6, "mlp.c_fc.weight"),
    Parameter("blocks/ffn_in/bias", "F", ("tensor",), 7, "mlp.c_fc.bias"),
    Parameter("blocks/ffn_out/kernel", "FD", ("tensor", "fsdp"), 8, "mlp.c_proj.weight"),
    Parameter("blocks/ffn_out/bias", "D", (), 9, "mlp.c_proj.bias"),
    Parameter("blocks/norm2/scale", "D", (), 10, "ln_2.weight"),
    Parameter("blocks/norm2/bias", "D", (), 11, "ln_2.bias"),
    # A model has this LM head only if its LM head is not tied to the token embedding.
    Parameter("lm_head/kernel", "VD", ("tensor", "fsdp")),
    Parameter("lm_head/bias", "V", ("tensor",)),
    # If the task head reads all positions of a sequence, the kernel is [tokens, D, O].
    Parameter(TASK_HEAD_KERNEL, "DO"),
    Parameter(TASK_HEAD_BIAS, "O"),
)  # fmt: skip

PARAMETERS: dict[str, Parameter] = {parameter.path: parameter for parameter in _ROWS}
"""The table: path -> parameter."""


def find(path: str) -> Parameter | None:
    """Returns the parameter whose path is the end of `path`, or None if there is no such parameter.

    For example, the path of an array of the optimizer's state ends in the path of a parameter.

    >>> find("opt_state/0/mu/blocks/ffn_in/bias").path
    'blocks/ffn_in/bias'
    """
    parts = path.split("/")
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((PARAMETERS[end] for end in ends if end in PARAMETERS), None)


def in_openai_order(stacked: bool) -> tuple[Parameter, ...]:
    """Returns the parameters in OpenAI's release, in the order of the release.

    Args:
      stacked: whether to return the parameters of a block. Otherwise the result is the other
        parameters, which are the embeddings.
    """
    places = {
        parameter.openai: parameter
        for parameter in PARAMETERS.values()
        if parameter.openai is not None and parameter.stacked == stacked
    }
    return tuple(places[place] for place in sorted(places))
