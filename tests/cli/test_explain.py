"""`gptjax explain`: the page as a file, and what is refused."""

import json
import os

import pytest
import runs

import gptjax
from gptjax.explain import data
from gptjax.explain import page as page_lib

TEXT = "the old man saw a tree"


def explain(*arguments: str, checkpoint: str = "") -> runs.Result:
    return runs.main("explain", f"--checkpoint={checkpoint or runs.trained()}", *arguments)


@pytest.mark.slow
def test_the_page_holds_the_numbers_of_python(tmp_path):
    page, numbers = tmp_path / "page.html", tmp_path / "page.json"
    for path in (page, numbers):
        result = explain(f"--text={TEXT}", "--label=yes", "--heads=0.1", f"--output={path}")
        assert result.code == 0, result.err
        assert result.out.startswith("11 tokens -> ")
        assert str(path) in result.out
    found = json.loads(numbers.read_text(encoding="utf-8"))
    gpt = gptjax.load(runs.trained())
    expected = data.explain(gpt, TEXT, "yes", [(0, 1)])
    assert found == json.loads(json.dumps(expected))
    text = page.read_text(encoding="utf-8")
    assert page_lib.read(text) == found
    assert gpt.explain(TEXT, "yes", [(0, 1)]).html == text
    assert 'lang="zh' in gpt.explain(TEXT, language="zh").html


def test_a_language_model_has_a_page(tmp_path):
    path = tmp_path / "page.html"
    checkpoint = f"{runs.trained()}/checkpoints/pretrain"
    result = explain(f"--text={TEXT}", f"--output={path}", "--language=zh", checkpoint=checkpoint)
    assert result.code == 0, result.err
    assert 'lang="zh' in path.read_text(encoding="utf-8")
    compared = page_lib.read(path.read_text(encoding="utf-8"))["comparison"]["checkpoints"]
    assert [each["stage"] for each in compared if each["shown"]] == ["pretrain"]
    assert "finetune" in [each["stage"] for each in compared]


@pytest.mark.slow
def test_pictures(tmp_path):
    result = explain(f"--text={TEXT}", "--format=svg", f"--output={tmp_path}/pictures")
    assert result.code == 0, result.err
    names = ("attention_0", "attribution", "mask", "steps", "surprise")
    assert sorted(os.listdir(tmp_path / "pictures")) == [f"{name}.svg" for name in names]
    assert result.out == f"11 tokens -> 5 pictures in {tmp_path}/pictures\n"


@pytest.mark.slow
def test_comparisons(tmp_path):
    numbers = tmp_path / "page.json"
    pretrained = f"{runs.trained()}/checkpoints/pretrain"
    result = explain(
        f"--text={TEXT}", "--other_text=the old man saw a house", f"--compare={pretrained}",
        f"--output={numbers}",
    )  # fmt: skip
    assert result.code == 0, result.err
    found = json.loads(numbers.read_text(encoding="utf-8"))["comparison"]
    assert [each["stage"] for each in found["checkpoints"]] == ["pretrain", "finetune"]
    assert found["other"]["columns"] == [{"name": "text", "text": "the old man saw a house"}]
    assert explain(f"--text={TEXT}", "--compare=none", f"--output={numbers}").code == 0
    assert json.loads(numbers.read_text(encoding="utf-8"))["comparison"]["checkpoints"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--text: give the text to explain"),
        (["--text=a", "--text_pair=b"], "--text_pair: "),
        (["--text=a", "--choice=b"], "--choice: given 1 times"),
        (["--text=a", "--label=maybe"], "label 'maybe' was not seen in training"),
        (["--text=a", "--heads=0"], "--heads=0: '0' must be LAYER.HEAD"),
        (["--text=a", "--heads=7.0"], "--heads: there is no head 7.0"),
        (["--text=a", "--output=page.pdf"], "--output=page.pdf: the ending must be .html or .json"),
        (["--text=a", "--output="], "--output: give the page to write"),
        (["--text=a", "--language=fr"], "language"),
        (["--text=a", "--format=png"], "--output=page.html: give a folder for the .png pictures"),
        (["--text=a", "--format=openai"], "--format=openai: must be one of png, svg, pdf"),
        (
            ["--text=a", "--format=png", "--output=p", "--weights"],
            "--weights: pictures do not show",
        ),
        (["--text=a", "--format=png", f"--output={__file__}/p"], "test_explain.py is no folder"),
        (["--text=a", "--compare=runs/nowhere"], "--compare=runs/nowhere: no checkpoint there"),
        (["--text=a", "--compare=none,runs/a"], "--compare=none: no checkpoint there"),
    ],
)
def test_wrong_use_is_one_line_and_writes_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    given = any(argument.startswith("--output") for argument in arguments)
    result = explain(*arguments, *([] if given else ["--output=page.html"]))
    assert result.code == 2
    assert message in result.error
    assert "\n" not in result.error.strip()
    assert os.listdir(tmp_path) == []
