"""What ``python -m sit.demo`` takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from sit.utils.threads import CpuThreads


@dataclass
class Arguments:
    """Open a page that samples from one run, or from two side by side."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """one or two: a run's folder (its newest complete checkpoint), a checkpoint's folder, or a published .pt file"""
    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 lets other machines in"""
    port: int | None = None
    """None takes a free one from 7860 on"""
    share: bool = False
    """also make a public link, through Gradio's servers"""
    open: bool = True
    """open the page in the browser"""
    image_size: tuple[int, int] | None = None
    """height and width; None as the network was trained"""
    vae: str | None = None
    """a VAE's name on the Hub or folder, instead of the checkpoints' own"""
    device: str | None = None
    """None takes the accelerator, if there is one"""
    threads: Annotated[CpuThreads, tyro.conf.OmitArgPrefixes] = field(default_factory=CpuThreads)
