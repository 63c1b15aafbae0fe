"""Speed of the mixers, from one layer to sampling: attention, ATConv as published, and ours, beside their roofline.

    python benchmarks/speed.py --scopes mixer --models SiT-XL/2 --pixels 256 512 --batch-sizes 4
    python benchmarks/speed.py --scopes network training sampling --models SiT-B/2

One process; every round runs each variant once, in turn; medians, and ratios of medians. The roofline of a row is the
time that its multiply-accumulates take at the machine's measured matrix-product rate, plus the time to read its inputs
and weights and to write its outputs once at the measured copy rate; the share is that time by the measured one.
Attention has the fastest backend of PyTorch's scaled-dot-product attention for the case, found by trying each.
"""

from __future__ import annotations

import functools
import gc
import itertools
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from baselines import PublishedATConv
from checks import at_least_one
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from sit.blocks import SiTBlock
from sit.mixers import build_mixer, parse_mixers, register_mixer
from sit.model import MODELS, check_model_name, create_model
from sit.sampling.config import SamplerConfig
from sit.sampling.sampler import sample
from sit.transport.transport import Transport
from sit.utils.cli import one_line_errors
from sit.utils.compile import compile_for_sampling
from sit.utils.device import pick_device
from sit.utils.errors import UserError, entry_point
from sit.utils.record import record, write_record
from sit.utils.tables import markdown_table
from sit.utils.timing import interleaved

register_mixer("published-atconv")(PublishedATConv)
VARIANTS = {"attention": "attention", "as published": "published-atconv", "ours": "atconv"}
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH,
}  # fmt: skip
MOST_SCORES = 4 * 2**30
"""bytes of float32 scores above which the backend that keeps them is not tried: it never wins there"""
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
    """with torch.compile or without; ``False True`` times both. Whole networks replay CUDA graphs when compiled"""
    steps: int = 4
    """Euler steps of a sampling run"""
    guidance: float = 1.0
    """of sampling; other than 1, the network evaluates each image twice a step"""
    repeats: int = 7
    rate_repeats: int = 15
    """runs of a matrix product and of a copy, of which the fastest gives the machine's rates"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    json: Path | None = None
    """file for all numbers, rewritten after every case"""

    def __post_init__(self) -> None:
        at_least_one(self, "steps", "repeats", "rate_repeats")
        for name in self.models:
            check_model_name(name)
        for pixels, name in itertools.product(self.pixels, self.models):
            if pixels < 1 or pixels % (side := 8 * MODELS[name]["patch_size"]):
                raise UserError(f"`pixels={pixels}`: the side must be a multiple of {side} for {name}")


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
    """One variant's result; seconds are medians, None where the device has too little memory.

    Peak memory is CUDA's, in bytes: the most that the variant took, its weights and optimizer included. Of attention,
    ``sdpa`` is the backend that it ran with.
    """

    what: str
    variant: str
    seconds: float | None
    macs: int
    bytes: int
    share: float | None
    peak_memory: int | None
    sdpa: str | None = None


@dataclass(frozen=True)
class Machine:
    """Measured rates: multiply-accumulates a second for each dtype, and bytes a second of a copy (read and written)."""

    macs: dict[str, float]
    copy: float


def best(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The fastest of some runs, in seconds: a rate that the machine can have."""
    times = [interleaved({"": run}, device, repeats=1, warm_up=0 if number else 2)[""] for number in range(repeats)]
    return min(times)


def measure_machine(device: torch.device, dtypes: tuple[str, ...], repeats: int) -> Machine:
    """Rates of a matrix product of the networks' kind, and of a copy that no cache holds."""
    rows, side = (8192, 4096) if device.type == "cuda" else (2048, 1152)
    macs = {}
    for dtype in dtypes:
        left = torch.randn(rows, side, device=device, dtype=getattr(torch, dtype))
        right = torch.randn(side, side, device=device, dtype=getattr(torch, dtype))
        macs[dtype] = rows * side * side / best(lambda a=left, b=right: a @ b, device, repeats)
    source = torch.ones(256 * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    return Machine(macs, 2 * source.nbytes / best(lambda: target.copy_(source), device, repeats))


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
        with device:
            block = SiTBlock(hidden, 4.0, build_mixer(spec, hidden, heads, grid=(tokens, tokens)))
        module = block.attn if case.scope == "mixer" else block
    else:
        with device:
            module = create_model(case.model, mixer=VARIANTS[variant], input_size=side)
        for parameter in module.parameters():  # the zeros of a new network would spare it work
            nn.init.normal_(parameter, std=0.02)
    # not module.to: diffusers warns there of layers kept in float32, even if there are none
    return module if case.scope == "training" else nn.Module.to(module, dtype=getattr(torch, case.dtype))


def passes(case: Case, arguments: Arguments) -> dict[str, int]:
    """What is timed of a case, and how many forward passes' multiply-accumulates it has."""
    if case.scope in ("mixer", "block"):
        return {"forward": 1, "forward+backward": 3}
    if case.scope == "network":
        return {"forward": 1}
    if case.scope == "training":
        return {"forward+backward": 3}
    return {f"{arguments.steps} steps": arguments.steps * (1 if arguments.guidance == 1 else 2)}


def runs(case: Case, module: nn.Module, arguments: Arguments) -> dict[str, Callable[[], object]]:
    """What is timed, by the names of :func:`passes`."""
    device, dtype = torch.device(arguments.device), getattr(torch, case.dtype)
    shape, side, batch = MODELS[case.model], case.pixels // 8, case.batch
    call: Callable = module
    if case.scope == "training" and case.dtype == "bfloat16":  # inside of what is compiled, as Accelerate has it
        module.forward = torch.autocast(device.type, torch.bfloat16)(module.forward)
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

        def step() -> None:
            t, noise = torch.rand(batch, device=device), torch.randn_like(x)
            transport.loss(call, x, t, noise, y=labels).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return {"forward+backward": step}
    config = SamplerConfig(sampler="ode", method="euler", steps=arguments.steps, cfg_scale=arguments.guidance)
    return {next(iter(passes(case, arguments))): lambda: sample(module, transport, x, labels, config)}


def attention_seconds(case: Case, what: str, arguments: Arguments) -> dict[str, float]:
    """Seconds of the attention of one layer alone, in a pass of :func:`passes`, by each backend that can do it."""
    device, shape = torch.device(arguments.device), MODELS[case.model]
    tokens, heads = (case.pixels // 8 // shape["patch_size"]) ** 2, shape["num_heads"]
    images = case.batch * (2 if case.scope == "sampling" and arguments.guidance != 1 else 1)
    size = (images, heads, tokens, shape["hidden_size"] // heads)
    backward = what == "forward+backward"
    parts = [torch.randn(size, device=device, dtype=getattr(torch, case.dtype), requires_grad=backward)
             for _ in range(3)]  # fmt: skip

    def attend(backend: SDPBackend) -> None:
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(*parts)
            if backward:
                torch.autograd.grad(out, parts, out.detach())

    able: dict[str, Callable[[], object]] = {}
    for name, backend in SDPA.items():
        if name == "math" and 4 * images * heads * tokens**2 > MOST_SCORES:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they say at length why a backend can't
                attend(backend)
        except RuntimeError:  # it can't, or memory is too little for it
            continue
        able[name] = functools.partial(attend, backend)
    return interleaved(able, device, arguments.repeats)


def with_best_attention(
    case: Case, timed: dict[str, Callable[[], object]], arguments: Arguments
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """The runs of the variant with attention, each with the backend that is the fastest for it; and which that is."""
    best: dict[str, str] = {}
    for what in timed:
        seconds = attention_seconds(case, what, arguments)
        if seconds:
            best[what] = min(seconds, key=seconds.__getitem__)

    def chosen(what: str, run: Callable[[], object]) -> Callable[[], object]:
        def inside() -> None:
            with sdpa_kernel(SDPA[best[what]]):
                run()

        return inside if what in best else run

    return {what: chosen(what, run) for what, run in timed.items()}, best


def prepare(
    case: Case, variant: str, arguments: Arguments
) -> tuple[dict[str, Callable[[], object]], int | None, dict[str, str]]:
    """A variant's runs, each made three times, so that all is compiled and recorded; the peak memory of that; and the
    backends of attention, by run.

    Raises:
        torch.OutOfMemoryError: the device has too little.
    """
    device = torch.device(arguments.device)
    on_cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_cuda else 0
    timed, sdpa = runs(case, build(case, variant, device), arguments), {}
    if variant == "attention":
        timed, sdpa = with_best_attention(case, timed, arguments)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    for run in timed.values():
        for _ in range(3 if on_cuda or case.compile else 1):
            run()
    return timed, torch.cuda.max_memory_allocated() - before if on_cuda else None, sdpa


def measure(case: Case, arguments: Arguments, machine: Machine) -> list[Row]:
    """The rows of a case."""
    device = torch.device(arguments.device)
    ready: dict[str, dict[str, Callable[[], object]]] = {}
    peaks: dict[str, int | None] = dict.fromkeys(VARIANTS)
    sdpa: dict[str, dict[str, str]] = {}
    for variant in VARIANTS:
        try:
            ready[variant], peaks[variant], sdpa[variant] = prepare(case, variant, arguments)
        except torch.OutOfMemoryError:
            release(device)
    seconds: dict[str, dict[str, float]] = {}
    for what in next(iter(ready.values()), {}):
        try:
            candidates = {variant: timed[what] for variant, timed in ready.items()}
            seconds[what] = interleaved(candidates, device, arguments.repeats)
        except torch.OutOfMemoryError:  # one fits, but not beside the others
            release(device)
    rows = []
    for what, variant in itertools.product(passes(case, arguments), VARIANTS):
        macs, moved = work(case, what, variant, arguments)
        bound, took = macs / machine.macs[case.dtype] + moved / machine.copy, seconds.get(what, {}).get(variant)
        rows.append(Row(**asdict(case), what=what, variant=variant, seconds=took, macs=macs, bytes=moved,
                        share=bound / took if took else None, peak_memory=peaks[variant],
                        sdpa=sdpa.get(variant, {}).get(what)))  # fmt: skip
    return rows


def release(device: torch.device) -> None:
    """Give memory back."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def work(case: Case, what: str, variant: str, arguments: Arguments) -> tuple[int, int]:
    """Multiply-accumulates, and bytes of inputs, outputs and weights, that a run can't do without.

    Counted on the forward pass of the plain PyTorch formulation; the published variant is judged by its own count.
    """
    hidden, tokens = MODELS[case.model]["hidden_size"], (case.pixels // 8 // MODELS[case.model]["patch_size"]) ** 2
    scope = "network" if case.scope in ("training", "sampling") else case.scope
    macs, weights = forward_work(Case(**asdict(case) | {"scope": scope, "compile": False}), variant)
    streams = 2 * case.batch * (tokens * hidden if case.scope in ("mixer", "block") else 4 * (case.pixels // 8) ** 2)
    times = passes(case, arguments)[what]
    return times * macs, times * (weights + streams) * getattr(torch, case.dtype).itemsize


@functools.cache
def forward_work(case: Case, variant: str) -> tuple[int, int]:
    """Multiply-accumulates and weights of a forward pass, counted on tensors without data."""
    module = build(case, variant, torch.device("meta"))
    macs = count(runs(case, module, Arguments(device="meta"))["forward"])
    return macs, sum(p.numel() for p in module.parameters())


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="benchmarks/speed.py")
    run(arguments)


HEADER = ("", "model", "pixels", "batch", "dtype", "compiled", "variant", "ms", "images/s", "x attention",
          "x published", "share of roofline", "peak memory", "attention by")  # fmt: skip


def table_rows(made: list[Row]) -> list[list[object]]:
    """The cells of a case's rows under :data:`HEADER`, its ratios within what was timed together."""
    lines: list[list[object]] = []
    for row in made:
        others = {other.variant: other.seconds for other in made if other.what == row.what}
        cells = [f"{row.scope}, {row.what}", row.model, row.pixels, row.batch, row.dtype,
                 "yes" if row.compile else "no", row.variant]  # fmt: skip
        if row.seconds is None:
            cells += ["too little memory", "", "", "", ""]
        else:
            cells += [f"{1e3 * row.seconds:.4g}", f"{row.batch / row.seconds:.4g}"]
            cells += [
                f"{others[name] / row.seconds:.2f}" if others[name] else "" for name in VARIANTS if name != "ours"
            ]
            cells.append(f"{row.share:.0%}")
        lines.append([*cells, f"{row.peak_memory / 2**30:.2f} GiB" if row.peak_memory else "", row.sdpa or ""])
    return lines


def run(arguments: Arguments) -> None:
    """Measure all cases, print the rows of each as soon as they are there, and keep them as JSON."""
    device = pick_device(arguments.device)
    machine, made_on = measure_machine(device, arguments.dtypes, arguments.rate_repeats), record(device)
    rates = ", ".join(f"{rate / 1e9:.0f} G multiply-accumulates/s in {dtype}" for dtype, rate in machine.macs.items())
    print(f"{made_on['date']}, {made_on['machine']}\n{rates}, copy {machine.copy / 1e9:.1f} GB/s; "
          f"medians of {arguments.repeats}\n")  # fmt: skip
    print(markdown_table(HEADER, []), flush=True)
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
        made = measure(case, arguments, machine)
        rows += made
        print(*markdown_table(HEADER, table_rows(made)).splitlines()[2:], sep="\n", flush=True)
        release(device)
        if arguments.json:  # after every case: a long run may be cut off
            write_record(arguments.json, device, {"rates": asdict(machine), "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
