"""The tiny model that the tests of `--mode=compile` compile, and its closed forms."""

import runs

LAYERS, WIDTH, LENGTH, VOCABULARY, ROWS = 3, 16, 16, 96, 8
FLAGS = (
    *runs.TINY, f"--config.model.num_layers={LAYERS}", f"--config.pretrain.batch_size={ROWS}",
    "--config.model.residual_dropout=0.1", "--config.model.attention=plain",
)  # fmt: skip
MATRICES = VOCABULARY * WIDTH + LAYERS * 12 * WIDTH**2
VECTORS = LENGTH * WIDTH + LAYERS * (3 + 1 + 4 + 1 + 4) * WIDTH


def products(tokens: int) -> int:
    """Operations of the products of a step that attends to all keys, masked ones too."""
    per_token = LAYERS * (12 * WIDTH**2 + 2 * WIDTH * LENGTH) + VOCABULARY * WIDTH
    return 3 * 2 * per_token * tokens
