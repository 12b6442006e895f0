"""Computes the numbers of the page: one JSON object, which `docs/explain_json.md` describes.

The letters of shapes are defined in `gptjax.batch`, and N = L + 1 is the number of states of the
residual stream: the embedding and the output of each block.
"""

import base64
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from scipy import special, stats

from gptjax import __version__
from gptjax.config.schema import TaskKind, TaskSpec
from gptjax.data.tokens.tokenizer import DELIMITER, EXTRACT, PADDING, START
from gptjax.errors import UserError, require
from gptjax.explain import comparison, training
from gptjax.explain import outcome as outcome_lib
from gptjax.explain import weights as weights_lib
from gptjax.explain import words as words_lib
from gptjax.infer import inside
from gptjax.infer.predictor import GPT
from gptjax.infer.row import Row, Texts
from gptjax.model.losses import lm_targets
from gptjax.ops.attention.plain import HIDDEN_SCORE
from gptjax.parameters import POSITION_EMBEDDING, SEGMENT_EMBEDDING, TOKEN_EMBEDDING

VERSION = 1
"""The version of the JSON object."""

_KINDS = {START: "start", DELIMITER: "delimiter", EXTRACT: "extract", PADDING: "padding"}
_NEAREST, _LENS, _TOP_TOKENS, _TOP_KEYS = 5, 5, 50, 8
# The number of dimensions of the embeddings that are shown, and of the heads with their parts.
_DIMENSIONS, _HEADS = 32, 8
# The patterns of a head that are measured (`_Page._patterns`).
_PATTERNS = ("previous", "first", "same", "delimiter", "extract")
# The largest number of weights, L H T T: 12 layers, 12 heads and 1,024 tokens.
_MOST_WEIGHTS = 12 * 12 * 1024 * 1024
# A computation of this size takes about half a minute on two cores of a laptop.
_LONG_FLOPS = 3e12

Heads = Sequence[tuple[int, int]]
"""Pairs of a layer and a head, both from 0."""


def explain(
    gpt: GPT,
    texts: Texts,
    label: Any = None,
    heads: Heads = (),
    compare: comparison.Models | None = None,
    other_text: Texts | None = None,
    weights: bool = False,
) -> dict[str, Any]:
    """Returns the data of the page for one text.

    Args:
      gpt: the model.
      texts: the text, or for a task with several texts a mapping of column names to texts.
      label: the right label. None means that it is not known.
      heads: the heads whose queries, keys and values are shown. An empty sequence means the most
        telling ones.
      compare: other models, or the paths of their checkpoints, which read the same text. None means
        the checkpoints that the run of the model kept, if it has at most 20 million parameters.
      other_text: another text, as `texts`, which the model reads too.
      weights: whether the parameters must travel, as in `gptjax.explain.weights.of`.

    Raises:
      UserError: a text does not fit, a label or a head does not exist, a model of `compare` cannot
        be read, or the parameters cannot travel.
    """
    row = gpt.read(texts, label)
    other_row = None if other_text is None else _read_other(gpt, other_text)
    config = gpt.config
    pairs = not isinstance(heads, str) and all(
        isinstance(pair, Sequence) and len(pair) == 2 for pair in heads
    )
    require(pairs, f"`heads`={heads!r}: must be pairs of a layer and a head, such as [(0, 3)]")
    for layer, head in heads:
        require(
            0 <= layer < config.num_layers and 0 <= head < config.num_heads,
            f"`heads`: there is no head {layer}.{head}; layers are 0 to {config.num_layers - 1}, "
            f"heads 0 to {config.num_heads - 1}",
        )
    count = config.num_layers * config.num_heads * row.length**2
    require(
        count <= _MOST_WEIGHTS,
        f"`text`: {row.length:,} tokens in {config.num_layers} layers of {config.num_heads} heads "
        "are too many to show; shorten it",
    )
    # What can be refused comes first, because the rest can take a minute.
    parameters = weights_lib.of(gpt, weights)
    page = _Page(gpt, row, heads)
    compared = page.comparison(compare, other_row)
    return page.data() | {"comparison": compared, "weights": parameters}


def how_long(gpt: GPT, texts: Texts) -> str:
    """Returns a sentence that says what takes long; "" if nothing does.

    Leaving out each token needs a pass of the model for each token, so the time is quadratic.
    """
    length = gpt.read(texts).length
    flops = 2 * sum(x.size for x in jax.tree.leaves(gpt.params)) * length**2
    if gpt.task is None or flops < _LONG_FLOPS:
        return ""
    return (
        f"{length} tokens; to leave out each of them, the model reads the text {length} times "
        f"({flops / 1e12:.0f} TFLOP), which can take minutes"
    )


def _read_other(gpt: GPT, texts: Texts) -> Row:
    """Reads another text. It has no label, because that of the first text may be wrong for it."""
    try:
        return gpt.read(texts)
    except UserError as error:
        named = str(error).replace("`text`", "`other_text`", 1)
        raise UserError(named.replace("the text:", "the other text:", 1)) from error


class _Page:
    """The activations of one row, and the parts of the page that are made of them."""

    def __init__(self, gpt: GPT, row: Row, heads: Heads):
        self.gpt, self.row, self.wanted = gpt, row, heads
        self.task: TaskSpec | None = gpt.task
        self.batch, self.ids = row.batch, row.batch.tokens[0]
        self.pieces = [gpt.tokenizer.token(i) for i in self.ids]
        self.kinds = [_KINDS.get(piece, "text") for piece in self.pieces]
        names = [name for name in inside.AXES if self.task or name != "task_logits"]
        self.found = inside.activations(gpt.opened, gpt.params, row.batch, names)
        finite = all(np.isfinite(self.found[name]).all() for name in names)
        require(finite, f"{gpt.path}: the model computes NaN or infinity for this text")
        self.states_NTD = comparison.states(self.found)
        self.is_predicted_T = row.batch.lm_weights[0] > 0
        self.next_T = np.asarray(lm_targets(row.batch)[0])
        self.outcome = outcome_lib.of(gpt, gpt.params, row.batch)
        self.merges = words_lib.Merges(gpt.tokenizer)
        # Position t is a query. The scores say which keys it sees, as the model has applied it.
        scores_LHTS = self.found["scores"]
        self.visible_TS = np.asarray(np.all(scores_LHTS > HIDDEN_SCORE, axis=(0, 1)))

    def data(self) -> dict[str, Any]:
        """Returns the whole object."""
        groups = words_lib.group(self.pieces, self.merges.known)
        patterns = self._patterns()
        return {
            "version": VERSION,
            "program": f"gptjax {__version__}",
            "checkpoint": self.gpt.path,
            "model": self._model(),
            "task": self._task(),
            "input": {
                "columns": [{"name": k, "text": v} for k, v in self.row.texts.items()],
                "label": self._label(),
                "option": self._option(),
                "cut": self.row.cut,
            },
            "answer": self._answer(),
            "losses": self._losses(),
            "tokens": self._tokens(groups),
            "sequences": self._sequences(),
            "words": self._words(groups),
            "embedding": self._embedding(),
            "steps": self._steps(),
            "ribbon": self._ribbon(),
            "attention": self._attention(),
            "patterns": patterns,
            "heads": self._heads(patterns),
            "lens": self._lens(),
            "lm": self._lm(),
            "attribution": self._attribution(),
            "training": training.step(self.gpt, self.row, self.outcome),
        }

    def comparison(self, compare: comparison.Models | None, other: Row | None) -> dict[str, Any]:
        """Returns the same text in other models, and another text in this model."""
        shown = comparison.checkpoints(self.gpt, self.row, self.found, self.outcome, compare)
        return {
            "checkpoints": shown[0],
            "left_out": shown[1],
            "other": None if other is None else self._other(other),
        }

    def _other(self, other: Row) -> dict[str, Any]:
        pieces = [self.gpt.tokenizer.token(i) for i in other.batch.tokens[0]]
        tokens = [
            {**self._token(i), "kind": _KINDS.get(piece, "text")}
            for i, piece in zip(other.batch.tokens[0], pieces, strict=True)
        ]
        return {"tokens": tokens, **comparison.text(self.gpt, self.row, self.found, other)}

    def _token(self, i: int) -> dict[str, Any]:
        return {"id": int(i), "text": words_lib.readable(self.gpt.tokenizer.token(int(i)))}

    def _label(self) -> str | None:
        """Returns the right label as the model knows it: "1" where the user wrote 1.0."""
        if self.task is None or self.batch.labels is None:
            return None
        option = self._option()
        if option is None:
            return f"{float(self.batch.labels[0, 0]):g}"
        return self.task.labels[option]

    def _option(self) -> int | None:
        """Returns the index of the right class or answer, None if it is not known."""
        if self.task is None or self.batch.labels is None:
            return None
        if self.task.kind is TaskKind.REGRESSION:
            return None
        return int(self.batch.labels[0, 0])

    def _model(self) -> dict[str, Any]:
        config, task = self.gpt.config, self.task
        reads = None
        if task:
            reads = "flatten" if task.flatten else "mean" if task.mean else "extract"
        parameters = sum(x.size for x in jax.tree.leaves(self.gpt.params))
        return {
            "layers": config.num_layers, "heads": config.num_heads, "width": config.width,
            "head_width": config.head_width, "ffn_width": config.hidden_ffn_width,
            "vocab_size": config.vocab_size, "context_length": config.context_length,
            "segment_types": config.segment_types, "parameters": parameters,
            "activation": str(config.activation), "tied": config.tied,
            "one_matrix": config.one_matrix, "head": reads,
            "temperature": float(self.gpt.temperature),
        }  # fmt: skip

    def _task(self) -> dict[str, Any] | None:
        if self.task is None:
            return None
        return {
            "kind": str(self.task.kind),
            "labels": list(self.task.labels),
            "lm_weight": outcome_lib.objective(self.gpt).lm_weight,
        }

    def _answer(self) -> dict[str, Any] | None:
        if self.task is None:
            return None
        logits, found = self.found["task_logits"].tolist(), self.outcome.answer
        assert found is not None
        if self.task.kind is TaskKind.REGRESSION:
            return {"prediction": found[0], "logits": logits, "probabilities": None}
        prediction = self.task.labels[int(np.argmax(logits))]
        return {"prediction": prediction, "logits": logits, "probabilities": found}

    def _losses(self) -> dict[str, Any]:
        found = self.outcome
        weights: dict[str, Any] = {"lambda": None, "task_weight": None}
        if self.task is not None:
            own = outcome_lib.objective(self.gpt)
            weights = {"lambda": own.lm_weight, "task_weight": own.task_weight}
        return {"lm": found.lm, "task": found.task, **weights, "total": found.total}

    def _tokens(self, groups: list[list[int]]) -> list[dict[str, Any]]:
        word_of = {i: w for w, group in enumerate(groups) for i in group}
        found = []
        for t, (i, kind) in enumerate(zip(self.ids, self.kinds, strict=True)):
            sequence = next(s for s, (a, b) in enumerate(self.row.sequences) if a <= t < b)
            found.append({
                **self._token(i), "kind": kind, "sequence": sequence,
                "position": int(self.batch.positions[0, t]),
                "type": int(self.batch.token_types[0, t]),
                "word": word_of.get(t), "seen": kind != "padding",
            })  # fmt: skip
        return found

    def _sequences(self) -> list[dict[str, Any]]:
        task, found = self.task, []
        has_extract = self.batch.extract is not None and not (task and task.flatten)
        extracts = self.batch.extract[0, 0].tolist() if has_extract else None
        for s, (start, stop) in enumerate(self.row.sequences):
            name = ""
            if task and task.kind is TaskKind.MULTIPLE_CHOICE:
                name = self.row.texts[task.choices[s]]
            elif task and task.windows and len(self.row.sequences) > 1:
                name = f"window {s + 1}"
            elif task and task.kind.sums_candidates:
                name = " | ".join(task.text_columns[:: -1 if s else 1])
            extract = extracts[s] if extracts else None
            found.append({"start": start, "stop": stop, "extract": extract, "name": name})
        return found

    def _words(self, groups: list[list[int]]) -> list[dict[str, Any]]:
        found = []
        for group in groups:
            steps = self.merges.steps([self.pieces[i] for i in group])
            shown = [[words_lib.readable(piece) for piece in step] for step in steps]
            found.append({"text": "".join(shown[-1]), "steps": shown})
        return found

    def _embedding(self) -> dict[str, Any]:
        params, batch = self.gpt.params, self.batch
        table_VD = np.asarray(params[TOKEN_EMBEDDING], np.float32)
        parts = {
            "token": table_VD[self.ids],
            "position": np.asarray(params[POSITION_EMBEDDING], np.float32)[batch.positions[0]],
            "segment": None,
            "sum": self.found["embedding"],
        }
        if self.gpt.config.segment_types:
            rows = np.asarray(params[SEGMENT_EMBEDDING], np.float32)
            parts["segment"] = rows[batch.token_types[0]]
        size = min(_DIMENSIONS, self.gpt.config.width)
        shown = {
            name: None if x is None else _base64(x[:, :size], "<f4") for name, x in parts.items()
        }
        norms = {name: None if x is None else _norms(x).tolist() for name, x in parts.items()}
        return {"dimensions": size, **shown, "norms": norms, "nearest": self._nearest(table_VD)}

    def _nearest(self, table_VD: np.ndarray) -> list[list[dict[str, Any]]]:
        unit_VD = table_VD / np.maximum(_norms(table_VD)[:, None], 1e-12)
        known = len(self.gpt.tokenizer)
        by_id = {}
        for i in set(self.ids.tolist()):
            cosines_V = unit_VD[:known] @ unit_VD[i]
            cosines_V[i] = -np.inf
            best = np.argsort(-cosines_V, kind="stable")[:_NEAREST]
            by_id[i] = [{**self._token(j), "cosine": float(cosines_V[j])} for j in best]
        return [by_id[i] for i in self.ids.tolist()]

    def _steps(self) -> list[dict[str, Any]]:
        config, found, length = self.gpt.config, self.found, len(self.ids)
        width, heads, ffn = config.width, config.num_heads, config.hidden_ffn_width
        vocab, pairs = config.vocab_size, int(self.visible_TS.sum())
        steps: list[dict[str, Any]] = []

        def add(
            name: str, layer: int | None, shape: Any, parameters: int, flops: int, x: Any
        ) -> None:
            norm = None if x is None else float(_norms(x.reshape(length, -1)).mean())
            steps.append({
                "name": name, "layer": layer, "shape": [int(n) for n in shape],
                "parameters": parameters, "flops": int(flops), "norm": norm,
            })  # fmt: skip

        square = [length, width]
        add("token_embedding", None, square, vocab * width, 0, None)
        add("position_embedding", None, square, config.context_length * width, 0, None)
        if config.segment_types:
            add("segment_embedding", None, square, config.segment_types * width, 0, None)
        add("embedding", None, square, 0, 0, found["embedding"])
        for layer in range(config.num_layers):

            def kept(name: str, layer: int = layer) -> np.ndarray:
                return found[name][layer]

            row = [length, 3, heads, config.head_width]
            products = 2 * length * width
            add("qkv", layer, row, 3 * width * (width + 1), products * 3 * width, kept("qkv"))
            square_TS = [heads, length, length]
            add("scores", layer, square_TS, 0, 2 * pairs * width, None)
            add("weights", layer, square_TS, 0, 0, None)
            values = [length, heads, config.head_width]
            add("heads", layer, values, 0, 2 * pairs * width, kept("heads"))
            out = kept("attention_out")
            add("attention_out", layer, square, width * (width + 1), products * width, out)
            add("norm1", layer, square, 2 * width, 0, kept("norm1"))
            add("ffn_in", layer, [length, ffn], ffn * (width + 1), products * ffn, None)
            add("activation", layer, [length, ffn], 0, 0, kept("ffn"))
            add("ffn_out", layer, square, width * (ffn + 1), products * ffn, kept("ffn_out"))
            add("norm2", layer, square, 2 * width, 0, kept("blocks"))
        head = 0 if config.tied else vocab * (width + 1)
        # With one matrix the softmax of the LM head also has outputs for positions.
        outputs = vocab + (config.context_length if config.one_matrix else 0)
        add("lm_head", None, [length, vocab], head, 2 * length * width * outputs, found["logits"])
        if self.task is not None:
            outputs, reads = self.task.num_outputs, width * (self.task.flatten or 1)
            count = len(found["task_logits"])
            steps.append({
                "name": "task_head", "layer": None, "shape": [count],
                "parameters": outputs * (reads + 1), "flops": 2 * count * reads,
                "norm": float(np.linalg.norm(found["task_logits"])),
            })  # fmt: skip
        return steps

    def _ribbon(self) -> list[dict[str, Any]]:
        found, ribbon = self.found, []
        for layer in range(self.gpt.config.num_layers):
            carried_TD = self.states_NTD[layer]
            for sublayer, name in (("attention", "attention_out"), ("ffn", "ffn_out")):
                ribbon.append({
                    "layer": layer, "sublayer": sublayer, "carried": _norms(carried_TD).tolist(),
                    "added": _norms(found[name][layer]).tolist(),
                })  # fmt: skip
                carried_TD = found["norm1"][layer]
        return ribbon

    def _attention(self) -> dict[str, Any]:
        weights_LHTS = self.found["attention"]
        lower = np.tril_indices(len(self.ids))
        size = min(_TOP_KEYS, len(self.ids))
        # The same order on every machine: the largest weight first, then the earliest key.
        keys = np.argsort(-weights_LHTS, axis=-1, kind="stable")[..., :size]
        values = np.take_along_axis(weights_LHTS, keys, axis=-1)
        room = [(0, 0)] * 3 + [(0, _TOP_KEYS - size)]
        return {
            "weights": _base64(np.rint(255 * weights_LHTS[:, :, *lower]), "u1"),
            "visible": _base64(self.visible_TS[lower], "u1"),
            "top": {
                "keys": _base64(np.pad(keys, room), "<u2"),
                "values": _base64(np.pad(values, room), "<f4"),
            },
        }

    def _patterns(self) -> list[dict[str, Any]]:
        """Returns how much each head attends in the patterns that people look for."""
        positions_T = self.batch.positions[0]
        places = np.arange(len(self.ids))
        kinds = np.array(self.kinds)
        first_T = places - positions_T
        same_TS = (self.ids[:, None] == self.ids[None, :]) & np.tri(len(self.ids), k=-1, dtype=bool)
        same_TS &= self.visible_TS
        masks = {
            "previous": (places[None, :] == places[:, None] - 1) & (positions_T[:, None] > 0),
            "first": (places[None, :] == first_T[:, None]) & (positions_T[:, None] > 0),
            "same": same_TS,
            "delimiter": (kinds[None, :] == "delimiter") & self.visible_TS,
            "extract": (kinds[:, None] == "extract") & (kinds[None, :] == "text") & self.visible_TS,
        }
        found = []
        for layer, head in np.ndindex(*self.found["attention"].shape[:2]):
            weights_TS = self.found["attention"][layer, head].astype(np.float64)
            entry: dict[str, Any] = {"layer": int(layer), "head": int(head)}
            for name, mask_TS in masks.items():
                queries = mask_TS.any(axis=1)
                taken = (weights_TS * mask_TS).sum(axis=1)[queries]
                entry[name] = float(taken.mean()) if queries.any() else None
            several = self.visible_TS.sum(axis=1) > 1
            entropy = special.entr(weights_TS).sum(axis=1)[several]
            entry["entropy"] = float(entropy.mean()) if several.any() else None
            found.append(entry)
        return found

    def _heads(self, patterns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        chosen = list(self.wanted) or _telling(patterns)
        found = []
        for layer, head in chosen:
            q, k, v = (self.found["qkv"][layer, :, i, head] for i in range(3))
            out = self.found["heads"][layer, :, head]
            parts = {"q": q, "k": k, "v": v, "out": out}
            shown = {name: _base64(x, "<f4") for name, x in parts.items()}
            found.append({"layer": int(layer), "head": int(head), **shown})
        return found

    def _lens(self) -> dict[str, Any]:
        gpt, top, rank, task = self.gpt, [], [], []
        for x_TD in self.states_NTD:
            logits_TV = np.asarray(inside.lm_lens(gpt.opened, gpt.params, x_TD[None]))[0]
            logits_TV = logits_TV.astype(np.float64)
            total_T = np.asarray(inside.lm_normaliser(gpt.opened, gpt.params, x_TD[None]))[0]
            best_TK = outcome_lib.largest(logits_TV, _LENS)
            top.append([
                [{**self._token(i), "p": float(np.exp(logits[i] - total))} for i in best]
                for logits, total, best in zip(logits_TV, total_T, best_TK, strict=True)
            ])  # fmt: skip
            true_T1 = np.take_along_axis(logits_TV, self.next_T[:, None], axis=1)
            ranks = 1 + (logits_TV > true_T1).sum(axis=1)
            rank.append([
                int(r) if wanted else None
                for r, wanted in zip(ranks, self.is_predicted_T, strict=True)
            ])  # fmt: skip
        if self.task is not None:
            logits_NO = inside.task_lens(gpt.opened, gpt.params, self.states_NTD, self.batch)
            task = [outcome_lib.answer(gpt, logits_O) for logits_O in np.asarray(logits_NO)]
        return {"top": top, "rank": rank, "task": task or None}

    def _lm(self) -> dict[str, Any]:
        gpt, logits_TV = self.gpt, self.found["logits"]
        last_NTD = self.states_NTD[-1:]
        total_T = np.asarray(inside.lm_normaliser(gpt.opened, gpt.params, last_NTD))[0]
        wanted, banned_V = self.is_predicted_T, self.gpt.never_drawn
        drawn_TV = np.where(banned_V, -np.inf, logits_TV.astype(np.float64))
        count = min(_TOP_TOKENS, int((~banned_V).sum()))
        last_TK = np.take_along_axis(logits_TV, outcome_lib.largest(drawn_TV, count), axis=1)
        top = []
        for logits, last in zip(logits_TV, last_TK[:, -1], strict=True):
            # The largest tokens that can be drawn, and the others that are as large.
            found = np.flatnonzero(logits >= last)
            best = found[np.lexsort((found, -logits[found]))]
            top.append([{**self._token(i), "logit": float(logits[i])} for i in best])
        return {
            "next": [
                self._token(i) if w else None for i, w in zip(self.next_T, wanted, strict=True)
            ],
            "surprise": self.outcome.surprise,
            "top": top,
            "logsumexp": total_T.tolist(),
            "never_drawn": np.flatnonzero(banned_V).tolist(),
            "drawn_logsumexp": special.logsumexp(drawn_TV, axis=1).tolist(),
        }  # fmt: skip

    def _attribution(self) -> dict[str, Any] | None:
        if self.task is None:
            return None
        is_text_T = np.array([kind == "text" for kind in self.kinds])
        logits_O = self.found["task_logits"]
        output = int(np.argmax(logits_O))
        if self.batch.labels is not None and self.task.kind is not TaskKind.REGRESSION:
            output = int(self.batch.labels[0, 0])
        found = inside.attribution(self.gpt.opened, self.gpt.params, self.batch, output, is_text_T)
        methods = {
            name: getattr(found, name)
            for name in ("integrated_gradients", "gradient_x_input", "leave_one_out")
        }
        counted_T = is_text_T
        if self.task.kind is TaskKind.MULTIPLE_CHOICE:
            # The tokens of the other answers have no part in the logit of this one.
            start, stop = self.row.sequences[output]
            places_T = np.arange(len(self.ids))
            counted_T = is_text_T & (places_T >= start) & (places_T < stop)
        agreement = {
            f"{name}/{other}": _spearman(a[counted_T], b[counted_T])
            for (name, a), (other, b) in itertools.combinations(methods.items(), 2)
        }
        return {
            "target": self.task.labels[output] if self.task.labels else None,
            "output": output,
            "baseline": "without the token embeddings of the text",
            "methods": {name: np.asarray(x, float).tolist() for name, x in methods.items()},
            "agreement": agreement, "difference": found.difference, "error": found.error,
            "steps": found.steps,
        }  # fmt: skip


def _spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Returns Spearman's correlation; None if it is not defined."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(stats.spearmanr(a, b).statistic)


def _telling(patterns: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Returns the heads with the clearest patterns: in turns the best of each pattern."""
    orders = [
        sorted(
            (pattern for pattern in patterns if pattern[kind] is not None),
            key=operator.itemgetter(kind),
            reverse=True,
        )
        for kind in _PATTERNS
    ]
    chosen: dict[tuple[int, int], None] = {}
    for place in range(len(patterns)):
        for order in orders:
            if place < len(order) and len(chosen) < _HEADS:
                chosen[order[place]["layer"], order[place]["head"]] = None
    return sorted(chosen)


def _norms(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(np.asarray(x, np.float64), axis=-1)


def _base64(x: np.ndarray, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(x, dtype=dtype).tobytes()).decode()
