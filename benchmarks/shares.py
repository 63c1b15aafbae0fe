"""Where a network's time goes: the share of each kind of operator, with ATConv and with attention (PyTorch's profiler).

    python benchmarks/shares.py --model SiT-B/2 --dtype bfloat16 --json docs/performance/shares.json

The share of a kind is its operators' own time over that of all operators, summed over repeated runs; Python between
operators is in none. ``training`` is a forward and backward pass under autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from checks import at_least_one
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from atconv import ATConv
from sit.model import MODELS, check_model_name, create_model
from sit.transport.transport import Transport
from sit.utils.cli import one_line_errors
from sit.utils.device import pick_device
from sit.utils.errors import UserError, entry_point
from sit.utils.record import write_record
from sit.utils.tables import markdown_table

KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "linear", "mkldnn_linear", "_addmm_activation"),
    "attention": ("scaled_dot_product", "flash_attention", "softmax"),
    "convolution": ("convolution", "conv_depthwise", "mkldnn_convolution"),
    "norms": ("layer_norm", "rms_norm"),
    "activations": ("gelu", "silu", "sigmoid"),
    "casts and copies": ("copy_", "clone", "contiguous", "to", "_to_copy", "cat"),
    "sums and means": ("sum", "mean"),
    "modulation, gates, residuals and taps": ("mul", "add", "sub", "div", "addcmul", "neg", "rsub"),
    "zeros and memory": ("zero_", "fill_", "empty", "zeros", "constant_pad_nd", "resize"),
}
"""Beginnings of the names of operators, of each kind; the first that fits counts."""
OTHER = "other"
BRANCH = "forward pass of the branch that makes ATConv's kernels"
Pass = Literal["forward", "training"]


@dataclass
class Arguments:
    """Find where the time goes."""

    model: str = "SiT-B/2"
    mixers: tuple[str, ...] = ("atconv", "attention")
    passes: tuple[Pass, ...] = ("forward", "training")
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """of the weights for the forward pass, of autocast for training"""
    pixels: int = 256
    """side of the images; the latents' is an eighth of it"""
    batch_size: int = 4
    repeats: int = 5
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    json: Path | None = None
    """file for all numbers"""

    def __post_init__(self) -> None:
        at_least_one(self, "batch_size", "repeats")
        check_model_name(self.model)
        if self.pixels < 1 or self.pixels % (side := 8 * MODELS[self.model]["patch_size"]):
            raise UserError(f"`pixels={self.pixels}`: the side must be a multiple of {side} for {self.model}")


def kind_of(operator: str) -> str:
    """The kind of an operator, by its name in the profile, such as ``aten::addmm``; gradients count as operators."""
    name = operator.removeprefix("aten::").removeprefix("native_").removeprefix("_")
    for kind, beginnings in KINDS.items():
        if name in beginnings or any(name.startswith(start) for start in beginnings if len(start) > 4):
            return kind
        if any(name.rstrip("_") == start.rstrip("_") or name.startswith(f"{start}_") for start in beginnings):
            return kind
    return OTHER


def shares(run: Callable[[], object], device: torch.device, repeats: int) -> dict[str, dict[str, float]]:
    """Own time of each operator over that of all, by kind and name, the largest first; the branch's last, if it ran."""
    run()
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        for _ in range(repeats):
            run()
    events = {event.key: event for event in found.key_averages()}
    branch = events.pop(BRANCH, None)
    times = {key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for key, e in events.items()}
    total = sum(times.values())
    kinds: dict[str, dict[str, float]] = {}
    for name, time in sorted(times.items(), key=lambda item: -item[1]):
        kinds.setdefault(kind_of(name), {})[name] = time / total
    kinds = dict(sorted(kinds.items(), key=lambda item: -sum(item[1].values())))
    if branch is not None:
        time = branch.device_time_total if on_gpu else branch.cpu_time_total - branch.self_cpu_time_total
        kinds[BRANCH] = {"all its operators": time / total}
    return kinds


def tell_branch(network: nn.Module) -> None:
    """Have the profiler see where ATConv's kernels are made."""
    for module in network.modules():
        if isinstance(module, ATConv):
            module.kernels = record_function(BRANCH)(module.kernels)  # type: ignore[method-assign]


def prepared(arguments: Arguments, mixer: str, which: Pass, device: torch.device) -> Callable[[], object]:
    """What is profiled."""
    side, dtype = arguments.pixels // 8, getattr(torch, arguments.dtype)
    network = create_model(arguments.model, 0, mixer=mixer, input_size=side).to(device)
    for parameter in network.parameters():  # the zeros of a new network would spare it work
        nn.init.normal_(parameter, std=0.02)
    tell_branch(network)
    x, t = (
        torch.randn(arguments.batch_size, 4, side, side, device=device),
        torch.rand(arguments.batch_size, device=device),
    )
    labels = torch.arange(arguments.batch_size, device=device)
    if which == "forward":
        nn.Module.to(network, dtype=dtype)

        def forward() -> None:
            with torch.no_grad():
                network(x.to(dtype), t, labels)

        return forward
    transport, noise = Transport(), torch.randn_like(x)

    def training() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = transport.loss(network, x, t, noise, y=labels).mean()
        loss.backward()
        network.zero_grad()

    return training


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="benchmarks/shares.py")
    device = pick_device(arguments.device)
    found = {
        f"{mixer}, {which}": shares(prepared(arguments, mixer, which, device), device, arguments.repeats)
        for mixer in arguments.mixers
        for which in arguments.passes
    }
    kinds = sorted(dict.fromkeys(kind for one in found.values() for kind in one), key=lambda kind: kind == BRANCH)
    rows = [(kind, *(f"{sum(one.get(kind, {}).values()):.1%}" for one in found.values())) for kind in kinds]
    print(markdown_table(["", *found], rows))
    if arguments.json:
        settings = {name: getattr(arguments, name) for name in ("model", "dtype", "pixels", "batch_size", "repeats")}
        write_record(arguments.json, device, {**settings, "shares": found})


if __name__ == "__main__":
    main()
