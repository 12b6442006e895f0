"""The metadata of a checkpoint: configuration, tokenizer, task, data."""

import dataclasses
import hashlib
import json
from typing import Any

from gptjax.config import schema
from gptjax.config.schema import ModelConfig, TaskSpec
from gptjax.data.tokens import tokenizer as tokenizer_lib
from gptjax.errors import require


@dataclasses.dataclass(frozen=True)
class Meta:
    """What belongs to the weights besides the arrays."""

    stage: str
    model: ModelConfig
    tokenizer_json: str
    tokenizer_hash: str
    task: TaskSpec | None
    metric: str
    """The validation score that ranks the checkpoints of the stage."""
    experiment: dict[str, Any]
    """The whole configuration as plain values."""
    data_fingerprint: str
    """Hash of the training data."""
    ledger: str = ""
    """Of the batches that the weights were trained on, from `gptjax.train.ledger`."""

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON-ready values."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any], where: str) -> "Meta":
        """Reads `to_dict`'s values; `where` names the checkpoint in errors."""
        task = values["task"] and TaskSpec.from_dict(values["task"])
        model = schema.from_dict(ModelConfig, values["model"], where)
        meta = Meta(**{**values, "task": task, "model": model})
        tokenizer = tokenizer_lib.from_json(meta.tokenizer_json, where)
        require(
            tokenizer.hash == meta.tokenizer_hash,
            f"{where}: the tokenizer inside is not the one that the weights were trained with "
            f"(hash {tokenizer.hash[:12]}, not {meta.tokenizer_hash[:12]})",
        )
        return meta


def digest(values: dict[str, Any]) -> str:
    """Returns a hash of JSON-ready values."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
