"""A study's file: what it means, and how its mistakes are told."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from sit.model import create_model
from sit.study import record
from sit.study.cli import Arguments, main, run_study
from sit.study.config import read_study
from sit.study.plan import disk_bytes, parameter_counts, plan
from sit.study.report import at_edge
from sit.study.runs import planned, to_be_known
from sit.study.schedule import Known, command_lines
from sit.study.selection import chosen, tried
from sit.study.text import markdown
from sit.study.values import measure_of
from sit.training.optimization import make_optimizer
from sit.training.recipes import load_recipe
from sit.utils.errors import UserError
from sit.utils.reading import read_yaml

BASE = """recipe: digits
settings: {model: SiT-XS/2, steps: 6, heldout: 0.1}
seeds: [3, 4]
"""
VARIANTS = """variants:
  - {name: A, mixer: attention}
  - {name: B, mixer: atconv, positional_embedding: on, seeds: [3], steps: 9}
"""


@pytest.fixture
def study(tmp_path):
    def make(text: str):
        (tmp_path / "mine.yaml").write_text(text)
        return read_study(tmp_path / "mine.yaml", str(tmp_path / "out"))

    return make


def stored_of(run, evaluation=None) -> dict:
    """What the JSON of a run without a choice says, as it is read again."""
    which = {"name": run.name, "variant": run.variant, "cause": run.cause, "seed": run.seed, "choice": None}
    measured = {"heldout": None, "speed": {"seconds_per_step": None, "rows": []}, "evaluation": evaluation}
    stored = {"format": 1, **which, "config": dataclasses.asdict(run.config), **measured, "machine": "m"}
    return json.loads(json.dumps(stored))


def test_runs_are_variants_by_seeds(study):
    runs = planned(study(BASE + VARIANTS), {})
    assert [run.name for run in runs] == ["A-seed3", "B-seed3", "A-seed4"], "a seed at a time"
    config = load_recipe("digits")
    for run, mixer, steps in zip(runs, ("attention", "atconv", "attention"), (6, 9, 6), strict=True):
        places = dict(output_dir=run.config.output_dir, resume="auto", trackers=(), preview_every=0, keep_last=1)
        wanted = dict(model="SiT-XS/2", heldout="0.1", cpu_threads=1, mixer=mixer, steps=steps, seed=int(run.name[-1]))
        table = "on" if mixer == "atconv" else "auto"
        assert run.config == dataclasses.replace(config, **places, **wanted, positional_embedding=table)
        assert Path(run.config.output_dir).parts[-3:] == ("work", run.name, "run")


def test_each_variant_goes_on_with_its_lowest_held_out_loss(study):
    select = "select: {seed: 3, learning_rate: [2e-3, 0.5], batch_size: [4, 8]}\n"
    of = study(BASE + VARIANTS + select)
    runs = planned(of, {})
    assert [run.name for run in runs] == ["A-0.002-seed3", "A-0.5-seed3", "B-0.002-seed3", "B-0.5-seed3"]
    assert [(run.config.learning_rate, run.config.batch_size) for run in runs[:2]] == [(2e-3, 4), (0.5, 8)]
    assert not any(run.compared for run in runs) and to_be_known(of, {}) == 1
    found = {
        run.name: {"heldout": {"steps": [run.config.steps], "loss": [loss]}, "config": {"steps": run.config.steps}}
        for run, loss in zip(runs, (0.3, 0.2, 0.1, 0.1), strict=True)
    }
    assert chosen(of, tried(of, runs, {name: found[name] for name in list(found)[:3]})) == {"A": 1}
    best = chosen(of, tried(of, runs, found))
    assert best == {"A": 1, "B": 0}, "the first of equals"
    after = planned(of, best)
    assert [run.name for run in after if run.compared] == ["A-0.5-seed3", "B-0.002-seed3", "A-0.5-seed4"]
    assert len(after) == 5
    found["A-0.5-seed3"]["heldout"] = None  # not finite
    assert chosen(of, tried(of, runs, found))["A"] == 0
    found["A-0.002-seed3"]["failed"] = "it diverged"
    assert chosen(of, tried(of, runs, found)) == {"B": 0}, "of two failures none is chosen"


def test_losses_of_other_images_choose_nothing(study):
    of = study(BASE + VARIANTS + "select: {seed: 3, learning_rate: [2e-3, 0.5]}\n")
    runs = planned(of, {})
    found = {
        run.name: {
            "heldout": {"steps": [run.config.steps], "loss": [0.3], "images": images},
            "config": {"steps": run.config.steps},
        }
        for run, images in zip(runs, "aabc", strict=True)
    }
    with pytest.raises(UserError, match=r"B-0.5-seed3.json has a held-out loss of other images than .*B-0.002-seed3"):
        tried(of, runs, found)
    found["B-0.5-seed3"]["heldout"]["images"] = "b"
    assert tried(of, runs, found)["B"] == {0: 0.3, 1: 0.3}


@pytest.mark.parametrize(
    "column, choice, edge",
    [
        ("learning_rate: [2e-3, 1e-3, 4e-3]", 0, False),
        ("learning_rate: [2e-3, 1e-3, 4e-3]", 1, True),
        ("learning_rate: [2e-3, 1e-3, 4e-3]", 2, True),
        ("optimizer: [adamw, muon]", 0, False),
        ("learning_rate: [2e-3]", 0, False),
    ],
)
def test_the_edge_of_what_was_tried_is_the_least_and_the_greatest(study, column, choice, edge):
    """Not the first and the last; and words have none."""
    of = study(BASE + VARIANTS + f"select: {{seed: 3, {column}}}\n")
    assert at_edge(of.select, choice) is edge


@pytest.mark.parametrize(
    "there, here, same",
    [
        ("fashion-mnist:/data/sets", "fashion-mnist:data", True),
        ("fashion-mnist:data", "fashion-mnist-test:data", False),
        ("classifier:a/b/net", "classifier:/x/net", True),
        ("classifier:nets/A", "classifier:nets/B", False),
        ("vaes/fashion", "/elsewhere/vaes/fashion", True),
        ("digits:train", "digits:heldout", False),
        ("datasets:x/set@validation", "datasets:x/set@test", False),
        ("lmdb:/d/ffhq.lmdb@256", "lmdb:/e/ffhq.lmdb@256", True),
        ("flat:/d/ffhq", "flat:/d/celeba", False),
        ("none:channels=1", "none:channels=1:scale=1.42", False),
        (None, "digits", False),
    ],
)
def test_a_place_on_another_machine_is_the_same_place_where_nothing_but_its_folder_differs(study, there, here, same):
    of = study(BASE + VARIANTS + f"evaluate: {{reference: '{here}'}}\n")
    run = planned(of, {})[0]
    settings = dataclasses.asdict(of.evaluate) | {"reference": there}
    stored = stored_of(run, {"settings": settings})
    run.json(of).parent.mkdir(parents=True)
    record.write(run.json(of), stored)
    with contextlib.nullcontext() if same else pytest.raises(UserError, match="was evaluated with reference"):
        assert record.read(run, of) == stored


@pytest.mark.parametrize(
    "latents, then, others, now, same",
    [
        (4, "cfg_scale: 2.0, cfg_channels: 3", {}, "cfg_scale: 2.0", True),
        (None, "cfg_scale: 2.0, cfg_channels: 3", {}, "cfg_scale: 2.0", True),  # an earlier program's, elsewhere
        (1, "cfg_scale: 2.0, cfg_channels: 3", {}, "cfg_scale: 2.0", True),
        (16, "cfg_scale: 2.0, cfg_channels: 3", {}, "cfg_scale: 2.0", False),
        (16, "cfg_scale: 2.0, cfg_channels: 0", {}, "cfg_scale: 2.0", True),
        (4, "cfg_scale: 2.0, cfg_channels: 0", {}, "cfg_scale: 2.0", False),
        (4, "cfg_scale: 2.0", {}, "cfg_scale: 2.0, cfg_channels: 3", True),
        (16, "cfg_scale: 2.0", {}, "cfg_scale: 2.0, cfg_channels: 3", False),
        (16, "cfg_scale: 1.0, cfg_channels: 3", {}, "cfg_scale: 1.0", True),  # and nothing was guided
        (4, "cfg_scale: 1.0, cfg_channels: 0", {}, "cfg_scale: 1.0", True),
        (16, "cfg_scale: 1.0, cfg_channels: 3", {"guidance 2": []}, "cfg_scale: 1.0", False),
        (16, "cfg_scale: 1.0, cfg_channels: 3", {"ema 0.1": []}, "cfg_scale: 1.0", True),
    ],
)
def test_an_evaluation_is_the_same_where_as_many_channels_are_guided(study, latents, then, others, now, same):
    of = study(BASE + VARIANTS + f"evaluate: {{reference: digits, sampler: {{{now}}}}}\n")
    run = planned(of, {})[0]
    settings = dataclasses.asdict(of.evaluate)
    settings["sampler"] |= {"cfg_channels": None} | yaml.safe_load(f"{{{then}}}")
    evaluation = {"settings": settings, "others": others} | ({} if latents is None else {"latent_channels": latents})
    stored = stored_of(run, evaluation)
    run.json(of).parent.mkdir(parents=True)
    record.write(run.json(of), stored)
    with contextlib.nullcontext() if same else pytest.raises(UserError, match="was evaluated with sampler"):
        assert record.read(run, of) == stored


def test_where_sampling_begins_is_not_how_a_run_was_watched(study):
    """It decides what the samples are."""
    of = study((BASE + VARIANTS).replace("steps: 6,", "steps: 6, prediction: noise, sample_eps: 1e-3,"))
    run = planned(of, {})[0]
    stored = stored_of(run)
    run.json(of).parent.mkdir(parents=True)
    record.write(run.json(of), stored | {"config": stored["config"] | {"sample_eps": 1e-2}})
    with pytest.raises(UserError, match="was made with sample_eps 0.01"):
        record.read(run, of)


def test_an_eps_without_a_part_is_refused_in_a_study_and_read_in_its_jsons(study):
    with pytest.raises(UserError, match="mine.yaml`: B: `train_eps=0.05` plays no part with `prediction=velocity`"):
        planned(study(BASE + VARIANTS.replace("steps: 9", "steps: 9, train_eps: 0.05")), {})
    of = study(
        (BASE + VARIANTS)
        .replace("steps: 6,", "steps: 6, train_eps: 0.05,")
        .replace("mixer:", "prediction: score, mixer:")
    )
    assert {run.config.train_eps for run in planned(of, {})} == {0.05}

    of = study(BASE + VARIANTS)
    run = planned(of, {})[0]
    stored = stored_of(run)
    earlier = stored | {"config": stored["config"] | {"train_eps": 0.05, "sample_eps": 0.01}}
    run.json(of).parent.mkdir(parents=True)
    record.write(run.json(of), earlier)
    assert record.read(run, of) is not None
    assert measure_of(earlier) == measure_of(stored)


def test_one_cause_varied_alone(study):
    runs = planned(study(BASE + "vary: [weights, seed]\n" + VARIANTS), {})
    seeds = {run.name: (run.config.seed, run.config.seed_weights, run.config.seed_order) for run in runs}
    assert seeds == {
        "A-seed3": (3, None, None),
        "B-seed3": (3, None, None),
        "A-weights4": (3, 4, None),
        "A-seed4": (4, None, None),
    }


def test_the_report_says_what_the_seeds_vary(study):
    found = {"runs": {"done": 0, "of": 3}, "machines": [], "selection": {}}
    ways = ("seed", "[seed, order]", "order")
    told = {vary: markdown(study(BASE + VARIANTS + f"vary: {vary}\n"), found, {}) for vary in ways}
    assert " vary" not in told["seed"]
    assert "over the seeds that vary everything. What each cause" in told["[seed, order]"]
    assert "vary the order of the images alone" in told["order"] and "is seed 3's, the" in told["order"]


def test_a_recipes_own_evaluations_are_not_made(study, tmp_path):
    (tmp_path / "watched.yaml").write_text("data: digits\nsteps: 6\neval_every: 2\n")
    assert load_recipe(str(tmp_path / "watched.yaml")).eval_every == 2
    of = study((BASE + VARIANTS).replace("recipe: digits", f"recipe: {tmp_path}/watched.yaml"))
    assert {run.config.eval_every for run in planned(of, {})} == {0}


def test_a_json_says_settings_as_they_were_said_then_and_places_as_they_are_elsewhere(study):
    """A block without an encoder was 8 where it is nothing now; images of an encoder lie anywhere."""
    of = study(BASE + VARIANTS)
    run = planned(of, {})[0]
    assert run.config.repa_block is None
    stored = stored_of(run)
    run.json(of).parent.mkdir(parents=True)
    record.write(run.json(of), stored | {"config": stored["config"] | {"repa_block": 8}})
    assert record.read(run, of)["config"]["repa_block"] == 8
    record.write(run.json(of), stored | {"config": stored["config"] | {"repa_block": 7}})
    with pytest.raises(UserError, match="repa_block"):
        record.read(run, of)

    of = study((BASE + VARIANTS).replace("steps: 6,", "steps: 6, data: cache, repa: dinov2-vit-b, repa_images: here,"))
    run = planned(of, {})[0]
    config = dataclasses.asdict(run.config)
    record.write(run.json(of), stored | {"config": config | {"repa_images": "there"}})
    assert record.read(run, of)["config"]["repa_images"] == "there"
    record.write(run.json(of), stored | {"config": config | {"repa_block": 4}})
    with pytest.raises(UserError, match="was made with repa_block 4"):
        record.read(run, of)


def test_checkpoints_are_where_they_are_evaluated(study):
    evaluate = "evaluate: {reference: digits, every: 2, sampler: {sampler: ode, method: euler}}\n"
    of = study(BASE + VARIANTS + evaluate)
    run = planned(of, {})[1]
    assert (run.config.checkpoint_every, run.config.keep_every) == (2, 2) and of.evaluate.sampler.method == "euler"
    assert run.steps_to_evaluate(of) == [2, 4, 6, 8, 9]
    with pytest.raises(UserError, match="A: evaluate: every 2 steps needs checkpoints there: checkpoint_every must di"):
        planned(study((BASE + VARIANTS + evaluate).replace("steps: 6", "steps: 6, checkpoint_every: 3")), {})


@pytest.mark.parametrize(
    "text, said",
    [
        ("recipe: [", r"not readable YAML: .* in line 1"),
        ("variants: []", "needs recipe"),
        ("recipe: digits", "needs variants"),
        ("recipe: digits\nvariants: []", "variants: name at least one"),
        ("recipe: digits\nrecipe: digits", "'recipe' stands there twice in line 2"),
        (BASE + VARIANTS + "jobs: 2", "unknown setting 'jobs'; the settings are recipe, variants"),
        (BASE + "variants: [attention]", "each is a mapping with a name and settings, not 'attention'"),
        (BASE + "variants: [{name: A, steps: many}]", "A: steps: 'many'"),
        (BASE + "variants: [{name: A, mixer: fourier}]", "A: unknown mixer 'fourier'"),
        (BASE + "variants: [{name: A, model: SiT-M/2}]", "A: .*SiT-M/2"),
        (BASE + "variants: [{name: A, seeds: 3}]", "A: seeds must be a list of integers, not 3"),
        (BASE + "variants: [{name: A, seed: 3}]", "A: seed is the study's own to set; give seeds"),
        (BASE + "variants: [{name: A, eval_every: 3}]", "eval_every is the study's own to set; give evaluate"),
        (BASE + "variants: [{name: a b}, {name: a/b}]", "two are called 'a-b'"),
        (BASE.replace("[3, 4]", "[3, 3]") + VARIANTS, "seeds must name at least one seed, and each once"),
        (BASE + VARIANTS + "vary: luck", "vary: 'luck'"),
        (BASE + "vary: weights\nvariants: [{name: A, seeds: [4, 3]}]", "A: seeds must begin with 3, as the study"),
        (BASE + VARIANTS + "processes: 0", "processes must be at least 1, not 0"),
        (BASE + VARIANTS + "select: {learning_rate: [1e-3]}", "select: needs seed"),
        (BASE + VARIANTS + "select: {seed: 0, learning_rate: 1e-3}", "select: needs settings with a list"),
        (BASE + VARIANTS + "select: {seed: 0, learning_rate: [1e-3, 1e-3]}", "learning_rate has a value twice"),
        (BASE + VARIANTS + "select: {seed: 0, learning_rate: [1e-3], steps: [1, 2]}", "must be as long as each other"),
        (BASE.replace("heldout: 0.1", "flip: false") + VARIANTS + "select: {seed: 0, learning_rate: [1e-3]}",
         "A: select chooses by the held-out loss: set heldout"),
        (BASE + VARIANTS + "evaluate: {num_samples: 5}", "evaluate: needs reference"),
        (BASE + VARIANTS + "evaluate: {reference: digits, num_samples: 0}", "num_samples must be at least 1, not 0"),
        (BASE + VARIANTS + "evaluate: {reference: digits, guidance: [0]}", "guidance must be positive numbers, each"),
        (BASE + VARIANTS + "evaluate: {reference: digits, ema: [0.1, 0.1]}", "ema must be positive numbers, each once"),
        (BASE.replace("steps: 6", "seed-weights: 5") + VARIANTS, "settings: seed_weights is the study's own to set"),
        (BASE + "variants: [{name: A, eval-every: 3}]", "A: eval_every is the study's own to set; give evaluate"),
        (BASE.replace("steps: 6", "log-every: 5, log_every: 5") + VARIANTS, "settings: log_every is there twice"),
        (BASE + VARIANTS.replace("steps: 9", "learning-rate: 7e-4") + "select: {seed: 3, learning_rate: [2e-3, 4e-3]}",
         "variants: B: learning_rate is chosen for each variant by select, .*: leave one of them out"),
        (BASE + VARIANTS + "select: {seed: 3, loss-weight: [none, velocity]}", "not comparable where loss_weight diff"),
        (BASE + VARIANTS + "select: {seed: 3, meanflow_omega: [1.0, 2.0]}", "not comparable where meanflow_omega diff"),
        (BASE + "variants: [{name: A, prediction: average-velocity}]\nevaluate: {reference: digits, guidance: [2]}",
         "A: evaluate: .*cfg_scale"),
        (BASE + "variants: [{name: A, prediction: average-velocity}]\n"
         "evaluate: {reference: digits, sampler: {steps: 1}, every: 2, autoguidance: [2], guide_step: 2}",
         "A: evaluate: .*"),
        (BASE + VARIANTS + "evaluate: {reference: digits, sampler: {cfg_interval: [0.0, 0.5]}}",
         "`?cfg_interval`? plays no part with `?cfg_scale=1"),
        (BASE + VARIANTS + "evaluate: {reference: digits, sampler: {sampler: meanflow, steps: 1}}",
         "A: evaluate: `sampler=meanflow`: this network predicts no average velocity"),
        (BASE.replace("steps: 6", "steps: 6, posthoc_ema: [0.05]") + VARIANTS
         + "evaluate: {reference: digits, ema: [0.25]}", "A: evaluate: ema: 0.25 can't be reached from 1 snapshots"),
        (BASE + VARIANTS + "evaluate: {reference: digits, guidance: [1.0]}", "guidance: 1 is the sampler's own"),
        (BASE + VARIANTS + "evaluate: {reference: digits, autoguidance: [1.0]}", "autoguidance: 1 is without a guide"),
        (BASE + VARIANTS + "evaluate: {reference: digits, autoguidance: [2]}", "guide_step .* need each other"),
        (BASE + VARIANTS + "evaluate: {reference: digits, guide_step: 2}", "guide_step .* need each other"),
        (BASE + VARIANTS + "evaluate: {reference: digits, every: 2, autoguidance: [2], guide_step: 3}",
         "A: evaluate: guide_step must be one of a checkpoint that is kept before step 6, not 3"),
        (BASE + VARIANTS + "evaluate: {reference: digits, every: 2, autoguidance: [2], guide_step: 6}",
         "guide_step must be one of a checkpoint that is kept before step 6, not 6"),
        (BASE + VARIANTS + "evaluate: {reference: digits, ema: [0.1]}", "A: evaluate: ema .*: set posthoc_ema"),
        ((BASE + VARIANTS).replace("steps: 6,", "steps: 6, posthoc_ema: [0.05, 0.1],")
         + "evaluate: {reference: digits, ema: [0.9]}", "A: evaluate: ema: a relative length must lie between"),
        ((BASE + VARIANTS).replace("steps: 6,", "steps: 6, class_dropout: 0,")
         + "evaluate: {reference: digits, guidance: [2]}", "A: evaluate: guidance is away from no label, and class_dr"),
        (BASE + VARIANTS + "evaluate: {reference: digits, sampler: ode}", "sampler is a mapping, such as .*not 'ode'"),
        (BASE + VARIANTS + "select: {seed: 0, prediction: [velocity, noise]}", "not comparable where prediction"),
        (BASE + VARIANTS + "evaluate: {reference: digits, sampler: {steps: 0}}", "`steps` must be at least 1|--steps"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_one_line_that_names_it(tmp_path, monkeypatch, capsys, text, said):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["study", str(path), "--dry-run"])
    with pytest.raises(SystemExit) as stopped:
        main()
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and told.count("\n") == 1
    with pytest.raises(UserError, match=said):
        planned(read_study(path), {})
    assert told.startswith(f"error: --study {path}")


@pytest.mark.parametrize(
    "words, said",
    [
        (["nowhere.yaml"], "error: --study nowhere.yaml: .*no such file"),
        (["{file}", "--jobs", "-1"], "error: --jobs must be at least 0, not -1"),
        (["{file}", "--hours", "0"], "error: --hours must be positive, not 0.0"),
        (["{file}", "--dry-run", "--report-only"], "error: --dry-run and --report-only exclude each other"),
        (
            ["{file}", "--only", "C"],
            "error: --only C: no run and no variant .*; the variants are A, B, .* like A-seed3",
        ),
        (["{file}", "--run", "A"], "error: --run A: no run is called so; .* like A-seed3"),
        (["{file}", "--report-only", "--only", "A"], "error: --only plays no part with --report-only: leave it out"),
        (["{file}", "--dry-run", "--hours", "1"], "error: --hours plays no part with --dry-run: leave it out"),
        (["{file}", "--jobs", "0", "--seconds-per-step", "1"], "error: --seconds-per-step plays no part with --jobs 0"),
        (["{file}", "--against", "C"], "error: .*mine.yaml`?: no variant is called 'C'; there are A"),
        (["{file}", "--report-only"], "no run of .*mine.yaml is done yet: there is nothing to report"),
    ],
)
def test_a_mistake_on_the_command_line(study, tmp_path, monkeypatch, capsys, words, said):
    study(BASE + VARIANTS)
    words = [word.replace("{file}", str(tmp_path / "mine.yaml")) for word in words]
    monkeypatch.setattr(sys, "argv", ["study", *words, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        main()
    told = capsys.readouterr().err
    assert re.search(said, told) and told.count("\n") == 1


def test_the_plan_and_the_commands(study, tmp_path, capsys):
    of = study(BASE + VARIANTS + "select: {seed: 3, learning_rate: [2e-3, 0.5]}\n")
    told = plan(of, Known(of).state(), 2, 600.0)
    assert "runs: 5, of them 0 done" in told and "besides those above: 1," in told
    # 600 s a step: 2 runs of 6 steps and 2 of 9, and as long as the average for the one to come
    assert "training what is missing, without evaluations: 3 h 08 min with 2 at a time" in told
    assert "A-0.002-seed3  missing      6   1.00" in told
    assert "runs: 2, of them 0 done" in plan(of, Known(of).state(), 1, 600.0, ("A",))
    lines = command_lines(of, Known(of).state(), ("B",), str(tmp_path / "out")).splitlines()
    assert [line.split(" --run ")[1].split()[0] for line in lines] == ["B-0.002-seed3", "B-0.5-seed3"]
    assert all(line.startswith(f"{sys.executable} -m sit.study {of.path} --run ") for line in lines)
    several = dataclasses.replace(of, processes=4)
    (line,) = command_lines(several, Known(of).state(), ("B-0.5-seed3",), None).splitlines()
    assert " -m accelerate.commands.launch --num_processes 4 -m sit.study " in line


def test_a_plan_says_what_it_assumed_where_that_may_be_why_it_fails(study):
    """Without the VAE's folder a latent is taken for an eighth of the image's side."""
    elsewhere = (BASE + "variants:\n  - {name: A, mixer: atconv}\n").replace("steps: 6,", "steps: 6, vae: nowhere,")
    of = study(elsewhere)
    with pytest.raises(UserError, match=r"A: .* 9 taps .*\(assumed: .*VAE nowhere is here: 4 channels, 1/8"):
        plan(of, Known(of).state(), 1, 1.0)


def test_a_variant_by_the_name_that_its_files_have(study, tmp_path, capsys):
    of = study(BASE + "variants:\n  - {name: A, mixer: attention}\n  - {name: with table, mixer: atconv}\n")
    told = []
    for name in ("with table", "with-table"):
        assert run_study(Arguments(of.path, out=str(tmp_path / "out"), print_commands=True, only=(name,)))
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] and " --run with-table-seed3 " in told[0] and " --run A-" not in told[0]
    assert of.variant("with-table") is of.variant("with table")


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_what_a_checkpoint_holds(study, optimizer):
    """Two copies of the weights, and the optimizer's state as it is after a step; its counters are a few bytes."""
    (run,) = planned(
        study(f"{BASE}variants:\n  - {{name: A, mixer: attention, optimizer: {optimizer}, seeds: [3]}}\n"), {}
    )
    network = create_model(run.config.model, 0, **run.config.network_options((4, 8, 8), 10))
    made = make_optimizer(network, run.config)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    kept = 2 * sum(p.numel() for p in network.parameters())
    kept += sum(
        value.numel() for of in made.state_dict()["state"].values() for value in of.values() if torch.is_tensor(value)
    )
    config = dataclasses.replace(run.config, keep_last=1, keep_every=None)
    assert disk_bytes(config, *parameter_counts(run)) == pytest.approx(4 * kept, rel=1e-3)


def test_numbers_without_a_point_are_numbers(tmp_path):
    (tmp_path / "a.yaml").write_text("a: [2e-3, 1E5, -.5e+2, 7, 1.5]\nb: e5\nc: 1e\n")
    read = read_yaml(tmp_path / "a.yaml", "`study`")
    assert read == {"a": [0.002, 1e5, -50.0, 7, 1.5], "b": "e5", "c": "1e"}
