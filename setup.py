"""The packages and the optional requirements. pyproject.toml can hold only fixed lists of them."""

import pathlib

from setuptools import find_packages, setup


def requirements(extra: str) -> list[str]:
    """Returns the requirements in requirements-EXTRA.txt, without comments and `-r FILE` lines."""
    text = pathlib.Path(f"requirements-{extra}.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith(("#", "-r"))]


setup(
    packages=[*find_packages(include=["gptjax", "gptjax.*"]), "gptjax.experiments"],
    # In the repository the experiments are beside the package. The installation puts them inside.
    package_dir={"gptjax.experiments": "experiments"},
    # The style, the scripts and the template of the page of `gptjax explain`.
    package_data={"gptjax.explain": ["static/**"]},
    extras_require={extra: requirements(extra) for extra in ("cuda", "remote", "tpu")},
)
