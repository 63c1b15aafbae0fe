"""Which device the doors run on."""

from __future__ import annotations

import torch

from sit.errors import UserError


def pick_device(name: str | None = None) -> torch.device:
    """The device that ``--device`` names; without a name, the accelerator if there is one, else the CPU.

    Raises:
        UserError: the name is unknown or the device is not there.
    """
    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} can't be used: {str(error).splitlines()[0]}") from error
    return device
