"""The parameters of the model: one table of their paths, shapes, layouts and names elsewhere.

Everything that depends on the name of a parameter reads this table: the layout on a mesh
(`gptjax.mesh`), weight decay (`gptjax.train.optimizer`), the copy of a model for generation
(`gptjax.infer.generate`), and the formats of OpenAI and Hugging Face (`gptjax.interop`). A
parameter that is added to `gptjax.model.gpt` needs a row here; a test compares the two.
"""

import dataclasses
import enum

TOKEN_EMBEDDING = "token_embedding"
POSITION_EMBEDDING = "position_embedding"
BLOCKS = "blocks"
"""The parameters of all blocks; each array has a leading axis of size L, the layers."""
TASK_HEAD = "task_head"
TASK_HEAD_KERNEL = "task_head/kernel"
TASK_HEAD_BIAS = "task_head/bias"


class Role(enum.StrEnum):
    """The use of a parameter."""

    EMBEDDING = "embedding"
    """A table of vectors, one for each id."""
    KERNEL = "kernel"
    """A weight that is multiplied with the activations."""
    BIAS = "bias"
    SCALE = "scale"
    """The gain of a layer norm."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One row of the table."""

    path: str
    """Keys in the parameter tree, joined by slashes."""
    shape: str
    """One letter for each axis, as in `gptjax.batch`; without the axis L of the layers."""
    mesh_axes: tuple[str | None, ...] = ()
    """The mesh axis that each axis of `shape` is sharded over, or None; (): not sharded."""
    openai: int | None = None
    """Place in OpenAI's release, from 0: an embedding's among all arrays; that of a parameter of a
    block among the twelve arrays of its layer, which follow the embeddings. None: not released."""
    huggingface: str | None = None
    """Name in Hugging Face's `openai-gpt` models, without the prefix "transformer." or, for a
    parameter of a block, "transformer.h.LAYER.". None: these models do not share a name for it."""

    @property
    def stacked(self) -> bool:
        """Whether the array holds all layers, on a leading axis of size L."""
        return self.path.startswith(f"{BLOCKS}/")

    @property
    def path_in_block(self) -> str:
        """The path without "blocks/"."""
        return self.path.removeprefix(f"{BLOCKS}/")

    @property
    def role(self) -> Role:
        """The role that the last part of the path names."""
        return next(role for role in Role if self.path.endswith(role))

    @property
    def decayed(self) -> bool:
        """Whether weight decay applies: to embeddings and kernels, not to biases and gains."""
        return self.role in (Role.EMBEDDING, Role.KERNEL)


_ROWS = (
    Parameter(POSITION_EMBEDDING, "TD", (), 0, "positions_embed.weight"),
    Parameter(TOKEN_EMBEDDING, "VD", ("tensor", "fsdp"), 1, "tokens_embed.weight"),
    # Y is the number of token types, `ModelConfig.segment_types`.
    Parameter("segment_embedding", "YD"),
    # 3 is the axis of query, key and value.
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
    # The LM head of a model whose head is not tied to the token embedding.
    Parameter("lm_head/kernel", "VD", ("tensor", "fsdp")),
    Parameter("lm_head/bias", "V", ("tensor",)),
    # A head that reads a flattened sequence has a kernel [tokens, D, O].
    Parameter(TASK_HEAD_KERNEL, "DO"),
    Parameter(TASK_HEAD_BIAS, "O"),
)  # fmt: skip

PARAMETERS: dict[str, Parameter] = {parameter.path: parameter for parameter in _ROWS}
"""The table, by path."""


def find(path: str) -> Parameter | None:
    """Returns the parameter whose path is the end of `path`; None if there is none.

    The arrays of an optimizer's state end in the path of their parameter.

    >>> find("opt_state/0/mu/blocks/ffn_in/bias").path
    'blocks/ffn_in/bias'
    """
    parts = path.split("/")
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((PARAMETERS[end] for end in ends if end in PARAMETERS), None)


def in_openai_order(stacked: bool) -> tuple[Parameter, ...]:
    """Returns the parameters of OpenAI's release in its order: those of a block, or the others."""
    places = {
        parameter.openai: parameter
        for parameter in PARAMETERS.values()
        if parameter.openai is not None and parameter.stacked == stacked
    }
    return tuple(places[place] for place in sorted(places))
