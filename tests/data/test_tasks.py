"""The input transformations against the table of the paper, written out by hand."""

import dataclasses
import math
import random

import numpy as np
import pytest
import small

from gptjax.config.schema import TaskSpec
from gptjax.data import tasks
from gptjax.data.tables.labelled import LabelledTable, as_text
from gptjax.data.tokens import tokenizer as tokenizer_lib
from gptjax.errors import UserError

CONTEXT = 12


@pytest.fixture(scope="module")
def tokenizer():
    """One token a character: lengths are those of the texts."""
    return tokenizer_lib.train_characters(["abcdefghijklmnopqrstuvwxyz .!"])


def fails(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as info:
        function(*args, **kwargs)
    assert "\n" not in str(info.value)
    return str(info.value)


ROWS = {
    "text": ["ab", "hello", "x"],
    "pair": ["c", "you", "yz"],
    "third": ["dd", "all", ""],
    "label": ["1", "0", "1"],
}
SPECS = {
    "classification": TaskSpec("classification", "text"),
    "entailment": TaskSpec("entailment", "text", "pair"),
    "similarity": TaskSpec("similarity", "text", "pair"),
    "regression": TaskSpec("regression", "text", "pair"),
    "multiple_choice": TaskSpec("multiple_choice", "text", choices=("pair", "third")),
}


def table(kind, row):
    """GPT1_RECIPE, fine-tuning: the sequences of a row, S start, D delimiter, E extract."""
    text, pair, third = (row[name] for name in ("text", "pair", "third"))
    return {
        "classification": [["S", text, "E"]],
        "entailment": [["S", text, "D", pair, "E"]],
        "similarity": [["S", text, "D", pair, "E"], ["S", pair, "D", text, "E"]],
        "regression": [["S", text, "D", pair, "E"], ["S", pair, "D", text, "E"]],
        "multiple_choice": [["S", text, "D", pair, "E"], ["S", text, "D", third, "E"]],
    }[kind]


def join(parts, tokenizer):
    special = {
        "S": [tokenizer.start_id], "D": [tokenizer.delimiter_id], "E": [tokenizer.extract_id],
    }  # fmt: skip
    return [i for part in parts for i in special.get(part) or tokenizer.encode(part)]


@pytest.mark.parametrize("kind", small.KINDS)
def test_sequences_are_those_of_the_table(tokenizer, kind):
    spec = tasks.find_labels(SPECS[kind], LabelledTable(ROWS, "rows"))
    examples = tasks.encode(spec, LabelledTable(ROWS, "rows"), tokenizer, CONTEXT)
    expected = []
    starts = []
    for i in range(3):
        for parts in table(kind, {name: values[i] for name, values in ROWS.items()}):
            expected.append(join(parts, tokenizer))
            second = parts.index("D") + 1 if "D" in parts else len(parts)
            starts.append(len(join(parts[:second], tokenizer)))
    assert [sequence.tolist() for sequence in examples.tokens] == expected
    assert {sequence.dtype for sequence in examples.tokens} == {np.dtype(np.int32)}
    assert examples.second_start.tolist() == starts
    assert len(examples) == 3
    assert examples.num_candidates == spec.num_candidates == len(expected) // 3
    lengths = [len(sequence) for sequence in expected]
    per_example = np.reshape(lengths, (3, spec.num_candidates)).sum(axis=1)
    assert examples.lengths.tolist() == per_example.tolist()
    assert (examples.cut, examples.empty) == (0, int(kind == "multiple_choice"))
    assert examples.labels.tolist() == [1, 0, 1]
    assert examples.labels.dtype == (np.float32 if kind == "regression" else np.int32)


@pytest.mark.parametrize("kind", small.KINDS)
def test_long_texts_are_cut_inside_their_segment(tokenizer, kind):
    generator = random.Random(0)
    lengths = [0, 1, 2, 4, 5, 9, 10, 11, 30]
    rows = {
        name: ["".join(generator.choices("abcdef", k=generator.choice(lengths))) for _ in range(60)]
        for name in ("text", "pair", "third")
    }
    rows["label"] = ["0", "1"] * 30
    spec = tasks.find_labels(SPECS[kind], LabelledTable(rows, "rows"))
    for context in (5, 8, CONTEXT, 64):
        examples = tasks.encode(spec, LabelledTable(rows, "rows"), tokenizer, context)
        cut = empty = 0
        for i in range(60):
            row = {name: values[i] for name, values in rows.items()}
            shortened = False
            for c, parts in enumerate(table(kind, row)):
                whole = join(parts, tokenizer)
                found = examples.tokens[i * spec.num_candidates + c].tolist()
                assert len(found) == min(context, len(whole))
                assert (found[0], found[-1]) == (tokenizer.start_id, tokenizer.extract_id)
                shortened |= found != whole
                if kind == "classification":
                    assert found[:-1] == whole[: len(found) - 1]
                    continue
                middle = found.index(tokenizer.delimiter_id)
                assert found.count(tokenizer.delimiter_id) == 1
                assert examples.second_start[i * spec.num_candidates + c] == middle + 1
                first, second = found[1:middle], found[middle + 1 : -1]
                assert tokenizer.encode(parts[1])[: len(first)] == first
                assert tokenizer.encode(parts[3])[: len(second)] == second
            cut += shortened
            empty += any(row[name] == "" for name in spec.text_columns)
        assert (examples.cut, examples.empty) == (cut, empty)


LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize("most", [1, 2, 3, 16])
def test_a_long_text_in_windows_has_each_token_once(tokenizer, most):
    """Against the text itself: the windows joined are its beginning, and all are about as long."""
    sizes = [0, 1, CONTEXT - 2, CONTEXT - 1, 20, 21, 30, 31, 26 * 4]
    texts = [(LETTERS * 4)[:size] for size in sizes]
    rows = LabelledTable({"text": texts, "label": list("ab" * 4 + "a")}, "rows")
    spec = TaskSpec("classification", "text", labels=("a", "b"), windows=most)
    examples = tasks.encode(spec, rows, tokenizer, CONTEXT)
    room, count = CONTEXT - 2, examples.num_candidates
    read = cut = several = 0
    for i, text in enumerate(texts):
        sequences = [each for each in examples.tokens[i * count : (i + 1) * count] if len(each)]
        needed = max(1, math.ceil(len(text) / room))
        assert len(sequences) == min(most, needed)
        for each in sequences:
            assert (each[0], each[-1]) == (tokenizer.start_id, tokenizer.extract_id)
            assert len(each) <= CONTEXT
        lengths = [len(each) for each in sequences]
        assert max(lengths) - min(lengths) <= 1
        joined = np.concatenate([each[1:-1] for each in sequences])
        assert joined.tolist() == tokenizer.encode(text)[: most * room]
        assert examples.lengths[i] == sum(lengths)
        read, cut = read + len(joined), cut + (needed > most)
        several += len(sequences) > 1
    assert count == min(most, 16)
    assert (examples.cut, examples.reading.in_windows) == (cut, several)
    assert examples.reading.share == read / sum(sizes)
    assert examples.reading.most_windows == min(most, math.ceil(max(sizes) / room))


def test_one_window_is_the_cut_text(tokenizer):
    rows = LabelledTable({"text": ["ab", LETTERS], "label": ["a", "b"]}, "rows")
    spec = tasks.find_labels(SPECS["classification"], rows)
    cut = tasks.encode(spec, rows, tokenizer, CONTEXT)
    one = tasks.encode(dataclasses.replace(spec, windows=1), rows, tokenizer, CONTEXT)
    assert (cut.fingerprint, cut.cut) == (one.fingerprint, one.cut) == (one.fingerprint, 1)
    assert cut.reading == one.reading == tasks.Reading(share=(2 + CONTEXT - 2) / 28)


@pytest.mark.parametrize("kind", small.KINDS)
def test_the_share_of_longer_rows_is_that_of_cut_rows(tokenizer, kind):
    generator = random.Random(1)
    rows = {
        name: ["x" * generator.choice([0, 3, 5, 9, 12]) for _ in range(50)]
        for name in ("text", "pair", "third")
    }
    table = LabelledTable(rows | {"label": ["0", "1"] * 25}, "rows")
    spec = tasks.find_labels(SPECS[kind], table)
    lengths = tasks.sequence_lengths(spec, table, tokenizer)
    for context in (5, 8, CONTEXT, 30):
        examples = tasks.encode(spec, table, tokenizer, context)
        assert tasks.share_longer(lengths, context) == examples.cut / 50
    whole = tasks.encode(spec, table, tokenizer, 100)
    longest = np.reshape([len(each) for each in whole.tokens], (50, -1)).max(axis=1)
    assert lengths.tolist() == longest.tolist()
    assert tasks.share_longer(lengths[:0], 5) == 0


@pytest.mark.parametrize("budget", range(2, 40))
def test_cut_pair_cuts_the_longer_first(budget):
    for first in range(45):
        for second in range(45):
            a, b = tasks.cut_pair(first, second, budget)
            assert 0 <= a <= first
            assert 0 <= b <= second
            assert a + b == min(first + second, budget)  # fits, and cuts no more than it must
            half = budget // 2
            assert a >= min(first, half)
            assert b >= min(second, half)
            if first + second > budget:
                # Water level: what is cut is down to the level, what is not cut is below it.
                level = max(a, b)
                assert a == first or a >= level - 1
                assert b == second or b >= level - 1
            other = tasks.cut_pair(second, first, budget)
            odd = budget % 2 and min(first, second) > half
            if odd:  # the odd token cannot be shared: it is the first text's
                assert (a, b) == other == (half + 1, half)
            else:
                assert (b, a) == other


def test_context_too_short_for_a_pair(tokenizer):
    spec = tasks.find_labels(SPECS["entailment"], LabelledTable(ROWS, "rows"))
    assert "`model.context_length`=4" in fails(
        tasks.encode, spec, LabelledTable(ROWS, "rows"), tokenizer, 4
    )


def test_cells_that_are_no_text(tokenizer):
    rows = {"text": [None, 12, 1.5], "label": [0, 1, 0]}
    spec = tasks.find_labels(SPECS["classification"], LabelledTable(rows, "rows"))
    assert (as_text(None), as_text(12)) == ("", "12")
    examples = tasks.encode(spec, LabelledTable(rows, "rows"), tokenizer, CONTEXT)
    assert examples.empty == 1
    assert examples.tokens[0].tolist() == [tokenizer.start_id, tokenizer.extract_id]


def test_rows_without_labels(tokenizer):
    rows = {"text": ["a", "b"]}
    spec = TaskSpec("classification", "text", labels=("0", "1"))
    examples = tasks.encode(spec, LabelledTable(rows, "rows"), tokenizer, CONTEXT, labelled=False)
    assert examples.labels is None
    assert len(examples) == 2
    empty = tasks.encode(
        spec, LabelledTable({"text": []}, "rows"), tokenizer, CONTEXT, labelled=False
    )
    assert (len(empty), empty.lengths.tolist()) == (0, [])


def labels_of(values, spec=SPECS["classification"]):
    return tasks.find_labels(spec, LabelledTable({spec.label: values}, "train.csv")).labels


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["b", "a", "b"], ("a", "b")),
        (["10", "9", "-1"], ("-1", "9", "10")),
        ([10, 9, 100], ("9", "10", "100")),
        (["10", "9", "x"], ("10", "9", "x")),
        ([" yes", "yes ", "no"], ("no", "yes")),
        ([True, False], ("False", "True")),
        ([0.5, -0.5, 2.0], ("-0.5", "0.5", "2.0")),
    ],
)
def test_classes_are_the_labels_in_order(values, expected):
    assert labels_of(values) == expected


def test_order_of_labels_does_not_depend_on_the_process():
    """Labels that are equal as numbers, and NaN, are in a set whose order is random."""
    code = (
        "from gptjax.config.schema import TaskSpec\n"
        "from gptjax.data import tasks\n"
        "from gptjax.data.tables.labelled import LabelledTable\n"
        "spec = TaskSpec('classification', 't')\n"
        "rows = {'label': ['1', '1.0', '01', '1e0', 'nan', '0', 'NaN', '2']}\n"
        "print(tasks.find_labels(spec, LabelledTable(rows, 'x')).labels)\n"
    )
    orders = small.outputs_by_hash_seed(code, 4)
    assert len(orders) == 1


THREE = TaskSpec("multiple_choice", "text", choices=("a", "b", "c"))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1, 2], ("0", "1", "2")),
        ([0, 0], ("0", "1", "2")),
        (["1", "2"], ("0", "1", "2")),
        ([1, 2, 3], ("1", "2", "3")),
        (["3"], ("1", "2", "3")),
        (["A", "C"], ("A", "B", "C")),
        (["B"], ("A", "B", "C")),
        ([0.0, 2.0], ("0", "1", "2")),
        (["1.0", "3.0"], ("1", "2", "3")),
    ],
)
def test_answers_are_numbered_from_0_from_1_or_lettered(values, expected):
    assert labels_of(values, THREE) == expected


@pytest.mark.parametrize("values", [[0, 1, 2, 3], [0, 3], ["a"], ["A", "1"], ["D"], [-1], ["1.5"]])
def test_answers_that_number_nothing(values):
    message = fails(labels_of, values, THREE)
    assert message.startswith("train.csv: column label: ")
    assert "0 to 2, 1 to 3, or letters from A" in message


def test_label_mistakes_in_training():
    spec = TaskSpec("classification", "text", label="sentiment")
    for bad in (None, "", "  "):
        message = fails(labels_of, ["1", "0", bad], spec)
        assert message == "train.csv: row 3, column sentiment: the label is empty"
    message = fails(labels_of, ["yes", "yes"], spec)
    assert message.startswith("train.csv: column sentiment: every row has the label 'yes'")
    assert "train.csv: column sentiment" in fails(labels_of, [], spec)
    regression = TaskSpec("regression", "text", "pair")
    assert (
        tasks.find_labels(regression, LabelledTable({"label": ["junk"]}, "train.csv")) == regression
    )


@pytest.mark.parametrize("labels", [("0", "1"), ("0.0", "1.0")])
def test_labels_that_are_equal_numbers_are_one_class(tokenizer, labels):
    spec = TaskSpec("classification", "text", labels=labels)
    rows = {"text": ["a"] * 6, "label": [0, 1, 1.0, "1.0", "01", "1e0"]}
    found = tasks.encode(spec, LabelledTable(rows, "valid.csv"), tokenizer, CONTEXT)
    assert found.labels.tolist() == [0, 1, 1, 1, 1, 1]
    both = dataclasses.replace(spec, labels=("0", "1", "1.0"))
    ids = tasks.encode(
        both, LabelledTable({"text": ["a"] * 2, "label": ["1", "1.0"]}, "x"), tokenizer, CONTEXT
    )
    assert ids.labels.tolist() == [1, 2]
    message = fails(tasks.label_ids, both, LabelledTable({"label": ["01"]}, "x"))
    assert "label '01' was not seen in training" in message


def test_the_fraction_of_unknown_tokens(tokenizer):
    """It is counted over the words of the texts, each of which is one token or more."""
    spec = TaskSpec("similarity", "text", "pair", labels=("0", "1"))
    rows = {"text": ["a", "\u65e5\u672c"], "pair": ["a a", "a"], "label": [0, 1]}
    found = tasks.encode(spec, LabelledTable(rows, "x"), tokenizer, CONTEXT)
    ids = [tokenizer.encode(text) for name in ("text", "pair") for text in rows[name]]
    unknown = sum(row.count(tokenizer.unknown_id) for row in ids)
    assert unknown > 0
    assert found.unknown == pytest.approx(unknown / sum(map(len, ids)))


def test_a_label_that_training_did_not_see(tokenizer):
    spec = TaskSpec("classification", "text", labels=("negative", "positive"))
    rows = {"text": ["a", "b"], "label": ["positive", "postive"]}
    message = fails(tasks.encode, spec, LabelledTable(rows, "valid.csv"), tokenizer, CONTEXT)
    assert message.startswith("valid.csv: row 2, column label: label 'postive'")
    assert "negative, positive" in message
    assert "did you mean 'positive'?" in message


@pytest.mark.parametrize(
    "bad", [math.nan, math.inf, -math.inf, "nan", "inf", "1e99", "x", "", None]
)
def test_targets_that_are_no_numbers(tokenizer, bad):
    spec = TaskSpec("regression", "text", "pair", label="score")
    rows = {"text": ["a"] * 3, "pair": ["b"] * 3, "score": [1, "2.5", bad]}
    message = fails(tasks.encode, spec, LabelledTable(rows, "train.tsv"), tokenizer, CONTEXT)
    assert message.startswith("train.tsv: row 3, column score: ")
    assert message.endswith("is not a number")


def test_targets_are_kept(tokenizer):
    spec = TaskSpec("regression", "text", "pair")
    rows = {"text": ["a"] * 4, "pair": ["b"] * 4, "label": [0, "-1.25", 3.5, "1e-3"]}
    labels = tasks.encode(spec, LabelledTable(rows, "rows"), tokenizer, CONTEXT).labels
    assert labels.tolist() == np.array([0, -1.25, 3.5, 1e-3], np.float32).tolist()


@pytest.mark.parametrize(
    ("kind", "candidates", "outputs"),
    [
        ("classification", 1, 3),
        ("entailment", 1, 3),
        ("similarity", 2, 3),
        ("regression", 2, 1),
        ("multiple_choice", 3, 1),
    ],
)
def test_sizes_of_the_head(kind, candidates, outputs):
    choices = ("x", "y", "z") if kind == "multiple_choice" else ()
    spec = TaskSpec(kind, "text", choices=choices, labels=("0", "1", "2"))
    assert (spec.num_candidates, spec.num_outputs) == (candidates, outputs)


def test_the_question_at_the_end_of_joined_columns_is_kept():
    """A long article is cut at its beginning."""
    spec = TaskSpec("multiple_choice", "article+question", choices=("a", "b"), labels=("0", "1"))
    text = "the cat sat on a mat " * 40 + "some dogs ran far"
    rows = {"article+question": [text], "a": ["home"], "b": ["away"]}
    tokenizer = small.small_tokenizer()
    found = tasks.encode(spec, LabelledTable(rows, "rows"), tokenizer, 32, labelled=False)
    assert found.cut == 1
    for tokens in found.tokens:
        assert len(tokens) == 32
        assert "some dogs ran far" in tokenizer.decode(tokens)
    plain = tasks.encode(
        TaskSpec("multiple_choice", "text", choices=("a", "b"), labels=("0", "1")),
        LabelledTable({"text": [text], "a": ["home"], "b": ["away"]}, "rows"), tokenizer, 32,
        labelled=False,
    )  # fmt: skip
    assert "some dogs" not in tokenizer.decode(plain.tokens[0])
