"""TF32 and bfloat16: what is set on which device, and what is put back."""

from __future__ import annotations

import pytest
import torch

from sit.utils.errors import UserError
from sit.utils.precision import allow_tf32, for_sampling, full_float32

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def as_before():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision, dtype, products", [
    (None, None, "high"), ("tf32", torch.float32, "high"),
    ("float32", torch.float32, "highest"), ("bfloat16", torch.bfloat16, "highest"),
])  # fmt: skip
def test_sampling_on_a_gpu(precision, dtype, products):
    assert for_sampling(precision, GPU) == dtype and torch.get_float32_matmul_precision() == products


def test_a_cpu_is_left_as_it_is():
    torch.set_float32_matmul_precision("highest")
    allow_tf32(CPU)
    assert for_sampling(None, CPU) is None and torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(UserError, match="`precision=tf32` is for GPUs"):
        for_sampling("tf32", CPU)


def test_full_precision_within_and_the_same_after():
    allow_tf32(GPU)
    cudnn = torch.backends.cudnn
    before = cudnn.enabled, cudnn.benchmark, cudnn.allow_tf32
    assert cudnn.allow_tf32  # PyTorch's default for convolutions
    with pytest.raises(KeyError), full_float32():
        assert torch.get_float32_matmul_precision() == "highest" and not cudnn.allow_tf32
        assert cudnn.enabled == before[0]
        raise KeyError
    assert torch.get_float32_matmul_precision() == "high"
    assert (cudnn.enabled, cudnn.benchmark, cudnn.allow_tf32) == before
