"""The pictures of the page: their numbers are those of the data, and their files are sound."""

import base64
import functools
import io
import itertools
import warnings
import xml.etree.ElementTree

import loaded
import matplotlib
import numpy as np
import pages
import pytest
from matplotlib import font_manager
from matplotlib.image import imread

from gptjax.config.schema import PictureFormat
from gptjax.errors import UserError
from gptjax.explain import data as data_lib
from gptjax.explain import pictures
from gptjax.explain.model import Page

HAS_CHINESE = any("CJK" in font for font in font_manager.findSystemFonts())


def drawn(data, language="en", format=PictureFormat.PNG):
    return dict(pictures.draw(data, language, format))


@pytest.fixture(scope="module")
def png():
    return drawn(pages.of("classification"))


def test_the_arrays_are_those_of_the_model():
    gpt = loaded.model("classification", num_layers=3, num_heads=4, context_length=64)
    found = gpt.inside("the cat sat on a mat", ["attention", "scores"])
    data = pages.of("classification")
    np.testing.assert_allclose(pictures.weights(data), found["attention"], atol=0.5001 / 255)
    largest = np.argsort(-found["attention"], axis=-1)[..., :8]
    both = [
        np.take_along_axis(x, largest, -1) for x in (pictures.weights(data), found["attention"])
    ]
    np.testing.assert_allclose(*both, atol=1e-6)
    np.testing.assert_array_equal(pictures.visible(data), np.tri(len(data["tokens"]), dtype=bool))


@pytest.mark.slow
def test_sequences_do_not_see_each_other():
    data = pages.of("similarity")
    sequence = np.array([token["sequence"] for token in data["tokens"]])
    length = len(sequence)
    expected = np.tri(length, dtype=bool) & (sequence[:, None] == sequence[None, :])
    np.testing.assert_array_equal(pictures.visible(data), expected)


def test_all_pictures_are_drawn(png):
    assert list(png) == [
        "mask", "attention_0", "attention_1", "attention_2", "steps", "surprise", "attribution"
    ]  # fmt: skip
    for name, content in png.items():
        image = imread(io.BytesIO(content))
        assert min(image.shape[:2]) > 150, name
        assert image.std() > 0.01, name
    assert "attribution" not in drawn(pages.of("language"))


@pytest.mark.slow
def test_equal_data_give_equal_files(png):
    assert drawn(pages.of("classification")) == png


@pytest.mark.slow
def test_vectors_are_equal_and_valid():
    data = pages.of("similarity")
    for format in (PictureFormat.SVG, PictureFormat.PDF):
        files = drawn(data, format=format)
        assert drawn(data, format=format) == files
        for content in files.values():
            if format is PictureFormat.SVG:
                xml.etree.ElementTree.fromstring(content)
                assert b"http://www.w3.org" in content
            else:
                assert content.startswith(b"%PDF")


def test_darker_means_more_attention():
    """The brightness of each cell falls with its weight, and masked cells have a colour apart."""
    data = pages.of("classification")
    with matplotlib.rc_context({"font.family": pictures.fonts("en")}):
        strings = pictures._strings("en")
        weights = pictures.weights(data)[1]
        name = functools.partial(pictures._text, strings)
        figure = pictures._attention(data, name, 1, weights)
    seen = pictures.visible(data)
    heads = [axis for axis in figure.axes if axis.images and axis.images[0].get_array().ndim == 2]
    for axis, weight in zip(heads[: len(weights)], weights, strict=True):
        image = axis.images[0]
        colours = image.to_rgba(image.get_array())
        bright = colours[..., :3] @ np.array([0.299, 0.587, 0.114])
        order = np.argsort(weight[seen], kind="stable")
        assert (np.diff(bright[seen][order]) <= 1e-9).all()
        assert len({tuple(colour) for colour in colours[~seen]}) == 1


@pytest.mark.slow
def test_hostile_texts_are_drawn_as_they_are():
    """Formulas, turned text and characters without a glyph give no warning and no error."""
    gpt = loaded.model("", num_layers=1, context_length=64)
    text = "a cat $x^2$ $\\frac{1}{0}$ \u202eturned \x1b[31m \u05d0 \U0001f600 \ud800 猫 sat"
    data = data_lib.explain(gpt, text, compare=[])
    for token in data["tokens"]:
        token["text"] = text  # each token has it all
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(drawn(data)) == {"mask", "attention_0", "steps", "surprise"}
        with matplotlib.rc_context({"font.family": pictures.fonts("en")}):
            label = pictures._label({"kind": "text", "text": "\u202e\ud800\u05d0"}, str)
    assert label == "⟨202E⟩⟨D800⟩⟨5D0⟩"


@pytest.mark.slow
def test_many_tokens_have_thin_labels():
    content = drawn(pages.of("middle"))["mask"]
    image = imread(io.BytesIO(content))
    assert image.shape[1] < 300 * 7


@pytest.mark.skipif(not HAS_CHINESE, reason="needs a font with Chinese characters")
def test_chinese(png):
    chinese = drawn(pages.of("classification"), "zh")
    assert list(chinese) == list(png)
    assert all(chinese[name] != png[name] for name in png)


def test_without_a_font_chinese_is_refused(monkeypatch):
    monkeypatch.setattr(pictures, "_CHINESE", ())
    with pytest.raises(UserError, match="no font with Chinese characters; install one"):
        pictures.fonts("zh")
    assert pictures.fonts("en") == ["DejaVu Sans"]


@pytest.mark.slow
def test_every_text_is_found():
    for language in ("en", "zh"):
        strings = pictures._strings(language)
        for step in pages.of("similarity")["steps"]:
            assert strings[f"step_{step['name']}"]
    assert pictures._strings("en")["picture_queries"] == "queries"


def test_pictures_are_saved(tmp_path, png):
    page = Page(pages.of("classification"))
    paths = page.save_pictures(tmp_path / "new" / "folder")
    assert paths == [str(tmp_path / "new" / "folder" / f"{name}.png") for name in png]
    for path, content in zip(paths, png.values(), strict=True):
        with open(path, "rb") as file:
            assert file.read() == content
    with pytest.raises(UserError, match="`format`=gif: must be one of png, svg, pdf"):
        page.save_pictures(tmp_path, "gif")


def test_weights_need_no_top_keys():
    """A head whose rows have fewer than eight keys leaves places unused."""
    data = pages.of("classification")
    values = np.frombuffer(base64.b64decode(data["attention"]["top"]["values"]), "<f4")
    assert (values == 0).any()
    np.testing.assert_allclose(pictures.weights(data).sum(axis=-1), 1, atol=0.02)


def test_the_readers_settings_of_matplotlib_are_neither_used_nor_changed(png):
    own = {"axes.facecolor": "black", "savefig.facecolor": "red", "font.size": 20.0}
    with matplotlib.rc_context(own):
        before = dict(matplotlib.rcParams)
        for name, content in pictures.draw(pages.of("classification")):
            assert content == png[name], name
            assert dict(matplotlib.rcParams) == before, name


def test_the_cells_of_the_mask_are_what_a_query_sees():
    data = pages.of("classification")
    strings = pictures._strings("en")
    with matplotlib.rc_context({"font.family": pictures.fonts("en")}):
        figure = pictures._mask(data, lambda *a, **k: pictures._text(strings, *a, **k))
    image = figure.axes[0].images[0]
    colours = image.to_rgba(image.get_array())
    seen = np.tri(len(data["tokens"]), dtype=bool)
    assert len({tuple(colour) for colour in colours[seen]}) == 1
    assert len({tuple(colour) for colour in colours[~seen]}) == 1
    assert tuple(colours[0, 0]) != tuple(colours[0, -1])


@pytest.mark.parametrize("length", [5, 19, 60, 128, 512])
def test_names_of_tokens_do_not_overlap(length):
    figure = pictures._figure(3, 3)
    axis = figure.add_axes((0.4, 0.4, 0.45, 0.45))
    axis.imshow(np.zeros((length, length)))
    pictures._name_axes(axis, ["word"] * length, 6, 0.45 * 3, True, True)
    figure.draw_without_rendering()
    for labels, side in ((axis.get_yticklabels(), "y"), (axis.get_xticklabels(), "x")):
        boxes = [label.get_window_extent() for label in labels]
        assert boxes
        edges = sorted((getattr(b, f"{side}0"), getattr(b, f"{side}1")) for b in boxes)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(edges))
