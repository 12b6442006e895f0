"""Paths of a run: a folder of this machine, or a folder in a bucket, written gs://BUCKET/FOLDER.

This module accesses buckets with etils' epath, which orbax uses too. A bucket has no real folders,
and its objects cannot be renamed or appended to. Writing an object is atomic.
"""

import glob
import logging
import os

from etils import epath

from gptjax.errors import UserError, brief, require

PathLike = str | os.PathLike[str]


def is_remote(path: PathLike) -> bool:
    """Returns whether a path is an address such as gs://BUCKET/FOLDER."""
    return "://" in os.fspath(path)


def require_workdir(path: PathLike) -> None:
    """Checks that a run can use a workdir and reach it.

    Raises:
      UserError: the workdir cannot be used. The message says what to install or what to give
        instead.
    """
    # orbax finds its checkpoints with glob. With these characters in the path it would miss the
    # checkpoints, or find the checkpoints of another run.
    place = "" if is_remote(path) else os.path.abspath(path)
    require(
        glob.escape(place) == place,
        f"`workdir`={os.fspath(path)}: its path must be without [, * and ?: {place}",
    )
    require_reachable(path, "workdir")


def require_reachable(path: PathLike, argument: str) -> None:
    """Checks that orbax supports an address, and that the address can be reached.

    Args:
      path: an address, or a folder of this machine, which is always accepted.
      argument: the name of the path in error messages.

    Raises:
      UserError: the address cannot be used. The message says what to install or what to give
        instead.
    """
    if not is_remote(path):
        return
    where = f"`{argument}`={os.fspath(path)}"
    scheme, _, rest = os.fspath(path).partition("://")
    require(
        scheme != "s3",
        f"{where}: orbax, which writes the checkpoints, knows folders and gs:// only; give "
        "gs://BUCKET/FOLDER, or a folder that all hosts share (EFS, FSx, NFS)",
    )
    bucket, _, folder = rest.partition("/")
    require(scheme == "gs" and bucket, f"{where}: must be a folder or gs://BUCKET/FOLDER")
    require(folder.strip("/"), f"{where}: give a folder in the bucket, as gs://{bucket}/RUN")
    _disable_listings_cache()
    try:
        try:
            epath.Path(path).stat()
        except FileNotFoundError:  # the run is new, or the bucket does not exist
            epath.Path(f"gs://{bucket}").stat()
    except ImportError as error:
        raise UserError(f"{where}: needs a package; pip install gcsfs ({brief(error)})") from error
    except FileNotFoundError as error:
        raise UserError(f"{where}: there is no bucket {bucket}, or none for you") from error
    except Exception as error:  # each storage library has its own error classes
        raise UserError(f"{where}: cannot be reached ({brief(error)})") from error


def _disable_listings_cache() -> None:
    """Makes gcsfs list a bucket again at each request.

    A cached listing could be wrong, because other processes and tensorstore write to the bucket.
    """
    try:
        from fsspec.config import conf
    except ImportError:
        # fsspec and gcsfs are not installed. epath then uses TensorFlow. If TensorFlow is missing
        # too, `require_reachable` tells the user to install gcsfs.
        return
    conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    # gcsfs logs a warning for each kind of credentials that it tries without success.
    logging.getLogger("gcsfs").setLevel(logging.ERROR)


def absolute(path: PathLike) -> epath.Path:
    """Returns the absolute path of a path of this machine. An address is not changed."""
    return epath.Path(path) if is_remote(path) else epath.Path(os.path.abspath(path))


def exists(path: PathLike) -> bool:
    """Returns whether the file or folder exists."""
    return epath.Path(path).exists()


def is_folder(path: PathLike) -> bool:
    """Returns whether the folder exists. In a bucket a folder exists if it contains any object."""
    return epath.Path(path).is_dir()


def listing(folder: PathLike) -> list[str]:
    """Returns the sorted names of the entries of a folder. The names of folders end in "/"."""
    return sorted(each.name + "/" * each.is_dir() for each in epath.Path(folder).iterdir())


def move_folder(source: epath.Path, target: epath.Path) -> None:
    """Moves a folder to a path that does not exist yet. In a bucket the folder is copied."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(target):  # for epath an empty folder of a bucket does not exist
        (target.parent / "README").write_text("Moved here by gptjax.\n")
    source.rename(target)


class RemoteFile:
    """A growing file in a bucket. Each `flush` writes the whole file again as one atomic object.

    The class is meant for small files. It has only a few of the methods of Python's files.
    """

    def __init__(self, path: PathLike, contents: bytes = b""):
        """Takes the address of the file, and the bytes that the file contains already."""
        self._path, self._parts, self._changed = epath.Path(path), [contents], False

    @classmethod
    def open(cls, path: str) -> "RemoteFile":
        """Returns a new, empty file. tensorboardX calls this method to create its files."""
        return cls(path)

    def write(self, data: bytes) -> int:
        """Appends `data` in memory, and returns the number of appended bytes."""
        self._parts.append(data)
        self._changed = True
        return len(data)

    def flush(self) -> None:
        """Writes the file to the bucket if it has grown since the last `flush`."""
        if self._changed:
            self._parts = [b"".join(self._parts)]
            self._path.write_bytes(self._parts[0])
            self._changed = False

    def close(self) -> None:
        """Writes the file to the bucket if it has grown."""
        self.flush()
