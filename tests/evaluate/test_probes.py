"""Zero-shot probes: scores of spans against a plain softmax, answers against definitions."""

import json
import pathlib

import numpy as np
import pytest
import runs
import small

import gptjax
from gptjax.config.schema import ProbeConfig
from gptjax.errors import UserError
from gptjax.evaluate import probes
from gptjax.evaluate.score import Evaluator
from gptjax.model.gpt import GPT

pytestmark = pytest.mark.devices(8)

ROWS = [
    {"text": "the cat sat on a mat", "a": "the dog", "b": "a dog ran home", "label": 1,
     "schema": "the cat saw the dog while _ ran far away", "pronoun": "ran",
     "place": len("the cat saw the dog while _ ")},
    {"text": "some dogs ran", "a": "a mat", "b": "back again", "label": 0,
     "schema": "the mat came to the cat and _ sat", "pronoun": "sat",
     "place": len("the mat came to the cat and _ ")},
    {"text": "and then came back", "a": "cat", "b": "home", "label": 1,
     "schema": "_ ran to the mat", "pronoun": "ran", "place": 2},
]  # fmt: skip
CONFIGS = {
    "acceptability": ProbeConfig(kind="acceptability"),
    "next_word": ProbeConfig(kind="next_word", words="cat,dogs"),
    "multiple_choice": ProbeConfig(kind="multiple_choice", choices="a,b"),
    "substitution": ProbeConfig(kind="substitution", text="schema", choices="a,b"),
}


def built(path: pathlib.Path, kind: str, rows=ROWS, context: int = 32, **changes) -> probes.Probe:
    file = path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = CONFIGS[kind]
    for name, value in {"file": str(file), **changes}.items():
        config = ProbeConfig(**(vars(config) | {name: value}))
    return probes.build("mine", config, small.small_tokenizer(), context)


def pieces(probe) -> list[tuple[list[int], list[int]]]:
    """Returns the ids of each text before (without its first line break) and scored text."""
    return [
        (ids[1:first].tolist(), ids[first:].tolist())
        for ids, first in zip(probe.tokens, probe.first, strict=True)
    ]


def encoded(*pairs: tuple[str, str]) -> list[tuple[list[int], list[int]]]:
    encode = small.small_tokenizer().encode
    return [(encode(before), encode(scored)) for before, scored in pairs]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("acceptability", [("", "the cat sat on a mat")]),
        ("next_word", [("the cat sat on a mat and", "cat"), ("the cat sat on a mat and", "dogs")]),
        ("multiple_choice", [
            ("the cat sat on a mat", "the dog"), ("the cat sat on a mat", "a dog ran home"),
        ]),
        ("substitution", [
            ("the cat saw the dog while the dog", "ran far away"),
            ("the cat saw the dog while a dog ran home", "ran far away"),
        ]),
    ],
)  # fmt: skip
def test_what_is_scored_after_what(tmp_path, kind, expected):
    more = {"append": "and"} if kind == "next_word" else {}
    probe = built(tmp_path, kind, **more)
    assert pieces(probe)[: len(expected)] == encoded(*expected)
    assert probe.labels.tolist() == [1, 0, 1]
    assert len(probe.tokens) == 3 * probe.num_candidates


def test_a_pronoun_may_be_named_by_columns(tmp_path):
    named = built(tmp_path, "substitution", pronoun="pronoun", pronoun_start="place")
    before = "the cat saw the dog while _ "
    expected = encoded((before + "the dog", "far away"), (before + "a dog ran home", "far away"))
    assert pieces(named)[:2] == expected
    assert pieces(built(tmp_path, "substitution", pronoun="pronoun"))[:2] == expected


def test_a_pronoun_is_a_word(tmp_path):
    """The letters of a pronoun inside of other words do not count."""
    row = ROWS[0] | {"schema": "random cat and a mat", "pronoun": "a"}
    [first, _, *_] = pieces(built(tmp_path, "substitution", [row, *ROWS[1:]], pronoun="pronoun"))
    assert [first] == encoded(("random cat and the dog", "mat"))


@pytest.mark.parametrize("mesh", [(1, 1), pytest.param((8, 1), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(
    "kind",
    [
        kind if kind == "next_word" else pytest.param(kind, marks=pytest.mark.slow)
        for kind in CONFIGS
    ],
)
def test_log_probabilities_are_those_of_a_plain_softmax(tmp_path, kind, mesh):
    probe = built(tmp_path, kind)
    model = GPT(small.config())
    params = small.params(model)
    evaluator = Evaluator(model, small.mesh(*mesh))
    totals, counts = probes.log_probabilities(evaluator, params, probe)
    for n, (ids, first) in enumerate(zip(probe.tokens, probe.first, strict=True)):
        ones = np.ones((1, len(ids)), np.int32)
        x = gptjax.model.gpt.run(
            model, params, ids[None], ones, np.arange(len(ids))[None], method="hidden"
        )
        logits = np.asarray(
            gptjax.model.gpt.run(model, params, x, method="lm_logits"), np.float64
        )[0]  # fmt: skip
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = sum(log_p[t - 1, ids[t]] for t in range(first, len(ids)))
        place = np.unravel_index(n, totals.shape)
        assert totals[place] == pytest.approx(expected, rel=1e-5)
        assert counts[place] == len(ids) - first


def test_a_text_longer_than_the_context_keeps_its_end(tmp_path):
    probe = built(tmp_path, "multiple_choice", context=9)
    whole = built(tmp_path, "multiple_choice")
    for ids, first, full in zip(probe.tokens, probe.first, whole.tokens, strict=True):
        assert ids.tolist() == full[-9:].tolist()
        assert 1 <= first <= len(ids)


def test_answers_follow_the_definitions():
    totals, counts = np.array([[-8.0, -5.0], [-1.0, -2.0]]), np.array([[4, 1], [1, 4]])
    labels = np.array([0, 1])
    # A word is chosen by its total log-probability, an answer by the mean over its tokens.
    assert probes.answers("next_word", totals, counts, labels).tolist() == [1, 0]
    assert probes.answers("multiple_choice", totals, counts, labels).tolist() == [0, 1]
    assert probes.answers("substitution", totals, counts, labels).tolist() == [0, 1]
    nothing = np.array([[0, 1], [1, 0]])
    assert probes.answers("multiple_choice", totals, nothing, labels).tolist() == [1, 0]


@pytest.mark.parametrize("seed", range(20))
def test_the_threshold_is_the_best_there_is(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, 15).astype(float) if seed % 2 else rng.normal(size=15)
    labels = rng.integers(0, 2, 15)
    bound = probes.threshold(scores, labels)
    best = max(((scores > b) == labels).mean() for b in [-1e9, *scores])
    assert ((scores > bound) == labels).mean() == best


def test_a_half_s_threshold_never_saw_the_half():
    """Random labels are predicted at chance: a threshold is not fitted to its own half."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 2000)
    totals = rng.normal(size=(2000, 1))
    said = probes.answers("acceptability", totals, np.ones((2000, 1)), labels)
    assert abs((said == labels).mean() - 0.5) < 4 * 0.5 / np.sqrt(2000)
    clear = probes.answers("acceptability", labels[:, None] - 3.0, np.ones((2000, 1)), labels)
    assert (clear == labels).all()


def probe_file(path: pathlib.Path) -> str:
    """Writes sentences of the pretraining text, every second one with its words shuffled."""
    rng, rows = np.random.default_rng(0), []
    for i, sentence in enumerate(runs.sentences(120, seed=5)):
        if i % 2:
            sentence = " ".join(rng.permutation(sentence.split()))
        rows.append({"text": sentence, "label": 1 - i % 2})
    return runs.write(path / "acceptability.csv", rows)


@pytest.mark.slow
def test_pretraining_learns_to_tell_its_sentences_from_shuffled_ones(tmp_path):
    """Validations log the scores, a plot shows them, `evaluate --probes` gives the same."""
    flags = [
        "--config=experiments/probes.py", *runs.TINY, *runs.files().pretrain,
        "--config.probes.cola.dataset=", f"--config.probes.cola.file={probe_file(tmp_path)}",
        "--config.probes.cola.text=text", f"--workdir={tmp_path}/w",
    ]  # fmt: skip
    others = [
        f"--config.probes.{name}.{field}" for name in ("sst2", "race", "pronouns")
        for field in ("dataset=", f"file={tmp_path}/none.csv")
    ]  # fmt: skip
    refused = runs.main(*flags, *others)
    assert "none.csv" in refused.error
    assert not (tmp_path / "w").exists(), "nothing is written before all input is found good"
    only = tmp_path / "only.py"
    only.write_text(
        pathlib.Path("experiments/probes.py").read_text()
        + "\n\n_all = get_config\n\n\ndef get_config():\n    experiment = _all()\n"
        "    experiment.probes = {'cola': experiment.probes['cola']}\n    return experiment\n"
    )
    flags[0] = f"--config={only}"
    trained = runs.main(*flags)
    assert trained.code == 0, trained.err
    log = [r for r in runs.records(f"{tmp_path}/w") if "probe_cola_matthews" in r]
    assert [r["step"] for r in log] == [10, 20]
    assert runs.summary(f"{tmp_path}/w")["pretrain"]["probe_cola_matthews"] > 0.3
    assert (tmp_path / "w/plots/probes.png").read_bytes().startswith(b"\x89PNG")
    asked = runs.main("--mode=evaluate", "--probes", f"--checkpoint={tmp_path}/w")
    found = json.loads(asked.out)["probes"]["cola"]
    best = min(log, key=lambda r: r["loss"])
    assert found["matthews"] == pytest.approx(best["probe_cola_matthews"], abs=1e-6)
    assert (found["rows"], found["floor"]) == (120, 0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "was trained without any"),
        (["--config=experiments/probes.py", "--config.probes.cola.kind=accept"], "acceptability"),
        (["--config=experiments/probes.py", "--config.probes.cola.file=x"], "and not both"),
        (["--config=experiments/probes.py", "--config.probes.race.choices=a"], "two or more"),
        (["--config=experiments/probes.py", "--config.probes.cola.kin=x"], "did you mean"),
        (["--config.probes.cola.limit=5"], "the experiment has no entry 'cola'"),
        (["--config", "experiments/quickstart.py"], "the experiment of --config has no probes"),
        (
            ["--config=experiments/probes.py", "--config.probes.cola.pronoun_start=x"],
            "--config.probes.cola.pronoun_start: is the place",
        ),
    ],
)
def test_wrong_use_is_one_line(flags, words):
    result = runs.main("--mode=evaluate", "--probes", f"--checkpoint={runs.trained()}", *flags)
    assert words in result.error


@pytest.mark.parametrize(
    ("kind", "row", "changes", "words"),
    [
        ("substitution", {"schema": "nothing here"}, {}, "row 4, column schema: no _"),
        ("substitution", {"pronoun": "x"}, {"pronoun": "pronoun"}, "has 'x' 0 times as a word"),
        ("substitution", {"pronoun": "the"}, {"pronoun": "pronoun"}, "has 'the' 2 times as a word"),
        (
            "substitution",
            {"place": 3},
            {"pronoun": "pronoun", "pronoun_start": "place"},
            "0 times as a word at 3",
        ),
        ("next_word", {"label": 2}, {}, "need a word each"),
        ("acceptability", {"label": 2}, {}, "labels of acceptability are 0 (not acceptable) and 1"),
        ("multiple_choice", {"label": 7}, {}, "do not number"),
        ("multiple_choice", {}, {"choices": "a,c"}, "no column 'c'"),
    ],
)
def test_a_bad_row_is_named(tmp_path, kind, row, changes, words):
    with pytest.raises(UserError) as info:
        built(tmp_path, kind, [*ROWS, ROWS[0] | row], **changes)
    assert words in str(info.value)
