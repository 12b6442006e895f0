"""The table of parameters against the model, OpenAI's release and transformers."""

import jax
import numpy as np
import pytest
import small

from gptjax import parameters
from gptjax.config.schema import ModelConfig
from gptjax.mesh import AXES
from gptjax.model import gpt
from gptjax.model.gpt import GPT
from gptjax.parameters import PARAMETERS


def sizes(config, outputs):
    """Letter -> size of the axis."""
    return {
        "V": config.vocab_size, "T": config.context_length, "D": config.width, "3": 3,
        "H": config.num_heads, "K": config.head_width, "F": config.hidden_ffn_width,
        "Y": config.segment_types, "O": outputs,
    }  # fmt: skip


def leaves(config, outputs):
    """Path -> shape of each parameter of a model."""
    model = GPT(config, num_outputs=outputs)
    shapes = jax.eval_shape(lambda key: gpt.init_params(model, key), jax.random.key(0))
    return {
        "/".join(part.key for part in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }


ALL = {"tied": False, "segment_types": 3}


def test_the_table_has_all_parameters_with_their_shapes():
    config = small.config(**ALL)
    found, letters = leaves(config, 5), sizes(config, 5)
    assert found.keys() == PARAMETERS.keys()
    for path, shape in found.items():
        parameter = PARAMETERS[path]
        layers = (config.num_layers,) if parameter.stacked else ()
        assert shape == (*layers, *(letters[letter] for letter in parameter.shape)), path


def test_a_row_is_consistent():
    for path, parameter in PARAMETERS.items():
        assert path == parameter.path
        assert len(parameter.mesh_axes) in (0, len(parameter.shape))
        assert set(parameter.mesh_axes) <= {None, *AXES}


def test_the_roles_are_those_of_the_names():
    decayed = {path for path, parameter in PARAMETERS.items() if parameter.decayed}
    ends = {path.rpartition("/")[2] for path in decayed}
    assert ends == {"token_embedding", "position_embedding", "segment_embedding", "kernel"}
    others = {path.rpartition("/")[2] for path in PARAMETERS.keys() - decayed}
    assert others == {"bias", "scale"}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("token_embedding", "token_embedding"),
        ("opt_state/inner_state/0/mu/blocks/ffn_in/kernel", "blocks/ffn_in/kernel"),
        ("params/lm_head/bias", "lm_head/bias"),
        ("opt_state/inner_state/0/count", None),
        ("step", None),
        ("other_token_embedding", None),
        ("ffn_in/kernel", None),
    ],
)
def test_find_takes_the_end_of_a_path(path, expected):
    found = parameters.find(path)
    assert (found and found.path) == expected


def test_openais_order():
    """As in the release's `params_shapes.json`."""
    embeddings = [each.path for each in parameters.in_openai_order(stacked=False)]
    assert embeddings == ["position_embedding", "token_embedding"]
    block = [each.path_in_block for each in parameters.in_openai_order(stacked=True)]
    assert block == [
        "attention/qkv/kernel", "attention/qkv/bias", "attention/out/kernel", "attention/out/bias",
        "norm1/scale", "norm1/bias", "ffn_in/kernel", "ffn_in/bias", "ffn_out/kernel",
        "ffn_out/bias", "norm2/scale", "norm2/bias",
    ]  # fmt: skip


def test_what_openai_released_has_gpt1s_number_of_parameters():
    config = ModelConfig(vocab_size=40478)
    letters = sizes(config, 0)
    total = 0
    for parameter in PARAMETERS.values():
        if parameter.openai is not None:
            layers = config.num_layers if parameter.stacked else 1
            total += layers * int(np.prod([letters[letter] for letter in parameter.shape]))
    assert total == 116_534_784


def test_the_names_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.OpenAIGPTConfig(vocab_size=20, n_embd=8, n_head=2, n_layer=1)
    theirs = {name for name, _ in transformers.OpenAIGPTModel(config).named_parameters()}
    ours = {
        f"h.0.{parameter.huggingface}" if parameter.stacked else parameter.huggingface
        for parameter in PARAMETERS.values()
        if parameter.huggingface is not None
    }
    assert ours == theirs
