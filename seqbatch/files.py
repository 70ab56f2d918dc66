"""Files that are never half written, and are known to be writable before there is work to lose."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import IO

__all__ = ["check_writable", "replacing"]


@contextmanager
def replacing(path: "str | PathLike[str]") -> Iterator[IO[bytes]]:
    """Open a new file that takes the place of `path` when the block ends without an error, and never half written."""
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} is no folder to write {target.name} to")
    # A name of its own, since several ranks may write the same file at once.
    handle, name = tempfile.mkstemp(prefix=target.name, suffix=".partial", dir=target.parent)
    partial = Path(name)
    try:
        with open(handle, "wb") as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)  # as other new files are
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: "str | PathLike[str]") -> None:
    """Raise unless a file can be written at `path`; its folder is made, what is there stays as it is.

    Raises:
        OSError: there is a folder of that name, its own folder cannot be made, or nothing can be written in it.

    >>> check_writable("setup.cfg/report.html")
    Traceback (most recent call last):
    OSError: cannot write setup.cfg/report.html (File exists): choose another file
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder")
        if target.exists():
            with open(target, "ab"):
                return
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=target.name):
            return
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror or error}): choose another file") from error
