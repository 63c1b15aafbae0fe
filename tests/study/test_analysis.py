"""The numbers of a report against SciPy and closed forms, on JSONs that are made up."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from sit.study.analysis import analyze, at_equal_seconds
from sit.study.at_best import at_best
from sit.study.config import Evaluation, Study, Variant
from sit.study.plots import MARGIN, limits
from sit.study.relations import agreement, causes, correlation, points, spearman
from sit.study.text import markdown
from sit.study.values import LOSS, Found, groups, measure_of, of_one_measure

FID = "FID"
SHELL = {"study": "x.yaml", "runs": {"done": 6, "of": 6}, "machines": ["m"], "selection": {}}


def made(variant: str, seed: int, losses: list[float], fids: list[float], **changes) -> dict:
    """A run of 20 steps, measured after 10 and 20."""
    images = np.random.default_rng(seed).normal(losses[-1], 0.1, (50, 8))
    heldout = {
        "steps": [10, 20],
        "loss": losses,
        "by_time": [[loss] * 8 for loss in losses],
        "times": [t / 8 for t in range(8)],
        "images": "x",
        "step": 20,
        "per_image": images.tolist(),
    }
    evaluation = {
        "steps": {str(s): [{"name": FID, "value": f}] for s, f in zip((10, 20), fids, strict=True)},
        "parameters": 9,
        "settings": {},
        "seed": 0,
    }
    config = {"steps": 20, "mixer": variant, "model": "SiT-XS/2"}
    one = {"variant": variant, "cause": "seed", "seed": seed, "config": config, "heldout": heldout, "choice": None}
    return one | {"evaluation": evaluation, "machine": "m", "speed": {"seconds_per_step": 1.0}} | changes


def study(*names: str, seeds: tuple[int, ...] = (0, 1, 2), vary=("seed",)) -> Study:
    variants = tuple(Variant(name, {}) for name in names)
    return Study(Path("x.yaml"), "digits", {}, variants, seeds, vary, None, None, True, 1, Path("x"))


@pytest.fixture
def records() -> dict[str, dict]:
    source = np.random.default_rng(0)
    found = {}
    for name, seed in itertools.product("ab", range(3)):
        shared = np.random.default_rng(100 + seed).normal(0, 0.1)
        losses = [2 + shared + source.normal(0, 0.01), 1 + shared + source.normal(0, 0.01) + (name == "b") * 0.2]
        found[f"{name}-seed{seed}"] = made(name, seed, losses, [20 + 10 * losses[0], 10 * losses[1]])
    return found


def test_pairing_and_differences(records):
    found = analyze(study("a", "b"), records)
    a, b = ([records[f"{name}-seed{seed}"]["heldout"]["loss"][1] for seed in range(3)] for name in "ab")
    test = stats.ttest_rel(b, a)
    told = found["differences"][LOSS]["b"]
    assert (told["value"], told["p_value"]) == (pytest.approx(np.mean(b) - np.mean(a)), pytest.approx(test.pvalue))
    assert told["verdict"] == "worse"
    assert told["p_value_holm"] == pytest.approx(2 * min(test.pvalue, found["differences"][FID]["b"]["p_value"]))
    ratio = np.var(np.subtract(b, a), ddof=1) / (np.var(a, ddof=1) + np.var(b, ddof=1))
    assert found["pairing"]["over seeds"][LOSS]["all"] == pytest.approx(ratio) and ratio < 0.1
    a, b = (
        [records[f"{name}-seed{seed}"]["evaluation"]["steps"]["20"][0]["value"] for seed in range(3)] for name in "ab"
    )
    a, b = np.log(a), np.log(b)
    ratio = np.var(b - a, ddof=1) / (np.var(a, ddof=1) + np.var(b, ddof=1))
    assert found["pairing"]["over seeds"][FID]["by_variant"]["b"] == pytest.approx(ratio)
    images = [np.array(records[f"{name}-seed0"]["heldout"]["per_image"]) for name in "ab"]
    told = found["per_image"]["b"][0]
    assert told["t"] == pytest.approx(stats.ttest_rel(images[1].mean(1), images[0].mean(1)).statistic)
    assert told["t_by_time"][3] == pytest.approx(stats.ttest_rel(images[1][:, 3], images[0][:, 3]).statistic)


def test_each_variant_at_its_best(records):
    """b is better than a without guidance, and worse with each at its best; what a seed lacks can't be chosen."""
    fids = {"a": {"1.5": (5.0, 6.0, 7.5), "2": (4.0, 3.0, 5.0), "3": (0.1, 0.1)}, "b": {"1.5": (6.0, 5.5, 7.5)}}
    for name, values in fids.items():
        for seed in range(3):
            records[f"{name}-seed{seed}"]["evaluation"]["steps"]["20"][0]["value"] = {"a": 10.0, "b": 9.0}[name] + seed
            records[f"{name}-seed{seed}"]["evaluation"]["others"] = {
                f"guidance {value}": [{"name": FID, "value": own[seed]}]
                for value, own in values.items()
                if seed < len(own)
            }
    found = at_best(groups(study("a", "b"), records, "seed"), FID, Evaluation("digits"))
    assert list(found) == ["guidance"], "no average but the usual one was evaluated"
    told = found["guidance"]
    assert told["best"] == {"a": "2", "b": "1.5"} and set(told["values"]["a"]) == {"1", "1.5", "2"}
    assert told["order"] == {"usual": ["b", "a"], "best": ["a", "b"]} and told["against"] == "a"
    test = stats.ttest_rel(fids["b"]["1.5"], fids["a"]["2"])
    difference = told["differences"][FID]["b"]
    assert difference["value"] == pytest.approx(7 / 3) and difference["p_value"] == pytest.approx(test.pvalue)
    assert told["values"]["a"]["2"]["error"] == pytest.approx(stats.t.ppf(0.975, 2) * 1 / 3**0.5)


def test_runs_that_one_variant_lacks_are_left_out(records):
    del records["b-seed1"]
    found = analyze(study("a", "b"), records)
    assert found["differences"][LOSS]["b"]["seeds"] == 2 and found["variants"]["a"]["seeds"] == [0, 1, 2]
    records["a-seed0"] |= {"evaluation": None}
    found = analyze(study("a", "b"), records)
    assert found["variants"]["a"]["metrics"][FID]["by_seed"].keys() == {1, 2}
    assert "b" not in found["differences"].get(FID, {}) and LOSS in found["differences"]
    alone = {name: one | {"evaluation": None} for name, one in records.items() if name == "b-seed0"}
    found = analyze(study("a", "b"), alone)
    assert (
        found["fid"] is None and found["differences"] == {} and found["variants"]["b"]["metrics"][LOSS]["error"] is None
    )


def test_equal_seconds(records):
    """The first takes 3 s a step and the second 2: after the second's 40 s the first has done 13⅓ of its steps."""
    for name, one in records.items():
        one["speed"] = {"seconds_per_step": 3.0 if name[0] == "a" else 2.0}
    groups = [Found(name, {seed: records[f"{name}-seed{seed}"] for seed in range(3)}) for name in "ab"]
    found = at_equal_seconds(groups, FID)
    assert found["seconds"] == 40 and found["seconds_per_step"] == {"a": 3.0, "b": 2.0}
    for seed in range(3):
        one = records[f"a-seed{seed}"]
        first, last = one["heldout"]["loss"]
        told = found["metrics"]["a"]
        assert told[LOSS]["by_seed"][seed] == pytest.approx(first + (last - first) / 3)
        first, last = (math.log(one["evaluation"]["steps"][step][0]["value"]) for step in ("10", "20"))
        assert told[FID]["by_seed"][seed] == pytest.approx(math.exp(first + (last - first) / 3))
        assert found["metrics"]["b"][LOSS]["by_seed"][seed] == records[f"b-seed{seed}"]["heldout"]["loss"][1]
    apart = at_equal_seconds(groups, FID, {"a": 1.0, "b": 2.0})  # measured apart, it is the other way round
    assert apart["seconds"] == 20
    assert apart["metrics"]["b"][LOSS]["by_seed"][0] == records["b-seed0"]["heldout"]["loss"][0]
    for one in groups[0].records.values():  # 40 s are 8 steps: before the first measurement
        one["speed"] = {"seconds_per_step": 5.0}
    assert at_equal_seconds(groups, FID)["metrics"]["a"] == {}


def test_what_ends_at_nearly_the_same_time_counts_as_it_ended(records):
    """a ends after 44 s and b after 40: a tenth later is its end; 45 s are a place between measurements."""
    groups = [Found(name, {seed: records[f"{name}-seed{seed}"] for seed in range(3)}) for name in "ab"]
    for pace, ended in ((2.2, True), (2.25, False)):
        found = at_equal_seconds(groups, FID, {"a": pace, "b": 2.0})["metrics"]["a"]
        last = {seed: records[f"a-seed{seed}"] for seed in range(3)}
        assert (found[LOSS]["by_seed"] == {seed: one["heldout"]["loss"][1] for seed, one in last.items()}) == ended
        fids = {seed: one["evaluation"]["steps"]["20"][0]["value"] for seed, one in last.items()}
        assert (found[FID]["by_seed"] == pytest.approx(fids, rel=1e-12)) == ended


def test_speeds_of_different_machines_are_not_compared(records):
    """The machine that has most of a variant's runs counts; of paces that are given it does not matter."""
    groups = [Found(name, {seed: records[f"{name}-seed{seed}"] for seed in range(3)}) for name in "ab"]
    usual = at_equal_seconds(groups, FID)
    records["b-seed0"]["machine"] = "n"
    assert at_equal_seconds(groups, FID) == usual
    records["b-seed1"]["machine"] = "n"
    assert at_equal_seconds(groups, FID) == {"machines": {"a": "m", "b": "n"}}
    assert at_equal_seconds(groups, FID, {"a": 1.0, "b": 1.0}) == usual
    for seed in (0, 1):
        records[f"b-seed{seed}"]["speed"] = {"seconds_per_step": None}
    assert at_equal_seconds(groups, FID)["seconds"] == usual["seconds"], "what has no speed there is not compared"


def test_losses_of_something_else_are_not_compared(records):
    """b predicts noise, or is measured on other images: its loss is left out, its FID stays."""
    of = study("a", "b")
    assert of_one_measure(of, records) == (records, [])
    for change in ("config", "heldout"):
        other = {name: dict(one) for name, one in records.items()}
        for one in other.values():
            if one["variant"] == "b":
                one[change] = one[change] | {"config": {"prediction": "noise"}, "heldout": {"images": "y"}}[change]
        kept, named = of_one_measure(of, other)
        assert named == ["b"] and all((one["heldout"] is None) == (one["variant"] == "b") for one in kept.values())
        found = analyze(of, kept)
        assert LOSS not in found["differences"] and found["differences"][FID]["b"]["seeds"] == 3
        assert found["per_image"]["b"] == {} and LOSS not in found["variants"]["b"]["metrics"]


def test_losses_at_each_time_are_compared_as_the_mean_is(records):
    """Against SciPy's paired t; no time gets a verdict."""
    source = np.random.default_rng(3)
    for one in records.values():
        one["heldout"]["by_time"][-1] = source.normal(1, 0.1, 8).tolist()
    found = analyze(study("a", "b"), records)
    for part, time in enumerate(("0", "0.125", "0.25", "0.375", "0.5", "0.625", "0.75", "0.875")):
        a, b = ([records[f"{name}-seed{seed}"]["heldout"]["by_time"][-1][part] for seed in range(3)] for name in "ab")
        told = stats.ttest_rel(b, a)
        interval = told.confidence_interval()
        cell = found["differences_by_time"][time]["b"]
        assert cell == {
            "value": pytest.approx(np.mean(b) - np.mean(a)), "error": pytest.approx((interval.high - interval.low) / 2),
            "seeds": 3,
        }  # fmt: skip
        own = found["variants"]["b"]["heldout_by_time"][time]
        assert own["value"] == pytest.approx(np.mean(b)) and own["by_seed"] == dict(enumerate(b))
        text = markdown(study("a", "b"), SHELL | found, {}, "a")
        assert f"| b | {cell['value']:+.4g} ± {cell['error']:.2g} |" in text or part
        assert f"{cell['value']:+.4g} ± {cell['error']:.2g} |" in text


def test_what_was_measured_before_the_end_is_not_its_end(records):
    """A run whose last held-out loss was not finite: neither images nor times of an earlier step stand for it."""
    for seed in range(3):
        heldout = records[f"b-seed{seed}"]["heldout"]
        heldout |= {"steps": [10], "loss": heldout["loss"][:1], "by_time": heldout["by_time"][:1], "step": 10}
    found = analyze(study("a", "b"), records)
    assert found["per_image"]["b"] == {} and found["variants"]["b"]["heldout_by_time"] == {}
    assert found["pairing"]["over images"][LOSS]["by_variant"] == {} and LOSS not in found["differences"]


def test_a_distance_that_has_no_logarithm_ends_nothing(records):
    records["b-seed0"]["evaluation"]["steps"]["20"][0]["value"] = -0.01
    of = study("a", "b")
    found = analyze(of, records)
    assert found["variants"]["b"]["metrics"][FID]["by_seed"][0] == -0.01
    assert (
        len(points(records, FID)) == 11
        and causes({"seed": groups(of, records, "seed")}, FID)[FID]["b"]["seed"]["seeds"] == 2
    )


def test_a_loss_is_of_what_it_was_when_an_earlier_program_did_not_say():
    """It had no MeanFlow: what it did not know was as it is now by default."""
    config = {"prediction": "velocity", "interpolant": "linear", "loss_weight": "none", "train_eps": None}
    heldout = {"images": "hash", "times": [0.5]}
    now = {"meanflow_omega": 1.0, "meanflow_kappa": 0.0}
    then = measure_of({"config": config, "heldout": heldout})
    assert then == measure_of({"config": config | now, "heldout": heldout})
    assert then != measure_of({"config": config | now | {"meanflow_omega": 2.0}, "heldout": heldout})


def test_the_axis_of_quality_holds_the_ends_of_intervals_that_are_not_far():
    curves = [[(0, 4.0, 1.0), (1, 5.0, None)], [(0, 30.0, 200.0), (1, float("nan"), 1.0)]]
    assert limits(curves) == (3.0 / MARGIN, 30.0 * MARGIN), "one end below all means, and none at 230 or below zero"
    assert limits([]) == (1 / MARGIN, MARGIN)


def test_rank_correlation(records):
    found = points(records, FID)
    assert len(found) == 12
    told = correlation(found)
    value = stats.spearmanr([point["loss"] for point in found], [point["fid"] for point in found]).statistic
    assert told["value"] == pytest.approx(value) and told["interval"][0] <= told["value"] <= told["interval"][1]
    assert agreement(found)["last step"]["points"] == 6 and correlation(found[:3]) is None


def test_rank_correlation_of_the_loss_at_each_time(records):
    """The loss at one time may rank as FID does where the mean over times doesn't."""
    for one in records.values():
        for row, fid in zip(one["heldout"]["by_time"], (10.0, 20.0), strict=True):
            metric = one["evaluation"]["steps"][f"{fid:.0f}"][0]["value"]
            row[:] = [metric, -metric, *np.random.default_rng(int(1e4 * metric)).normal(size=6)]
    found = points(records, FID)
    told = agreement(found)["by_time"]
    assert list(told) == ["0.00", "0.12", "0.25", "0.38", "0.50", "0.62", "0.75", "0.88"]
    assert told["0.00"]["value"] == pytest.approx(1) and told["0.12"]["value"] == pytest.approx(-1)
    losses = [one["heldout"]["by_time"][step][5] for one in records.values() for step in range(2)]
    fids = [one["evaluation"]["steps"][step][0]["value"] for one in records.values() for step in ("10", "20")]
    assert told["0.62"]["value"] == pytest.approx(stats.spearmanr(losses, fids).statistic)
    assert told["0.62"]["interval"][0] < told["0.62"]["value"] < told["0.62"]["interval"][1]


def test_spearman_of_points_that_come_several_times():
    source = np.random.default_rng(0)
    values, times = source.integers(0, 5, (12, 2)).astype(float), source.integers(0, 4, (20, 12))
    for told, how_often in zip(spearman(values, times), times, strict=True):
        again = np.repeat(values, how_often, axis=0)
        assert told == pytest.approx(stats.spearmanr(again[:, 0], again[:, 1]).statistic)
    assert np.isnan(spearman(np.ones((3, 2)), np.ones((1, 3), dtype=int))[0])


def test_variants_on_different_curves_are_told():
    """FID is 10 · loss for one and 20 · loss for the other: each is √2 off the common line."""
    source = np.random.default_rng(1)
    losses = source.uniform(1, 2, 20)
    found = [
        {"run": f"{name}{seed}", "variant": name, "step": 1, "loss": loss, "fid": factor * loss, "by_time": {}}
        for name, factor in (("a", 10), ("b", 20))
        for seed, loss in enumerate(losses)
    ]
    told = agreement(found)["off_the_line"]
    assert told["a"]["factor"] == pytest.approx(2**-0.5) and told["b"]["factor"] == pytest.approx(2**0.5)
    assert told["a"]["interval"][1] < 1 < told["b"]["interval"][0]


def test_the_spread_by_its_causes():
    values = {"weights": [1.0, 1.1, 1.3, 1.2], "order": [1.0, 1.02, 1.01, 0.98], "seed": [1.0, 1.4, 0.8, 1.1]}
    by_cause = {
        cause: [Found("a", {seed: made("a", seed, [2, loss], [9, 9]) for seed, loss in enumerate(losses)})]
        for cause, losses in values.items()
    }
    told = causes(by_cause, None)[LOSS]["a"]
    deviations = {cause: np.std(losses, ddof=1) for cause, losses in values.items()}
    for cause, one in told.items():
        assert one["deviation"] == pytest.approx(deviations[cause])
        low, high = (3 * deviations[cause] ** 2 / stats.chi2(3).ppf(level) for level in (0.975, 0.025))
        assert one["interval"] == [pytest.approx(math.sqrt(low)), pytest.approx(math.sqrt(high))]
    share = deviations["weights"] ** 2 / (deviations["weights"] ** 2 + deviations["order"] ** 2)
    assert told["weights"]["share"] == pytest.approx(share) and "share" not in told["seed"]


def test_one_seed_has_the_interval_over_its_samples():
    """And says so; several seeds have the interval over seeds."""
    records = {}
    for name, seeds in (("a", (0, 1)), ("b", (0,))):
        for seed in seeds:
            one = made(name, seed, [2.0, 1.0], [20.0, 10.0 + seed])
            one["evaluation"]["steps"]["20"][0]["error"] = 0.25
            records[f"{name}-seed{seed}"] = one
    found = analyze(study("a", "b", seeds=(0, 1)), records)
    several, single = (found["variants"][name]["metrics"][FID] for name in "ab")
    half = stats.t.ppf(0.975, 1) * np.std([10, 11], ddof=1) / math.sqrt(2)
    assert several["error"] == pytest.approx(half) and "error_over_samples" not in several
    assert single["error"] is None and single["error_over_samples"] == 0.25
    assert "error_over_samples" not in found["variants"]["b"]["metrics"][LOSS]
    text = markdown(study("a", "b", seeds=(0, 1)), SHELL | found, {}, "a")
    assert "| 10 ± 0.25 (samples) |" in text and f"| 10.5 ± {half:.2g} |" in text
    assert "tells nothing of other seeds" in text
