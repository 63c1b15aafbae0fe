"""What an evaluation found: numbers with their errors, as text and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from sit.metrics.by_class import ClassShare
from sit.metrics.identity import Identity
from sit.utils.json_text import json_text
from sit.utils.tables import text_table

WORST = 3
"""classes that the text names; the JSON has all"""

NUMBERS = 4
"""version of how numbers are made of features, and told: those that another version left are made again"""


@dataclass(frozen=True)
class Number:
    """One line of a report.

    Attributes:
        name: the metric, with the features it is on where they are not Inception's.
        value: the number.
        error: half the width of its 95 % interval over samples; None where there are too few samples for one.
        how: what else must be known.
        replicates: those of :class:`Estimate`, with which two reports of the same labels are paired.
        basis: what it was measured with (reference, features, classifier, training images), as far as it plays a part;
            numbers are of one kind only where these are equal.
    """

    name: str
    value: float
    error: float | None = None
    how: str = ""
    replicates: tuple[float, ...] = ()
    basis: dict[str, Identity] = field(default_factory=dict)

    @classmethod
    def from_mapping(cls, content: dict[str, Any]) -> Number:
        """A number as JSON has it; those of before have no basis."""
        basis = {name: Identity(**one) for name, one in content.get("basis", {}).items()}
        return cls(**content | {"replicates": tuple(content["replicates"]), "basis": basis})


def _refuse(constant: str) -> None:
    """NaN and infinity, which an earlier version wrote: such a report is made again."""
    raise ValueError(f"{constant} is no JSON")


@dataclass
class Report:
    """What an evaluation found."""

    samples: str
    sample_count: int
    reference: str
    features: str
    numbers: list[Number] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """what else must be known, a line each"""
    by_class: dict[str, list[ClassShare]] = field(default_factory=dict)
    """class accuracy and precision of each class by the metric's name, the worst first"""
    class_names: list[str] = field(default_factory=list)
    """by label; empty if unknown"""
    version: int = NUMBERS
    """of how the numbers are made; 0 where the file doesn't say"""

    def to_json(self) -> str:
        """All of it as JSON."""
        return json_text(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """What :meth:`to_json` gave.

        Raises:
            ValueError, TypeError, KeyError: it is something else.
        """
        content = json.loads(text, parse_constant=_refuse)
        numbers = [Number.from_mapping(number) for number in content["numbers"]]
        if any(number.value is None or None in number.replicates for number in numbers):
            raise ValueError("a number is not finite")
        by_class = {name: [ClassShare(**one) for one in shares] for name, shares in content["by_class"].items()}
        return cls(**{"version": 0} | content | {"numbers": numbers, "by_class": by_class})

    def __str__(self) -> str:
        rows = []
        for number in self.numbers:
            error = f" ± {number.error:.4g}" if number.error is not None else ""
            how = f"  ({number.how})" if number.how else ""
            rows.append((number.name, f"{number.value:.5g}{error}{how}"))
        heading = f"{self.sample_count} samples of {self.samples}\nagainst {self.reference}; {self.features}"
        meaning = "± is half the width of the 95 % interval over samples of these weights, the reference held as it is"
        return "\n".join([heading, text_table(rows), meaning, *self._worst_classes(), *self.notes])

    def _worst_classes(self) -> list[str]:
        """The worst classes by each metric that is known by class, with Wilson's intervals."""
        lines = []
        for metric, shares in self.by_class.items():
            named = [
                f"{self.class_names[one.label] if one.label < len(self.class_names) else one.label} {one.share:.2f} "
                f"({one.low:.2f} to {one.high:.2f})"
                for one in shares[:WORST]
            ]
            lines.append(f"worst classes by {metric}: {', '.join(named)}")
        return lines
