"""Parts in pieces: each kept as soon as it is done, none begun that can't be expected to end in time."""

from __future__ import annotations

import json
import statistics
import time
import traceback
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from gpu_parts.device import hardware, is_lost, release
from sit.utils.errors import UserError, first_line
from sit.utils.record import write_record

ROOT = Path(__file__).resolve().parents[2]
Figures: TypeAlias = dict[str, Any]
TRIES = 2
"""how often a piece is begun that never ends"""


@dataclass(frozen=True)
class Clock:
    """The time of this call: ``limit`` seconds from ``started`` on, by ``time.monotonic``."""

    started: float
    limit: float

    def left(self) -> float:
        return self.started + self.limit - time.monotonic()


@dataclass(frozen=True)
class Piece:
    """What is done or not done as a whole.

    Attributes:
        name: within its part.
        seconds: what it takes on an H200, roughly, or in the tiny form on a core.
        run: called with the figures of the pieces done before, by name, and the seconds that are left; gives its own,
            with ``passed``, or None if it only got further.
        goes_on: whether it may be broken off at any time and begun again.
    """

    name: str
    seconds: float
    run: Callable[[dict[str, Figures], float], Figures | None]
    goes_on: bool = False


@dataclass(frozen=True)
class Part:
    """Pieces with a JSON of their own.

    Attributes:
        name: of the JSON.
        pieces: in order.
        sources: files and folders of the repository whose code the figures depend on.
        settings: what else they depend on.
    """

    name: str
    pieces: list[Piece]
    sources: tuple[str, ...]
    settings: dict[str, Any]

    def code(self) -> str:
        """A checksum of :attr:`sources`: names and contents, in order."""
        crc = 0
        for source in self.sources:
            place = ROOT / source
            for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
                crc = zlib.crc32(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes(), crc)
        return f"{crc:08x}"


@dataclass
class Kept:
    """A part's JSON: the figures of what is done, and how often the rest was begun."""

    part: Part
    path: Path
    device: torch.device
    pieces: dict[str, Figures] = field(default_factory=dict)
    begun: dict[str, int] = field(default_factory=dict)

    @classmethod
    def open(cls, part: Part, out: Path, device: torch.device) -> Kept:
        """What is there of a part; nothing if its code has changed, and the JSON of before is set aside.

        Raises:
            UserError: a JSON that can't be read, or one of other settings or another machine.
        """
        kept = cls(part, out / f"{part.name}.json", device)
        if not kept.path.exists():
            return kept
        try:
            found = json.loads(kept.path.read_text())
            made = {"settings": found["settings"], **found["hardware"]}
            code, pieces, begun = found["code"], dict(found["pieces"]), dict(found["begun"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{kept.path} is no JSON of this program: remove it, or choose another `out`") from error
        now = {"settings": part.settings, **hardware(device)}
        for name, value in json.loads(json.dumps(now)).items():
            if made.get(name) != value:
                raise UserError(f"{kept.path} was made with {name} {made.get(name)}, not {value}: choose another `out`")
        if code != part.code():
            kept.path.rename(kept.path.with_name(f"{part.name}-{code}.json"))
            return kept
        kept.pieces, kept.begun = pieces, begun
        return kept

    def write(self) -> None:
        figures = {
            "hardware": hardware(self.device), "torch": torch.__version__, "settings": self.part.settings,
            "code": self.part.code(), "done": self.is_done(), "pieces": self.pieces, "begun": self.begun,
        }  # fmt: skip
        write_record(self.path, self.device, figures)

    def is_done(self) -> bool:
        return all(piece.name in self.pieces for piece in self.part.pieces)

    def missing(self) -> list[Piece]:
        """What is left, in order; what was begun and never ended comes last."""
        left = [piece for piece in self.part.pieces if piece.name not in self.pieces]
        return sorted(left, key=lambda piece: self.begun.get(piece.name, 0))

    def expected(self, piece: Piece) -> float:
        """The seconds that a piece will take, by its own estimate and by how those of the part's others were wrong.

        At least half of its own: that others were fast tells little of one that does something else.
        """
        took = [done["seconds"] / done["expected"] for done in self.pieces.values() if done.get("expected")]
        return piece.seconds * max(0.5, statistics.median(took) if took else 1.0)

    def do(self, piece: Piece, left: float) -> None:
        """Do a piece and keep its figures, or the error that it ended with."""
        tries = self.begun.get(piece.name, 0)
        if tries >= TRIES:
            self._keep(piece, {"passed": False, "error": f"it was begun {tries} times and never ended"})
            return
        if not piece.goes_on:  # noted first: the process may not live to do it afterwards
            self.begun[piece.name] = tries + 1
            self.write()
        start = time.monotonic()
        try:
            figures = piece.run(self.pieces, left)
        except (UserError, KeyboardInterrupt):
            self.begun.pop(piece.name, None)
            self.write()
            raise
        except Exception as error:  # a figure too: the other pieces are to be made all the same
            told = traceback.format_exc().splitlines()[-30:]
            figures = {"passed": False, "error": f"{type(error).__name__}: {first_line(error)}", "traceback": told}
        if figures is None:
            self.write()
        else:
            self._keep(piece, {"seconds": time.monotonic() - start, "expected": piece.seconds, **figures})

    def _keep(self, piece: Piece, figures: Figures) -> None:
        self.begun.pop(piece.name, None)
        self.pieces[piece.name] = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), **figures}
        self.write()


def verdict(figures: Figures) -> str:
    """How a piece ended, in a word or with its error."""
    if "error" in figures:
        return f"failed: {figures['error']}"
    return {True: "passed", False: "failed", None: "measured"}[figures["passed"]]


def carry_out(parts: list[Part], out: Path, device: torch.device, clock: Clock) -> bool:
    """Do what is left of the parts; whether nothing is left.

    Raises:
        UserError: a JSON that is of something else, or the time limit is below what the next piece takes.
    """
    everything = [Kept.open(part, out, device) for part in parts]
    begun, too_long = False, None
    for kept in everything:
        for piece in kept.missing():
            name, expected, left = f"{kept.part.name}, {piece.name}", kept.expected(piece), clock.left()
            if expected > left:
                print(f"{name}: left for the next call, as it may take {expected:.0f} s", flush=True)
                too_long = too_long or (name, expected)
                continue
            begun = True
            kept.do(piece, left)
            done = kept.pieces.get(piece.name)
            print(f"{name}: {'goes on' if done is None else verdict(done)}", flush=True)
            if is_lost(device):
                print("the device is lost to this process: the next call goes on", flush=True)
                return False
            release(device)
    if too_long is not None and not begun:
        name, expected = too_long
        raise UserError(f"`minutes={clock.limit / 60:g}` is too little: {name} may take {expected:.0f} s")
    return all(kept.is_done() for kept in everything)
