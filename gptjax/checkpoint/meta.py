"""The metadata of a checkpoint: configuration, tokenizer, task, data."""

import dataclasses
import hashlib
import json
from typing import Any

from gptjax.config import schema
from gptjax.config.schema import INHERITED_SIZES, Experiment, ModelConfig, TaskSpec
from gptjax.data.tokens import tokenizer as tokenizer_lib
from gptjax.errors import require


@dataclasses.dataclass(frozen=True)
class Meta:
    """All that is needed to use the arrays of a checkpoint."""

    stage: str
    model: ModelConfig
    tokenizer_json: str
    tokenizer_hash: str
    task: TaskSpec | None
    metric: str
    """Name of the validation score that ranks the checkpoints of the stage."""
    experiment: dict[str, Any]
    """The configuration as `schema.to_dict` returns it; `experiment_config` reads it."""
    data_fingerprint: str
    """Hash of the training data."""
    ledger: str = ""
    """Hash of all batches that the weights were trained on, from `gptjax.train.ledger`."""

    def experiment_config(self) -> Experiment:
        """Returns the configuration of the run; fields that are not stored have their defaults.

        Raises:
          UserError: a field that this version does not have.
        """
        return schema.from_dict(Experiment, self.experiment, f"the {self.stage} checkpoint")

    def with_sizes(self, model: ModelConfig) -> ModelConfig:
        """Returns a configuration whose sizes are those of the checkpoint's arrays."""
        return dataclasses.replace(model, **{n: getattr(self.model, n) for n in INHERITED_SIZES})

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON-ready values."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any], where: str) -> "Meta":
        """Reads the values of `to_dict`.

        Args:
          values: from `to_dict`, possibly written as JSON and read again.
          where: name of the checkpoint in error messages.

        Raises:
          UserError: an unknown field of the model, or a changed tokenizer.
        """
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
