"""The metadata of a checkpoint: its configuration, tokenizer and task, and hashes of its data."""

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
    """The metadata of a checkpoint. It has the model, tokenizer and task that its arrays need."""

    stage: str
    model: ModelConfig
    tokenizer_json: str
    tokenizer_hash: str
    task: TaskSpec | None
    metric: str
    """The name of the validation score that ranks the checkpoints of the stage."""
    experiment: dict[str, Any]
    """The configuration of the run, as a dictionary from `schema.to_dict`."""
    data_fingerprint: str
    """The hash of the training data."""
    ledger: str = ""
    """The running hash of all batches that the weights were trained on (`gptjax.train.ledger`)."""

    def experiment_config(self) -> Experiment:
        """Returns the configuration of the run. Fields that are not stored get their defaults.

        Raises:
          UserError: a stored field does not exist in this version of gptjax.
        """
        return schema.from_dict(Experiment, self.experiment, f"the {self.stage} checkpoint")

    def with_sizes(self, model: ModelConfig) -> ModelConfig:
        """Returns `model` with the sizes of the checkpoint's arrays."""
        return dataclasses.replace(model, **{n: getattr(self.model, n) for n in INHERITED_SIZES})

    def to_dict(self) -> dict[str, Any]:
        """Returns a dictionary that can be written as JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any], where: str) -> "Meta":
        """Makes the metadata from the values of `to_dict`.

        Args:
          values: a dictionary from `to_dict`, also after it was written as JSON and read again.
          where: the name of the checkpoint in error messages.

        Raises:
          UserError: the model has an unknown field, or the tokenizer has changed.
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
    """Returns a hash of a dictionary that can be written as JSON."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
