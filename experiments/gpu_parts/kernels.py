"""ATConv's Triton kernels against float64 on the device: the convolution, the branch that makes kernels, the module."""

from __future__ import annotations

import copy
import itertools

import torch
import torch.nn.functional as F

from atconv import ATConv, functional
from atconv import triton as operators
from gpu_parts.errors import UNIT, Worst, rounded
from gpu_parts.pieces import Figures, Part, Piece
from sit.utils.precision import full_float32

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_SIZES = (3, 5, 7)
GRIDS = ((16, 16), (7, 9), (32, 32), (64, 64), (1, 5))
TOKENS = 32768
"""of the batch that is large enough for the largest tiles"""
MODULES: tuple[dict, ...] = ({}, {"inhibition": False}, {"routing": False}, {"kernel_size": 5})
OF_MODULE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.25e-3}
"""bounds on the norm of a layer's error; the gradients' are three times as large"""
CONSTANT = torch.float32
"""of the kernels, whatever the values are, as the network has them"""


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def randn(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, device=device).to(dtype)


# --- the convolution -------------------------------------------------------------------------------------------------


def convolved(
    v: torch.Tensor, kernels: torch.Tensor, g: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The convolution and its gradients by values and kernels, for the gradient ``g`` of its output."""
    v, kernels = v.detach().requires_grad_(), kernels.detach().requires_grad_()
    out = functional.depthwise_conv(v, kernels, backend)
    return out.detach(), *torch.autograd.grad(out, (v, kernels), g)


def convolution(
    k: int, dtype: torch.dtype, grid: tuple[int, int], cases: tuple[tuple[int, int], ...], device: torch.device
) -> Figures:
    """All (images, channels) of ``cases``; the last of them twice, and with kernels of the values' own dtype."""
    worst, (height, width) = Worst(), grid
    for number, (images, channels) in enumerate(cases):
        torch.manual_seed(number)
        last = number == len(cases) - 1
        v, g = (randn((images, *grid, channels), dtype, device) for _ in range(2))
        kernels = randn((images, k * k, channels), dtype if last else CONSTANT, device)
        found = convolved(v, kernels, g, "triton")
        exact = convolved(v.double(), kernels.double(), g.double(), "taps")
        scales = convolved(v.double().abs(), kernels.double().abs(), g.double().abs(), "taps")
        # a sum over pixels goes down the rows of a tile, over its columns, then over the tiles, of 2 x 4 at least
        pixels = 32 + -(-height // 2) * -(-width // 4)
        roundings = (k * k + 1, k * k + 1, pixels + 1)
        where = f"{images}x{height}x{width}x{channels}"
        names = ("output", "gradient by values", "gradient by kernels")
        for what, one, truth, scale, times in zip(names, found, exact, scales, roundings, strict=True):
            worst.each(what, where, one, truth, rounded(scale, truth, times, one.dtype))
        if last:
            for one, other in zip(found, convolved(v, kernels, g, "triton"), strict=True):
                worst.same("a second time", where, one, other)
    return worst.figures()


def cases(k: int, grid: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """(images, channels): one image; channels that fill no tile; few; and so many images that tiles are large.

    Larger kernels, which take long to compile, have two of them.
    """
    many = (min(128, TOKENS // (grid[0] * grid[1])), 256)
    return ((1, 1152), (2, 130), (1, 9), many) if k == 3 else ((1, 130), many)


# --- the branch that makes kernels -----------------------------------------------------------------------------------


def pooling(dtype: torch.dtype, shapes: tuple[tuple[int, int, int], ...], device: torch.device) -> Figures:
    """Of tokens (images, tokens, channels) into as many bins as kernels of 3, 5 and 7 have taps, and its transpose."""
    worst = Worst()
    for (images, tokens, channels), k in itertools.product(shapes, KERNEL_SIZES):
        bins = k * k
        if bins > tokens:
            continue
        torch.manual_seed(bins)
        x, g = randn((images, tokens, channels), dtype, device), randn((images, bins, channels), dtype, device)
        where = f"{images}x{tokens}x{channels} to {bins} bins"

        def both(x: torch.Tensor, g: torch.Tensor, pool, bins: int = bins) -> tuple[torch.Tensor, torch.Tensor]:
            x = x.detach().requires_grad_()
            out = pool(x, bins)
            return out.detach(), *torch.autograd.grad(out, x, g)

        found = both(x, g, lambda x, bins: operators.pool(x, bins, x.dtype))
        exact = both(x.double(), g.double(), plain_pooling)
        scales = both(x.double().abs(), g.double().abs(), plain_pooling)
        # 32 sums side by side, then their sum; a token is in two bins at most. A division may round thrice
        for what, one, truth, scale, times in zip(
            ("pooled", "gradient"), found, exact, scales, (36 + tokens // bins // 32 + 1, 5), strict=True
        ):
            worst.each(what, where, one, truth, rounded(scale, truth, times, one.dtype))
    return worst.figures()


def plain_pooling(x: torch.Tensor, bins: int) -> torch.Tensor:
    return F.adaptive_avg_pool1d(x.mT, bins).mT


def branch(dtype: torch.dtype, kernel_sizes: tuple[int, ...], shape: tuple[int, int], device: torch.device) -> Figures:
    """Activation, mixing and inhibition of logits in ``dtype``, for (images, channels), by norms."""
    worst, (images, channels) = Worst(), shape
    options = itertools.product(kernel_sizes, functional.ACTIVATIONS, (True, False))
    for k, activation, inhibited in options:
        taps = k * k
        torch.manual_seed(taps)
        logits = randn((images, taps, channels), dtype, device)
        weight, bias = randn((taps, taps), CONSTANT, device) / k, randn((taps,), CONSTANT, device)
        control = randn((channels,), CONSTANT, device) if inhibited else None
        g = randn((images, taps, channels), CONSTANT, device)

        def both(route, inputs: tuple[torch.Tensor | None, ...], g: torch.Tensor = g) -> tuple[torch.Tensor, ...]:
            inputs = tuple(None if one is None else one.detach().requires_grad_() for one in inputs)
            out = route(*inputs)
            given = [one for one in inputs if one is not None]
            return out.detach(), *torch.autograd.grad(out, given, g.to(out.dtype))

        def fused(logits, weight, bias, control, activation: str = activation) -> torch.Tensor:
            raw, kernels = operators.route(logits, weight, bias, control, activation)
            return raw if control is None else kernels

        def plain(logits, weight, bias, control, activation: str = activation) -> torch.Tensor:
            raw = functional.mix_taps(logits, weight, bias, activation)
            return raw if control is None else functional.inhibit(raw, control)

        inputs = (logits, weight, bias, control)
        wide = tuple(None if one is None else one.double() for one in inputs)
        names = ("kernels", *(f"gradient by {name}" for name in ("logits", "mixing", "bias", "control")))
        where = f"{images}x{taps}x{channels}, {activation}{', inhibited' if inhibited else ''}"
        pairs = zip(both(fused, inputs), both(plain, wide), strict=True)
        for what, (one, truth) in zip(names, pairs, strict=False):
            worst.norm(what, where, one, truth, 1e-5 + UNIT[one.dtype])
    return worst.figures()


# --- the module ------------------------------------------------------------------------------------------------------


def module(
    dtype: torch.dtype, kinds: tuple[dict, ...], tokens: tuple[int, int, int, int], device: torch.device
) -> Figures:
    """The layer under autocast to ``dtype``, or without for float32; ``tokens``: images, height, width, channels."""
    worst, (images, height, width, channels) = Worst(), tokens
    for options in kinds:
        torch.manual_seed(0)
        ours = ATConv(channels, backend="triton", **options).to(device)
        for parameter in ours.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        exact = copy.deepcopy(ours).double()
        exact.backend = "taps"
        x, g = (torch.randn(images, height * width, channels, device=device) for _ in range(2))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = ours(x, (height, width))
        truth = exact(x.double(), (height, width))
        found = torch.autograd.grad((out * g).sum(), list(ours.parameters()))
        expected = torch.autograd.grad((truth * g).sum(), list(exact.parameters()))
        where = f"{images}x{height}x{width}x{channels}, {options or 'as published'}"
        worst.norm("output", where, out, truth, OF_MODULE[dtype])
        for (name, _), one, other in zip(ours.named_parameters(), found, expected, strict=True):
            worst.norm("gradients", f"{where}, {name}", one, other, 3 * OF_MODULE[dtype])
    return worst.figures()


# ---------------------------------------------------------------------------------------------------------------------


def part(device: torch.device, tiny: bool) -> Part:
    """The convolution by kernel size, dtype and grid, then the rest by dtype."""
    pieces = []

    def add(name: str, seconds: float, run, *words) -> None:
        def do(done: dict[str, Figures], left: float) -> Figures:
            with full_float32():
                return run(*words, device)

        pieces.append(Piece(name, seconds, do))

    grids = ((2, 3),) if tiny else GRIDS
    for grid, k, dtype in itertools.product(grids, KERNEL_SIZES, DTYPES):
        named = f"convolution, {k}x{k}, {grid[0]}x{grid[1]}, {name_of(dtype)}"
        some = ((1, 5), (1, 3))[-1 if k > 3 else 0 :] if tiny else cases(k, grid)
        add(named, 0.5 if tiny else 12 if k < 7 else 30, convolution, k, dtype, grid, some)
    pooled = ((1, 12, 5),) if tiny else ((1, 9, 40), (2, 31, 130), (2, 256, 1152), (1, 1024, 384), (1, 4096, 384))
    routed = (KERNEL_SIZES[:1], (1, 5)) if tiny else (KERNEL_SIZES, (3, 1152))
    layers = (MODULES[:2], (1, 2, 5, 4)) if tiny else (MODULES, (2, 16, 16, 384))
    for dtype in DTYPES:
        add(f"pooling, {name_of(dtype)}", 0.5 if tiny else 20, pooling, dtype, pooled)
        add(f"branch, {name_of(dtype)}", 0.5 if tiny else 60, branch, dtype, *routed)
        add(f"module, {name_of(dtype)}", 0.5 if tiny else 30, module, dtype, *layers)
    sources = ("atconv", "experiments/gpu_parts/kernels.py", "experiments/gpu_parts/errors.py")
    return Part("kernels", pieces, sources, {"tiny": tiny})
