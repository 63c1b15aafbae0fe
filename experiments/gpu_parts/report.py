"""The page of what the JSONs hold: tables with verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu_parts.pieces import Figures, verdict
from gpu_parts.speed import benchmark
from sit.utils.errors import UserError
from sit.utils.files import atomic_write
from sit.utils.tables import markdown_table

TITLES = {
    "kernels": "Triton kernels against float64",
    "sampling": "Sampling, compiled and not",
    "speed": "Speed",
    "training": "Training steps",
    "study": "Study",
}


def number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2g}"


def compared(pieces: dict[str, Figures]) -> str:
    """Of each piece, the comparison that is nearest to its bound."""
    lines = []
    for name, piece in pieces.items():
        rows = piece.get("compared", {})
        what = max(rows, key=lambda key: float("inf") if rows[key]["share"] is None else rows[key]["share"], default="")
        cells = ["", "", "", "", 0]
        if what:
            row = rows[what]
            count = sum(one["comparisons"] for one in rows.values())
            cells = [f"{what}: {row['where']}", *(number(row[key]) for key in ("error", "bound", "share")), count]
        lines.append([name, *cells, verdict(piece)])
    header = ("", "nearest to its bound", "error", "bound", "share", "comparisons", "verdict")
    return markdown_table(header, lines)


def speeds(pieces: dict[str, Figures]) -> str:
    """The rows as ``benchmarks/speed.py`` prints them."""
    speed, lines, failed = benchmark(), [], []
    for name, piece in pieces.items():
        lines += speed.table_rows([speed.Row(**row) for row in piece.get("rows", [])])
        if "error" in piece:
            failed.append(f"- {name}: {verdict(piece)}")
    told = pieces.get("rates", {}).get("rates")
    rates = ""
    if told:
        macs = ", ".join(
            f"{value / 1e9:.0f} G multiply-accumulates/s in {dtype}" for dtype, value in told["macs"].items()
        )
        rates = f"Measured rates: {macs}, copy {told['copy'] / 1e9:.0f} GB/s.\n\n"
    return rates + markdown_table(speed.HEADER, lines) + "".join(f"\n{line}" for line in ["", *failed] if failed)


def trainings(pieces: dict[str, Figures]) -> str:
    """Losses beside those of the first way, and waits."""
    lines = []
    for name, piece in pieces.items():
        told: dict[str, Any] = piece.get("agreement", {})
        apart = [f"{row['difference']:.2g} of {row['bound']:g}" for row in told.values()] or ["", ""]
        waited = ", ".join(f"{place} ({count})" for place, count in piece.get("waits", {}).items())
        waited = waited or ("none" if piece.get("watched") else "not watched")
        pace = f"{1e3 * piece['seconds_per_step']:.4g}" if "seconds_per_step" in piece else ""
        lines.append([name, piece.get("steps", ""), pace, *apart, waited, verdict(piece)])
    header = ("", "steps", "ms a step", "first losses apart", "means apart", "waits in a step", "verdict")
    return markdown_table(header, lines)


def studies(pieces: dict[str, Figures]) -> str:
    """Where the report is."""
    reports = [piece["report"] for piece in pieces.values() if "report" in piece]
    return "\n".join(f"[Its report]({place})" for place in reports) or "It is not done yet."


TABLES = {"kernels": compared, "sampling": compared, "speed": speeds, "training": trainings, "study": studies}


def has_parts(out: Path) -> bool:
    """Whether there is a JSON of a part."""
    return any((out / f"{name}.json").is_file() for name in TITLES)


def write(out: Path) -> Path:
    """Write OUT/README.md of the JSONs that are there.

    Raises:
        UserError: there is none, or one can't be read.
    """
    texts = ["# What a GPU was had for"]
    for name, title in TITLES.items():
        path = out / f"{name}.json"
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text())
            bad = sum(piece["passed"] is False for piece in found["pieces"].values())
            state = "done" if found["done"] else f"{len(found['pieces'])} pieces are done, others are left"
            told = f"{found['machine']}, triton {found['hardware']['triton']}, {found['date']}. {state}; {bad} failed."
            texts += [f"## {title}", f"    {found['command']}", told, TABLES[name](found["pieces"])]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no JSON of this program: remove it, or choose another `out`") from error
    if len(texts) == 1:
        raise UserError(f"`out={out}` has no JSON of a part")
    page = out / "README.md"
    with atomic_write(page) as temporary:
        temporary.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return page
