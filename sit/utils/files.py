"""Writing files and folders whole: made beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from sit.utils.errors import UserError

LOCK = ".lock"
"""The file by which a program holds a folder (:mod:`sit.utils.lock`): a folder with nothing else is empty."""

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextlib.contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn "disk full", "read-only" and their kin, met while writing ``path``, into a :class:`UserError`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        number = _error_number(error, path)
        if number in _FULL:
            raise UserError(f"the disk is full, so {path} was not written; what was there is untouched") from error
        if number in _REFUSED:
            raise UserError(f"{path} can't be written ({os.strerror(number)}); choose another output folder") from error
        missing = error.filename if isinstance(error, OSError) and number == errno.ENOENT else None
        if missing and Path(missing).parent == path.parent:
            raise UserError(f"{path} can't be made there; choose another output folder") from error
        if number in (errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"{path} can't be written: a file stands where a folder is needed") from error
        raise


def _error_number(error: Exception, path: Path) -> int | None:
    """The system's error number, which safetensors hides in its message and torch.save does not tell at all."""
    if isinstance(error, OSError):
        return error.errno
    if match := re.search(r"\(os error (\d+)\)", str(error)):
        return int(match[1])
    folder = next((parent for parent in path.absolute().parents if parent.is_dir()), Path("/"))
    if "inline_container" in str(error) and shutil.disk_usage(folder).free < 1 << 20:
        return errno.ENOSPC
    return None


def _finish(path: Path) -> None:
    """Give a new file the usual permissions (safetensors makes its files private), and flush it to the disk."""
    if path.is_file() and path.stat().st_nlink == 1:
        path.chmod(0o666 & ~_umask())
    _fsync(path)


@functools.cache
def _umask() -> int:
    """The process's umask, read once: the only way to read it is to set it, which other threads would see."""
    umask = os.umask(0o077)  # what a thread makes meanwhile is too private rather than too open
    os.umask(umask)
    return umask


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` to write to; it takes ``path``'s place only if the block succeeds.

    Raises:
        UserError: the disk is full or the place can't be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _finish(temporary)
            os.replace(temporary, path)
            _fsync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; it is renamed to ``path`` only if the block succeeds.

    Raises:
        UserError: ``path`` exists already, the disk is full or the place can't be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explain_os_errors(path):
        if path.exists():
            raise UserError(f"{path} exists already; it is not overwritten")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            for entry in [*temporary.rglob("*"), temporary]:
                _finish(entry)
            os.rename(temporary, path)
            _fsync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def replaced_folder(path: str | Path) -> Iterator[Path]:
    """As :func:`atomic_folder`, but what is at ``path`` gives way: it is removed once the new folder has its place.

    A crash between the two renames leaves both, as ``.NAME.PID.old`` and ``.NAME.PID.new`` beside their place.

    Raises:
        UserError: the disk is full or the place can't be written.
    """
    path = Path(path).resolve()
    new, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    with atomic_folder(new) as place:
        yield place
    with explain_os_errors(path):
        if path.exists():
            os.rename(path, old)
        try:
            os.rename(new, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
        _fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def refuse_used(path: str | Path, argument: str) -> None:
    """Raise UserError unless the output folder that ``argument`` names is free: before any work is done for it."""
    path = Path(path)
    with explain_os_errors(path):
        if path.is_dir() and any(entry.name != LOCK for entry in path.iterdir()):
            raise UserError(f"`{argument}={path}` exists and is not empty; choose a new folder or remove it")


def new_output(path: str | Path, argument: str) -> Path:
    """Create the empty output folder ``path``, which the ``argument`` names.

    Raises:
        UserError: it exists and is not empty, or it can't be made or written.
    """
    path = Path(path)
    refuse_used(path, argument)
    with explain_os_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise UserError(f"`{argument}={path}` can't be written; choose another folder")
    return path
