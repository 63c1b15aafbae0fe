"""The commands ``python -m sit.latents encode``, ``verify`` and ``measure``."""

from __future__ import annotations

from typing import Annotated

import tyro

from sit.latents.arguments import Encode, Measure, Verify
from sit.utils.cli import parse
from sit.utils.errors import entry_point

COMMANDS = (
    Annotated[Encode, tyro.conf.subcommand("encode")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Measure, tyro.conf.subcommand("measure")]
)


def verified(config: Verify) -> str:
    """Verify a cache; what to print."""
    from sit.latents.encode import verify

    figures = verify(config)
    return f"{config.cache}: {figures['compared']} entries compared, worst difference {figures['worst']:.2g}"


def measured(config: Measure) -> str:
    """Measure latents; what to print."""
    from sit.latents.measure import constants, measure

    mean, deviation = measure(config)
    advice = constants(config.vae, mean, deviation)
    return f"mean {mean:.4f}, standard deviation {deviation:.4f}; unit spread: {advice}"


def encoded(config: Encode) -> str | None:
    """Encode a data set; what the main process prints."""
    from sit.latents.cache import CachedLatents
    from sit.latents.encode import encode
    from sit.utils.device import process_state

    out = encode(config)
    if not process_state().is_main_process:
        return None
    made = CachedLatents(out).manifest
    flags = f"--data {out} --vae {config.vae} --image-size {made.image_size}" + " --flip" * made.flipped
    return f"latents of {made.count:,} images in {out}; train on them with: {flags}"


@entry_point
def main() -> None:
    config = parse(COMMANDS, "python -m sit.latents", description=__doc__)
    from sit.utils.device import leave_processes  # heavy imports come once the flags are parsed

    config.threads.use()
    try:
        said = {Verify: verified, Measure: measured, Encode: encoded}[type(config)](config)
        if said is not None:
            print(said)
    finally:
        leave_processes()
