"""ATConv's hot spots as Triton kernels: the per-image depthwise convolution, and the small branch that makes kernels.

Everything is in the token layout, channels last, takes any strides, accumulates in float32 (float64 for float64) and is
deterministic: no atomics, and tilings that depend on shapes alone. The operators are registered in the namespace
``atconv::`` with shapes for tracing and with derivatives (of any order), so that ``torch.compile``, autocast,
checkpointing and data parallelism see ordinary operators. They are opaque ``custom_op``, not ``triton_op``: the latter
refuses kernels that run in Triton's interpreter, which is how the tests run them.

Shapes and strides inside an image are compile-time constants, which turns bounds and addresses into constants too: an
image size that is new is compiled once, in about a second.

The kernels have been run through the interpreter (``TRITON_INTERPRET=1``) and compiled for Hopper (sm_90); they have
not been run on a GPU, so the tile sizes come from the machine code (``benchmarks/machine_code.py``), not from timings.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PROGRAMS = 512  # enough to keep a GPU of 132 multiprocessors busy


@triton.jit
def _seen(
    v,
    top,
    column,
    real,
    down: tl.constexpr,
    right: tl.constexpr,
    v_row: tl.constexpr,
    v_column: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
):
    """The values (COLUMNS, CHANNELS) so far down and to the right of a tile's top row; zero outside of the image."""
    row, place = top + down, column + right
    inside = (place >= 0) & (place < width) & (row >= 0) & (row < height)
    return tl.load(v + (down * v_row + right * v_column), mask=inside[:, None] & real[None, :], other=0.0)


@triton.jit
def _convolve(
    v,
    kernels,
    out,
    v_image,
    v_channel,
    k_image,
    k_tap,
    k_channel,
    v_row: tl.constexpr,
    v_column: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    channels: tl.constexpr,
    SIDE: tl.constexpr,
    FLIP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: ROWS × COLUMNS pixels × CHANNELS of one image.

    It goes down the rows and keeps the sums of the SIDE rows of output that a row of input adds to, so that each value
    is loaded once for every column of the kernel, and each tap once.
    """
    MARGIN: tl.constexpr = SIDE // 2
    channel_tiles: tl.constexpr = (channels + CHANNELS - 1) // CHANNELS
    column_tiles: tl.constexpr = (width + COLUMNS - 1) // COLUMNS
    tiles: tl.constexpr = column_tiles * ((height + ROWS - 1) // ROWS)
    program = tl.program_id(0)
    tile = program // channel_tiles % tiles
    image = (program // channel_tiles // tiles).to(tl.int64)
    channel = program % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    first = tile // column_tiles * ROWS
    column = tile % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    top = first + tl.zeros([COLUMNS], dtype=tl.int32)  # the interpreter can't join a scalar's mask with a tensor's
    real = channel < channels
    wide_column, wide_channel = column.to(tl.int64)[:, None], channel.to(tl.int64)
    v += image * v_image + first.to(tl.int64) * v_row + wide_column * v_column + (wide_channel * v_channel)[None, :]
    kernels += image * k_image + wide_channel * k_channel
    out += (image * height + first) * width * channels + wide_column * channels + wide_channel[None, :]
    taps = ()
    for tap in tl.static_range(SIDE * SIDE):
        source = SIDE * SIDE - 1 - tap if FLIP else tap
        taps = taps + (tl.load(kernels + source * k_tap, mask=real, other=0.0).to(WIDE)[None, :],)
    zero = tl.zeros([COLUMNS, CHANNELS], dtype=WIDE)
    sums = (zero,) * SIDE  # of output rows step - (SIDE - 1) … step of the tile
    for step in tl.static_range(ROWS + SIDE - 1):
        for shift in tl.static_range(SIDE):
            value = _seen(v, top, column, real, step - MARGIN, shift - MARGIN, v_row, v_column, height, width).to(WIDE)
            added = ()
            for line in tl.static_range(SIDE):
                added = added + (sums[line] + taps[(SIDE - 1 - line) * SIDE + shift] * value,)
            sums = added
        if step >= SIDE - 1:
            done = step - (SIDE - 1)
            inside = (top + done < height) & (column < width)
            result = sums[0].to(out.dtype.element_ty)
            tl.store(out + done * width * channels, result, mask=inside[:, None] & real[None, :])
        moved = ()
        for line in tl.static_range(SIDE - 1):
            moved = moved + (sums[line + 1],)
        sums = moved + (zero,)


@triton.jit
def _correlate(
    v,
    grad,
    out,
    v_image,
    v_channel,
    g_image,
    g_channel,
    v_row: tl.constexpr,
    v_column: tl.constexpr,
    g_row: tl.constexpr,
    g_column: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    channels: tl.constexpr,
    SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: the k² sums over ROWS × COLUMNS pixels of one image, for CHANNELS channels.

    It goes down the rows and keeps the SIDE rows of the gradient that a row of values is multiplied with; every tap
    has COLUMNS running sums a channel in registers, which are added up at the end.
    """
    MARGIN: tl.constexpr = SIDE // 2
    channel_tiles: tl.constexpr = (channels + CHANNELS - 1) // CHANNELS
    column_tiles: tl.constexpr = (width + COLUMNS - 1) // COLUMNS
    tiles: tl.constexpr = column_tiles * ((height + ROWS - 1) // ROWS)
    program = tl.program_id(0)
    part = program // channel_tiles  # image * tiles + its tile
    tile = part % tiles
    image = (part // tiles).to(tl.int64)
    channel = program % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    first = tile // column_tiles * ROWS
    column = tile % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    top = first + tl.zeros([COLUMNS], dtype=tl.int32)  # as above
    real = channel < channels
    wide_row, wide_column, wide_channel = first.to(tl.int64), column.to(tl.int64)[:, None], channel.to(tl.int64)
    v += image * v_image + wide_row * v_row + wide_column * v_column + (wide_channel * v_channel)[None, :]
    grad += image * g_image + wide_row * g_row + wide_column * g_column + (wide_channel * g_channel)[None, :]
    zero = tl.zeros([COLUMNS, CHANNELS], dtype=WIDE)
    sums = (zero,) * (SIDE * SIDE)
    lines = (zero,) * SIDE  # of the gradient's rows step … step - (SIDE - 1) of the tile
    for step in tl.static_range(ROWS + SIDE - 1):
        newest = zero
        if step < ROWS:
            inside = (top + step < height) & (column < width)
            newest = tl.load(grad + step * g_row, mask=inside[:, None] & real[None, :], other=0.0).to(WIDE)
        moved = (newest,)
        for line in tl.static_range(SIDE - 1):
            moved = moved + (lines[line],)
        lines = moved
        for shift in tl.static_range(SIDE):
            value = _seen(v, top, column, real, step - MARGIN, shift - MARGIN, v_row, v_column, height, width).to(WIDE)
            added = ()
            for tap in tl.static_range(SIDE * SIDE):
                if tap % SIDE == shift and step >= tap // SIDE and step < tap // SIDE + ROWS:
                    added = added + (sums[tap] + lines[tap // SIDE] * value,)
                else:
                    added = added + (sums[tap],)
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


INTERPRETED = not isinstance(_convolve, triton.JITFunction)
"""Whether this process runs the kernels in Triton's interpreter; decided when triton is imported."""


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type to accumulate in."""
    return torch.promote_types(dtype, torch.float32)


def _tl(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def channel_block(channels: int, item: int) -> int:
    """Channels of a tile: a cache line of 128 bytes, less where there are fewer."""
    return min(triton.next_power_of_2(channels), 128 // item)


def tile(batch: int, height: int, width: int, channels: int, side: int, item: int) -> dict[str, int]:
    """ROWS, COLUMNS, CHANNELS and num_warps for values (B, H, W, C) of ``item`` bytes and kernels side × side.

    The widest tiles that leave the GPU enough programs, of which the least is in vain: outside the image, or seen by
    two programs. A thread has few enough channels for its k² taps, or sums, to stay in registers.
    """
    vector = 4 if side <= 5 else 2 if side == 7 else 1
    block = min(channel_block(channels, item), 32 * vector if side <= 5 else 8 * vector)

    def waste(length: int, size: int) -> int:
        return triton.cdiv(length, size) * (size + side - 1)

    columns = min((16, 8, 4), key=lambda size: waste(width, size))
    strips = batch * triton.cdiv(channels, block) * triton.cdiv(width, columns)
    fitting = [
        rows for rows in (16, 8, 4) if (side <= 3 or rows <= 8) and strips * triton.cdiv(height, rows) >= PROGRAMS
    ]
    rows = min(fitting, key=lambda size: waste(height, size), default=2)
    warps = max(1, min(8, columns * block // (32 * vector)))
    return {"ROWS": rows, "COLUMNS": columns, "CHANNELS": block, "num_warps": warps}


def _programs(v: torch.Tensor, options: dict[str, int]) -> int:
    batch, height, width, channels = v.shape
    tiles = triton.cdiv(height, options["ROWS"]) * triton.cdiv(width, options["COLUMNS"])
    return batch * tiles * triton.cdiv(channels, options["CHANNELS"])


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
    options = tile(batch, height, width, channels, side, v.element_size())
    v_image, v_row, v_column, v_channel = v.stride()
    k_image, k_tap, k_channel = kernels.stride()
    with torch.cuda.device_of(v):
        _convolve[(_programs(v, options),)](
            v, kernels, out, v_image, v_channel, 0 if kernels.shape[0] == 1 else k_image, k_tap, k_channel,
            v_row=v_row, v_column=v_column, height=height, width=width, channels=channels,
            SIDE=side, FLIP=flip, WIDE=_tl(v.dtype), **options,
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
    options = tile(batch, height, width, channels, side, v.element_size())
    tiles = triton.cdiv(height, options["ROWS"]) * triton.cdiv(width, options["COLUMNS"])
    partial = torch.empty(batch, tiles, taps, channels, dtype=wide, device=v.device)
    v_image, v_row, v_column, v_channel = v.stride()
    g_image, g_row, g_column, g_channel = grad.stride()
    with torch.cuda.device_of(v):
        _correlate[(_programs(v, options),)](
            v, grad, partial, v_image, v_channel, g_image, g_channel,
            v_row=v_row, v_column=v_column, g_row=g_row, g_column=g_column,
            height=height, width=width, channels=channels, SIDE=side, WIDE=_tl(v.dtype), **options,
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
                BINS=bins, TOKENS=32, CHANNELS=block, WIDE=_tl(x.dtype), num_warps=1,
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
                WIDE=_tl(grad.dtype), num_warps=4,
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
    raw = torch.empty(logits.shape, dtype=_wide(logits.dtype), device=logits.device)
    inhibited = torch.empty(0 if control is None else raw.shape, dtype=raw.dtype, device=raw.device)
    if raw.numel():
        block = min(triton.next_power_of_2(channels), 128)
        weight, bias = weight.contiguous(), bias.contiguous()
        with torch.cuda.device_of(raw):
            _route[(batch * triton.cdiv(channels, block),)](
                logits, weight, bias, bias if control is None else control.contiguous(), raw, inhibited,
                *logits.stride(), channels=channels, TAPS=taps, CHANNELS=block, ACTIVATION=activation,
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
    """In plain torch: it works on k² rows an image. Autocast may be on where the backward pass is traced."""
    with torch.autocast(grad_raw.device.type, enabled=False):
        return _route_gradients(ctx, grad_raw, grad_inhibited)


def _route_gradients(ctx, grad_raw, grad_inhibited):
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
    d_weight = torch.bmm(grad_raw, g.mT).sum(0)
    d_bias = grad_raw.sum((0, 2))
    d_g = torch.bmm(weight.mT.expand(len(g), -1, -1), grad_raw)  # matmul would leave it transposed
    if ctx.activation == "silu":
        d_logits = torch.ops.aten.silu_backward(d_g, logits)
    else:
        d_logits = torch.ops.aten.gelu_backward(d_g, logits, approximate=approximate)
    return d_logits.to(narrow.dtype), d_weight, d_bias, d_control, None


route.register_autograd(_route_backward, setup_context=_route_context)
