"""Which of Accelerate's settings are refused, and how processes on a CPU are connected."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from sit.training.config import TrainConfig
from sit.training.distributed import check_settings, is_ddp, set_up_processes
from sit.utils.device import leave_processes, process_state
from sit.utils.errors import UserError


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


def test_muon_of_sharded_weights_is_refused():
    with pytest.raises(UserError, match=r"`optimizer=muon` is not for sharded weights \(FSDP2\): use adamw, or DDP"):
        check_settings(accelerator(kind="FSDP", fsdp2=True), "muon")
    check_settings(accelerator(), "muon")


def test_several_processes_that_do_not_shard_are_ddp():
    kinds = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")
    assert [is_ddp(accelerator(kind=kind)) for kind in kinds] == [False, True, True, False]


@pytest.mark.parametrize("asked, there", [("true", "cuda"), ("true", None), ("false", None), (None, None)])
def test_processes_on_a_cpu_are_connected(fresh_accelerate, monkeypatch, asked, there):
    """The flag of ``accelerate launch --cpu`` counts whether there is an accelerator or not, which here is claimed."""
    found = torch.device(there) if there else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
    launched = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "OMP_NUM_THREADS": 1}
    for name, value in (launched | {"MASTER_ADDR": "localhost", "MASTER_PORT": 0}).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if asked is not None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", asked)
    try:
        state = process_state()
        assert torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo"
        assert state.device.type == "cpu" and state.num_processes == 1
        assert process_state().process_index == 0
    finally:
        leave_processes()
    assert not torch.distributed.is_initialized()


def test_accumulation_that_the_environment_asks_for_is_refused(fresh_accelerate, monkeypatch):
    """Accelerate would heed it instead of the run's, and leave optimizer steps out."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    with pytest.raises(UserError, match="ACCUMULATION_STEPS=3 .*`gradient_accumulation=1`: unset it"):
        set_up_processes(TrainConfig())


def test_ddp_is_told_that_the_projector_may_end(fresh_accelerate):
    """It would wait for gradients that don't come; it looks for such parameters only where they are to be expected."""
    assert set_up_processes(TrainConfig(cpu_threads=1, repa="an/encoder")).ddp_handler is None
    AcceleratorState._reset_state(reset_partial_state=True)
    ends = set_up_processes(TrainConfig(cpu_threads=1, repa="an/encoder", repa_until=2))
    assert ends.ddp_handler.find_unused_parameters


def test_a_process_that_no_launcher_started_is_alone(fresh_accelerate, monkeypatch):
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    state = process_state()
    assert state.num_processes == 1 and state.is_main_process and state.device == torch.device("cpu")
    assert not torch.distributed.is_initialized()
    leave_processes()
