"""Jackknife groups and errors against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from sit.metrics.estimate import Estimate, half_width, jackknife, jackknife_groups, of_mean

rng = np.random.default_rng(0)


def test_the_error_of_a_mean_is_that_of_the_group_means():
    values, group = rng.normal(size=200), np.arange(200) % 10
    found = of_mean(values, group)
    means = np.array([values[group == number].mean() for number in range(10)])
    np.testing.assert_allclose(found.replicates, means)
    assert found.value == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(means.std(ddof=1) / np.sqrt(10))
    assert found.error == pytest.approx(2.262157 * found.standard_error)  # t of 9 degrees of freedom, from a table
    assert of_mean(values, None) == Estimate(pytest.approx(values.mean()))


def test_half_width_by_hand():
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / np.sqrt(3))


def test_a_bias_of_one_over_n_is_found_whatever_the_sizes():
    sizes = np.array([10, 20, 30, 40])
    with_bias = lambda n: 3 + 7 / n  # noqa: E731
    found = jackknife(with_bias(100), with_bias(100 - sizes), sizes)
    assert found.value == pytest.approx(3.07) and found.bias == pytest.approx(0.07)


def test_unequal_groups_have_the_error_of_equal_ones():
    """The mean of 1,000 numbers, whose error is known."""
    group = np.repeat(np.arange(10), [40, 160] * 5)
    found = [of_mean(rng.normal(size=1000), group).standard_error ** 2 for _ in range(2000)]
    assert np.mean(found) == pytest.approx(1 / 1000, rel=0.05)


def test_groups_are_whole_rounds_of_the_classes():
    in_turn = np.arange(120) % 3
    group = jackknife_groups(120, in_turn)
    for number in range(10):
        np.testing.assert_array_equal(np.bincount(in_turn[group == number]), [4, 4, 4])
    np.testing.assert_array_equal(group, np.arange(120) // 3 % 10)
    by_class = jackknife_groups(120, np.sort(in_turn))
    np.testing.assert_array_equal(np.bincount(np.sort(in_turn)[by_class == 7]), [4, 4, 4])


def test_groups_of_what_is_not_balanced_are_random_ones():
    labels = rng.integers(3, size=1000)
    group = jackknife_groups(1000, labels)
    np.testing.assert_array_equal(group, jackknife_groups(1000))
    assert set(np.bincount(group)) == {100}
    assert not np.array_equal(group, np.arange(1000) % 10)


def test_few_samples():
    assert jackknife_groups(39) is None and jackknife_groups(40).max() == 3
    assert jackknife_groups(60, np.arange(60) % 10).max() == 5, "six rounds are six groups"
    one_round = jackknife_groups(100, np.arange(100))
    np.testing.assert_array_equal(one_round, jackknife_groups(100), err_msg="too few of a class: random groups")
    with pytest.raises(ValueError, match="too few samples"):
        _ = Estimate(1.0).bias
    assert Estimate(1.0).error is None and Estimate(1.0).standard_error is None
