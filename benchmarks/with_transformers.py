"""transformers by Hugging Face, used as its documentation describes."""

import csv
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers.trainer_pt_utils import LengthGroupedSampler

from benchmarks.sizes import DROPOUT, EPSILON, INIT_STD, LM_WEIGHT, Size
from benchmarks.with_torch import IGNORED, FastGPT, Training
from gptjax.data.tokens.tokenizer import DELIMITER, EXTRACT, PADDING, START, UNKNOWN

Tensor = torch.Tensor


def openai_config(size: Size, dropout: float = DROPOUT) -> Any:
    """Returns the configuration of transformers' GPT-1."""
    return transformers.OpenAIGPTConfig(
        vocab_size=size.vocab_size, n_positions=size.context_length, n_embd=size.width,
        n_layer=size.num_layers, n_head=size.num_heads, resid_pdrop=dropout, embd_pdrop=dropout,
        attn_pdrop=dropout, summary_first_dropout=dropout, initializer_range=INIT_STD,
        layer_norm_epsilon=EPSILON,
    )  # fmt: skip


def pretraining(size: Size, dtype: str, dropout: float, model: Any = None) -> Training:
    """Returns the pretraining of OpenAIGPTLMHeadModel with AdamW; dtype as in `Training`."""
    model = model or transformers.OpenAIGPTLMHeadModel(openai_config(size, dropout))
    model.train()

    def loss(tokens: Tensor) -> Tensor:
        return model(input_ids=tokens, labels=tokens).loss

    return Training(model, loss, dtype, fused=False)


class Generation:
    """Greedy generation by `generate`, always to the full length."""

    def __init__(self, size: Size, dtype: str, kind: str = "openai", model: Any = None):
        """Builds the model.

        Args:
          size: of the model.
          dtype: float32 or bfloat16.
          kind: openai (GPT-1, for which transformers has no cache) or gpt2 (GPT-2 with layers of
            the same size and number, layer norms before the sublayers, and a cache).
          model: None means random weights.
        """
        if model is None and kind == "gpt2":
            config = transformers.GPT2Config(
                vocab_size=size.vocab_size, n_positions=size.context_length, n_embd=size.width,
                n_layer=size.num_layers, n_head=size.num_heads, initializer_range=INIT_STD,
                bos_token_id=None, eos_token_id=None,
            )  # fmt: skip
            model = transformers.GPT2LMHeadModel(config)
        elif model is None:
            model = transformers.OpenAIGPTLMHeadModel(openai_config(size))
        self._model = model.to(getattr(torch, dtype)).eval()
        self._cached = kind == "gpt2"

    @torch.inference_mode()
    def __call__(self, prompt: np.ndarray, batch: int, tokens: int) -> np.ndarray:
        """Returns int [batch, tokens]: continuations of int [T]."""
        ids = torch.from_numpy(prompt.astype(np.int64))[None].repeat(batch, 1)
        found = self._model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=tokens, min_new_tokens=tokens, use_cache=self._cached, pad_token_id=0,
        )  # fmt: skip
        return found[:, len(prompt) :].numpy()


class JointModel(nn.Module):
    """A decoder with an LM head and a linear task head on the last state of each sequence."""

    def __init__(self, size: Size, kind: str, outputs: int, dropout: float = DROPOUT):
        """Builds the model.

        Args:
          size: of the decoder.
          kind: transformers (OpenAIGPTLMHeadModel) or pytorch (`FastGPT`).
          outputs: number of classes.
          dropout: rate of all dropout layers.
        """
        super().__init__()
        self.kind, self.dropout = kind, dropout
        if kind == "transformers":
            self.decoder: Any = transformers.OpenAIGPTLMHeadModel(openai_config(size, dropout))
        else:
            self.decoder = FastGPT(size, dropout)
        self.task_head = nn.Linear(size.width, outputs)
        nn.init.normal_(self.task_head.weight, std=INIT_STD)
        nn.init.zeros_(self.task_head.bias)

    def loss(self, tokens: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        """Returns task + 0.5 * LM.

        Args:
          tokens: int [n * C, T]. The padding at the right needs no mask of its own, because tokens
            do not see later ones.
          lengths: int [n * C], tokens of each sequence.
          labels: int [n]. The C sequences of an example follow each other, and their last states
            are summed.
        """
        if self.kind == "transformers":
            states = self.decoder.transformer(input_ids=tokens).last_hidden_state
            logits = self.decoder.lm_head(states)
        else:
            states = self.decoder.hidden(tokens)
            logits = self.decoder.logits(states)
        places = torch.arange(tokens.shape[1])[None]
        real = places[:, 1:] < lengths[:, None]
        targets = torch.where(real, tokens[:, 1:], IGNORED)
        lm = functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED
        )
        last = states[torch.arange(len(tokens)), lengths - 1]
        summed = last.view(len(labels), -1, last.shape[-1]).sum(1)
        outputs = self.task_head(functional.dropout(summed, self.dropout, self.training))
        return functional.cross_entropy(outputs.float(), labels) + LM_WEIGHT * lm


def fast_tokenizer(path: str) -> Any:
    """Returns the fast tokenizer of transformers for a tokenizer.json of gptjax."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=path, unk_token=UNKNOWN, bos_token=START, sep_token=DELIMITER,
        cls_token=EXTRACT, pad_token=PADDING, split_special_tokens=True,
    )  # fmt: skip


def read_examples(
    path: str, tokenizer: Any, task: str, context: int
) -> tuple[list[list[int]], np.ndarray, int]:
    """Reads and tokenises a CSV file with text, text_pair and label.

    Args:
      path: of the file.
      tokenizer: from `fast_tokenizer`.
      task: classification, entailment or similarity, as in `gptjax/data/tasks.py`.
      context: tokens of the longest sequence. If two texts are too long, the longer one is cut.

    Returns:
      The sequences, with the C sequences of an example in a row; the class of each example [n]; and
      the number of classes.
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = sorted({row["label"] for row in rows})
    labels = np.array([names.index(row["label"]) for row in rows])
    columns = ("text",) if task == "classification" else ("text", "text_pair")
    encoded = [
        tokenizer([row[column] for row in rows], add_special_tokens=False)["input_ids"]
        for column in columns
    ]
    start, delimiter, extract = tokenizer.convert_tokens_to_ids(
        [tokenizer.bos_token, tokenizer.sep_token, tokenizer.cls_token]
    )
    found = []
    for row in zip(*encoded, strict=True):
        for each in (row, row[::-1]) if task == "similarity" else (row,):
            order = _cut([list(text) for text in each], context - len(each) - 1)
            sequence = [start, *order[0]]
            if len(order) > 1:
                sequence += [delimiter, *order[1]]
            found.append([*sequence, extract])
    return found, labels, len(names)


def _cut(texts: list[list[int]], budget: int) -> list[list[int]]:
    while sum(map(len, texts)) > budget:
        max(reversed(texts), key=len).pop()  # if equal, the second text, as in gptjax
    return texts


def batches(
    sequences: list[list[int]], labels: np.ndarray, batch_size: int, padding: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields the batches (tokens, lengths, labels) of an epoch, padded to their longest sequence.

    A batch has examples of about the same length, as with `group_by_length` in the Trainer of
    transformers.
    """
    each = len(sequences) // len(labels)
    longest = [max(map(len, sequences[i * each : (i + 1) * each])) for i in range(len(labels))]
    sampler = LengthGroupedSampler(
        batch_size, lengths=longest, generator=torch.Generator().manual_seed(0)
    )
    order = list(sampler)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = [sequences[i * each + c] for i in chosen for c in range(each)]
        width = max(map(len, rows))
        tokens = torch.tensor([row + [padding] * (width - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        yield tokens, lengths, torch.from_numpy(labels[chosen])


def classifier(folder: str, dtype: str, batch_size: int) -> Callable[[list[str]], list[str]]:
    """Returns a function texts -> labels that uses the text-classification pipeline.

    Args:
      folder: a folder that `gptjax.interop.huggingface.write` has written.
      dtype: float32 or bfloat16.
      batch_size: texts that are padded to one length and run together.
    """
    from tokenizers.processors import TemplateProcessing

    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ends = [(name, tokenizer.convert_tokens_to_ids(name)) for name in (START, EXTRACT)]
    # The model was trained on sequences of this form: start text extract.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{START} $A {EXTRACT}", special_tokens=ends
    )
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=getattr(torch, dtype)
    )
    run = transformers.pipeline(
        "text-classification", model=model, tokenizer=tokenizer, device="cpu"
    )

    def classify(texts: list[str]) -> list[str]:
        # The texts are sorted by length, so that there is little padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        context = model.config.n_positions
        found = run(
            [texts[i] for i in order], batch_size=batch_size, truncation=True, max_length=context
        )
        labels = [""] * len(texts)
        for i, each in zip(order, found, strict=True):
            labels[i] = each["label"]
        return labels

    return classify
