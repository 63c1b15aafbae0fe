"""Labeled grids of images, as PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sit.utils.files import atomic_write

MARGIN = 4


def labeled_grid(images: np.ndarray, captions: Sequence[str], columns: int | None = None) -> Image.Image:
    """Lay images out in rows, each with its caption below it.

    Args:
        images: (N, H, W, 3) uint8. Images under 64 pixels are enlarged by a whole factor, without smoothing.
        captions: N short texts; the same text in a whole column is written once, above it.
        columns: images a row; None makes the grid about square.
    """
    count, height, width = images.shape[:3]
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    enlarge = max(1, 64 // min(height, width))
    height, width = height * enlarge, width * enlarge
    font = ImageFont.load_default(size=min(14, max(9, width // 5)))
    line = font.getbbox("Ag")[3] + 2

    once = all(captions[i] == captions[i % columns] for i in range(count))
    cell_height = height + MARGIN + (0 if once else line)
    top = MARGIN + (line if once else 0)
    sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, top + rows * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x = MARGIN + (i % columns) * (width + MARGIN)
        y = top + (i // columns) * cell_height
        sheet.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (x, y))
        if not once or i < columns:
            text_y = 1 if once else y + height
            draw.text((x + width / 2, text_y), _fit(caption, font, width), fill="black", font=font, anchor="ma")
    return sheet


def _fit(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def save_png(image: Image.Image, path: str | Path) -> None:
    """Write one PNG whole, or not at all."""
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG")
