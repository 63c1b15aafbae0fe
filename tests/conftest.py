"""What several test modules need."""

from __future__ import annotations

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps its state in the process; each training run of a test starts without it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
