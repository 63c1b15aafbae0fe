"""The depthwise convolution of each image with its own kernels, its derivatives, and their kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atconv.triton.launch import programs, tile, triton_dtype, wide_dtype


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


INTERPRETED = not isinstance(_convolve, triton.JITFunction)
"""Whether this process runs the kernels in Triton's interpreter; decided when triton is imported."""


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
    options = tile(batch, height, width, channels, side=side, item=v.element_size())
    v_image, v_row, v_column, v_channel = v.stride()
    k_image, k_tap, k_channel = kernels.stride()
    with torch.cuda.device_of(v):
        _convolve[(programs(v, options),)](
            v, kernels, out, v_image, v_channel, 0 if kernels.shape[0] == 1 else k_image, k_tap, k_channel,
            v_row=v_row, v_column=v_column, height=height, width=width, channels=channels,
            SIDE=side, FLIP=flip, WIDE=triton_dtype(v.dtype), **options,
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
    wide, side = wide_dtype(v.dtype), round(taps**0.5)
    if not v.numel():
        return torch.zeros(1 if shared else batch, taps, channels, dtype=wide, device=v.device)
    options = tile(batch, height, width, channels, side=side, item=v.element_size())
    tiles = triton.cdiv(height, options["ROWS"]) * triton.cdiv(width, options["COLUMNS"])
    partial = torch.empty(batch, tiles, taps, channels, dtype=wide, device=v.device)
    v_image, v_row, v_column, v_channel = v.stride()
    g_image, g_row, g_column, g_channel = grad.stride()
    with torch.cuda.device_of(v):
        _correlate[(programs(v, options),)](
            v, grad, partial, v_image, v_channel, g_image, g_channel,
            v_row=v_row, v_column=v_column, g_row=g_row, g_column=g_column,
            height=height, width=width, channels=channels, SIDE=side, WIDE=triton_dtype(v.dtype), **options,
        )  # fmt: skip
    return partial.sum((0, 1))[None] if shared else partial.sum(1)


@depthwise_kernel_grad.register_fake
def _(v, grad, taps, shared):
    return torch.empty(1 if shared else v.shape[0], taps, v.shape[3], dtype=wide_dtype(v.dtype), device=v.device)


def _kernel_grad_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1])


def _kernel_grad_backward(ctx, upstream):
    v, grad = ctx.saved_tensors
    dv = depthwise(grad, upstream, True).to(v.dtype) if ctx.needs_input_grad[0] else None
    dg = depthwise(v, upstream).to(grad.dtype) if ctx.needs_input_grad[1] else None
    return dv, dg, None, None


depthwise_kernel_grad.register_autograd(_kernel_grad_backward, setup_context=_kernel_grad_context)
