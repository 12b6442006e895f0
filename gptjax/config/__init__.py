"""The configuration of an experiment: fields, validation, and the named recipes.

Experiment files import the classes from here.
"""

from gptjax.config.schema import (
    AblationConfig,
    CheckpointConfig,
    Experiment,
    FinetuneConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    ProbeConfig,
    TokenizerConfig,
)

__all__ = [
    "AblationConfig",
    "CheckpointConfig",
    "Experiment",
    "FinetuneConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PretrainConfig",
    "ProbeConfig",
    "TokenizerConfig",
]
