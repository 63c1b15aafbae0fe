"""One program at a time on a folder: a lock that goes with its process, and a file that names the holder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from sit.utils.errors import UserError
from sit.utils.files import LOCK, explain_os_errors

_HELD = {errno.EACCES, errno.EAGAIN}


class InUse(UserError):
    """Another process holds the folder: waiting helps."""


@contextlib.contextmanager
def locked(folder: str | Path, argument: str, *, beside: bool = False) -> Iterator[None]:
    """Hold ``folder``, made if need be, for this process while the block runs.

    A folder that was made for it and is empty in the end goes again.

    Args:
        folder: which.
        argument: what the folder is called in messages, such as ``output_dir``.
        beside: ``folder`` is yet to be made, and its lock lies beside it.

    The lock is the system's (``fcntl.lockf``), so it ends with its process however that ends, and forked workers do not
    hold it. It works between machines where the file system shares locks (NFS 4, Lustre).

    Raises:
        InUse: another process holds it; the message names its machine, number and beginning.
        UserError: it can't be written.
    """
    folder = Path(folder)
    path = folder.with_name(f".{folder.name}{LOCK}") if beside else folder / LOCK
    made = not path.parent.exists()
    with explain_os_errors(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _take(path, f"`{argument}={folder}`")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still held: whoever opened it before looks whether it is still there
        os.close(descriptor)
        if made and not any(path.parent.iterdir()):
            path.parent.rmdir()


def _take(path: Path, what: str) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(descriptor)
            os.close(descriptor)
            if error.errno not in _HELD:
                raise
            raise InUse(f"{what} is in use by {holder}: wait for its end, or choose another") from None
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            break
        os.close(descriptor)  # its holder removed it in between
    notice = {"host": platform.node(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(notice).encode(), 0)
    return descriptor


def _holder(descriptor: int) -> str:
    try:
        notice = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {notice['pid']} on {notice['host']} since {notice['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
