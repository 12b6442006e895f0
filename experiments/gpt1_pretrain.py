"""Pretrains GPT-1 at full size, 117M parameters, on a corpus of books for 100 epochs.

    python launch.py --config=gpt1_pretrain \
        --config.pretrain.train_files='bookcorpus/*.txt' --workdir=/mnt/BUCKET/gpt1

The hyper-parameters come from the paper (Radford et al. 2018, section 4.1), which reports a
perplexity of 18.4 on BooksCorpus. They are batches of 64 x 512 tokens, Adam with a learning rate of
2.5e-4, 2,000 steps of warm-up, a cosine decay to 0, dropout 0.1 and weight decay 0.01. The paper
does not give beta2 (0.999), epsilon (1e-8) and the clipping at norm 1. These values come from
OpenAI's fine-tuning code. `--config=gpt1_pretrain:modern` uses another recipe, which
gptjax/config/recipes.py describes.

The corpus is not public as a file. The full training has not been run in this project, which has
no accelerator. To use GPT-1's own vocabulary, add `--config.tokenizer.kind=gpt1
--config.tokenizer.vocab_file=encoder_bpe_40000.json
--config.tokenizer.merges_file=vocab_40000.bpe`. Without these flags a BPE of the same size is
trained.
"""

from gptjax.config import (
    Experiment,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    TokenizerConfig,
    recipes,
)


def get_config(recipe: str = "paper") -> Experiment:
    """Returns the experiment with the given recipe. It needs `--config.pretrain.train_files`."""
    experiment = Experiment(
        name="gpt1_pretrain",
        model=ModelConfig(dtype="bfloat16"),
        # The tokens are <unk>, 2 x 238 symbols, 40,000 merges and the line break.
        tokenizer=TokenizerConfig(vocab_size=40478),
        pretrain=PretrainConfig(
            batch_size=64,
            epochs=100,
            eval_every=5000,
            eval_batches=200,
            validation_fraction=0.01,
            optimizer=OptimizerConfig(learning_rate=2.5e-4, warmup_steps=2000),
        ),
    )
    return recipes.apply(experiment, recipe)
