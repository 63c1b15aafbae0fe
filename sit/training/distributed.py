"""The processes of a launch: what training asks of Accelerate's settings, and how FSDP2 computes as DDP does."""

from __future__ import annotations

import dataclasses

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, get_mixed_precision_context_manager
from torch import nn

from sit.model import SiT
from sit.training.config import TrainConfig
from sit.utils.device import process_state
from sit.utils.errors import UserError
from sit.utils.precision import allow_tf32
from sit.utils.threads import use_threads


def set_up_processes(config: TrainConfig) -> Accelerator:
    """Connect this process with the others of the launch, and set precision and CPU threads as ``config`` says.

    Raises:
        UserError: settings of Accelerate that training refuses, or a batch that can't be divided among the processes.
    """
    process_state()  # else Accelerate connects processes on CPUs only where ACCELERATE_USE_CPU is set
    # DDP waits for the gradients of all parameters, and the projector gets none once the alignment has ended
    ends = [] if config.repa_until is None else [DistributedDataParallelKwargs(find_unused_parameters=True)]
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        kwargs_handlers=ends,
        gradient_accumulation_steps=config.gradient_accumulation,
        step_scheduler_with_optimizer=False,
    )
    if accelerator.gradient_accumulation_steps != config.gradient_accumulation:
        raise UserError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={accelerator.gradient_accumulation_steps} in the environment "
            f"outweighs `gradient_accumulation={config.gradient_accumulation}`: unset it"
        )
    check_settings(accelerator, config.optimizer)
    allow_tf32(accelerator.device, config.tf32)
    if accelerator.device.type == "cpu":
        use_threads(config.cpu_threads)
    parts = accelerator.num_processes * config.gradient_accumulation
    if config.batch_size % parts:
        raise UserError(
            f"`batch_size={config.batch_size}` can't be divided among {accelerator.num_processes} processes "
            f"x {config.gradient_accumulation} micro-batches: make it a multiple of {parts}"
        )
    return accelerator


def compile_for_training(network: SiT, ddp: bool) -> None:
    """Compile the network in place, before DDP, if ``ddp``, wraps it."""
    if ddp and network.gradient_checkpointing:
        # Dynamo cuts graphs to overlap DDP's sums; in some versions it can't where they hold checkpoints, and raises
        torch._dynamo.config.optimize_ddp = False
    network.compile()


def check_settings(accelerator: Accelerator, optimizer: str = "adamw") -> None:
    """Raise UserError unless Accelerate trains as its settings say and previews can be made.

    It ignores float16 on a CPU; and the root of an FSDP1 network can't be called for previews. Muon of sharded matrices
    sums them in bfloat16, shard by shard, and what it makes of their small parts is another than on one process.
    """
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("`mixed_precision=fp16` is for GPUs, and this is a CPU: use bf16 or no")
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError("FSDP1 is not supported: set fsdp_version: 2, as docs/accelerate/8gpus-fsdp2.yaml does")
    if optimizer == "muon" and accelerator.is_fsdp2:
        raise UserError("`optimizer=muon` is not for sharded weights (FSDP2): use adamw, or DDP")


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
