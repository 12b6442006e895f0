"""Chooses how many of the eight CPU devices a test sees."""

import contextlib
from collections.abc import Iterator

import jax
import pytest

_all = jax.devices  # before any test replaces it


@contextlib.contextmanager
def use(count: int) -> Iterator[None]:
    """Lets `jax.devices` return so many devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: _all()[:count])
        yield
