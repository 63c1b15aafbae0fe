"""Forward and forward+backward of one mixer layer: attention, ATConv as published, and ours.

    python benchmarks/mixers.py

Interleaved in one process, medians; printed as times and as ratios to attention.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from baselines import PublishedATConv
from timing import interleaved

from atconv import ATConv
from sit.mixers import Attention


@dataclass
class Arguments:
    """Time one mixer layer."""

    tokens: tuple[int, ...] = (256, 1024)
    dim: int = 1152
    heads: int = 16
    batch_size: int = 4
    dtype: Literal["float32", "bfloat16"] = "float32"
    repeats: int = 11
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def main(arguments: Arguments) -> None:
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.processor() or 'CPU'}"
    print(f"{name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, {arguments.dtype}, "
          f"C = {arguments.dim}, batch {arguments.batch_size}, medians of {arguments.repeats}")  # fmt: skip
    print(f"{'tokens':>6}  {'pass':<16}  {'mixer':<20}  {'ms':>9}  {'x attention':>11}  {'x as published':>14}")
    for tokens in arguments.tokens:
        side = int(tokens**0.5)
        torch.manual_seed(0)
        ours, published = (kind(arguments.dim).to(device, dtype) for kind in (ATConv, PublishedATConv))
        published.load_state_dict(ours.state_dict())
        mixers = {
            "attention (SDPA)": Attention(arguments.dim, arguments.heads).to(device, dtype),
            "ATConv as published": published,
            "ATConv ours": ours,
        }
        x = torch.randn(arguments.batch_size, tokens, arguments.dim, device=device, dtype=dtype)
        with torch.no_grad():
            difference = (ours(x, (side, side)) - published(x, (side, side))).float().norm()
            assert difference < 2e-2 * ours(x, (side, side)).float().norm(), "ours is not the published operator"

        def forward(mixer: torch.nn.Module, x: torch.Tensor = x, side: int = side) -> None:
            with torch.no_grad():
                mixer(x, (side, side))

        def both(mixer: torch.nn.Module, x: torch.Tensor = x, side: int = side) -> None:
            mixer(x.clone().requires_grad_(), (side, side)).square().sum().backward()

        for label, run in (("forward", forward), ("forward+backward", both)):
            candidates = {kind: (lambda m=mixer, run=run: run(m)) for kind, mixer in mixers.items()}
            times = interleaved(candidates, device, arguments.repeats)
            attention, baseline = times["attention (SDPA)"], times["ATConv as published"]
            for kind, seconds in times.items():
                print(f"{tokens:>6}  {label:<16}  {kind:<20}  {1000 * seconds:>9.2f}  {attention / seconds:>10.2f}x  "
                      f"{baseline / seconds:>13.2f}x")  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Arguments, prog="benchmarks/mixers.py"))
