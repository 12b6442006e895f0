"""GPT-1, full size and by the paper's recipe: 117M parameters, 100 epochs of a book corpus.

    python launch.py --config=experiments/gpt1_pretrain.py \
        --config.pretrain.train_files='bookcorpus/*.txt' --workdir=/mnt/BUCKET/gpt1

Batch 64 x 512, Adam 2.5e-4 with 2,000 steps of warm-up and cosine to 0, dropout 0.1, decay 0.01
(Radford et al. 2018, section 4.1), which reports a perplexity of 18.4 on BooksCorpus. Not stated
there, and taken from the authors' fine-tuning code: beta2 0.999, epsilon 1e-8, clipping at norm 1.
`gpt1_pretrain.py:modern` takes the recipe of that name (gptjax/config/recipes.py).

The corpus is not public as a file, and this project has not run the full training: it has no
accelerator to do so. With GPT-1's own vocabulary, add
`--config.tokenizer.kind=gpt1 --config.tokenizer.vocab_file=encoder_bpe_40000.json
--config.tokenizer.merges_file=vocab_40000.bpe`; without, a BPE of the same size is trained.
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
    """Returns the experiment; give it `--config.pretrain.train_files`."""
    experiment = Experiment(
        name="gpt1_pretrain",
        model=ModelConfig(dtype="bfloat16"),
        # <unk> + 2 x 238 symbols + 40,000 merges + the line break.
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
