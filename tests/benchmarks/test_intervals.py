"""The simulation of printed intervals in a short form, and the tables that go with it."""

from __future__ import annotations

import json
import sys

import intervals
import metrics_time
import numpy as np
import power
import pytest
from intervals import Arguments, Setting

from sit.metrics.distances import frechet
from sit.metrics.estimate import jackknife_groups
from sit.metrics.moments import GroupSums

SHORT = dict(samples=640, dimensions=6, classes=8, reference=60)


@pytest.fixture(scope="module")
def rows():
    found = intervals.simulate(Arguments(replications=80, of_all=0, **SHORT))
    return {(row["labels"], row["compared"], row["number"]): row for row in found}


def test_intervals_hold(rows):
    """Of 80 replications an interval of 95 % misses about four; ten have a chance of 1 in 100."""
    printed = {key: row for key, row in rows.items() if "same noise" not in key[1]}
    assert len(printed) == 2 * (2 * 2 + 2) + 1
    for key, row in printed.items():
        assert 0.87 <= row["coverage"] <= 1, key
        assert 0.75 <= row["ratio"] <= 1.35, key


def test_a_difference_is_known_better_than_one_run_and_labels_in_turn_help(rows):
    error = {key: row["true_error"] for key, row in rows.items()}
    for order in ("balanced", "uniform"):
        assert error[order, "difference", "FID"] < 0.7 * error[order, "one run", "FID"]
    assert error["balanced", "one run", "FID"] < 0.9 * error["uniform", "one run", "FID"]


def test_fid_at_infinity_has_no_bias(rows):
    row = rows["balanced", "one run", "FID at infinity"]
    assert abs(row["mean"] - row["true"]) < 3 * row["true_error"] / 80**0.5
    assert row["mean"] < rows["balanced", "one run", "FID"]["mean"]


def test_groups_that_ignore_the_classes_overstate_the_error():
    """Labels in turn: the printed error of groups of whole rounds against that of random groups."""
    setting, (model, _) = Setting.of(Arguments(**SHORT))
    found: dict[str, list[float]] = {"rounds": [], "random": []}
    values = []
    for replication in range(80):
        labels, noise = setting.draws(np.random.default_rng(replication), "balanced")
        features = model.draw(labels, noise)
        for name, group in (("rounds", jackknife_groups(640, labels)), ("random", jackknife_groups(640))):
            estimate = frechet(GroupSums.of(features, group), setting.reference)
            found[name].append(estimate.standard_error**2)
        values.append(estimate.value)
    ratios = {name: (np.mean(squares) / np.var(values)) ** 0.5 for name, squares in found.items()}
    assert 0.75 < ratios["rounds"] < 1.3 < ratios["random"]


def test_the_commands_print_what_they_write(monkeypatch, capsys, tmp_path):
    """Every number of the evaluation, in the tables and in the JSON."""
    file = tmp_path / "found.json"
    words = [word for name, value in SHORT.items() for word in (f"--{name}", str(value))]
    words += ["--replications", "3", "--of-all", "2", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["intervals.py", *words])
    intervals.main()
    found, out = json.loads(file.read_text()), capsys.readouterr().out
    assert {row["replications"] for row in found["rows"]} == {2, 3}
    for name in ("FID", "Inception score", "Class accuracy", "Precision", "Density", "KID"):
        assert f"| one run | {name} |" in out and f"| difference | {name} |" in out

    small = "--samples 60 --dimensions 6 --spatial 5 --classes 6 --reference 40".split()
    monkeypatch.setattr(sys, "argv", ["metrics_time.py", *small, "--json", str(file)])
    metrics_time.main()
    found, out = json.loads(file.read_text()), capsys.readouterr().out
    assert len(found["seconds"]) == 10 and all(f"| {name} |" in out for name in found["seconds"])


def test_power_table(monkeypatch, capsys, tmp_path):
    file = tmp_path / "power.json"
    words = ["--spreads", "0.013", "--left", "0.3", "0.57", "--differences", "0.15"]
    monkeypatch.setattr(sys, "argv", ["power.py", *words, "--json", str(file)])
    power.main()
    (row,) = json.loads(file.read_text())["rows"]
    # the normal approximation, 2 (1.96 + 0.84)² (spread / difference)², is below by about two
    normal = 2 * (1.959964 + 0.841621) ** 2 * (0.013 * 17.2 / 0.15) ** 2
    assert normal < row["unpaired"] < normal + 2
    assert 0.3 * normal < row["paired"]["0.3"] < 0.3 * normal + 3 and row["paired"]["0.57"] < 0.57 * normal + 3
    assert f"| {row['unpaired']} | {row['paired']['0.3']} | {row['paired']['0.57']} |" in capsys.readouterr().out
