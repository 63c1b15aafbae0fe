"""What an evaluation found: numbers with their errors, as text and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from sit.utils.tables import text_table


@dataclass(frozen=True)
class Number:
    """One line of a report.

    Attributes:
        name: the metric, with the features it is on where they are not Inception's.
        value: the number.
        error: its standard error or deviation; None where there is none.
        how: what the error is, or what else must be known.
    """

    name: str
    value: float
    error: float | None = None
    how: str = ""


@dataclass
class Report:
    """What an evaluation found."""

    samples: str
    sample_count: int
    reference: str
    features: str
    numbers: list[Number] = field(default_factory=list)

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    def __str__(self) -> str:
        rows = []
        for number in self.numbers:
            error = f" ± {number.error:.4g}" if number.error is not None else ""
            how = f"  ({number.how})" if number.how else ""
            rows.append((number.name, f"{number.value:.5g}{error}{how}"))
        heading = f"{self.sample_count} samples of {self.samples}\nagainst {self.reference}; {self.features}"
        return f"{heading}\n{text_table(rows)}"
