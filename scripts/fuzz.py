"""Cut and flip every kind of file that is read, and count how each damage is answered.

    python scripts/fuzz.py --tries 5000 --json fuzz.json

Each try damages one file of a small set in one way (cut anywhere, bits flipped, bytes replaced, a stretch zeroed or
doubled, emptied), reads it in a forked process with limits of time and memory, and notes

- ``right``: what was read is what the whole file says;
- ``one line``: a UserError of one line, which names the file or its folder;
- ``silent``: something else was read, without a word;
- ``traceback``: any other error, or a UserError of several lines or without the name;
- ``hang``: the limit of time was met, or ``killed``: the process died.

Exits with 1 if there was a traceback, a hang or a kill; or a silent damage in a kind of file that has checksums.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from fuzz_kinds import KINDS, Kind, digest

from sit.utils.cli import one_line_errors
from sit.utils.errors import UserError, entry_point
from sit.utils.forks import own_progress_lock
from sit.utils.record import write_record

BAD = ("traceback", "hang", "killed")
CHECKED = ("checkpoint", "latent cache", "work folder", "published .pt", "samples npz", "packed npz", "statistics npz")
"""kinds of files with a checksum of all their bytes, in which no damage may go unnoticed"""
GROWTH = 2 << 30
"""bytes of address space that a try may take on top of what the imports took"""


@dataclass
class Arguments:
    """Damage files and read them."""

    tries: int = 5000
    """in all, spread evenly over the kinds"""
    kinds: tuple[str, ...] = ()
    """which; none given means all"""
    seed: int = 0
    seconds: float = 20.0
    """after which a try counts as a hang"""
    json: Path | None = None
    """a file for the counts, and for the damage of every try that went wrong"""

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise UserError(f"`tries` must be at least 1, not {self.tries}")
        if unknown := set(self.kinds) - set(KINDS):
            raise UserError(f"`kinds={sorted(unknown)[0]}` is none of {', '.join(KINDS)}")


@dataclass
class Counts:
    """What the tries of one kind came to, and the damages that went wrong."""

    outcomes: Counter = field(default_factory=Counter)
    wrong: list[dict[str, Any]] = field(default_factory=list)


# --- damages --------------------------------------------------------------------------------------------------------


def damage(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """One damage of a file, in words and done."""
    size = len(content)
    kind = chance.choice(["cut", "cut", "flip", "flip", "flip", "digits", "replace", "zero", "double", "empty"])
    at = chance.randrange(size)
    if chance.random() < 0.3:
        at = min(at, chance.randrange(min(size, 300)))  # headers are small and say the most
    if kind == "cut":
        return f"cut after {at} bytes", content[:at]
    if kind == "empty":
        return "emptied", b""
    changed = bytearray(content)
    if kind == "flip":
        bit = chance.randrange(8)
        changed[at] ^= 1 << bit
        return f"bit {bit} of byte {at} flipped", bytes(changed)
    if kind == "digits":  # another number, in text as in a header
        places = [place for place, byte in enumerate(content[: 1 << 16]) if chr(byte).isdecimal()] or [at]
        place, digits = chance.choice(places), str(10 ** chance.randrange(1, 20)).encode()
        return f"{digits!r} instead of byte {place}", content[:place] + digits + content[place + 1 :]
    length = min(chance.choice([1, 4, 16, 512]), size - at)
    if kind == "replace":
        changed[at : at + length] = chance.randbytes(length)
        return f"{length} random bytes at {at}", bytes(changed)
    if kind == "zero":
        changed[at : at + length] = bytes(length)
        return f"{length} zeros at {at}", bytes(changed)
    return f"{length} bytes at {at} doubled", content[:at] + content[at : at + length] + content[at:]


# --- a try in a process of its own ------------------------------------------------------------------------------------


def attempt(kind: Kind, expected: str | None, seconds: float) -> tuple[str, str]:
    """Read the damaged files in a forked process: the outcome, and what was said."""
    answer, send = os.pipe()
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        os.close(answer)
        try:
            _limit_memory()
            _quiet()
            own_progress_lock()
            outcome = _outcome(kind, expected)
            os.write(send, json.dumps(outcome).encode()[:60_000])
        finally:
            os._exit(0)
    os.close(send)
    end, said = time.monotonic() + seconds, b""
    os.set_blocking(answer, False)
    while time.monotonic() < end:
        done, _ = os.waitpid(process, os.WNOHANG)
        if done:
            with open(answer, "rb") as file:
                said = file.read()
            return tuple(json.loads(said)) if said else ("killed", "the process died without an answer")
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    os.close(answer)
    return "hang", f"no end after {seconds} s"


def _outcome(kind: Kind, expected: str | None) -> tuple[str, str]:
    try:
        found = digest(kind.read(kind.place))
    except UserError as error:
        said = str(error)
        named = any(str(place) in said for place in (kind.place, *kind.files))
        return ("one line" if "\n" not in said and named and len(said) < 1000 else "traceback"), said
    except BaseException:
        return "traceback", traceback.format_exc()[-2000:]
    if expected is None:
        return "right", found
    return ("right" if found == expected else "silent"), ""


def _limit_memory() -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + GROWTH, taken + GROWTH))


def _quiet() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    sys.stderr = sys.stdout = io.StringIO()


def fuzz(name: str, tries: int, seed: int, seconds: float, place: Path) -> Counts:
    """Damage the files of a kind so often, one after another, and read each."""
    torch.manual_seed(0)
    kind, counts = KINDS[name](place), Counts()
    pristine = place.with_name(place.name + " whole")
    shutil.copytree(place, pristine)
    outcome, expected = attempt(kind, None, 10 * seconds)
    if outcome != "right":
        raise RuntimeError(f"{name}: the whole file can't be read: {expected}")
    chance = random.Random(f"{seed} {name}")
    for _ in range(tries):
        path = chance.choice(kind.files)
        content = (pristine / path.relative_to(place)).read_bytes()
        words, damaged = damage(content, chance)
        if damaged == content:
            continue
        path.unlink(missing_ok=True)  # it may be a link
        path.write_bytes(damaged)
        outcome, said = attempt(kind, expected, seconds)
        counts.outcomes[outcome] += 1
        if outcome != "right" and outcome != "one line":
            counts.wrong.append(
                {"file": str(path.relative_to(place)), "damage": words, "outcome": outcome, "said": said}
            )
        _restore(pristine, place)
    return counts


def _restore(pristine: Path, place: Path) -> None:
    """Put every file back as it was, also what reading has made anew."""
    for path in pristine.rglob("*"):
        here = place / path.relative_to(pristine)
        if path.is_file() and (not here.is_file() or _sum(here) != _sum(path)):
            here.unlink(missing_ok=True)
            shutil.copyfile(path, here)


def _sum(path: Path) -> int:
    return zlib.crc32(path.read_bytes())


def run(arguments: Arguments) -> dict[str, Counts]:
    """Fuzz the kinds asked for, print their counts, and return them."""
    kinds = arguments.kinds or tuple(KINDS)
    share = -(-arguments.tries // len(kinds))
    found = {}
    for number, name in enumerate(kinds):
        with tempfile.TemporaryDirectory(prefix=f"fuzz-{number}-") as folder:
            place = Path(folder) / "place"
            place.mkdir()
            found[name] = fuzz(name, share, arguments.seed, arguments.seconds, place)
        print(f"{name:24} {dict(found[name].outcomes)}", flush=True)
    return found


def is_clean(found: dict[str, Counts]) -> bool:
    """Whether nothing ended in a traceback, hang or kill, and no damage went unnoticed where there is a checksum."""
    bad = sum(counts.outcomes[outcome] for counts in found.values() for outcome in BAD)
    return not bad and not sum(counts.outcomes["silent"] for name, counts in found.items() if name in CHECKED)


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="scripts/fuzz.py")
    torch.set_num_threads(1)  # what is forked has no threads
    found = run(arguments)
    if arguments.json is not None:
        kinds = {name: dict(counts.outcomes) | {"wrong": counts.wrong} for name, counts in found.items()}
        write_record(arguments.json, "cpu", {"seed": arguments.seed, "kinds": kinds})
    sys.exit(0 if is_clean(found) else 1)


if __name__ == "__main__":
    main()
