"""Which device the commands run on, and as which of the launch's processes."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from sit.utils.errors import UserError, first_line


def pick_device(name: str | None = None) -> torch.device:
    """The device of that name; without a name, the accelerator if there is one, else the CPU.

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
        raise UserError(f"`device={name}` can't be used: {first_line(error)}") from error
    return device


def execution_device(network: Any) -> torch.device:
    """Where a network of diffusers computes, which under offloading is not where its weights are between calls.

    Accelerate's hooks (``enable_model_cpu_offload``, ``enable_sequential_cpu_offload``, ``cpu_offload``) and diffusers'
    (``enable_group_offload``) say it, as :attr:`diffusers.DiffusionPipeline._execution_device` reads it of a pipeline.

    Args:
        network: a :class:`diffusers.ModelMixin`.
    """
    for part in network.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if (device := getattr(one, "execution_device", None)) is not None:
                return torch.device(device)
        for one in getattr(getattr(part, "_diffusers_hook", None), "hooks", {}).values():
            if (device := getattr(getattr(one, "group", None), "onload_device", None)) is not None:
                return torch.device(device)
    return network.device


def process_state() -> PartialState:
    """This process among those of its launch, and its device.

    ``PartialState()`` by itself connects processes on accelerators only, and does not read ``ACCELERATE_USE_CPU``, by
    which ``accelerate launch --cpu`` asks for the CPU: the processes would be alone, each with all of the work.
    """
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or pick_device().type == "cpu"
    return PartialState(cpu=on_cpu)


def leave_processes() -> None:
    """Disconnect this process from the others of its launch, if it is connected to them, before it ends."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
