"""Which of Accelerate's settings are refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from sit.distributed import check_settings, is_ddp
from sit.errors import UserError


def accelerator(device: str = "cuda", kind: str = "MULTI_GPU", fsdp2: bool = False, precision: str = "fp16"):
    return SimpleNamespace(
        device=torch.device(device),
        distributed_type=DistributedType(kind),
        is_fsdp2=fsdp2,
        mixed_precision=precision,
        num_processes=1 if kind == "NO" else 2,
    )


def test_fsdp1_is_refused():
    with pytest.raises(UserError, match="FSDP1 is not supported: set fsdp_version: 2"):
        check_settings(accelerator(kind="FSDP"))
    for settings in (accelerator(kind="FSDP", fsdp2=True), accelerator(), accelerator("cpu", "NO", precision="bf16")):
        check_settings(settings)


def test_several_processes_that_do_not_shard_are_ddp():
    kinds = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")
    assert [is_ddp(accelerator(kind=kind)) for kind in kinds] == [False, True, True, False]
