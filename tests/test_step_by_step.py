"""docs/gpt_step_by_step*: both languages say the same, and what they say is true.

The arithmetic is done again from the numbers that are printed, as a reader does it.
"""

import ast
import collections
import importlib.util
import math
import pathlib
import re

import nbclient
import nbformat
import numpy as np
import pytest

from gptjax.infer.inside import AXES
from gptjax.interop import convert

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {
    "en": DOCS / "gpt_step_by_step.md",
    "zh": DOCS / "gpt_step_by_step.zh.md",
}
BOOKS = [path.with_suffix(".ipynb") for path in PAGES.values()]
SENTENCE, LABEL = "the jokes were not good", "negative"
# Half of the last of three digits.
HALF = 0.0005


def load_build():
    spec = importlib.util.spec_from_file_location(
        "step_by_step_build", ROOT / "scripts" / "step_by_step" / "build.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_build()


def sections(language):
    """The parts of a page by their number; 0 is what is before the first step."""
    parts = re.split(r"^## (\d+)\. .*$", PAGES[language].read_text(encoding="utf-8"), flags=re.M)
    assert parts[1::2] == [str(i) for i in range(1, 16)]
    return [parts[0], *parts[2::2]]


def tables(text):
    """The tables of a text: a list of rows each, without the names of the rows and columns."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        lines = [line.strip("| \n").split(" | ") for line in block.splitlines()]
        found.append([[cell.strip() for cell in line[1:]] for line in lines[2:]])
    return found


def numbers(step, index, language="en"):
    """A table of numbers of a step, float64."""
    return np.array(tables(sections(language)[step])[index], np.float64)


def prose(text):
    """A text without code, comments and addresses."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return re.sub(r"<!--.*?-->|\]\([^)]*\)", "", text)


# ---- the two languages ----


def test_both_languages_have_the_same_code_formulas_pictures_and_tables():
    def parts(text):
        formulas = re.findall(r"^\$\$.*\$\$$", text, re.M)
        return re.findall(r"^```python.*?^```", text, re.M | re.S), formulas, tables(text)

    for step, (english, chinese) in enumerate(zip(sections("en"), sections("zh"), strict=True)):
        (code, formulas, found), (own_code, own_formulas, own_found) = map(
            parts, (english, chinese)
        )
        assert code == own_code
        assert formulas == own_formulas
        marks = [re.findall(r"<!-- .*? -->|!\[\]\(.*?\)", text) for text in (english, chinese)]
        assert marks[0] == [mark.replace("_zh.png", "_en.png") for mark in marks[1]]
        if step not in (0, 14):  # their tables have words
            assert found == own_found
    assert len(re.findall("^```python", PAGES["en"].read_text(encoding="utf-8"), re.M)) > 15


def test_both_languages_have_the_same_numbers_in_each_step():
    pattern = r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?"
    for step, (english, chinese) in enumerate(zip(sections("en"), sections("zh"), strict=True)):
        found = [
            collections.Counter(re.findall(pattern, re.sub(r"[^\x00-\x7f]", " ", prose(text))))
            for text in (english, chinese)
        ]
        assert found[0] == found[1], step
        assert found[0]


# ---- the code ----


@pytest.mark.parametrize("language", PAGES)
def test_each_block_of_code_is_in_the_function_that_it_names(language):
    text = PAGES[language].read_text(encoding="utf-8")
    pattern = r"^<!-- code: (\S+) (\S+)[^\n]*-->\n[^\n]*\n\n```python\n(.*?)\n```$"
    found = re.findall(pattern, text, re.M | re.S)
    assert len(found) == text.count("```python") == text.count("<!-- code:")
    for file, name, block in found:
        source = (ROOT / file).read_text(encoding="utf-8")
        node = ast.parse(source)
        for part in name.split("."):
            node = next(x for x in node.body if getattr(x, "name", "") == part)
        body = source.splitlines()[node.lineno - 1 : node.end_lineno]
        # A common indentation is all that may be missing.
        lines = block.splitlines()
        shifts = {
            start
            for start in range(len(body) - len(lines) + 1)
            if [x.strip() for x in body[start : start + len(lines)]] == [x.strip() for x in lines]
        }
        assert shifts, f"{name} of {file} has changed: run python scripts/step_by_step/build.py"
        start = min(shifts)
        gaps = {
            len(a) - len(b)
            for a, b in zip(body[start : start + len(lines)], lines, strict=True)
            if b
        }
        assert len(gaps) == 1


def test_code_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"has no Block\.nothing"):
        build.code("gptjax/model/gpt.py", "Block.nothing")
    with pytest.raises(ValueError, match="has no lines from"):
        build.code("gptjax/model/gpt.py", "Block", "y_BTD", "no such line")


# ---- the arithmetic, from the printed numbers ----


def test_the_language_model_s_loss_is_the_mean_of_its_surprises():
    _, p, nats = np.array(tables(sections("en")[2])[0]).T
    p, nats = p.astype(float), nats.astype(float)
    assert (nats <= -np.log(np.maximum(p - HALF, 1e-9)) + HALF).all()
    assert (nats >= -np.log(p + HALF) - HALF).all()
    said = float(re.search(r"`L1 = ([\d.]+)`", sections("en")[2])[1])
    assert nats.mean() == pytest.approx(said, abs=2 * HALF)
    assert "`ln 117 = 4.762`" in sections("en")[2]
    assert math.log(117) == pytest.approx(4.762, abs=HALF)


def test_the_joint_loss_is_a_weighted_sum():
    [[task, lm, joint]] = numbers(3, 0)
    assert task + 0.5 * lm == pytest.approx(joint, abs=1e-4)
    nats = np.array(tables(sections("en")[3])[1])[:, 2].astype(float)
    assert nats.mean() == pytest.approx(lm, abs=2 * HALF)


def test_the_embedding_is_a_sum():
    token, position, total = numbers(4, 0).T
    np.testing.assert_allclose(token + position, total, atol=3 * HALF)


def test_the_score_is_a_scaled_product():
    q, k, products = numbers(5, 0)
    error = (abs(q) + abs(k) + 1) * HALF
    assert (abs(q * k - products) <= error + HALF).all()
    text = sections("en")[5]
    total = float(re.search(r"add up to (-?[\d.]+\d)", text)[1])
    score = float(re.search(r"the score is\s+(-?[\d.]+\d)", text)[1])
    assert abs(q @ k - total) <= error.sum()
    assert total / math.sqrt(len(q)) == pytest.approx(score, abs=2 * HALF)


def test_the_mask_is_a_lower_triangle_and_the_softmax_follows_from_the_scores():
    mask, weights, (scores, exponentials, row) = (numbers(6, i) for i in range(3))
    np.testing.assert_array_equal(mask, np.tril(np.ones_like(mask)))
    assert (weights[mask == 0] == 0).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=len(mask) * HALF)
    e = np.exp(scores - scores.max())
    np.testing.assert_allclose(e, exponentials, atol=3 * HALF)
    np.testing.assert_allclose(e / e.sum(), row, atol=3 * HALF)
    np.testing.assert_array_equal(weights[len(row) - 1, : len(row)], row)


def test_the_head_is_a_weighted_sum_of_values():
    weights, values, products = numbers(7, 0)
    np.testing.assert_allclose(weights * values, products, atol=5 * HALF)
    heads = numbers(7, 1).T[0]
    text = sections("en")[7]
    total = float(re.search(r"add up to (-?[\d.]+\d)", text)[1])
    assert (weights * values).sum() == pytest.approx(total, abs=12 * HALF)
    assert total in heads
    np.testing.assert_array_equal(weights, numbers(6, 2)[2])


def test_the_layer_norm_has_its_mean_variance_gain_and_bias():
    before, attention, added, normal, gain, bias, result = numbers(8, 0).T
    np.testing.assert_allclose(before + attention, added, atol=3 * HALF)
    mean, variance = added.mean(), added.var()
    text = sections("en")[8]
    said = re.search(r"mean (-?[\d.]+\d) and the variance ([\d.]+\d)", text)
    assert (mean, variance) == pytest.approx((float(said[1]), float(said[2])), abs=4 * HALF)
    np.testing.assert_allclose((added - mean) / np.sqrt(variance + 1e-5), normal, atol=6 * HALF)
    np.testing.assert_allclose(normal * gain + bias, result, atol=8 * HALF)
    one, other = numbers(8, 1).T
    assert abs(one - other).max() > 0.1, "batch norm hardly depends on the other tokens"


def test_the_gelu_is_that_of_the_formula():
    before, after = numbers(9, 0)
    exact = before / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (before + 0.044715 * before**3)))
    np.testing.assert_allclose(exact, after, atol=3 * HALF)


def test_the_answer_is_a_softmax_and_the_loss_its_logarithm():
    logits, p = numbers(11, 1)
    exact = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(exact, p, atol=1e-4)
    [[task, _, _]] = numbers(3, 0)
    assert -math.log(p[0]) == pytest.approx(task, abs=1e-4 / p[0])


def test_the_gradient_is_p_minus_y_and_a_difference_of_losses():
    p, y, gradient = numbers(12, 0)
    np.testing.assert_allclose(p - y, gradient, atol=1e-4)
    state, first, second = numbers(12, 1).T
    np.testing.assert_allclose(np.outer(gradient, state), [first, second], atol=4e-4)
    [[up, down, slope, backward]] = numbers(12, 2)
    # The losses have eight digits, and are divided by 0.0002.
    assert (up - down) / 2e-4 == pytest.approx(slope, abs=6e-5)
    assert slope == pytest.approx(backward, abs=2e-6)


def test_the_two_updates_are_those_of_adam():
    rows = numbers(13, 0)
    text = sections("en")[13]
    weight = float(re.search(r"It starts at\s+(-?[\d.]+\d)", text)[1])
    m = v = 0.0
    for t, (norm, g, said_m, said_v, m_hat, v_hat, direction, said) in enumerate(rows, 1):
        assert norm > 0
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        assert (m, v) == pytest.approx((said_m, said_v), rel=2e-3)
        assert m / (1 - 0.9**t) == pytest.approx(m_hat, rel=2e-3)
        assert v / (1 - 0.999**t) == pytest.approx(v_hat, rel=2e-3)
        step = (m / (1 - 0.9**t)) / math.sqrt(v / (1 - 0.999**t)) + 0.01 * weight
        assert step == pytest.approx(direction, abs=5e-4)
        weight -= 1e-3 * step
        assert weight == pytest.approx(said, abs=3e-6)
    losses = re.search(r"after the second: ([\d., ]+\d)\.", text)[1].split(", ")
    assert [float(x) for x in losses] == sorted(map(float, losses), reverse=True)
    assert float(losses[0]) == pytest.approx(numbers(3, 0)[0, 2], abs=1e-4)


# ---- the model ----


def test_the_pages_print_what_the_model_computes(tmp_path):
    import gptjax

    folder = DOCS / "step_by_step" / "model" / "finetune"
    convert.import_weights(str(folder), str(tmp_path / "model"), "huggingface")
    gpt = gptjax.load(tmp_path / "model")
    row = gpt.read(SENTENCE, LABEL)
    found = gpt.inside(row, list(AXES))
    at, query = 4, 5
    assert [gpt.tokenizer.token(int(row.batch.tokens[0, i])) for i in (at, query)] == [
        "not</w>", "good</w>",
    ]  # fmt: skip
    head = int(re.search(r"head (\d+), the\s+query of", sections("en")[5])[1])

    def same(printed, exact, atol=HALF + 1e-5):
        np.testing.assert_allclose(printed, exact, atol=atol)

    same(numbers(4, 0).T[2], found["embedding"][at])
    same(numbers(5, 0)[0], found["qkv"][0, query, 0, head])
    same(numbers(5, 0)[1], found["qkv"][0, at, 1, head])
    same(numbers(6, 1), found["attention"][0, head])
    same(numbers(7, 1).T[0], found["heads"][0, query].ravel())
    same(numbers(7, 1).T[1], found["attention_out"][0, query])
    same(numbers(8, 0).T[6], found["norm1"][0, query])
    same(numbers(9, 0)[1], found["ffn"][0, query, :4])
    same(numbers(10, 0).T[0], found["embedding"][query])
    same(numbers(10, 0).T[1:], found["blocks"][:, query])
    # The head that reads the negation, and the answer without it.
    layer, reader = map(
        int, re.search(r"head (\d+) of block (\d+)", sections("en")[10]).groups()[::-1]
    )
    same(numbers(10, 1)[0], found["attention"][layer, reader, -1])
    assert found["attention"][:, :, -1, at].max() == found["attention"][layer, reader, -1, at]
    off = gpt.inside(row, ["task_logits"], gptjax.Changes(heads_off=[(layer, reader)]))
    without = np.exp(off["task_logits"]) / np.exp(off["task_logits"]).sum()
    same(
        numbers(11, 2),
        [np.exp(found["task_logits"]) / np.exp(found["task_logits"]).sum(), without],
        1e-4,
    )
    same(numbers(11, 1)[0], found["task_logits"], 1e-4)
    scores = gpt.score({"text": [SENTENCE], "label": [LABEL]})
    same(numbers(3, 0)[0, :2], [scores["task_loss"], scores["lm_loss"]], 1e-4)
    shapes = [int(x) for x in np.array(tables(sections("en")[1])[0])[:, 1]]
    assert sum(shapes[:-1]) == shapes[-1]
    assert "`D` | 16" in sections("en")[0]


def test_the_sentence_is_not_trained_on_and_one_word_never_decides():
    namespace = {}
    exec(build.cells()["data"], namespace)
    rows = namespace["rows"]
    assert len(rows) == 215
    assert SENTENCE not in {row["text"] for row in rows}
    assert not [text for text in namespace["texts"] if text["text"].startswith(f"{SENTENCE} and")]
    for word in ("good", "bad", "not", "very", "jokes"):
        labels = collections.Counter(row["label"] for row in rows if word in row["text"].split())
        assert min(labels.values()) > 0.4 * labels.total(), word


# ---- the files ----


def test_stale_files_are_found():
    page = PAGES["en"]
    text = page.read_text(encoding="utf-8")
    assert build.stale({page: text.encode()}) == []
    assert build.stale({page: text.replace("return jnp.roll", "return roll").encode()})
    assert build.stale({DOCS / "step_by_step" / "no.png": b""}) == ["docs/step_by_step/no.png"]
    assert build.same_text("p = 0.124, 1.234e-05", "p = 0.125, 1.235e-05")
    assert not build.same_text("p = 0.124", "p = 0.126")
    assert not build.same_text("p = 1.234e-05", "p = 1.236e-05")
    assert not build.same_text("p = 0.124", "q = 0.124")
    assert not build.same_text("p = 0.124, 0.5", "p = 0.124")


def test_the_pictures_are_those_of_the_pages_and_small():
    pictures = {path.name for path in (DOCS / "step_by_step").glob("*.png")}
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES.values())
    assert set(re.findall(r"\(step_by_step/(\w+\.png)\)", text)) == pictures
    files = [path for path in (DOCS / "step_by_step").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 600_000
    for path in PAGES.values():
        text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
        links = re.findall(r"\]\(([^)#:]+)\)", text)
        assert links
        assert [link for link in links if not (DOCS / link).exists()] == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_pages_notebooks_and_pictures_are_up_to_date():
    assert build.stale(build.files(*build.run())) == []


# ---- the notebooks ----


def test_both_notebooks_are_valid_clear_and_have_the_cells():
    code = []
    for path in BOOKS:
        book = nbformat.read(path, as_version=4)
        nbformat.validate(book)
        cells = [cell for cell in book.cells if cell.cell_type == "code"]
        assert not [cell for cell in cells if cell.outputs or cell.execution_count]
        code.append([cell.source for cell in cells])
    assert code[0] == code[1] == list(build.cells().values())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_notebook_runs_and_prints_the_numbers_of_the_page(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    book = nbformat.read(BOOKS[0], as_version=4)
    resources = {"metadata": {"path": str(DOCS)}}
    nbclient.NotebookClient(book, timeout=500, resources=resources).execute()
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "\n".join(output.get("text", "") for output in outputs)
    [[task, lm, joint]] = tables(sections("en")[3])[0]
    assert f"L2 = {task}, L1 = {lm}, L3 = {joint}" in text
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    names = {path.stem for path in (DOCS / "step_by_step").glob("*.png")}
    assert len(pictures) == len(names & set(build.cells()))
