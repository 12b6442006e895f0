"""Where the files of a run lie: in a folder, or in a bucket, as gs://BUCKET/FOLDER.

Buckets are reached as orbax reaches them, through etils' epath. A bucket has no folders, cannot
rename and cannot append; but putting one object is atomic.
"""

import glob
import logging
import os

from etils import epath

from gptjax.errors import UserError, brief, require

PathLike = str | os.PathLike[str]


def is_remote(path: PathLike) -> bool:
    """Tells an address from a path of this machine."""
    return "://" in os.fspath(path)


def check_address(path: PathLike, argument: str) -> None:
    """Refuses an address that can hold no run, or that cannot be reached; a folder is fine.

    Raises:
      UserError: one line that names the argument and says what to install or to give instead.
    """
    where = f"`{argument}`={os.fspath(path)}"
    if not is_remote(path):
        # orbax looks for what it has written with glob: it would find nothing, or another run's.
        place = os.path.abspath(path)
        plain = argument != "workdir" or glob.escape(place) == place
        require(plain, f"{where}: its path must be without [, * and ?: {place}")
        return
    scheme, _, rest = os.fspath(path).partition("://")
    require(
        scheme != "s3",
        f"{where}: orbax, which writes the checkpoints, knows folders and gs:// only; give "
        "gs://BUCKET/FOLDER, or a folder that all hosts share (EFS, FSx, NFS)",
    )
    bucket, _, folder = rest.partition("/")
    require(scheme == "gs" and bucket, f"{where}: must be a folder or gs://BUCKET/FOLDER")
    require(folder.strip("/"), f"{where}: give a folder in the bucket, as gs://{bucket}/RUN")
    _forget_nothing()
    try:
        try:
            epath.Path(path).stat()
        except FileNotFoundError:  # a new run; is there a bucket?
            epath.Path(f"gs://{bucket}").stat()
    except ImportError as error:
        raise UserError(f"{where}: needs a package; pip install gcsfs ({brief(error)})") from error
    except FileNotFoundError as error:
        raise UserError(f"{where}: there is no bucket {bucket}, or none for you") from error
    except Exception as error:  # the store's own classes, which differ between the libraries
        raise UserError(f"{where}: cannot be reached ({brief(error)})") from error


def _forget_nothing() -> None:
    """Asks the store each time what it holds: other processes, and tensorstore, write to it too."""
    try:
        from fsspec.config import conf
    except ImportError:  # then TensorFlow is used, or `check_address` says what is missing
        return
    conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    logging.getLogger("gcsfs").setLevel(logging.ERROR)  # it warns of every way in that it tries


def absolute(path: PathLike) -> epath.Path:
    """The path from the root, or the address."""
    return epath.Path(path) if is_remote(path) else epath.Path(os.path.abspath(path))


def exists(path: PathLike) -> bool:
    """Whether there is a file or folder."""
    return epath.Path(path).exists()


def is_folder(path: PathLike) -> bool:
    """Whether there is a folder (in a bucket: anything below that name)."""
    return epath.Path(path).is_dir()


def listing(folder: PathLike) -> list[str]:
    """The names in a folder, sorted, a / behind those of folders."""
    return sorted(each.name + "/" * each.is_dir() for each in epath.Path(folder).iterdir())


def move_folder(source: epath.Path, target: epath.Path) -> None:
    """Moves a folder to where none is yet; in a bucket by copying."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(target):  # a folder exists there only when something lies in it
        (target.parent / "README").write_text("Moved here by gptjax.\n")
    source.rename(target)


class RemoteFile:
    """A file at an address that grows: every `flush` puts all of it again, at once or not at all.

    For files that stay small. Anything else of Python's files is missing.
    """

    def __init__(self, path: PathLike, contents: bytes = b""):
        """Args: where; what is there already."""
        self._path, self._parts, self._changed = epath.Path(path), [contents], False

    def write(self, data: bytes) -> int:
        """Adds to the end, in memory."""
        self._parts.append(data)
        self._changed = True
        return len(data)

    def flush(self) -> None:
        """Puts the file, where anything was added."""
        if self._changed:
            self._parts = [b"".join(self._parts)]
            self._path.write_bytes(self._parts[0])
            self._changed = False

    def close(self) -> None:
        """Flushes."""
        self.flush()


class RemoteFiles:
    """What tensorboardX wants to know of an address."""

    @staticmethod
    def open(path: str) -> RemoteFile:
        """A new file."""
        return RemoteFile(path)
