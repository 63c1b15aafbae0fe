"""The branch that makes kernels: pooling and its transpose; activation, mixing of the taps and inhibition."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atconv.triton.launch import channel_block, triton_dtype, wide_dtype


@triton.jit
def _average(
    x,
    out,
    tokens,
    channels,
    x_image,
    x_token,
    x_channel,
    BINS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: one bin of one image, for CHANNELS channels."""
    channel_tiles = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    part = program // channel_tiles  # image * BINS + bin
    image = (part // BINS).to(tl.int64)
    bin = (part % BINS).to(tl.int64)
    channel = program % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    real = channel < channels
    start = bin * tokens // BINS
    end = ((bin + 1) * tokens + BINS - 1) // BINS
    x += image * x_image + channel.to(tl.int64)[None, :] * x_channel
    total = tl.zeros([TOKENS, CHANNELS], dtype=WIDE)
    for first in range(start, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        place = token.to(tl.int64)[:, None] * x_token
        total += tl.load(x + place, mask=(token < end)[:, None] & real[None, :], other=0.0).to(WIDE)
    mean = tl.sum(total, axis=0) / (end - start).to(WIDE)
    tl.store(out + part.to(tl.int64) * channels + channel, mean.to(out.dtype.element_ty), mask=real)


@triton.jit
def _spread(
    grad,
    out,
    tokens,
    channels,
    g_image,
    g_bin,
    g_channel,
    BINS: tl.constexpr,
    SPAN: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The transpose of :func:`_average`. One program: TOKENS tokens of one image; a token is in at most SPAN bins."""
    channel_tiles = tl.cdiv(channels, CHANNELS)
    token_tiles = tl.cdiv(tokens, TOKENS)
    program = tl.program_id(0)
    image = (program // channel_tiles // token_tiles).to(tl.int64)
    token = program // channel_tiles % token_tiles * TOKENS + tl.arange(0, TOKENS)
    channel = program % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    real = channel < channels
    grad += image * g_image + channel.to(tl.int64)[None, :] * g_channel
    total = tl.zeros([TOKENS, CHANNELS], dtype=WIDE)
    for step in tl.static_range(SPAN):
        bin = token * BINS // tokens + step
        start = bin * tokens // BINS
        end = ((bin + 1) * tokens + BINS - 1) // BINS
        inside = (token < tokens) & (bin < BINS) & (start <= token)
        g = tl.load(grad + bin.to(tl.int64)[:, None] * g_bin, mask=inside[:, None] & real[None, :], other=0.0).to(WIDE)
        total += g / (end - start).to(WIDE)[:, None]
    target = out + (image * tokens + token)[:, None] * channels + channel[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(token < tokens)[:, None] & real[None, :])


@triton.jit
def _activate(h, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu_tanh":  # (1 + tanh u) / 2 is the sigmoid of 2u
        return h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    elif ACTIVATION == "gelu":
        return 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    else:
        return h * tl.sigmoid(h)


@triton.jit
def _mix(active, weight, bias, target, TAPS: tl.constexpr):
    """Tap ``target`` of the kernels: a mixture of all taps."""
    kernel = active[0] * tl.load(weight + target * TAPS) + tl.load(bias + target)
    for tap in tl.static_range(1, TAPS):
        kernel += active[tap] * tl.load(weight + target * TAPS + tap)
    return kernel


@triton.jit
def _route(
    logits,
    weight,
    bias,
    control,
    raw,
    inhibited,
    l_image,
    l_tap,
    l_channel,
    channels: tl.constexpr,
    TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INHIBIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Activation, tap mixing and inhibition. One program: all taps of one image, for CHANNELS channels.

    A thread has all taps of its channels, so that nothing is exchanged; inhibition mixes a second time, which costs
    less than to keep the kernels.
    """
    channel_tiles: tl.constexpr = (channels + CHANNELS - 1) // CHANNELS
    program = tl.program_id(0)
    image = (program // channel_tiles).to(tl.int64)
    channel = program % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    real = channel < channels
    logits += image * l_image + channel.to(tl.int64) * l_channel
    place = image * TAPS * channels + channel
    active = ()
    for tap in tl.static_range(TAPS):
        logit = tl.load(logits + tap * l_tap, mask=real, other=0.0).to(WIDE)
        active = active + (_activate(logit, ACTIVATION),)
    total = tl.zeros([CHANNELS], dtype=WIDE)
    for target in range(TAPS):
        kernel = _mix(active, weight, bias, target, TAPS)
        tl.store(raw + place + target * channels, kernel, mask=real)
        total += kernel
    if INHIBIT:
        taken = tl.sigmoid(tl.load(control + channel, mask=real, other=0.0)) * (total / TAPS)
        for target in range(TAPS):
            kernel = _mix(active, weight, bias, target, TAPS)
            tl.store(inhibited + place + target * channels, kernel - taken, mask=real)


@torch.library.custom_op("atconv::pool", mutates_args=())
def pool(x: torch.Tensor, bins: int, dtype: torch.dtype) -> torch.Tensor:
    """Adaptive average pooling over flattened tokens, (B, N, C) to (B, bins, C) in ``dtype``.

    Bin j is the mean of the tokens ⌊jN/bins⌋ … ⌈(j+1)N/bins⌉ − 1; x is read once, in its own dtype, and is not copied.
    """
    batch, tokens, channels = x.shape
    out = torch.empty(batch, bins, channels, dtype=dtype, device=x.device)
    if out.numel():
        block = channel_block(channels, x.element_size())
        with torch.cuda.device_of(x):
            _average[(batch * bins * triton.cdiv(channels, block),)](
                x, out, tokens, channels, *x.stride(),
                BINS=bins, TOKENS=32, CHANNELS=block, WIDE=triton_dtype(x.dtype), num_warps=1,
            )  # fmt: skip
    return out


@pool.register_fake
def _(x, bins, dtype):
    return torch.empty(x.shape[0], bins, x.shape[2], dtype=dtype, device=x.device)


def _pool_context(ctx, inputs, output):
    x = inputs[0]
    ctx.tokens, ctx.dtype = x.shape[1], x.dtype


def _pool_backward(ctx, grad):
    return unpool(grad, ctx.tokens, ctx.dtype), None, None


pool.register_autograd(_pool_backward, setup_context=_pool_context)


@torch.library.custom_op("atconv::unpool", mutates_args=())
def unpool(grad: torch.Tensor, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """The transpose of :func:`pool`: (B, bins, C) to (B, tokens, C) in ``dtype``."""
    batch, bins, channels = grad.shape
    out = torch.empty(batch, tokens, channels, dtype=dtype, device=grad.device)
    if out.numel():
        block = channel_block(channels, out.element_size())
        with torch.cuda.device_of(grad):
            _spread[(batch * triton.cdiv(tokens, 64) * triton.cdiv(channels, block),)](
                grad, out, tokens, channels, *grad.stride(),
                BINS=bins, SPAN=min(bins, triton.cdiv(bins, tokens) + 1), TOKENS=64, CHANNELS=block,
                WIDE=triton_dtype(grad.dtype), num_warps=4,
            )  # fmt: skip
    return out


@unpool.register_fake
def _(grad, tokens, dtype):
    return torch.empty(grad.shape[0], tokens, grad.shape[2], dtype=dtype, device=grad.device)


def _unpool_context(ctx, inputs, output):
    ctx.bins, ctx.dtype = inputs[0].shape[1], inputs[0].dtype


def _unpool_backward(ctx, upstream):
    return pool(upstream, ctx.bins, ctx.dtype), None, None


unpool.register_autograd(_unpool_backward, setup_context=_unpool_context)


@torch.library.custom_op("atconv::route", mutates_args=())
def route(
    logits: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, control: torch.Tensor | None, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Activation, mixing of the taps, lateral inhibition, in one kernel.

    Args:
        logits: projected pooled context (B, k², C), of any floating type and strides.
        weight, bias: (k², k²) and (k²,), which mix the taps, float32, or float64 where the logits are.
        control: (C,), inhibition's; None for none.
        activation: ``gelu_tanh``, ``gelu`` or ``silu``.

    Returns:
        Kernels (B, k², C) before and after inhibition, in the dtype of the weight; the second is empty, of shape (0,),
        without control.
    """
    batch, taps, channels = logits.shape
    raw = torch.empty(logits.shape, dtype=wide_dtype(logits.dtype), device=logits.device)
    inhibited = torch.empty(0 if control is None else raw.shape, dtype=raw.dtype, device=raw.device)
    if raw.numel():
        block = min(triton.next_power_of_2(channels), 128)
        weight, bias = weight.contiguous(), bias.contiguous()
        with torch.cuda.device_of(raw):
            _route[(batch * triton.cdiv(channels, block),)](
                logits, weight, bias, bias if control is None else control.contiguous(), raw, inhibited,
                *logits.stride(), channels=channels, TAPS=taps, CHANNELS=block, ACTIVATION=activation,
                INHIBIT=control is not None, WIDE=triton_dtype(logits.dtype), num_warps=4,
            )  # fmt: skip
    return raw, inhibited


@route.register_fake
def _(logits, weight, bias, control, activation):
    raw = torch.empty(logits.shape, dtype=wide_dtype(logits.dtype), device=logits.device)
    return raw, torch.empty(0 if control is None else raw.shape, dtype=raw.dtype, device=raw.device)


def _route_context(ctx, inputs, output):
    logits, weight, bias, control, ctx.activation = inputs
    ctx.save_for_backward(logits, weight, bias, control)


def _route_backward(ctx, grad_raw, grad_inhibited):
    """In plain torch: it works on k² rows an image. Autocast may be on where the backward pass is traced."""
    with torch.autocast(grad_raw.device.type, enabled=False):
        return _route_gradients(ctx, grad_raw, grad_inhibited)


def _route_gradients(ctx, grad_raw, grad_inhibited):
    narrow, weight, bias, control = ctx.saved_tensors
    logits = narrow.to(wide_dtype(narrow.dtype))
    if ctx.activation == "silu":
        g = torch.nn.functional.silu(logits)
    else:
        approximate = "tanh" if ctx.activation == "gelu_tanh" else "none"
        g = torch.nn.functional.gelu(logits, approximate=approximate)
    d_control = None
    if control is not None:
        share = control.sigmoid()
        mean = torch.matmul(weight.mean(0), g) + bias.mean()
        d_control = -(grad_inhibited.sum(1) * mean).sum(0) * share * (1 - share)
        grad_raw = grad_raw + grad_inhibited - share * grad_inhibited.mean(1, keepdim=True)
    d_weight = torch.bmm(grad_raw, g.mT).sum(0)
    d_bias = grad_raw.sum((0, 2))
    d_g = torch.bmm(weight.mT.expand(g.shape[0], -1, -1), grad_raw)  # matmul would leave it transposed
    if ctx.activation == "silu":
        d_logits = torch.ops.aten.silu_backward(d_g, logits)
    else:
        d_logits = torch.ops.aten.gelu_backward(d_g, logits, approximate=approximate)
    return d_logits.to(narrow.dtype), d_weight, d_bias, d_control, None


route.register_autograd(_route_backward, setup_context=_route_context)
