"""Errors beside their bounds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from atconv.triton import INTERPRETED

UNIT = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float16, torch.bfloat16, torch.float32)}
"""the largest relative error of rounding to a dtype"""
CUT_OFF = 2 * UNIT[torch.bfloat16]
"""the same of Triton's interpreter, which does not round to bfloat16: it leaves the lower half of the bits out"""


@dataclass
class Worst:
    """Of each thing that is compared, the comparison that comes nearest to its bound, or is furthest beyond it."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, what: str, where: str, error: float, bound: float) -> None:
        """Take in an error; one that is not a number is beyond any bound."""
        share = error / bound if bound else float("inf" if error else 0)
        share = share if share == share else float("inf")
        row = {"error": error, "bound": bound, "share": share, "where": where, "comparisons": 1}
        before = self.rows.get(what)
        if before is not None:
            row = row if share > before["share"] else before
            row = {**row, "comparisons": before["comparisons"] + 1}
        self.rows[what] = row

    def each(self, what: str, where: str, found: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> None:
        """Every value against its own bound; kept is the one that is nearest to it."""
        if found.shape != exact.shape:
            raise ValueError(f"{what} of {where} has the shape {tuple(found.shape)}, not {tuple(exact.shape)}")
        error = (found.double() - exact).abs().flatten()
        shares = error / bound.flatten()
        place = shares.nan_to_num(torch.inf, posinf=torch.inf).argmax()
        self.add(what, where, error[place].item(), bound.flatten()[place].item())

    def norm(self, what: str, where: str, found: torch.Tensor, exact: torch.Tensor, bound: float) -> None:
        """The norm of the difference by that of the exact values."""
        if found.shape != exact.shape:
            raise ValueError(f"{what} of {where} has the shape {tuple(found.shape)}, not {tuple(exact.shape)}")
        self.add(what, where, ((found.double() - exact).norm() / exact.norm()).item(), bound)

    def same(self, what: str, where: str, one: torch.Tensor, other: torch.Tensor) -> None:
        """Equal to the bit."""
        self.add(what, where, 0.0 if torch.equal(one, other) else 1.0, 0.0)

    def figures(self) -> dict[str, Any]:
        """What a piece keeps. JSON has no infinity: a share that is infinite is null."""
        passed = all(row["share"] <= 1 for row in self.rows.values())
        plain = {
            what: {name: None if value in (float("inf"),) or value != value else value for name, value in row.items()}
            for what, row in self.rows.items()
        }
        return {"passed": passed, "compared": plain}


def rounded(scale: torch.Tensor, exact: torch.Tensor, roundings: int, dtype: torch.dtype) -> torch.Tensor:
    """A bound on the error of each sum of products that is accumulated in float32 and then rounded to ``dtype``.

    With n roundings on the way of a term, γ_n Σ|terms| (Higham, Accuracy and Stability of Numerical Algorithms, lemma
    3.1 and equation 3.5), and the last rounding, which may be to a subnormal number.

    Args:
        scale: Σ|terms|, float64.
        exact: the sums, float64.
        roundings: n, of float32.
    """
    gamma = roundings * UNIT[torch.float32] / (1 - roundings * UNIT[torch.float32])
    summed = gamma * scale
    unit = CUT_OFF if dtype == torch.bfloat16 and INTERPRETED else UNIT[dtype]
    return summed + unit * (exact.abs() + summed + torch.finfo(dtype).smallest_normal)
