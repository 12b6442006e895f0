"""The configuration of an experiment: its fields, their validation, and the named recipes.

Experiment files import the configuration classes from this package.
"""

from gptjax.config.schema import CHOOSABLE as CHOOSABLE
from gptjax.config.schema import AblationConfig as AblationConfig
from gptjax.config.schema import CheckpointConfig as CheckpointConfig
from gptjax.config.schema import Experiment as Experiment
from gptjax.config.schema import FinetuneConfig as FinetuneConfig
from gptjax.config.schema import MeshConfig as MeshConfig
from gptjax.config.schema import ModelConfig as ModelConfig
from gptjax.config.schema import OptimizerConfig as OptimizerConfig
from gptjax.config.schema import PretrainConfig as PretrainConfig
from gptjax.config.schema import ProbeConfig as ProbeConfig
from gptjax.config.schema import TokenizerConfig as TokenizerConfig
