"""Shares by class against Wilson's formula."""

from __future__ import annotations

import numpy as np
import pytest

from sit.metrics.by_class import shares_by_class


def test_the_worst_class_is_first_with_wilsons_interval():
    labels = np.array([2] * 50 + [0] * 40 + [7] * 10)
    hits = np.concatenate([np.arange(50) < 45, np.arange(40) < 12, np.arange(10) < 9])
    found = shares_by_class(hits, labels)
    assert [(one.label, one.count, one.share) for one in found] == [(0, 40, 0.3), (2, 50, 0.9), (7, 10, 0.9)]
    for one in found:
        n, p, z = one.count, one.share, 1.959964
        center, reach = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        assert one.low == pytest.approx((center - reach) / (1 + z**2 / n), rel=1e-5)
        assert one.high == pytest.approx((center + reach) / (1 + z**2 / n), rel=1e-5)
