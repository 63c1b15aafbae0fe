"""The work folder of evaluations: one folder for each set of images, in it one for what each reader makes of them.

::

    WORK/images-0123456789abcdef/        named by a hash of what the images are
        about.json                       what they are, in words
        inception-0123456789abcdef/      named by a hash of what the features are
            about.json
            rows-00000512.npz            of images 512 to 1023: features, logits, …; written whole, or not at all
            sums.npz                     float64 sums of all features by group
        numbers-0123456789abcdef.json    a finished report

Any number of evaluations share a work folder: whatever is there already is not made again, whoever made it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object

from sit.metrics.identity import About, same, short_hash
from sit.utils.device import process_state
from sit.utils.errors import UserError, with_flags
from sit.utils.files import atomic_write
from sit.utils.lock import locked

ABOUT = "about.json"
FORMAT = 2
"""of a work folder; another is not read, as every name in it has this in its hash"""


def folder_for(parent: Path, kind: str, about: About, source: dict[str, Any] | None = None) -> Path:
    """The folder below ``parent`` for what ``about`` says, made by the main process if it isn't there.

    Args:
        parent: the work folder, or the folder of a set of images.
        kind: the first part of its name.
        about: what it is of.
        source: where that comes from, for its reader.
    """
    about = about | {"format": FORMAT}
    place = parent / f"{kind}-{short_hash(about)}"
    if process_state().is_main_process and not same(read_about(place), about):
        with atomic_write(place / ABOUT) as temporary:
            text = json.dumps({"about": about, "source": source or {}}, indent=1, ensure_ascii=False, default=str)
            temporary.write_text(text + "\n", encoding="utf-8")
    return place


def read_about(place: Path) -> About:
    """What a folder is of; nothing where it doesn't say, or can't be read."""
    return _read(place).get("about") or {}


def read_source(place: Path) -> dict[str, Any]:
    """Where what is in a folder comes from; nothing where it doesn't say."""
    return _read(place).get("source") or {}


def _read(place: Path) -> dict[str, Any]:
    try:
        content = json.loads((place / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def folder_size(place: Path) -> int:
    """The bytes of all arrays in a folder."""
    return sum(path.stat().st_size for path in place.rglob("*.npz"))


class WorkDirectory:
    """The work folder while it is in use: the one that was named, which stays, or a temporary one.

    All processes of a launch see the same. A temporary one goes in the end; after a failure it stays, if anything is in
    it, and the error names it.

    Args:
        named: the folder; None for a temporary one.

    Raises:
        UserError: another program holds it, or not every process sees it, as on several machines that share no disk.
    """

    def __init__(self, named: str | None) -> None:
        self.named = named

    def __enter__(self) -> Path:
        state = process_state()
        self.held = contextlib.ExitStack()
        place = [self.named]
        if state.is_main_process:
            if self.named is None:
                place = [tempfile.mkdtemp(prefix="eval-")]
            else:
                self.held.enter_context(locked(self.named, "work_dir"))
        self.temporary = place[0] if self.named is None else None
        try:
            if state.num_processes > 1:
                self._check_shared(place)
        except UserError:
            self._leave(keep=False)
            raise
        self.place = Path(place[0])
        return self.place

    def _check_shared(self, place: list[str]) -> None:
        """Raise UserError, in every process, unless all see what the main process writes."""
        state = process_state()
        token = [uuid.uuid4().hex]
        broadcast_object_list(place)
        broadcast_object_list(token)
        probe = Path(place[0]) / f".probe-{token[0]}"
        if state.is_main_process:
            probe.touch()
        state.wait_for_everyone()
        seen = gather_object([probe.exists()])
        state.wait_for_everyone()
        if state.is_main_process:
            probe.unlink()
        if not all(seen):
            blind = ", ".join(str(number) for number, sees in enumerate(seen) if not sees)
            mend = "processes on several machines need a `work_dir` on a disk that all of them share"
            raise UserError(f"process {blind} doesn't see the work folder {place[0]} of process 0: {mend}")

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        failed = isinstance(error, Exception)
        keep = failed and self.temporary is not None and any(self.place.rglob("*.npz"))
        self._leave(keep)
        if keep and process_state().is_main_process:
            said = f"what was made is kept in {self.temporary}: the same command goes on with `work_dir={self.place}`"
            if isinstance(error, UserError):
                raise UserError(f"{error}; {said}") from error
            print(with_flags(said), file=sys.stderr)

    def _leave(self, keep: bool) -> None:
        self.held.close()
        if self.temporary is not None and not keep and process_state().is_main_process:
            shutil.rmtree(self.temporary, ignore_errors=True)
