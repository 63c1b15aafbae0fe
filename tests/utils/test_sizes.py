"""Sizes and the quiet Hub."""

from __future__ import annotations

import logging
import warnings

import pytest

from sit.utils.hub import quiet_hub
from sit.utils.sizes import size_text


@pytest.mark.parametrize(
    "size, text",
    [(0, "0 B"), (999, "999 B"), (1000, "1 KB"), (204_800, "205 KB"), (42e9, "42 GB"), (10.84e9, "10.8 GB"),
     (1.5e12, "1.5 TB"), (5e15, "5000 TB")],
)  # fmt: skip
def test_sizes(size, text):
    assert size_text(size) == text


def test_the_hubs_warnings_are_not_shown_and_come_back(caplog):
    logger = logging.getLogger("huggingface_hub.utils")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with quiet_hub():
            logger.warning("an attempt failed")
            warnings.warn_explicit("an argument is old", UserWarning, "hub.py", 1, module="huggingface_hub.utils")
        assert not caplog.messages and not shown
        logger.warning("an attempt failed")
        warnings.warn_explicit("an argument is old", UserWarning, "hub.py", 1, module="huggingface_hub.utils")
    assert caplog.messages == ["an attempt failed"] and len(shown) == 1
