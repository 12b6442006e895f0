"""One text (or the texts of one labelled row) as the packed row that the model reads."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from gptjax.batch import Batch
from gptjax.config.schema import TaskSpec
from gptjax.data import loader, tasks
from gptjax.data.packing import Packer
from gptjax.data.tables import memory
from gptjax.data.tables.labelled import LabelledTable, as_text
from gptjax.data.tokens.tokenizer import Tokenizer
from gptjax.errors import UserError, require

# The fields of a batch that are [B, T].
_BY_TOKEN = ("tokens", "segment_ids", "positions", "token_types", "lm_weights")

Texts = str | Mapping[str, Any]
"""A text, or for a task with several texts a mapping of column names to texts."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A packed row that holds one text, or the sequences of one example."""

    batch: Batch
    """NumPy arrays with B = 1 and without padding at the end."""
    texts: dict[str, str]
    """Column name -> text, in the order of `TaskSpec.text_columns`. A language model has the single
    column "text"."""
    sequences: list[tuple[int, int]]
    """The first token of each sequence, and the token after its last."""
    cut: bool = False
    """Whether a text was shortened to fit into the context."""

    @property
    def length(self) -> int:
        """T, the number of tokens."""
        return int(self.batch.tokens.shape[1])


def of_text(text: str, tokenizer: Tokenizer, context_length: int) -> Row:
    """Returns the row of a text for a language model.

    Raises:
      UserError: the text has fewer than two tokens, or more than the context.
    """
    require(isinstance(text, str), f"`text`: must be a text, not a {type(text).__name__}")
    ids = tokenizer.encode(text)
    require(len(ids) > 1, f"`text`: has {len(ids)} tokens; a language model needs at least 2")
    require(
        len(ids) <= context_length,
        f"`text`: has {len(ids)} tokens, and the context of the model has {context_length}; "
        "shorten it",
    )
    batch = loader.lm_batch([np.asarray(ids, np.int32)], len(ids), 1)
    return Row(batch, {"text": text}, [(0, len(ids))])


def of_example(
    texts: Texts,
    task: TaskSpec,
    tokenizer: Tokenizer,
    context_length: int,
    label: Any = None,
    sequence_means: bool = False,
) -> Row:
    """Returns the row of an example of a task.

    Args:
      texts: the text, or column name -> text for the columns of the task.
      task: the task.
      tokenizer: the tokenizer.
      context_length: the largest number of tokens in a sequence.
      label: the label, as in a file of the task. None means that it is not known.
      sequence_means: as in `Packer`.

    Raises:
      UserError: a text is missing, or the label does not exist.
    """
    columns = task.text_columns
    if isinstance(texts, str):
        require(
            len(columns) == 1,
            f"`text`: the task reads {len(columns)} texts: {', '.join(columns)}; give all of them",
        )
        texts = {columns[0]: texts}
    require(
        isinstance(texts, Mapping),
        f"`text`: is a {type(texts).__name__}; give a text, or a mapping of columns to texts",
    )
    cells = {name: [text] for name, text in texts.items()}
    if label is not None:
        cells[task.label] = [label]
    wanted = [*columns, *([task.label] if label is not None else [])]
    table = LabelledTable(memory.columns(cells, "the text", wanted), "the text")
    table.require_columns(wanted)
    read = {name: as_text(cells[0]) for name, cells in table.columns(columns).items()}
    try:
        examples = tasks.encode(task, table, tokenizer, context_length, label is not None)
    except UserError as error:
        place = f"{table.cell(0, task.label)}: "
        raise UserError(str(error).replace(place, "`label`: ", 1)) from error
    longest = int(examples.lengths.max())
    packer = Packer(examples.lengths, 1, longest, sequence_means=sequence_means)
    batch = packer.pack(examples, np.zeros(1, np.int64))[0]
    # The packer rounds T up to a multiple of 8.
    batch = dataclasses.replace(
        batch, **{name: getattr(batch, name)[:, :longest] for name in _BY_TOKEN}
    )
    ends = np.cumsum([len(tokens) for tokens in examples.tokens if len(tokens)]).tolist()
    return Row(batch, read, list(zip([0, *ends], ends, strict=False)), bool(examples.cut))
