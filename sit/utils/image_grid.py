"""Labeled grids of images, as PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

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
    factor = max(1, 64 // min(height, width))
    height, width = height * factor, width * factor
    font = ImageFont.load_default(size=min(14, max(9, width // 5)))
    line = math.ceil(font.getbbox("Ag")[3]) + 2

    once = all(captions[i] == captions[i % columns] for i in range(count))
    below, above = (0, line) if once else (line, 0)
    cells = np.pad(enlarge(images, factor), ((0, 0), (0, below), (0, 0), (0, 0)), constant_values=255)
    grid = np.pad(
        tile(cells, columns, gap=MARGIN, fill=255), ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), constant_values=255
    )
    sheet = Image.fromarray(np.pad(grid, ((above, 0), (0, 0), (0, 0)), constant_values=255))
    draw = ImageDraw.Draw(sheet)
    for i, caption in enumerate(captions):
        x = MARGIN + (i % columns) * (width + MARGIN)
        y = MARGIN + above + (i // columns) * (height + below + MARGIN)
        if not once or i < columns:
            text_y = 1 if once else y + height
            draw.text((x + width / 2, text_y), _fit(caption, font, width), fill="black", font=font, anchor="ma")
    return sheet


def tile(cells: np.ndarray, columns: int, *, gap: int, fill: float) -> np.ndarray:
    """Lay cells (N, h, w, …) out row by row, ``gap`` pixels of ``fill`` between them.

    Returns:
        (rows·(h + gap) − gap, columns·(w + gap) − gap, …) of the cells' dtype; places without a cell are ``fill`` too.
    """
    count, height, width, *rest = cells.shape
    shape = (math.ceil(count / columns) * (height + gap) - gap, columns * (width + gap) - gap, *rest)
    sheet = np.full(shape, fill, dtype=cells.dtype)
    for number, cell in enumerate(cells):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        sheet[top : top + height, left : left + width] = cell
    return sheet


def enlarge(images: np.ndarray, factor: int) -> np.ndarray:
    """Images (N, H, W, …) with every pixel ``factor`` pixels wide and high."""
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def save_png(image: Image.Image, path: str | Path, **texts: str) -> None:
    """Write one PNG whole, or not at all; ``texts`` go into its text chunks by their names."""
    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
