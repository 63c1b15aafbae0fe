"""Where a network computes, told from its weights or from the hooks that move them."""

from __future__ import annotations

import torch
from accelerate.hooks import CpuOffload, SequentialHook, add_hook_to_module, remove_hook_from_module

from sit.latents.vae import load_vae
from sit.utils.device import execution_device


def test_where_a_network_computes():
    """A device without data stands for the accelerator: nothing is computed there."""
    vae, there = load_vae("digits"), torch.device("meta")
    assert execution_device(vae) == torch.device("cpu")
    add_hook_to_module(vae, CpuOffload(there))  # enable_model_cpu_offload
    assert execution_device(vae) == there and vae.device == torch.device("cpu")
    remove_hook_from_module(vae)
    add_hook_to_module(vae.decoder, SequentialHook(CpuOffload(there)))
    assert execution_device(vae) == there
    remove_hook_from_module(vae, recurse=True)
    assert execution_device(vae) == torch.device("cpu")
    here = torch.device("cpu")
    vae.enable_group_offload(here, here, offload_type="leaf_level")  # which refuses a device without data
    for part in vae.modules():
        if hasattr(part, "_diffusers_hook"):
            part._diffusers_hook.get_hook("group_offloading").group.onload_device = there
    assert execution_device(vae) == there
