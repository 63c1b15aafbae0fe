"""ATConv's hot spots as Triton kernels: the per-image depthwise convolution, and the small branch that makes kernels.

Everything is in the token layout, channels last, takes any strides, accumulates in float32 (float64 for float64) and is
deterministic: no atomics, and tilings that depend on shapes alone. The operators are registered in the namespace
``atconv::`` with shapes for tracing and with derivatives (of any order), so that ``torch.compile``, autocast,
checkpointing and data parallelism see ordinary operators. They are opaque ``custom_op``, not ``triton_op``: the latter
refuses kernels that run in Triton's interpreter, which is how the tests run them.

The kernels have been run through the interpreter (``TRITON_INTERPRET=1``) and compiled for Hopper (sm_90); they have
not been run on a GPU, so the tile sizes are reasoned, not measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PROGRAMS = 512  # enough to keep a GPU of 132 multiprocessors busy


@triton.jit
def _convolve(
    v,
    kernels,
    out,
    height,
    width,
    channels,
    v_image,
    v_row,
    v_column,
    v_channel,
    k_image,
    k_tap,
    k_channel,
    SIDE: tl.constexpr,
    FLIP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: ROWS × COLUMNS pixels × CHANNELS of one image; each tap is loaded once."""
    channel_tiles = tl.cdiv(channels, CHANNELS)
    column_tiles = tl.cdiv(width, COLUMNS)
    tiles = column_tiles * tl.cdiv(height, ROWS)
    program = tl.program_id(0)
    tile = program // channel_tiles % tiles
    image = (program // channel_tiles // tiles).to(tl.int64)
    channel = program % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    pixel = tl.arange(0, ROWS * COLUMNS)
    row = tile // column_tiles * ROWS + pixel // COLUMNS
    column = tile % column_tiles * COLUMNS + pixel % COLUMNS
    real = channel < channels
    wide_channel = channel.to(tl.int64)
    v += image * v_image + wide_channel[None, :] * v_channel
    kernels += image * k_image + wide_channel * k_channel
    total = tl.zeros([ROWS * COLUMNS, CHANNELS], dtype=WIDE)
    for tap in tl.static_range(SIDE * SIDE):
        r = row + (tap // SIDE - SIDE // 2)
        s = column + (tap % SIDE - SIDE // 2)
        inside = (r >= 0) & (r < height) & (s >= 0) & (s < width)
        place = r.to(tl.int64) * v_row + s.to(tl.int64) * v_column
        value = tl.load(v + place[:, None], mask=inside[:, None] & real[None, :], other=0.0).to(WIDE)
        source = SIDE * SIDE - 1 - tap if FLIP else tap
        total += value * tl.load(kernels + source * k_tap, mask=real, other=0.0).to(WIDE)[None, :]
    place = (image * height + row) * width + column
    inside = (row < height) & (column < width)
    target = out + place[:, None] * channels + channel[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=inside[:, None] & real[None, :])


@triton.jit
def _correlate(
    v,
    grad,
    out,
    height,
    width,
    channels,
    chunks,
    chunk,
    v_image,
    v_row,
    v_column,
    v_channel,
    g_image,
    g_row,
    g_column,
    g_channel,
    SIDE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: the k² sums over ``chunk`` pixels of one image, for CHANNELS channels.

    Every tap keeps PIXELS running sums a channel in registers; they are added up once, at the end.
    """
    channel_tiles = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    part = program // channel_tiles  # image * chunks + its chunk
    image = (part // chunks).to(tl.int64)
    start = part % chunks * chunk
    channel = program % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    real = channel < channels
    wide_channel = channel.to(tl.int64)
    v += image * v_image + wide_channel[None, :] * v_channel
    grad += image * g_image + wide_channel[None, :] * g_channel
    end = tl.minimum(start + chunk, height * width)
    zero = tl.zeros([PIXELS, CHANNELS], dtype=WIDE)
    sums = (zero,) * (SIDE * SIDE)
    for first in range(start, end, PIXELS):
        pixel = first + tl.arange(0, PIXELS)
        row = pixel // width
        column = pixel % width
        counted = pixel < end
        place = row.to(tl.int64) * g_row + column.to(tl.int64) * g_column
        g = tl.load(grad + place[:, None], mask=counted[:, None] & real[None, :], other=0.0).to(WIDE)
        added = ()
        for tap in tl.static_range(SIDE * SIDE):
            r = row + (tap // SIDE - SIDE // 2)
            s = column + (tap % SIDE - SIDE // 2)
            inside = counted & (r >= 0) & (r < height) & (s >= 0) & (s < width)
            place = r.to(tl.int64) * v_row + s.to(tl.int64) * v_column
            value = tl.load(v + place[:, None], mask=inside[:, None] & real[None, :], other=0.0).to(WIDE)
            added = added + (sums[tap] + value * g,)
        sums = added
    out += part.to(tl.int64) * (SIDE * SIDE) * channels + channel
    for tap in tl.static_range(SIDE * SIDE):
        tl.store(out + tap * channels, tl.sum(sums[tap], axis=0), mask=real)


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
    tl.store(out + part.to(tl.int64) * channels + channel, mean, mask=real)


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
    token = (program // channel_tiles % token_tiles * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    channel = program % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    real = channel < channels
    grad += image * g_image + channel.to(tl.int64)[None, :] * g_channel
    total = tl.zeros([TOKENS, CHANNELS], dtype=WIDE)
    for step in tl.static_range(SPAN):
        bin = token * BINS // tokens + step
        start = bin * tokens // BINS
        end = ((bin + 1) * tokens + BINS - 1) // BINS
        inside = (token < tokens) & (bin < BINS) & (start <= token)
        g = tl.load(grad + bin[:, None] * g_bin, mask=inside[:, None] & real[None, :], other=0.0).to(WIDE)
        total += g / (end - start).to(WIDE)[:, None]
    target = out + (image * tokens + token)[:, None] * channels + channel[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(token < tokens)[:, None] & real[None, :])


@triton.jit
def _route(
    logits,
    weight,
    bias,
    control,
    raw,
    inhibited,
    channels,
    l_image,
    l_tap,
    l_channel,
    TAPS: tl.constexpr,
    ROOM: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INHIBIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Activation, tap mixing and inhibition. One program: all taps of one image, for CHANNELS channels."""
    channel_tiles = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    image = (program // channel_tiles).to(tl.int64)
    channel = program % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    real = channel < channels
    tap = tl.arange(0, ROOM)
    place = tap.to(tl.int64)[:, None] * l_tap + channel.to(tl.int64)[None, :] * l_channel
    h = tl.load(logits + image * l_image + place, mask=(tap < TAPS)[:, None] & real[None, :], other=0.0).to(WIDE)
    if ACTIVATION == "gelu_tanh":  # (1 + tanh u) / 2 is the sigmoid of 2u
        g = h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    elif ACTIVATION == "gelu":
        g = 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    else:
        g = h * tl.sigmoid(h)
    place = image * TAPS * channels + channel
    if INHIBIT:
        # the mean over the taps of the mixed kernels is the mixture by the mean row
        square = tl.load(
            weight + tap[:, None] * TAPS + tap[None, :], mask=(tap < TAPS)[:, None] & (tap < TAPS)[None, :], other=0.0
        )
        mean = tl.sum((tl.sum(square, axis=0) / TAPS)[:, None] * g, axis=0)
        mean += tl.sum(tl.load(bias + tap, mask=tap < TAPS, other=0.0), axis=0) / TAPS
        taken = tl.sigmoid(tl.load(control + channel, mask=real, other=0.0)) * mean
    for target in tl.static_range(TAPS):
        row = tl.load(weight + target * TAPS + tap, mask=tap < TAPS, other=0.0)
        kernel = tl.sum(row[:, None] * g, axis=0) + tl.load(bias + target)
        tl.store(raw + place + target * channels, kernel, mask=real)
        if INHIBIT:
            tl.store(inhibited + place + target * channels, kernel - taken, mask=real)


INTERPRETED = not isinstance(_convolve, triton.JITFunction)
"""Whether this process runs the kernels in Triton's interpreter; decided when triton is imported."""


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type to accumulate in."""
    return torch.promote_types(dtype, torch.float32)


def _tl(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _channel_block(channels: int, item: int) -> int:
    """Channels of a tile: a cache line of 128 bytes, less where there are fewer."""
    return min(triton.next_power_of_2(channels), 128 // item)


def _pixel_block(height: int, width: int, programs: int) -> tuple[int, int]:
    """Rows and columns of a tile, of 128 pixels where ``programs`` of one pixel each are enough to fill the GPU."""
    columns = min((16, 8, 4), key=lambda size: triton.cdiv(width, size) * size)  # the first of the least wasteful
    pixels = 128
    while pixels > 32 and programs < PROGRAMS * pixels:
        pixels //= 2
    return min(pixels // columns, triton.next_power_of_2(height)), columns


@torch.library.custom_op("atconv::depthwise", mutates_args=())
def depthwise(v: torch.Tensor, kernels: torch.Tensor, flip: bool = False) -> torch.Tensor:
    """Zero-padded cross-correlation of every image and channel with its own k×k kernel.

    Args:
        v: values (B, H, W, C), any strides.
        kernels: (B, k², C) or (1, k², C), row-major taps, k odd, of any floating type.
        flip: take the taps in reverse order, which makes the transpose of the operation (a true convolution).

    Returns:
        (B, H, W, C), contiguous, in v's dtype.
    """
    batch, height, width, channels = v.shape
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if not out.numel():
        return out
    side = round(kernels.shape[1] ** 0.5)
    block = _channel_block(channels, v.element_size())
    per_pixel = batch * triton.cdiv(channels, block)
    rows, columns = _pixel_block(height, width, per_pixel * height * width)
    grid = (per_pixel * triton.cdiv(height, rows) * triton.cdiv(width, columns),)
    shared = kernels.shape[0] == 1
    with torch.cuda.device_of(v):
        _convolve[grid](
            v, kernels, out, height, width, channels,
            *v.stride(), 0 if shared else kernels.stride(0), kernels.stride(1), kernels.stride(2),
            SIDE=side, FLIP=flip, ROWS=rows, COLUMNS=columns, CHANNELS=block, WIDE=_tl(v.dtype),
            num_warps=8 if rows * columns >= 128 else 4,
        )  # fmt: skip
    return out


@depthwise.register_fake
def _(v, kernels, flip=False):
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


def _depthwise_context(ctx, inputs, output):
    v, kernels, ctx.flip = inputs
    ctx.save_for_backward(v, kernels)


def _depthwise_backward(ctx, grad):
    v, kernels = ctx.saved_tensors
    dv = dk = None
    if ctx.needs_input_grad[0]:
        dv = depthwise(grad, kernels, not ctx.flip)
    if ctx.needs_input_grad[1]:
        dk = depthwise_kernel_grad(v, grad, kernels.shape[1], kernels.shape[0] == 1)
        dk = (dk.flip(1) if ctx.flip else dk).to(kernels.dtype)
    return dv, dk, None


depthwise.register_autograd(_depthwise_backward, setup_context=_depthwise_context)


@torch.library.custom_op("atconv::depthwise_kernel_grad", mutates_args=())
def depthwise_kernel_grad(v: torch.Tensor, grad: torch.Tensor, taps: int, shared: bool) -> torch.Tensor:
    """The gradient of :func:`depthwise` by its kernels: k×k correlations of v with the incoming gradient.

    Args:
        v, grad: (B, H, W, C), any strides.
        taps: k².
        shared: sum over the images, for kernels (1, k², C).

    Returns:
        (B, k², C), or (1, k², C) when shared; float32, or float64 where v is.
    """
    batch, height, width, channels = v.shape
    wide, side = _wide(v.dtype), round(taps**0.5)
    if not v.numel():
        return torch.zeros(1 if shared else batch, taps, channels, dtype=wide, device=v.device)
    # the k² running sums of a program stay in registers: at most 4096 · 9 of them in 4 warps
    block = min(triton.next_power_of_2(channels), 64 if side <= 3 else 32)
    pixels = 16 if side <= 3 else 8 if side <= 5 else 4
    per_image = triton.cdiv(channels, block)
    chunks = max(1, min(triton.cdiv(PROGRAMS, batch * per_image), triton.cdiv(height * width, 4 * pixels)))
    chunks = max(chunks, triton.cdiv(height * width, 4096))  # a bound on a program's length, and on its rounding
    chunk = triton.cdiv(triton.cdiv(height * width, chunks), pixels) * pixels
    chunks = triton.cdiv(height * width, chunk)
    partial = torch.empty(batch, chunks, taps, channels, dtype=wide, device=v.device)
    with torch.cuda.device_of(v):
        _correlate[(batch * chunks * per_image,)](
            v, grad, partial, height, width, channels, chunks, chunk, *v.stride(), *grad.stride(),
            SIDE=side, PIXELS=pixels, CHANNELS=block, WIDE=_tl(v.dtype), num_warps=4,
        )  # fmt: skip
    return partial.sum((0, 1))[None] if shared else partial.sum(1)


@depthwise_kernel_grad.register_fake
def _(v, grad, taps, shared):
    return torch.empty(1 if shared else v.shape[0], taps, v.shape[3], dtype=_wide(v.dtype), device=v.device)


def _kernel_grad_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1])


def _kernel_grad_backward(ctx, upstream):
    v, grad = ctx.saved_tensors
    dv = depthwise(grad, upstream, True).to(v.dtype) if ctx.needs_input_grad[0] else None
    dg = depthwise(v, upstream).to(grad.dtype) if ctx.needs_input_grad[1] else None
    return dv, dg, None, None


depthwise_kernel_grad.register_autograd(_kernel_grad_backward, setup_context=_kernel_grad_context)


@torch.library.custom_op("atconv::pool", mutates_args=())
def pool(x: torch.Tensor, bins: int) -> torch.Tensor:
    """Adaptive average pooling over flattened tokens, (B, N, C) to (B, bins, C), in float32 (float64 for float64).

    Bin j is the mean of the tokens ⌊jN/bins⌋ … ⌈(j+1)N/bins⌉ − 1; x is read once, in its own dtype, and is not copied.
    """
    batch, tokens, channels = x.shape
    out = torch.empty(batch, bins, channels, dtype=_wide(x.dtype), device=x.device)
    if out.numel():
        block = _channel_block(channels, x.element_size())
        with torch.cuda.device_of(x):
            _average[(batch * bins * triton.cdiv(channels, block),)](
                x, out, tokens, channels, *x.stride(),
                BINS=bins, TOKENS=32, CHANNELS=block, WIDE=_tl(x.dtype), num_warps=4,
            )  # fmt: skip
    return out


@pool.register_fake
def _(x, bins):
    return torch.empty(x.shape[0], bins, x.shape[2], dtype=_wide(x.dtype), device=x.device)


def _pool_context(ctx, inputs, output):
    x, ctx.bins = inputs
    ctx.tokens, ctx.dtype = x.shape[1], x.dtype


def _pool_backward(ctx, grad):
    return unpool(grad, ctx.tokens, ctx.dtype), None


pool.register_autograd(_pool_backward, setup_context=_pool_context)


@torch.library.custom_op("atconv::unpool", mutates_args=())
def unpool(grad: torch.Tensor, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """The transpose of :func:`pool`: (B, bins, C) to (B, tokens, C) in ``dtype``."""
    batch, bins, channels = grad.shape
    out = torch.empty(batch, tokens, channels, dtype=dtype, device=grad.device)
    if out.numel():
        block = _channel_block(channels, out.element_size())
        with torch.cuda.device_of(grad):
            _spread[(batch * triton.cdiv(tokens, 64) * triton.cdiv(channels, block),)](
                grad, out, tokens, channels, *grad.stride(),
                BINS=bins, SPAN=min(bins, triton.cdiv(bins, tokens) + 1), TOKENS=64, CHANNELS=block,
                WIDE=_tl(grad.dtype), num_warps=4,
            )  # fmt: skip
    return out


@unpool.register_fake
def _(grad, tokens, dtype):
    return torch.empty(grad.shape[0], tokens, grad.shape[2], dtype=dtype, device=grad.device)


def _unpool_context(ctx, inputs, output):
    ctx.bins, ctx.dtype = inputs[0].shape[1], inputs[0].dtype


def _unpool_backward(ctx, upstream):
    return pool(upstream, ctx.bins).to(ctx.dtype), None, None


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
        Kernels (B, k², C) before and after inhibition, in the dtype of the weight; the second is empty, of shape (0,), without control.
    """
    batch, taps, channels = logits.shape
    raw = torch.empty(logits.shape, dtype=_wide(logits.dtype), device=logits.device)
    inhibited = torch.empty(0 if control is None else raw.shape, dtype=raw.dtype, device=raw.device)
    if raw.numel():
        room = triton.next_power_of_2(taps)
        block = min(triton.next_power_of_2(channels), 64 if room <= 32 else 32)
        weight, bias = weight.contiguous(), bias.contiguous()
        with torch.cuda.device_of(raw):
            _route[(batch * triton.cdiv(channels, block),)](
                logits, weight, bias, bias if control is None else control.contiguous(), raw, inhibited, channels,
                *logits.stride(), TAPS=taps, ROOM=room, CHANNELS=block, ACTIVATION=activation,
                INHIBIT=control is not None, WIDE=_tl(logits.dtype), num_warps=4,
            )  # fmt: skip
    return raw, inhibited


@route.register_fake
def _(logits, weight, bias, control, activation):
    raw = torch.empty(logits.shape, dtype=_wide(logits.dtype), device=logits.device)
    return raw, torch.empty(0 if control is None else raw.shape, dtype=raw.dtype, device=raw.device)


def _route_context(ctx, inputs, output):
    logits, weight, bias, control, ctx.activation = inputs
    ctx.save_for_backward(logits, weight, bias, control)


def _route_backward(ctx, grad_raw, grad_inhibited):
    """In plain torch: it works on k² rows an image."""
    narrow, weight, bias, control = ctx.saved_tensors
    logits = narrow.to(_wide(narrow.dtype))
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
    d_weight = torch.matmul(grad_raw, g.mT).sum(0)
    d_bias = grad_raw.sum((0, 2))
    d_g = torch.matmul(weight.mT, grad_raw)
    if ctx.activation == "silu":
        d_logits = torch.ops.aten.silu_backward(d_g, logits)
    else:
        d_logits = torch.ops.aten.gelu_backward(d_g, logits, approximate=approximate)
    return d_logits.to(narrow.dtype), d_weight, d_bias, d_control, None


route.register_autograd(_route_backward, setup_context=_route_context)
