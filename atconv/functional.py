"""ATConv's mathematics on plain tensors: pooling, kernel generation, inhibition, per-image depthwise convolution.

All of it works in the token layout, channels last, so nothing is transposed around the projections.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

HAS_TRITON = find_spec("triton") is not None

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
}
"""Activations of the kernel branch: the published SiT variant's, AttNet's, and the REPA variant's."""


def pool_tokens(x: torch.Tensor, bins: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Adaptive average pooling over the flattened, row-major tokens: (B, N, C) to (B, bins, C).

    Bin j is the mean of the tokens ⌊jN/bins⌋ … ⌈(j+1)N/bins⌉ − 1, as in PyTorch's ``adaptive_avg_pool1d``; written
    as a product with a bins × N matrix, which needs no transposed copy of the tokens. Sums and means are float32 or
    float64: in half precision they would be rounded, and in float16 overflow. The result is in ``dtype``, by default
    x's.
    """
    tokens, kind, wide = x.shape[1], x.dtype, torch.promote_types(x.dtype, torch.float32)
    edges = torch.arange(bins, device=x.device)
    start, end = edges * tokens // bins, -((-(edges + 1) * tokens) // bins)
    place = torch.arange(tokens, device=x.device)
    # a program that is traced may be for any number of tokens, and can't be cut at numbers
    if kind != wide and not torch.compiler.is_compiling() and tokens > 2 * bins:
        x, place = _sums_of_runs(x, bins, wide)
    inside = (place >= start[:, None]) & (place < end[:, None])
    sums = torch.bmm(inside.to(wide).expand(x.shape[0], -1, -1), x.to(wide))
    return (sums / (end - start)[:, None]).to(dtype or kind)


def _sums_of_runs(x: torch.Tensor, bins: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, N, C) summed between all bounds of the bins, (B, 2·bins − 1, C), and where each run begins.

    In ``dtype``, without a copy of the tokens in it. Bins overlap by a token at most, which is a run of its own.
    """
    bounds = [part * x.shape[1] for part in range(1, bins)]
    cuts = sorted([0, *(bound // bins for bound in bounds), *(-(-bound // bins) for bound in bounds), x.shape[1]])
    runs = x.split([end - start for start, end in zip(cuts, cuts[1:], strict=False)], dim=1)
    sums = torch.stack([run.sum(1, dtype=dtype) for run in runs], dim=1)
    return sums, torch.tensor(cuts[:-1], device=x.device)


def mix_taps(
    logits: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str = "gelu_tanh"
) -> torch.Tensor:
    """Activation and mixing of the taps: logits (B, k², C), weight (k², k²) and bias (k²,) to kernels (B, k², C).

    ``activation`` is a name of :data:`ACTIVATIONS`.
    """
    # matmul would fold the images into the channels and leave a transposed result, on which all that follows is slow
    return torch.baddbmm(bias[:, None], weight.expand(logits.shape[0], -1, -1), ACTIVATIONS[activation](logits))


def inhibit(kernels: torch.Tensor, control: torch.Tensor) -> torch.Tensor:
    """Lateral inhibition: kernels (…, k², C) less σ(control), control (C,), of their mean over the taps."""
    return kernels - control.sigmoid() * kernels.mean(dim=-2, keepdim=True)


def make_kernels(
    x: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    mix_weight: torch.Tensor,
    mix_bias: torch.Tensor,
    *,
    control: torch.Tensor | None,
    activation: str = "gelu_tanh",
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adaptive routing: one k×k kernel for every image and channel, from the image's own tokens; lateral inhibition.

    Pooling is linear and its rows sum to one, so pooling before the projection equals the published order
    (projection of all N tokens, then pooling) and projects k² rows instead of N.

    The projection, a large matrix product, has the dtype of its weight; what follows is float32 or float64, as a
    difference from the taps' mean is taken. To be called with autocast disabled.

    Args:
        x: tokens (B, N, C).
        proj_weight, proj_bias: (C, C) and (C,), the projection of the pooled context.
        mix_weight, mix_bias: (k², k²) and (k²,), which mix the taps.
        control: (C,), inhibition's; None for none.
        activation: a name of :data:`ACTIVATIONS`.
        backend: a name of :data:`BACKENDS`; None takes :func:`fastest_backend`.

    Returns:
        Two tensors (B, k², C), row-major taps, float32 or float64: the kernels before and after inhibition. Without
        ``control`` both are the same tensor.

    Raises:
        ValueError: the backend can't be used on this machine or device, or lacks the derivatives that are being taken.
    """
    wide = torch.promote_types(proj_weight.dtype, torch.float32)
    mix_weight, mix_bias = mix_weight.to(wide), mix_bias.to(wide)
    control = None if control is None else control.to(wide)
    kernels = load_triton(x.device.type == "cpu") if checked_backend(x, backend) == "triton" else None
    pooled = (kernels.pool if kernels else pool_tokens)(x, mix_weight.shape[0], proj_weight.dtype)
    logits = F.linear(pooled, proj_weight, proj_bias)
    if kernels:
        raw, inhibited = kernels.route(logits, mix_weight, mix_bias, control, activation)
        return raw, raw if control is None else inhibited
    raw = mix_taps(logits.to(wide), mix_weight, mix_bias, activation)
    return raw, raw if control is None else inhibit(raw, control)


def depthwise_conv(v: torch.Tensor, kernels: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    """Zero-padded k×k cross-correlation of every image and channel with its own kernel; k odd.

    Args:
        v: values (B, H, W, C).
        kernels: (B, k², C) row-major taps; or (1, k², C), the same kernels for all images.
        backend: a name of :data:`BACKENDS`; None takes :func:`fastest_backend`.

    Returns:
        (B, H, W, C) in v's dtype.

    Raises:
        ValueError: shapes that don't fit, an even k, or a backend that is unknown, can't be used on this machine or
            lacks the derivatives that are being taken.
    """
    taps, side = kernels.shape[1], math.isqrt(kernels.shape[1])
    if side * side != taps or side % 2 == 0:
        raise ValueError(f"`kernels` of {taps} taps are not k x k with odd k")
    if kernels.shape[0] not in (1, v.shape[0]) or kernels.shape[2] != v.shape[3]:
        raise ValueError(f"`kernels` of shape {tuple(kernels.shape)} don't fit `v` of shape {tuple(v.shape)}")
    return BACKENDS[checked_backend(v, backend)](v, kernels, side)


def checked_backend(x: torch.Tensor, backend: str | None) -> str:
    """``backend``, or the fastest one for x where it is None.

    Raises:
        ValueError: there is none of this name, or it lacks the derivatives that are being taken.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if backend == "triton" and under_a_transform():
        raise ValueError("`backend=triton` has no forward-mode derivatives or transforms of torch.func: leave it out")
    return backend or fastest_backend(x)


def under_a_transform() -> bool:
    """Whether forward-mode derivatives or a transform of ``torch.func`` are being taken.

    Operators of Triton have backward passes alone. PyTorch drops the tangents of such an operator without a word. Not
    asked while ``torch.compile`` traces.
    """
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def fastest_backend(x: torch.Tensor) -> str:
    """The backend for x's device when none is named: the fastest measured on CPUs, the expected one elsewhere.

    An exported program (``torch.export``, and ONNX through it) has ``taps``: plain operations on any device, while
    ``channels_last`` is a convolution of as many groups as the batch makes, which ONNX can't say. Where
    :func:`under_a_transform` is true, it is not ``triton``.
    """
    if torch.compiler.is_exporting():
        return "taps"
    if x.device.type == "cpu":
        return "channels_last"
    return "triton" if x.device.type == "cuda" and HAS_TRITON and not under_a_transform() else "taps"


def load_triton(on_cpu: bool) -> ModuleType:
    """The package :mod:`atconv.triton`, loaded when it is first asked for.

    Raises:
        ValueError: Triton is not installed; or ``on_cpu``, and Triton was not imported with ``TRITON_INTERPRET=1``.
    """
    if not HAS_TRITON:
        raise ValueError("`backend=triton`: the package triton is not installed; leave `backend` out")
    from atconv import triton as operators

    if on_cpu and not operators.INTERPRETED:
        raise ValueError("`backend=triton` needs a GPU, or TRITON_INTERPRET=1 for slow tests; leave `backend` out")
    return operators


def _taps(v: torch.Tensor, kernels: torch.Tensor, side: int) -> torch.Tensor:
    """The reference: one multiply-add for each tap, over shifted views of the padded values; torch.compile fuses it."""
    height, width = v.shape[1:3]
    kernels, margin = kernels.to(v.dtype), side // 2
    padded = F.pad(v, (0, 0, margin, margin, margin, margin))
    total: torch.Tensor | None = None
    for tap in range(side * side):
        row, column = divmod(tap, side)
        shifted = padded[:, row : row + height, column : column + width]
        kernel = kernels[:, tap, None, None]
        total = shifted * kernel if total is None else torch.addcmul(total, shifted, kernel)
    assert total is not None, "a kernel has taps"
    return total


def _channels_last(v: torch.Tensor, kernels: torch.Tensor, side: int) -> torch.Tensor:
    """One depthwise convolution of a single image of B·C channels, channels last: no image is transposed."""
    batch, height, width, channels = v.shape
    if not batch:  # a convolution has a group at least
        return _taps(v, kernels, side)
    kernels = kernels.to(v.dtype).expand(batch, -1, -1)
    values = v.permute(1, 2, 0, 3).reshape(1, height, width, batch * channels).permute(0, 3, 1, 2)
    weight = kernels.transpose(1, 2).reshape(batch * channels, 1, side, side)
    out = F.conv2d(values, weight, padding=side // 2, groups=batch * channels)
    return out.permute(0, 2, 3, 1).reshape(height, width, batch, channels).permute(2, 0, 1, 3)


BACKENDS: dict[str, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "taps": _taps,
    "channels_last": _channels_last,
    "triton": lambda v, kernels, side: load_triton(v.device.type == "cpu").depthwise(v, kernels),
}
"""Ways to convolve. ``triton`` also fuses the branch that makes the kernels (:func:`make_kernels`)."""
