"""Writing files and folders whole: made beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from safetensors import SafetensorError

from sit.utils.errors import UserError

LOCK = ".lock"
"""The file by which a program holds a folder (:mod:`sit.utils.lock`): a folder with nothing else is empty."""

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the limit on the size of files is reached",
}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextlib.contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn "disk full", "read-only" and their kin, met while writing ``path``, into a :class:`UserError`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        number = _error_number(error)
        if number in _FULL:
            raise UserError(f"{_FULL[number]}, so {path} was not written; what was there is untouched") from error
        if number in _REFUSED:
            raise UserError(f"{path} can't be written ({os.strerror(number)}); choose another output folder") from error
        missing = error.filename if isinstance(error, OSError) and number == errno.ENOENT else None
        if missing and (Path(missing).parent == path.parent or Path(missing) in path.parents):
            raise UserError(f"{path} can't be made there; choose another output folder") from error
        if number in (errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"{path} can't be written: a file stands where a folder is needed") from error
        raise


def _error_number(error: Exception) -> int | None:
    """The system's error number, which safetensors hides in its message."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None


class _Noting:
    """A file's ``write`` that notes why it failed: torch says only that the archive has another length than it should.

    It writes at once, unbuffered, so that nothing is left to fail when the file is closed.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        left = memoryview(content).cast("B")
        length = len(left)
        try:
            while left:
                left = left[os.write(self.descriptor, left) :]
        except OSError as error:
            self.error = error
            raise
        return length

    def flush(self) -> None:
        """Nothing: nothing is kept back."""


def save_torch(content: object, path: Path) -> None:
    """``torch.save``, but a write that fails is the system's error.

    Raises:
        OSError: the disk is full, or the file can't be written.
    """
    import torch

    with open(path, "wb", buffering=0) as file:
        noting = _Noting(file.fileno())
        try:
            torch.save(content, cast("IO[bytes]", noting))
        except Exception as error:
            if noting.error is not None:
                raise noting.error from error
            raise


def reserve(path: Path, header: bytes, size: int) -> None:
    """Make a file of ``header`` and zeros, ``size`` bytes in all, whose room on the disk is its own.

    Raises:
        OSError: there is no room for it.
    """
    with open(path, "wb", buffering=0) as file:
        file.write(header)
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            os.ftruncate(file.fileno(), size)  # a file system that can't: writes may still fail, and say so


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


def _temporary(path: Path) -> Path:
    """Where ``path`` is made: beside it, with this process in the name; those of dead processes are cleared first."""
    clear_dead(path.parent)
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}.tmp")


@functools.cache
def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "", platform.node()) or "localhost"


def clear_dead(folder: Path) -> None:
    """Delete what processes of this machine that are no more were writing into ``folder`` when they were killed."""
    ours = re.compile(rf"\..*\.{_host()}-(\d+)\.tmp", re.DOTALL)
    try:
        names = os.listdir(folder)
    except OSError:
        return  # whoever writes there says why not
    for name in names:
        if (match := ours.fullmatch(name)) and not _alive(int(match[1])):
            place = folder / name
            with contextlib.suppress(OSError):
                shutil.rmtree(place) if place.is_dir() else place.unlink()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it is another user's
    return True


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` to write to; it takes ``path``'s place only if the block succeeds.

    Raises:
        UserError: the disk is full or the place can't be written.
    """
    path = Path(path)
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
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
        UserError: ``path`` exists already and is no empty folder, the disk is full or the place can't be written.
    """
    path = Path(path)
    with explain_os_errors(path):
        path = path.resolve() if path.is_symlink() else path  # what it leads to gives way, not the link
        if path.exists() and not (path.is_dir() and next(path.iterdir(), None) is None):
            raise UserError(f"{path} exists already; it is not overwritten")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
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


def refuse_used(path: str | Path, argument: str, but: str | None = LOCK) -> None:
    """Raise UserError unless the output folder that ``argument`` names is free: before any work is done for it.

    Args:
        path: the folder.
        argument: for messages.
        but: a file that may be in it; None for what :func:`atomic_folder` will take the place of.
    """
    path = Path(path)
    with explain_os_errors(path):
        if path.is_dir() and any(entry.name != but for entry in path.iterdir()):
            raise UserError(f"`{argument}={path}` exists and is not empty; choose a new folder or remove it")
        if path.exists() and not path.is_dir():
            raise UserError(f"`{argument}={path}` is a file; choose a new folder or remove it")


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
