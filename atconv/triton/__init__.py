"""ATConv's hot spots as Triton kernels: the per-image depthwise convolution, and the small branch that makes kernels.

Everything is in the token layout, channels last, takes any strides, accumulates in float32 (float64 for float64) and is
deterministic: no atomics, and tilings that depend on shapes alone. The operators are registered in the namespace
``atconv::`` with shapes for tracing and with derivatives (of any order), so that ``torch.compile``, autocast,
checkpointing and data parallelism see ordinary operators. They are opaque ``custom_op``, not ``triton_op``: the latter
refuses kernels that run in Triton's interpreter, which is how the tests run them.

Shapes and strides inside an image are compile-time constants, which turns bounds and addresses into constants too: an
image size that is new is compiled once, in about a second.

The kernels have been run through the interpreter (``TRITON_INTERPRET=1``) and compiled for Hopper (sm_90); they have
not been run on a GPU, so the tile sizes come from the machine code (``benchmarks/machine_code.py``), not from timings.
"""

from __future__ import annotations

from atconv.triton.convolution import INTERPRETED, depthwise, depthwise_kernel_grad
from atconv.triton.kernel_branch import pool, route, unpool

__all__ = ["INTERPRETED", "depthwise", "depthwise_kernel_grad", "pool", "route", "unpool"]
