"""The kernels that a block's mixer makes for one state of a sampling, as numbers and as an image.

A mixer has kernels if it has a method ``kernels(x)`` that answers tokens x (B, N, C) with two tensors (B, k², C): the
kernels before and after inhibition, taps in row-major order (ATConv's).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from sit.model import SiT
from sit.utils.errors import UserError, first_line
from sit.utils.image_grid import enlarge, tile

SIDE = 8
"""channels along a side of the image's tile grid"""


def mixer_input(model: SiT, x: torch.Tensor, t: float, label: int, block: int) -> torch.Tensor:
    """The tokens (1, N, C) that the mixer of ``block`` is given when the network sees the state x (C, h, w) at time t.

    The network runs once, with the label and without guidance.

    Raises:
        UserError: the network has no such block.
    """
    if not 0 <= block < len(model.blocks):
        raise UserError(f"there is no block {block}: this network has the blocks 0 to {len(model.blocks) - 1}")
    seen: list[torch.Tensor] = []
    hook = model.blocks[block].attn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            state = x[None].to(device, model.dtype)
            model(state, torch.full((1,), t, device=device), torch.tensor([label], device=device))
    finally:
        hook.remove()
    return seen[0]


def kernels_at(
    model: SiT, x: torch.Tensor, t: float, label: int, block: int
) -> tuple[torch.Tensor, torch.Tensor] | str:
    """The kernels (k², C) of a block before and after inhibition; or a sentence, if its mixer has none.

    Args:
        x: (C, h, w) a state of the sampling.
        t: its time.
        label: the class.
        block: the block's number, from 0.

    Raises:
        UserError: the network has no such block.
    """
    tokens = mixer_input(model, x, t, label, block)
    mixer = model.blocks[block].attn
    if not hasattr(mixer, "kernels"):
        return f"Block {block} mixes its tokens by {type(mixer).__name__}, which has no kernels to show."
    try:
        with torch.no_grad():
            raw, inhibited = mixer.kernels(tokens)
    except ValueError as error:
        return f"Block {block} has no kernels to show: {first_line(error)}."
    return raw[0].float().cpu(), inhibited[0].float().cpu()


def tiles(kernels: torch.Tensor, side: int = SIDE, tap: int = 1, gap: int = 1) -> np.ndarray:
    """Lay the kernels (k², C) of the first side² channels out, tap² pixels a tap, with gaps of NaN between them.

    Returns:
        (rows·(k·tap + gap) − gap, side·(k·tap + gap) − gap) float, channel 0 at the top left, row by row.
    """
    k = math.isqrt(len(kernels))
    squares = kernels.T[: side**2].reshape(-1, k, k).double().numpy()
    return tile(enlarge(squares, tap), side, gap=gap, fill=np.nan)


def draw_kernels(raw: torch.Tensor, inhibited: torch.Tensor, title: str) -> Image.Image:
    """The image of kernels (k², C) before and after inhibition, in one scale that is symmetric around zero.

    The scale ends at the 98th percentile of what is shown, so that a few taps don't pale all others.
    """
    panels = [tiles(kernels, tap=6, gap=2) for kernels in (raw, inhibited)]
    sizes = np.abs(np.concatenate([panel.ravel() for panel in panels]))
    limit = float(np.nanpercentile(sizes, 98)) or 1.0
    figure = Figure(figsize=(10, 5.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)  # matplotlib's pyplot is not made for threads
    figure.get_layout_engine().set(wspace=0.06)
    figure.suptitle(title, fontsize=12)
    colors = colormaps["RdBu_r"].with_extremes(bad="0.7")
    axes = figure.subplots(1, 2)
    for place, panel, name in zip(axes, panels, ("before inhibition", "after inhibition"), strict=True):
        drawn = place.imshow(panel, cmap=colors, vmin=-limit, vmax=limit, interpolation="nearest")
        place.set_title(name, fontsize=11)
        place.set_xticks([])
        place.set_yticks([])
        for spine in place.spines.values():
            spine.set_visible(False)
    figure.colorbar(drawn, ax=axes, shrink=0.85, extend="both", label="weight of a tap: red adds, blue subtracts")
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


def describe_kernels(raw: torch.Tensor, inhibited: torch.Tensor) -> str:
    """One sentence: what inhibition did to the kernels (k², C)."""
    if torch.equal(raw, inhibited):
        return "This block has no inhibition: the two images are the same."
    share = 1 - inhibited.mean(0).abs().mean() / raw.mean(0).abs().mean()
    return (
        f"A kernel's mean tap is {raw.mean(0).abs().mean():.3g} in size before inhibition and "
        f"{inhibited.mean(0).abs().mean():.3g} after ({share:.0%} taken away); means over all {raw.shape[1]} channels."
    )
