"""What training asks of Accelerate's settings, and how FSDP2 computes as DDP does in mixed precision."""

from __future__ import annotations

import dataclasses

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, get_mixed_precision_context_manager
from torch import nn

from sit.model import SiT
from sit.utils.errors import UserError


def compile_for_training(network: SiT, ddp: bool) -> None:
    """Compile the network in place, before DDP, if ``ddp``, wraps it."""
    if ddp and network.gradient_checkpointing:
        # Dynamo cuts graphs to overlap DDP's sums; in some versions it can't where they hold checkpoints, and raises
        torch._dynamo.config.optimize_ddp = False
    network.compile()


def check_settings(accelerator: Accelerator) -> None:
    """Refuse what would train differently from what it says.

    Raises:
        UserError: float16 on a CPU, which Accelerate ignores, or FSDP1, whose root can't be called for previews.
    """
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed-precision fp16 is for GPUs, and this is a CPU: use bf16 or no")
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError("FSDP1 is not supported: set fsdp_version: 2, as docs/accelerate/8gpus-fsdp2.yaml does")


def set_up_fsdp2(accelerator: Accelerator, network: nn.Module) -> None:
    """Under FSDP2 with mixed precision, gather weights in half precision and leave all else to autocast.

    Accelerate's policy also casts what enters the network, times among it, and sums gradients in half precision; and
    it puts the forward pass of all networks but sharded ones under autocast. To be called before it prepares this one.
    """
    if accelerator.is_fsdp2 and (policy := accelerator.state.fsdp_plugin.mixed_precision_policy) is not None:
        accelerator.state.fsdp_plugin.mixed_precision_policy = dataclasses.replace(
            policy, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
        )
        autocast = get_mixed_precision_context_manager(accelerator.native_amp, accelerator.autocast_handler)
        network.forward = autocast(network.forward)


def is_ddp(accelerator: Accelerator) -> bool:
    """Whether the network is prepared as ``DistributedDataParallel``."""
    return accelerator.num_processes > 1 and accelerator.distributed_type != DistributedType.FSDP
