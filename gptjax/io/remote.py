"""Paths of a run: a folder of this machine, or a folder in a bucket as gs://BUCKET/FOLDER.

Buckets are reached through etils' epath, as orbax does. A bucket has no folders and can neither
rename nor append, but writing one object is atomic.
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
    """Refuses a workdir that no run can use, or that cannot be reached.

    Raises:
      UserError: one line that says what to install or to give instead.
    """
    # orbax finds its own checkpoints with glob: these characters would hide them from it, or show
    # it those of another run.
    place = "" if is_remote(path) else os.path.abspath(path)
    require(
        glob.escape(place) == place,
        f"`workdir`={os.fspath(path)}: its path must be without [, * and ?: {place}",
    )
    require_reachable(path, "workdir")


def require_reachable(path: PathLike, argument: str) -> None:
    """Refuses an address of a kind that orbax does not know, or that cannot be reached.

    Args:
      path: a folder of this machine (never refused) or an address.
      argument: name of the path in error messages.

    Raises:
      UserError: one line that says what to install or to give instead.
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
        except FileNotFoundError:  # the folder of a new run, or the bucket does not exist
            epath.Path(f"gs://{bucket}").stat()
    except ImportError as error:
        raise UserError(f"{where}: needs a package; pip install gcsfs ({brief(error)})") from error
    except FileNotFoundError as error:
        raise UserError(f"{where}: there is no bucket {bucket}, or none for you") from error
    except Exception as error:  # each storage library has error classes of its own
        raise UserError(f"{where}: cannot be reached ({brief(error)})") from error


def _disable_listings_cache() -> None:
    """Makes gcsfs list a bucket anew each time: other processes and tensorstore write to it too."""
    try:
        from fsspec.config import conf
    except ImportError:  # epath uses TensorFlow then, or `require_reachable` names the package
        return
    conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    # gcsfs logs a warning for each kind of credentials that it tries in vain.
    logging.getLogger("gcsfs").setLevel(logging.ERROR)


def absolute(path: PathLike) -> epath.Path:
    """Returns the absolute path; an address is returned unchanged."""
    return epath.Path(path) if is_remote(path) else epath.Path(os.path.abspath(path))


def exists(path: PathLike) -> bool:
    """Returns whether there is such a file or folder."""
    return epath.Path(path).exists()


def is_folder(path: PathLike) -> bool:
    """Returns whether there is such a folder; in a bucket, whether it contains any object."""
    return epath.Path(path).is_dir()


def listing(folder: PathLike) -> list[str]:
    """Returns the names in a folder, sorted; names of folders end in "/"."""
    return sorted(each.name + "/" * each.is_dir() for each in epath.Path(folder).iterdir())


def move_folder(source: epath.Path, target: epath.Path) -> None:
    """Moves a folder to a path that does not exist yet; in a bucket by copying."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(target):  # epath takes a folder of a bucket for missing while it is empty
        (target.parent / "README").write_text("Moved here by gptjax.\n")
    source.rename(target)


class RemoteFile:
    """A growing file in a bucket: each `flush` writes all of it again, as one atomic object.

    It is meant for small files and has only these methods of Python's files.
    """

    def __init__(self, path: PathLike, contents: bytes = b""):
        """Args: path, the address; contents, what the file has already."""
        self._path, self._parts, self._changed = epath.Path(path), [contents], False

    @classmethod
    def open(cls, path: str) -> "RemoteFile":
        """Returns a new, empty file; this makes the class a factory for tensorboardX."""
        return cls(path)

    def write(self, data: bytes) -> int:
        """Appends in memory and returns the number of bytes."""
        self._parts.append(data)
        self._changed = True
        return len(data)

    def flush(self) -> None:
        """Writes the file to the bucket if it has grown since the last time."""
        if self._changed:
            self._parts = [b"".join(self._parts)]
            self._path.write_bytes(self._parts[0])
            self._changed = False

    def close(self) -> None:
        """Flushes."""
        self.flush()
