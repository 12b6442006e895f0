"""Models of the Hugging Face hub, read by name: hf://OWNER/NAME or hf://OWNER/NAME@REVISION.

The files lie in the cache of the library `huggingface_hub`, where `transformers` finds them too.
The library also reads the environment: HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_ENDPOINT and
HF_HUB_OFFLINE. The cache holds a file once, under its hash, and a folder of links for each commit:

    HF_HOME/hub/models--OWNER--NAME/blobs/HASH
    HF_HOME/hub/models--OWNER--NAME/snapshots/COMMIT/model.safetensors -> ../../blobs/HASH
    HF_HOME/hub/models--OWNER--NAME/refs/REVISION                      contains COMMIT

Two things are done here. When a download of the library fails, the library deletes the part that
has arrived, and it compares only the size of a file. Here the large files are downloaded with the
library's function for one request. The part that has arrived stays beside the blobs, and the next
download goes on after it. Every file is compared with its hash before it is read, so a damaged file
is noticed and downloaded again. Large files come by plain HTTPS, and not by Xet, which the library
uses where it can.

A model is converted in memory at each start. It takes seconds, and a converted copy on the disk
could be out of date.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import tqdm
from jax.sharding import Mesh

from gptjax import __version__, state
from gptjax.checkpoint import load
from gptjax.checkpoint.load import Checkpoint
from gptjax.checkpoint.meta import Meta
from gptjax.config import schema
from gptjax.config.schema import WeightFormat, Words
from gptjax.errors import UserError, brief, require
from gptjax.interop import convert, huggingface
from gptjax.interop.arrays import Weights
from gptjax.io import files
from gptjax.mesh import Params
from gptjax.model import gpt

Say = Callable[[str], None]
"""A function that shows a line to the user."""

_FORM = "hf://OWNER/NAME, hf://OWNER/NAME@REVISION or gpt1"
_ADDRESS = re.compile(r"hf://([^/@\s]+/[^/@\s]+)(?:@([^\s?#]+))?")
_COMMIT = re.compile("[0-9a-f]{40}")
_TIMEOUT_SECONDS = 10
_LINE_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class _Source:
    """A model of the hub."""

    address: str
    """hf://OWNER/NAME or hf://OWNER/NAME@REVISION."""
    argument: str
    """The name of the argument with the address, for error messages."""
    repository: str
    """OWNER/NAME."""
    revision: str
    """A branch, a tag or a commit."""

    def __str__(self) -> str:
        return f"`{self.argument}`={self.address}"

    @property
    def folder(self) -> pathlib.Path:
        """The folder of the repository in the cache. Raises `UserError` for a wrong name."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        name = repo_folder_name(repo_id=self.repository, repo_type="model")
        return pathlib.Path(constants.HF_HUB_CACHE) / name

    def snapshot(self, commit: str) -> pathlib.Path:
        """The folder with the files of a commit."""
        return self.folder / "snapshots" / commit


@dataclasses.dataclass(frozen=True)
class HubModel:
    """A model of the hub in memory. It has the interface of a `Checkpoint`."""

    path: str
    """hf://OWNER/NAME@COMMIT."""
    weights: Weights = dataclasses.field(repr=False)

    @functools.cached_property
    def meta(self) -> Meta:
        """The metadata that an imported checkpoint has."""
        return convert.meta_of(self.weights)

    @property
    def temperature(self) -> float:
        """The number that the task logits are divided by."""
        return self.weights.temperature

    def load_params(self, mesh: Mesh) -> Params:
        """Returns the parameters, sharded over the devices of a mesh.

        Raises:
          UserError: the arrays do not fit the model.
        """
        model = gpt.make_model(self.weights.model, self.weights.task)
        like = state.abstract(lambda key: gpt.init_params(model, key), mesh, jax.random.key(0))
        params = convert.parameters_of(self.weights, self.path)
        # Each device gets its own part alone. JAX regards this transfer as implicit.
        with jax.transfer_guard_host_to_device("allow"):
            return jax.tree.map(
                lambda array, leaf: jax.make_array_from_callback(
                    leaf.shape, leaf.sharding, lambda index: array[index].astype(leaf.dtype)
                ),
                params,
                like,
            )


def open_checkpoint(
    path: str,
    argument: str = "path",
    commit: str = "",
    words: str = Words.EXACT,
    say: Say = lambda _: None,
) -> Checkpoint | HubModel:
    """Opens a checkpoint of gptjax, or a model of the hub, which is downloaded if necessary.

    Args:
      path: the path of a checkpoint, as in `checkpoint.load.open_checkpoint`, or a model of the
        hub: hf://OWNER/NAME, hf://OWNER/NAME@REVISION or gpt1.
      argument: the name of the path in error messages.
      commit: the commit of the hub's repository. Empty means the newest commit of the revision. If
        the cache has all files of a given commit, nothing is asked of the hub.
      words: as in `TokenizerConfig.words`. A model of the hub that gptjax exported has its own
        tokenizer, for which this does not matter.
      say: a function that shows a line to the user.

    Raises:
      UserError: there is no such model, it cannot be downloaded, or it is damaged.
    """
    address = schema.hub_address(path)
    if not address:
        return load.open_checkpoint(path, argument)
    source = _parse(path, argument)
    with _errors_named(source):
        if not (commit and _is_whole(source.snapshot(commit))):
            commit = _download(source, commit or source.revision, say)
        place = source.snapshot(commit)
        found = convert.read(place, WeightFormat.HUGGINGFACE, words, str(place))
    return HubModel(f"hf://{source.repository}@{commit}", found)


def pin(path: str, argument: str = "path", say: Say = lambda _: None) -> str:
    """Downloads a model of the hub, and returns its commit: the newest of the revision.

    If the hub cannot be reached, or HF_HUB_OFFLINE is set, it is the commit of the last download.

    Args:
      path: hf://OWNER/NAME, hf://OWNER/NAME@REVISION or gpt1.
      argument: the name of the path in error messages.
      say: a function that shows a line to the user.

    Raises:
      UserError: there is no such model, or it cannot be downloaded.
    """
    source = _parse(path, argument)
    with _errors_named(source):
        return _download(source, source.revision, say)


def _parse(path: str, argument: str) -> _Source:
    """Returns the model that a path names. Raises `UserError` for a path of another form."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    address = schema.hub_address(path)
    require(
        address == path or not os.path.isdir(path),
        f"`{argument}`={path}: means {address}, and there is a folder of this name too; write "
        f"{address} or ./{path}",
    )
    found = _ADDRESS.fullmatch(address)
    if not found or ".." in (found[2] or ""):
        raise UserError(f"`{argument}`={path}: must be {_FORM}")
    try:
        validate_repo_id(found[1])
    except HFValidationError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"`{argument}`={path}: must be {_FORM} ({reason})") from error
    return _Source(address, argument, found[1], found[2] or "main")


def _download(source: _Source, revision: str, say: Say) -> str:
    """Downloads the files of a revision that are not in the cache, and returns the commit.

    Args:
      source: the model.
      revision: a branch, a tag or a commit.
      say: a function that shows a line to the user.

    Raises:
      UserError: the files cannot be read by gptjax, or one of them differs from its hash.
      Exception: the hub has refused a request, cannot be reached, or the cache cannot be written.
    """
    try:
        commit, listing = _list(source, revision)
    except Exception as error:
        commit = _commit_in_cache(source, revision)
        if not (_is_unreachable(error) and commit and _is_whole(source.snapshot(commit))):
            raise
        say(f"{source.address}: {_why_not_asked(error)}; commit {commit[:12]} is in the cache")
        return commit
    place = source.snapshot(commit)
    weights = huggingface.require_weights(listing, str(source))
    require("config.json" in listing, f"{source}: the repository has no config.json")
    for name in huggingface.SMALL_FILES:
        if name in listing:
            _fetch(source, commit, listing[name], say)
    huggingface.require_architecture(place)
    _fetch(source, commit, listing[weights], say)
    # If the file is an index, it lists the files with the weights.
    for path in huggingface.weight_files(place):
        require(path.name in listing, f"{source}: the repository has no {path.name}")
        _fetch(source, commit, listing[path.name], say)
    if revision != commit:
        # Without the network, the revision is looked up here. If the cache is a read-only folder
        # that is shared, the next start with the network asks the hub again.
        with contextlib.suppress(UserError):
            files.write_atomically(source.folder / "refs" / revision, commit.encode())
    return commit


def _list(source: _Source, revision: str) -> tuple[str, dict[str, Any]]:
    """Asks the hub for the commit of a revision, and for its files.

    Returns:
      The commit, and name of a file -> a `RepoSibling` with its size and, if the file is large, its
      hash.

    Raises:
      UserError: the server is not a hub.
      Exception: the hub has refused the request, or cannot be reached.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HTTPError

    try:
        info = HfApi(library_name="gptjax", library_version=__version__).model_info(
            source.repository, revision=revision, files_metadata=True, timeout=_TIMEOUT_SECONDS
        )
        if not _COMMIT.fullmatch(info.sha or ""):
            raise ValueError("the answer has no commit")
        return str(info.sha), {sibling.rfilename: sibling for sibling in info.siblings or ()}
    except (HTTPError, OSError):
        raise
    except Exception as error:  # another kind of server may send anything
        raise UserError(
            f"{source}: {constants.ENDPOINT} does not answer as the hub does ({brief(error)}); "
            "check HF_ENDPOINT and the proxy"
        ) from error


def _fetch(source: _Source, commit: str, file: Any, say: Say) -> None:
    """Downloads a file into the cache, except if it is there.

    Args:
      source: the model.
      commit: the commit.
      file: the file, a `RepoSibling` of the listing.
      say: a function that shows a line to the user.

    Raises:
      UserError: the file that has arrived differs from its hash. It is not kept.
    """
    from huggingface_hub import hf_hub_download

    place = source.snapshot(commit) / file.rfilename
    if place.exists():
        if not _is_damaged(place):
            return
        say(f"{place}: is damaged; it is downloaded again")
        _remove(place)
    if file.lfs:
        _fetch_large(source, commit, file, say)
    # The library links a file that is already among the blobs, and downloads another.
    hf_hub_download(
        source.repository, file.rfilename, revision=commit, library_name="gptjax",
        library_version=__version__, tqdm_class=_progress(say, file.rfilename),
    )  # fmt: skip
    if _is_damaged(place):
        _remove(place)
        raise UserError(_arrived_damaged(source, file.rfilename))


def _arrived_damaged(source: _Source, name: str) -> str:
    return (
        f"{source}: {name} has arrived damaged, because its hash is not the one that the hub "
        "gives; it is not kept; start the command again"
    )


def _fetch_large(source: _Source, commit: str, file: Any, say: Say) -> None:
    """Downloads a file of Git LFS into the blobs of the cache, except if it is there.

    A download that was interrupted goes on. Other processes wait for the download.

    Args:
      source: the model.
      commit: the commit.
      file: the file, a `RepoSibling` of the listing.
      say: a function that shows a line to the user.

    Raises:
      UserError: the disk is too small, or the file that has arrived differs from its hash.
    """
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    name, digest, size = file.rfilename, file.lfs.sha256, file.lfs.size
    blob = source.folder / "blobs" / digest
    partial = blob.with_name(f"{digest}.gptjax.incomplete")
    url = hf_hub_url(source.repository, name, revision=commit)
    headers = build_hf_headers(library_name="gptjax", library_version=__version__)
    # The library locks the same file.
    lock = pathlib.Path(constants.HF_HUB_CACHE, ".locks", source.folder.name, f"{digest}.lock")
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        while not blob.exists():
            start = partial.stat().st_size if partial.exists() else 0
            if start > size:
                partial.unlink()
                continue
            _require_space(source, partial.parent, size - start)
            verb = f"going on after {_shown(start)} with" if start else "downloading"
            say(f"{source.address}: {verb} {name} ({_shown(size)}) to {constants.HF_HUB_CACHE}")
            with _kept_if_of_use(partial), open(partial, "ab") as output:
                http_get(
                    url, output, resume_size=start, headers=headers, expected_size=size,
                    displayed_filename=name, tqdm_class=_progress(say, name),
                )  # fmt: skip
            if _has_hash(partial, digest):
                os.replace(partial, blob)
                return
            partial.unlink()
            # The part of an earlier download may have been damaged. Then the whole file follows.
            require(start, _arrived_damaged(source, name))


@contextlib.contextmanager
def _kept_if_of_use(partial: pathlib.Path) -> Iterator[None]:
    """Deletes the part of a file after an error, except if the download can go on after the part.

    It can go on after a lost connection, after a refusal of the hub, and if the process ends.
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except OSError as error:
        # The disk is full, or the file of the server is shorter than the hub says. 416 means that
        # the server does not have the bytes that were asked for.
        if not isinstance(error, HfHubHTTPError) or error.response.status_code == 416:
            partial.unlink(missing_ok=True)
        raise


def _require_space(source: _Source, folder: pathlib.Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    require(
        free >= size,
        f"{source}: needs {_shown(size)}, and the disk of {folder} has {_shown(free)}; free space, "
        "or set HF_HOME to a folder on another disk",
    )


def _shown(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e8 else f"{size / 1e6:,.0f} MB"


class _Progress(tqdm.tqdm):
    """A progress bar that is not drawn, but says every ten seconds how much of a file is there."""

    def __init__(self, say: Say, name: str, total: int | None = None, initial: int = 0, **_: Any):
        super().__init__(total=total, initial=initial, disable=True)
        self._say, self._name, self._size, self._done = say, name, total, initial
        self._said = time.monotonic()

    def update(self, n: float | None = 1) -> None:
        """Receives the number of bytes that have arrived."""
        self._done += int(n or 0)
        if time.monotonic() - self._said >= _LINE_SECONDS:
            self._said = time.monotonic()
            of = f" of {_shown(self._size)}" if self._size else ""
            self._say(f"{self._name}: {_shown(self._done)}{of}")


def _progress(say: Say, name: str) -> Any:
    return functools.partial(_Progress, say, name)


def _commit_in_cache(source: _Source, revision: str) -> str:
    """Returns the commit that a revision had at the last download; "" if there is none."""
    if _COMMIT.fullmatch(revision):
        return revision
    with contextlib.suppress(OSError, ValueError):
        found = (source.folder / "refs" / revision).read_text().strip()
        return found if _COMMIT.fullmatch(found) else ""
    return ""


def _is_whole(place: pathlib.Path) -> bool:
    """Returns whether a folder of the cache has all files of a model, and none is damaged."""
    names = {path.name for path in place.iterdir()} if place.is_dir() else set()
    if not ("config.json" in names and ("tokenizer.json" in names or "vocab.json" in names)):
        return False
    try:
        needed = {path.name for path in huggingface.weight_files(place)}
    except UserError:
        return False
    read = names & {*huggingface.SMALL_FILES, huggingface.INDEX} | needed
    return all((place / name).exists() and not _is_damaged(place / name) for name in read)


def _is_damaged(place: pathlib.Path) -> bool:
    """Returns whether a file of a snapshot differs from its hash.

    The name of the blob is the hash. A system without links has no blobs, and the file counts as
    whole.
    """
    if not place.is_symlink():
        return False
    stat = place.stat()
    return not _had_hash(place, pathlib.Path(os.readlink(place)).name, stat.st_size, stat.st_mtime)


@functools.lru_cache(maxsize=64)
def _had_hash(path: pathlib.Path, digest: str, size: int, changed: float) -> bool:
    """Returns `_has_hash` of a file with this size and time. A run compares a file only once."""
    return _has_hash(path, digest)


def _has_hash(path: pathlib.Path, digest: str) -> bool:
    """Returns whether a file has a hash of the hub.

    Args:
      path: the file.
      digest: SHA-256 of a file of Git LFS, or the SHA-1 that Git has for another file. A text of
        another length is the name of a blob that is not a hash, and counts as equal.
    """
    with open(path, "rb") as file:
        if len(digest) == 64:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest
        if len(digest) == 40:
            data = file.read()
            header = f"blob {len(data)}\0".encode()
            return hashlib.sha1(header + data, usedforsecurity=False).hexdigest() == digest
    return True


def _remove(place: pathlib.Path) -> None:
    """Removes a file of a snapshot, and its blob."""
    with contextlib.suppress(FileNotFoundError):  # another process has removed it too
        (place.parent / os.readlink(place)).unlink(missing_ok=True)
        place.unlink()


@contextlib.contextmanager
def _errors_named(source: _Source) -> Iterator[None]:
    """Turns the errors of hub, network and disk into a `UserError` that names the model.

    Meanwhile `huggingface_hub` logs no warnings. It would log each error that it also raises.
    """
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except UserError as error:
        text = str(error).removeprefix(f"{source}: ")
        # A file is named without its folder in the cache.
        folder = re.escape(str(source.folder / "snapshots")) + "/[0-9a-f]{40}"
        raise UserError(f"{source}: {re.sub(folder + '(/|: )?', '', text)}") from error
    except Exception as error:
        reason = _reason(source, error)
        if not reason:
            raise
        raise UserError(f"{source}: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)


def _is_unreachable(error: Exception) -> bool:
    """Returns whether the hub could not be asked, or is too busy to answer."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return isinstance(error, HTTPError | OfflineModeIsEnabled)


def _why_not_asked(error: Exception) -> str:
    """Returns in a few words why the hub could not be asked (`_is_unreachable`)."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, HfHubHTTPError):
        return f"the hub answers with the error {error.response.status_code}"
    return f"{constants.ENDPOINT} cannot be reached"


def _reason(source: _Source, error: BaseException) -> str:
    """Returns what is wrong and what to do; "" if the error is a bug."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    if isinstance(error, LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"HF_HUB_OFFLINE is set, and the cache {constants.HF_HUB_CACHE} does not hold the "
            "whole model; unset it for one start, or set HF_HOME to the cache that holds the model"
        )
    if isinstance(error, HfHubHTTPError):
        return _refusal(source, error)
    if isinstance(error, HTTPError):
        return (
            f"{constants.ENDPOINT} cannot be reached ({brief(error)}); check the network, the "
            "proxy and HF_ENDPOINT, and start again; a download goes on where it stopped"
        )
    if isinstance(error, OSError) and error.strerror:
        return (
            f"cannot write the cache {constants.HF_HUB_CACHE}: {error.strerror}; free space, fix "
            "its permissions, or set HF_HOME to another folder"
        )
    if isinstance(error, OSError):  # sizes differ, or a header is missing
        return f"the file has not arrived as the hub describes it ({brief(error)}); start again"
    return ""


def _refusal(source: _Source, error: Any) -> str:
    """Returns what the hub has refused, and what to do.

    Args:
      source: the model.
      error: an `HfHubHTTPError`.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RevisionNotFoundError

    status, token = error.response.status_code, get_token()
    page = f"{constants.ENDPOINT}/{source.repository}"
    whose = "the account of your token" if token else "your account"
    then = "" if token else ", and set HF_TOKEN to a token of this account"
    private = "your token may not read it" if token else "it is private"
    reasons = (
        (
            isinstance(error, GatedRepoError),
            f"is gated; ask for access for {whose} at {page}{then}",
        ),
        (
            isinstance(error, RevisionNotFoundError),
            f"has no revision {source.revision}; give a branch, a tag or a commit that {page} has",
        ),
        (
            isinstance(error, EntryNotFoundError),
            f"the hub does not find a file that it lists ({brief(error)}); give another revision",
        ),
        (
            status == 401 and token and "credentials" in str(error),
            "the hub does not know your token; set HF_TOKEN to a valid one, or unset it",
        ),
        (
            status in (401, 404),
            f"there is no such model, or {private}; check the name at {page}"
            f"{'' if token else ', and set HF_TOKEN for a private model'}",
        ),
        (
            status == 403,
            f"the hub refuses access ({brief(error)}); check the rights of HF_TOKEN at {page}",
        ),
        (status == 429, "too many requests to the hub; wait some minutes, or set HF_TOKEN"),
    )
    default = f"the hub answers with the error {status}; start again later"
    return next((text for applies, text in reasons if applies), default)
