"""The zero-shot probes of the paper: what a pretrained model does without any fine-tuning.

    python launch.py --mode=evaluate --probes --config=experiments/probes.py --checkpoint=runs/gpt1

CoLA, SST-2, RACE and definite pronouns (Winograd schemas) from the Hugging Face hub; or files with
the same columns, by `--config.probes.cola.dataset= --config.probes.cola.file=dev.tsv` and so on. In
an experiment that pretrains, the same field `probes` scores them at each validation, and
plots/probes.png shows them over the steps. Not run on the hub's data here: it cannot be reached.
"""

from gptjax.config import Experiment, ModelConfig, PretrainConfig, ProbeConfig


def get_config() -> Experiment:
    """Returns the probes, and a pretraining to give text files to."""
    return Experiment(
        name="probes",
        model=ModelConfig(context_length=512),
        pretrain=PretrainConfig(steps=10000, eval_every=1000),
        probes={
            "cola": ProbeConfig(kind="acceptability", dataset="nyu-mll/glue:cola", text="sentence"),
            "sst2": ProbeConfig(kind="next_word", dataset="nyu-mll/glue:sst2", text="sentence"),
            "race": ProbeConfig(
                kind="multiple_choice",
                dataset="ehovy/race:all",
                text="article+question",
                choices="options[0],options[1],options[2],options[3]",
                label="answer",
            ),
            "pronouns": ProbeConfig(
                kind="substitution",
                dataset="community-datasets/definite_pronoun_resolution",
                split="test",
                text="sentence",
                choices="candidates[0],candidates[1]",
                pronoun="pronoun",
                pronoun_start="pronoun_loc",
            ),
        },
    )
