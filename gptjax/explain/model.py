"""The model as users have it in Python: `gptjax.infer.predictor.GPT`, and its page."""

import dataclasses
import html
import os
from typing import Any

from gptjax.config.schema import MeshConfig, PictureFormat
from gptjax.errors import require
from gptjax.explain import data, page, pictures
from gptjax.explain.comparison import Models
from gptjax.explain.data import Heads
from gptjax.infer import predictor
from gptjax.infer.row import Texts
from gptjax.io import files


@dataclasses.dataclass(frozen=True)
class Page:
    """A page that shows how a model reads one text. A notebook shows it inline."""

    data: dict[str, Any] = dataclasses.field(repr=False)
    """The numbers of the page, as `docs/explain_json.md` describes them."""
    language: str = "en"
    """The language that the page opens in: en or zh."""

    @property
    def html(self) -> str:
        """The page as one HTML text, which needs no other file and no network."""
        return page.render(self.data, self.language)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the page to a file.

        Raises:
          UserError: the file cannot be written.
        """
        files.write_atomically(path, self.html.encode())

    def save_pictures(self, folder: str | os.PathLike[str], format: str = "png") -> list[str]:
        """Draws the page as figures for a paper or a lesson, and returns their paths.

        They are `mask`, `attention_N` of each block N, `steps`, `surprise`, and for a task
        `attribution`.

        Args:
          folder: the folder to write. It is made if it is missing.
          format: png (300 dots per inch), svg or pdf.

        Raises:
          UserError: the format does not exist, a file cannot be written, or Chinese was wanted and
            this machine has no font for it.
        """
        formats = list(PictureFormat)
        require(format in formats, f"`format`={format}: must be one of {', '.join(formats)}")
        drawn = list(pictures.draw(self.data, self.language, PictureFormat(format)))
        paths = []
        for name, content in drawn:
            paths.append(os.path.join(os.fspath(folder), f"{name}.{format}"))
            files.write_atomically(paths[-1], content)
        return paths

    def _repr_html_(self) -> str:
        # A notebook has styles and scripts of its own, which must not meet those of the page.
        style, page = "width:100%;height:80vh;border:0", html.escape(self.html)
        return f'<iframe sandbox="allow-scripts" style="{style}" srcdoc="{page}"></iframe>'


@dataclasses.dataclass(frozen=True, eq=False)
class GPT(predictor.GPT):
    """A trained model in memory; `gptjax.load`, `finetune` and `pretrain` return one.

    It is `gptjax.infer.predictor.GPT`, which lists the attributes, with the page of a text.
    """

    def explain(
        self,
        texts: Texts,
        label: Any = None,
        heads: Heads = (),
        language: str = "en",
        compare: Models | None = None,
        other_text: Texts | None = None,
        weights: bool = False,
    ) -> Page:
        """Returns a page that shows, step by step, how the model reads one text.

        >>> page = gpt.explain("a moving, funny film", label="positive")  # doctest: +SKIP
        >>> page.save("page.html")                                        # doctest: +SKIP

        Args:
          texts: the text, or for a task with several texts a mapping of column names to texts.
          label: the right label, for the task loss. None means that it is not known.
          heads: pairs (layer, head), both from 0: the heads whose queries, keys and values are in
            the page. An empty sequence means the eight most telling ones.
          language: the language that the page opens in: en or zh.
          compare: other models, or paths of checkpoints as in `gptjax.load`, that read the same
            text. They must have the same tokenizer. None means the checkpoints that the run of this
            model kept; an empty sequence means none.
          other_text: another text, as `texts`, that this model reads too.
          weights: whether a model of more than 2 million parameters (at most 20 million) travels
            in the page too, so that the page can compute other texts. Smaller models always do.

        Raises:
          UserError: a text does not fit, a label, head or language does not exist, a model of
            `compare` cannot be read, or the model cannot travel.
        """
        require(language in page.LANGUAGES, f"`language`={language}: must be en or zh")
        found = data.explain(self, texts, label, heads, compare, other_text, weights)
        return Page(found, language)


def of(gpt: predictor.GPT) -> GPT:
    """Returns a model with its page."""
    fields = {field.name: getattr(gpt, field.name) for field in dataclasses.fields(gpt)}
    return GPT(**fields)


def load(path: str | os.PathLike[str], mesh_config: MeshConfig | None = None) -> GPT:
    """Loads a trained model.

    >>> gpt = gptjax.load("runs/quickstart")     # doctest: +SKIP
    >>> gpt.generate("The ", max_new_tokens=50)  # doctest: +SKIP

    Args:
      path: WORKDIR (its last stage and best step), WORKDIR/checkpoints/STAGE (its best step),
        WORKDIR/checkpoints/STAGE/STEP, or an imported checkpoint.
      mesh_config: the devices that hold the parameters. None means all devices, along the mesh axis
        `data`.

    Raises:
      UserError: there is no checkpoint, or it is damaged.
    """
    return of(predictor.load(path, mesh_config))
