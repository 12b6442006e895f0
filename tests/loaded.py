"""Random models of every kind of task as `gptjax.GPT`, without a training."""

import functools

import small

from gptjax import mesh as mesh_lib
from gptjax.checkpoint.meta import Meta
from gptjax.config import schema
from gptjax.config.schema import Experiment, FinetuneConfig, MeshConfig
from gptjax.infer.predictor import GPT
from gptjax.model import gpt

LM_WEIGHT = 0.5
TEMPERATURE = 1.7
LABELS = {
    "classification": 1, "entailment": 2, "similarity": 0, "multiple_choice": 2, "regression": 0.3
}  # fmt: skip
TEXTS = {
    "text": "the cat sat on a mat", "pair": "some dogs ran far", "b": "home and back", "c": "again"
}  # fmt: skip


@functools.cache
def model(kind: str = "", **changes) -> GPT:
    """A loaded model of a task; "" is a language model.

    Args:
      kind: of the task.
      **changes: fields of the model's configuration, and `mean`, `windows`, `flatten` or `labels`
        of the task.
    """
    spec = small.task(kind).spec if kind else None
    tokenizer = small.small_tokenizer()
    if spec:
        fields = ("mean", "windows", "flatten", "labels")
        own = {name: changes.pop(name) for name in fields if name in changes}
        spec = schema.TaskSpec(**{**vars(spec), **own})
    config = small.config(**changes)
    module = gpt.make_model(config, spec)
    mesh = mesh_lib.make_mesh(MeshConfig(), small.jax.devices()[:1])
    experiment = Experiment(model=config, finetune=FinetuneConfig(lm_weight=LM_WEIGHT))
    meta = Meta(
        "finetune" if spec else "pretrain", config, tokenizer.to_json(), tokenizer.hash, spec,
        "loss", schema.to_dict(experiment), "",
    )  # fmt: skip
    params = small.placed(small.params(module), mesh)
    temperature = TEMPERATURE if spec and spec.labels else 1.0
    return GPT(config, params, tokenizer, spec, meta, mesh, "runs/small", temperature=temperature)


def unusual() -> GPT:
    """A model with one matrix for all embeddings (recipe `original`) and a flattened head.

    The recipe `tutorial` has such a head.
    """
    return model("entailment", one_matrix=True, flatten=24, segment_types=3)


def texts(of: GPT):
    """Texts for a model: one text for a language model, else column -> text."""
    if of.task is None:
        return TEXTS["text"]
    return {name: TEXTS[name] for name in of.task.text_columns}
