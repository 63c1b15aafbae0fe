"""Speed of the mixers, from one layer to sampling: attention, ATConv as published, and ours, beside their roofline.

    python benchmarks/speed.py --scopes mixer --models SiT-XL/2 --pixels 256 512 --batch-sizes 4
    python benchmarks/speed.py --scopes network training sampling --models SiT-B/2

One process; every round runs each variant once, in turn; medians, and ratios of medians. The roofline of a row is the
time that its multiply-accumulates take at the machine's measured matrix-product rate, plus the time to read its inputs
and weights and to write its outputs once at the measured copy rate; the share is that time by the measured one.
"""

from __future__ import annotations

import itertools
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from baselines import PublishedATConv
from timing import interleaved
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sit.compiling import compile_for_sampling
from sit.files import atomic_write
from sit.mixers import register_mixer
from sit.model import MODELS, SiT, SiTBlock, create_model, parse_mixers
from sit.sampler import SamplerConfig, sample
from sit.transport import Transport

register_mixer("published-atconv")(PublishedATConv)
VARIANTS = {"attention": "attention", "as published": "published-atconv", "ours": "atconv"}
BACKWARD = {"forward": 1, "forward+backward": 3}  # multiply-accumulates of the passes, in forward passes
Scope = Literal["mixer", "block", "network", "training", "sampling"]


@dataclass
class Arguments:
    """Time the mixers."""

    scopes: tuple[Scope, ...] = ("mixer", "block", "network", "training", "sampling")
    """one layer; one block around it; the whole network forward; a training step; sampling"""
    models: tuple[str, ...] = ("SiT-S/2", "SiT-B/2", "SiT-XL/2")
    pixels: tuple[int, ...] = (256, 512, 1024)
    """side of the images; the latents' is an eighth of it"""
    batch_sizes: tuple[int, ...] = (1,)
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)
    """bfloat16: weights in bfloat16 for inference, autocast for training"""
    compile: tuple[bool, ...] = (False,)
    """without and with torch.compile: --compile False True; whole networks replay CUDA graphs then"""
    steps: int = 4
    """Euler steps of a sampling run"""
    guidance: float = 1.0
    """of sampling; other than 1 shows the network each image twice"""
    repeats: int = 7
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    json: Path | None = None


@dataclass(frozen=True)
class Case:
    """What one group of rows has in common."""

    scope: str
    model: str
    pixels: int
    batch: int
    dtype: str
    compile: bool


@dataclass(frozen=True)
class Row(Case):
    """One variant's result; seconds are medians, peak memory is CUDA's, in bytes."""

    what: str
    variant: str
    seconds: float
    macs: int
    bytes: int
    share: float
    peak_memory: int | None


@dataclass(frozen=True)
class Machine:
    """Measured rates: multiply-accumulates a second for each dtype, and bytes a second of a copy (read and written)."""

    macs: dict[str, float]
    copy: float


def best(run: Callable[[], object], device: torch.device, repeats: int = 15) -> float:
    """The fastest of some runs, in seconds: a rate that the machine can have."""
    times = [interleaved({"": run}, device, repeats=1, warm_up=0 if number else 2)[""] for number in range(repeats)]
    return min(times)


def measure_machine(device: torch.device, dtypes: tuple[str, ...]) -> Machine:
    """Rates of a matrix product of the networks' kind, and of a copy that no cache holds."""
    rows, side = (8192, 4096) if device.type == "cuda" else (2048, 1152)
    macs = {}
    for dtype in dtypes:
        left = torch.randn(rows, side, device=device, dtype=getattr(torch, dtype))
        right = torch.randn(side, side, device=device, dtype=getattr(torch, dtype))
        macs[dtype] = rows * side * side / best(lambda a=left, b=right: a @ b, device)
    source = torch.randn(256 * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    return Machine(macs, 2 * source.nbytes / best(lambda: target.copy_(source), device))


def count(run: Callable[[], object]) -> int:
    """Multiply-accumulates of matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


def build(case: Case, variant: str, device: torch.device) -> nn.Module:
    """The layer, block or network of a variant, with random weights."""
    torch.manual_seed(0)
    shape, side = MODELS[case.model], case.pixels // 8
    if case.scope in ("mixer", "block"):
        (spec,), hidden, heads = parse_mixers(VARIANTS[variant]), shape["hidden_size"], shape["num_heads"]
        tokens = side // shape["patch_size"]
        block = SiTBlock(hidden, heads, 4.0, spec, (tokens, tokens))
        module = block.attn if case.scope == "mixer" else block
    else:
        module = create_model(case.model, mixer=VARIANTS[variant], input_size=side)
        for parameter in module.parameters():  # the zeros of a new network would spare it work
            nn.init.normal_(parameter, std=0.02)
    module = module.to(device)
    return module.to(getattr(torch, case.dtype)) if case.scope != "training" else module


def runs(case: Case, module: nn.Module, arguments: Arguments) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    device, dtype = torch.device(arguments.device), getattr(torch, case.dtype)
    shape, side, batch = MODELS[case.model], case.pixels // 8, case.batch
    call: Callable = module
    if case.compile and case.scope in ("network", "sampling"):
        compile_for_sampling(module)
    elif case.compile:
        call = torch.compile(module, dynamic=False)
    if case.scope in ("mixer", "block"):
        hidden, tokens = shape["hidden_size"], side // shape["patch_size"]
        x = torch.randn(batch, tokens**2, hidden, device=device, dtype=dtype)
        inputs = (torch.randn(batch, hidden, device=device, dtype=dtype),) if case.scope == "block" else ()

        def forward() -> None:
            with torch.no_grad():
                call(x, *inputs, (tokens, tokens))

        def both() -> None:
            call(x.clone().requires_grad_(), *inputs, (tokens, tokens)).square().sum().backward()

        return {"forward": forward, "forward+backward": both}
    x = torch.randn(batch, 4, side, side, device=device)
    labels, transport = torch.randint(0, 1000, (batch,), device=device), Transport()
    if case.scope == "network":
        t = torch.rand(batch, device=device)

        def evaluate() -> None:
            with torch.no_grad():
                call(x.to(dtype), t, labels)

        return {"forward": evaluate}
    if case.scope == "training":
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
        narrow = case.dtype == "bfloat16"

        def step() -> None:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=narrow):
                loss = transport.loss(call, x, torch.rand(batch, device=device), torch.randn_like(x), y=labels).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return {"forward+backward": step}
    config = SamplerConfig(sampler="ode", method="euler", steps=arguments.steps, cfg_scale=arguments.guidance)
    narrow = _Narrow(module, dtype)
    return {f"sampling, {arguments.steps} steps": lambda: sample(narrow, transport, x, labels, config)}


class _Narrow(nn.Module):
    """A network in a narrower type, inside a sampler that integrates in float32."""

    def __init__(self, network: SiT, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype, self.config = network, dtype, network.config

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.network(x.to(self.dtype), t, y).to(x.dtype)


def measure(case: Case, arguments: Arguments, machine: Machine) -> Iterator[Row]:
    """The rows of a case."""
    device = torch.device(arguments.device)
    modules = {variant: build(case, variant, device) for variant in VARIANTS}
    timed = {variant: runs(case, module, arguments) for variant, module in modules.items()}
    for what in timed["ours"]:
        peaks: dict[str, int | None] = dict.fromkeys(VARIANTS)
        if device.type == "cuda":
            for variant in VARIANTS:
                timed[variant][what]()
                torch.cuda.reset_peak_memory_stats()
                timed[variant][what]()
                peaks[variant] = torch.cuda.max_memory_allocated()
        candidates = {variant: timed[variant][what] for variant in VARIANTS}
        seconds = interleaved(candidates, device, arguments.repeats, warm_up=3 if case.compile else 1)
        for variant, module in modules.items():
            macs, moved = work(case, module, what, variant, arguments)
            bound = macs / machine.macs[case.dtype] + moved / machine.copy
            took = seconds[variant]
            yield Row(**asdict(case), what=what, variant=variant, seconds=took, macs=macs, bytes=moved,
                      share=bound / took, peak_memory=peaks[variant])  # fmt: skip


def work(case: Case, module: nn.Module, what: str, variant: str, arguments: Arguments) -> tuple[int, int]:
    """Multiply-accumulates, and bytes of inputs, outputs and weights, that a run can't do without.

    Counted on the forward pass of the plain PyTorch formulation; the published variant is judged by its own count.
    """
    size, hidden = getattr(torch, case.dtype).itemsize, MODELS[case.model]["hidden_size"]
    tokens = (case.pixels // 8 // MODELS[case.model]["patch_size"]) ** 2
    plain = build(case, variant, torch.device("meta"))
    plain_case = Arguments(**asdict(arguments) | {"device": "meta"})
    scope = "network" if case.scope in ("training", "sampling") else case.scope
    simple = Case(**asdict(case) | {"scope": scope, "compile": False})
    macs = count(runs(simple, plain, plain_case)["forward"])
    weights = sum(p.numel() for p in module.parameters()) * size
    streams = 2 * case.batch * (tokens * hidden if case.scope in ("mixer", "block") else 4 * (case.pixels // 8) ** 2)
    moved = weights + streams * size
    passes = 3 if what == "forward+backward" else arguments.steps if case.scope == "sampling" else 1
    passes *= 2 if case.scope == "sampling" and arguments.guidance != 1 else 1
    return passes * macs, passes * moved


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main(arguments: Arguments) -> None:
    device = torch.device(arguments.device)
    machine = measure_machine(device, arguments.dtypes)
    rates = ", ".join(f"{rate / 1e9:.0f} G multiply-accumulates/s in {dtype}" for dtype, rate in machine.macs.items())
    print(f"{time.strftime('%Y-%m-%d')}, {describe(device)}\n{rates}, copy {machine.copy / 1e9:.1f} GB/s; "
          f"medians of {arguments.repeats}\n")  # fmt: skip
    print("| | model | pixels | batch | dtype | compiled | variant | ms | images/s | x attention | x published | "
          "share of roofline | peak memory |\n" + "|---" * 13 + "|")  # fmt: skip
    rows: list[Row] = []
    choices = (
        arguments.scopes,
        arguments.models,
        arguments.pixels,
        arguments.batch_sizes,
        arguments.dtypes,
        arguments.compile,
    )
    for case in itertools.starmap(Case, itertools.product(*choices)):
        made = list(measure(case, arguments, machine))
        rows += made
        for what in dict.fromkeys(row.what for row in made):
            group = {row.variant: row for row in made if row.what == what}
            for row in group.values():
                peak = f"{row.peak_memory / 2**30:.2f} GiB" if row.peak_memory else ""
                against = [group[other].seconds / row.seconds for other in ("attention", "as published")]
                cells = (f"{case.scope}, {what}", case.model, case.pixels, case.batch, case.dtype,
                         "yes" if case.compile else "no", row.variant, f"{1e3 * row.seconds:.4g}",
                         f"{case.batch / row.seconds:.4g}", *(f"{ratio:.2f}" for ratio in against),
                         f"{row.share:.0%}", peak)  # fmt: skip
                print(f"| {' | '.join(map(str, cells))} |", flush=True)
        torch.compiler.reset()
    if arguments.json:
        found = {"machine": describe(device), "rates": asdict(machine), "rows": [asdict(row) for row in rows]}
        with atomic_write(arguments.json) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments, prog="benchmarks/speed.py"))
