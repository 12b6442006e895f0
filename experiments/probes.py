"""Zero-shot probes of the paper: tasks that a language model does without any fine-tuning.

    python launch.py evaluate --probes --config=probes --checkpoint=runs/gpt1

The probes are CoLA, SST-2, RACE and the Winograd schemas of definite pronouns, from the Hugging
Face hub. Flags such as `--config.probes.cola.dataset= --config.probes.cola.file=dev.tsv` read files
with the same columns instead.

Any experiment that pretrains can have the field `probes`. Each validation then scores the probes,
and plots/probes.png shows the scores over the steps. These probes have not been run on the data of
the hub, because this project cannot reach the hub.
"""

from gptjax.config import Experiment, ModelConfig, PretrainConfig, ProbeConfig


def get_config() -> Experiment:
    """Returns the experiment of a pretraining and its probes.

    To train it, `--config.pretrain.train_files` is needed.
    """
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
