"""Every script runs in a short form."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import full_disk
import fuzz
import kill_trials
import make_digits_classifier
import make_digits_vae
import pairs
import peers_timm
import pytest
import signal_trials
import study_kills
import torch
from processes import Forked
from small_programs import PROGRAMS, contents
from tqdm import tqdm

from sit.latents.vae import load_vae
from sit.utils.errors import UserError


@pytest.fixture
def forked(monkeypatch) -> None:
    """The programs of the trials are forks of this process, which has all imports done."""
    monkeypatch.setattr(pairs, "start", lambda words: Forked(*words))


def test_the_vae_is_made(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "vae"
    words = ["--steps", "2", "--batch-size", "4", "--widths", "4", "4", "4", "--output-dir", str(folder)]
    monkeypatch.setattr(sys, "argv", ["scripts/make_digits_vae.py", *words])
    make_digits_vae.main()
    assert sorted(path.name for path in folder.iterdir()) == sorted(make_digits_vae.FILES)
    assert tuple(load_vae(folder).config.block_out_channels) == (4, 4, 4)
    readme = (folder / "README.md").read_text()
    assert readme.startswith(make_digits_vae.TITLE) and "python scripts/make_digits_vae.py --steps 2" in readme
    printed = capsys.readouterr().out
    figures = json.loads(printed[: printed.index("}") + 1])
    assert 0.95 < figures["svm_accuracy_on_real"] <= 1
    assert {f"psnr_db_{level}" for level in make_digits_vae.NOISE_LEVELS} < set(figures)


@pytest.mark.parametrize("module", [make_digits_vae, make_digits_classifier])
def test_digits_are_moved_a_little(module):
    """Within a few pixels, never to another range; half of the VAE's not at all."""
    channels = 3 if module is make_digits_vae else 1
    images = torch.full((64, channels, 32, 32), -1.0)
    images[:, :, 12:20, 12:20] = 1
    moved = module.warp(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape and moved.min() >= -1 and moved.max() <= 1
    assert (moved[:, :, 14:18, 14:18].mean((1, 2, 3)) > -0.5).all(), "what is in the center stays about there"
    still = (moved == images).flatten(1).all(1).sum()
    assert 20 < still < 44 if module is make_digits_vae else still == 0


def test_what_differs_between_two_ends_is_seen(tmp_path):
    """What decides whether two ends are the same: one changed bit, a plain value, a file that is left over."""
    for name in ("one", "two"):
        (tmp_path / name / "empty").mkdir(parents=True)
        (tmp_path / name / "file").write_bytes(b"abc")
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 2, "steps_per_second": 3}\n')
        files = {"training/optimizer.pt": {"size": 1}, "file": {"size": 3}}
        (tmp_path / name / "sit.json").write_text(json.dumps({"step": 1, "files": files, "checksum": name}))
        torch.save({"state": [{"step": 1, "moment": torch.zeros(2)}]}, tmp_path / name / "optimizer.pt")
    one, two = tmp_path / "one", tmp_path / "two"
    same = contents(one)
    assert same == contents(two) and same["empty"] is None and same["file"] == b"abc"
    (two / "metrics.jsonl").write_text('{"step": 1, "loss": 2, "steps_per_second": 4}\n')
    assert contents(two) == same
    for name, content in (("file", b"abd"), (".left.tmp", b""), ("metrics.jsonl", b'{"step": 1, "loss": 3}\n')):
        before = (two / name).read_bytes() if (two / name).is_file() else None
        (two / name).write_bytes(content)
        assert contents(two) != same, name
        (two / name).unlink() if before is None else (two / name).write_bytes(before)
    torch.save({"state": [{"step": 1, "moment": torch.tensor([0.0, -0.0])}]}, two / "optimizer.pt")
    found = contents(two)["optimizer.pt"]
    assert {name for name in found if found[name] != same["optimizer.pt"][name]} == {"/state/0/moment"}


def test_a_program_that_is_killed_while_it_draws_lets_others_draw(tmp_path, monkeypatch):
    """tqdm's lock is shared among forks, and nobody would give it back."""

    def killed(_):
        with tqdm.get_lock():
            os.kill(os.getpid(), signal.SIGKILL)

    def draws(_):
        with tqdm(total=1) as bar:
            bar.update()

    tqdm.get_lock()  # it is made by the first who asks, and forks of this process get this one
    monkeypatch.setattr(kill_trials, "LIMIT", 20)
    assert kill_trials.run_forked(killed, tmp_path / "killed", tmp_path, kill_at=1) is None
    assert kill_trials.run_forked(draws, tmp_path / "draws", tmp_path) == 0


@pytest.mark.slow
def test_killed_programs_end_as_undisturbed_ones(tmp_path, capfd):
    """One kill of each."""
    one_each = kill_trials.Arguments(**{name: 1 for name in PROGRAMS})
    trials = kill_trials.run(one_each, tmp_path)
    assert {name: trial["different"] for name, trial in trials.items()} == {name: [] for name in PROGRAMS}
    assert any(trial["met"] for trial in trials.values())  # one that is due after the last operation meets nothing
    assert all(trial["operations"] > 20 for trial in trials.values())


@pytest.mark.slow
def test_a_full_disk_ends_in_one_line_and_another_start_ends_as_without(checkpoint, tmp_path):
    """Evaluation at two sizes, each of which fails at another file; the other programs' tests are in their rooms."""
    found = full_disk.trials("evaluation", 2, tmp_path, checkpoint)
    assert [trial["wrong"] for trial in found] == [[], []]
    said = [trial["said"] for trial in found]
    assert len(set(said)) == 2 and all("the limit on the size of files is reached" in line for line in said)


STUDY = """
import json, pathlib, sys, time
out = pathlib.Path(sys.argv[1])
(out / "runs").mkdir(parents=True, exist_ok=True)
(out / "report").mkdir(exist_ok=True)
(out / "starts").open("a").write("started\\n")
while len(list((out / "runs").iterdir())) < 4:
    time.sleep(0.1)
    (out / "runs" / f"{len(list((out / 'runs').iterdir()))}.json").touch()
starts = len((out / "starts").read_text().split())
numbers = {"seconds": time.time(), "fid": starts if "forgets" in sys.argv else 1}
(out / "report" / "numbers.json").write_text(json.dumps(numbers))
"""


@pytest.mark.parametrize("forgets", [False, True])
def test_studies_are_killed_as_often_as_wanted(tmp_path, monkeypatch, forgets):
    """By a small program in place of a study: one that goes on, and one whose report depends on its kills."""

    def command(file, out, jobs):
        return [sys.executable, "-c", STUDY, str(out), *["forgets"] * forgets]

    monkeypatch.setattr(study_kills, "command", command)
    arguments = study_kills.Arguments(kills=4, longest=0.4, json=tmp_path / "kills.json")
    if forgets:
        with pytest.raises(UserError, match="after [1-4] kills of 1 studies the report has other numbers"):
            study_kills.run(arguments)
        return
    study_kills.run(arguments)
    told = json.loads((tmp_path / "kills.json").read_text())
    assert told["same_numbers"] and sum(map(len, told["studies"])) == 4
    assert all(0 <= kill["runs_done"] <= 4 and kill["processes"] == 1 for study in told["studies"] for kill in study)


def test_another_end_on_a_full_disk_is_told():
    assert full_disk.flaw(2, "error: no room\n") is None
    assert full_disk.flaw(0, "") == "status 0 and 0 lines: "
    assert full_disk.flaw(2, "error: one\nerror: two\n").startswith("status 2 and 2 lines")
    assert full_disk.flaw(1, "Traceback (most recent call last):\nOSError: no room").endswith("OSError: no room")
    assert full_disk.unlike_names({"a": b"1", "b": b"2"}, {"a": b"3", "c": None, "out-unfinished/d": b""}) == [*"abc"]


def test_signals_are_answered_at_the_start(tmp_path, forked, monkeypatch):
    """In the middle too, and in the imports: ``tests/training/test_ends.py``."""
    monkeypatch.setattr(signal_trials, "STEPS", 3)
    words = ["--moments", "1", "--signals", "SIGUSR1", "--programs", "train", "--json", str(tmp_path / "signals.json")]
    monkeypatch.setattr(sys, "argv", ["scripts/signal_trials.py", *words])
    with pytest.raises(SystemExit) as end:
        signal_trials.main()
    assert end.value.code == 0
    (first,) = json.loads((tmp_path / "signals.json").read_text())["programs"]["train"]["trials"]
    assert first["status"] == 85 and first["saved_step"] == 0
    assert not first["wrong"]


def test_signals_that_are_not_answered_are_refused():
    with pytest.raises(UserError, match="`signals=SIGHUP` is none"):
        signal_trials.Arguments(signals=("SIGHUP",))
    with pytest.raises(UserError, match="`programs=eat` is none of train, encode, sample, evaluate"):
        signal_trials.Arguments(programs=("eat",))


def test_kills_below_none_are_refused():
    with pytest.raises(UserError, match="`training` must be at least 0, not -1"):
        kill_trials.Arguments(training=-1)


@pytest.mark.parametrize("different", [[], [{"operation": 3}]])
def test_the_exit_status_says_whether_the_ends_are_the_same(different, monkeypatch):
    monkeypatch.setattr(kill_trials, "run", lambda arguments, place: {"training": {"different": different}})
    monkeypatch.setattr(sys, "argv", ["scripts/kill_trials.py"])
    with pytest.raises(SystemExit) as stopped:
        kill_trials.main()
    assert stopped.value.code == (1 if different else 0)


def test_a_mistake_is_told_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scripts/kill_trials.py", "--nonsense"])
    with pytest.raises(SystemExit) as stopped:
        kill_trials.main()
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1


@pytest.mark.parametrize("kind", ["recipe", "published .pt", "packed npz", "tar", "image folder", "run"])
def test_damaged_files_are_right_or_one_line_or_have_no_checksum(kind, tmp_path):
    (tmp_path / "place").mkdir()
    counts = fuzz.fuzz(kind, 12, 0, 20.0, tmp_path / "place")
    assert sum(counts.outcomes.values()) >= 9 and not counts.outcomes.keys() & set(fuzz.BAD), counts.wrong
    if kind in ("published .pt", "packed npz"):
        assert not counts.outcomes["silent"], counts.wrong


def test_a_fuzzed_reader_that_fails_hangs_or_says_nothing_is_told(tmp_path, monkeypatch):
    """Readers that answer every damage in one way, and what the fuzzer calls it."""

    def read(place):
        content, answer = (place / "file").read_text(), place.parent.name
        if content == "whole":
            return content
        if answer == "traceback":
            raise ValueError("no line for a user")
        if answer == "several lines":
            raise UserError(f"{place}\n is damaged")
        if answer == "without a name":
            raise UserError("something is damaged")
        if answer == "hang":
            time.sleep(60)
        if answer == "killed":
            fuzz.os._exit(1)
        if answer == "one line":
            raise UserError(f"{place / 'file'} is damaged")
        return "whole" if answer == "right" else content

    def make(place):
        (place / "file").write_text("whole")
        return fuzz.Kind(place, [place / "file"], read)

    monkeypatch.setitem(fuzz.KINDS, "checkpoint", make)
    expected = {name: name for name in ("traceback", "hang", "killed", "one line", "right", "silent")}
    expected |= {"several lines": "traceback", "without a name": "traceback"}
    for answer, outcome in expected.items():
        (tmp_path / answer / "place").mkdir(parents=True)
        counts = fuzz.fuzz("checkpoint", 1, 1, 0.5 if answer == "hang" else 30.0, tmp_path / answer / "place")
        assert counts.outcomes == {outcome: 1}, answer
        assert fuzz.is_clean({"checkpoint": counts}) == (outcome in ("one line", "right"))


def test_of_two_programs_on_one_folder_one_works_and_the_other_says_who_holds_it(checkpoint, tmp_path, forked):
    """Sampling; the script has the other programs, of which ``tests/training/test_two_programs.py`` asks the same."""
    assert pairs.flaw(pairs.PROGRAMS["sample"], tmp_path / "place", checkpoint) is None


def test_a_pair_that_ends_otherwise_is_told(checkpoint, tmp_path):
    """Programs of which both work, both fail, or one fails without a word."""
    both_work = pairs.Program(lambda folder, _: ["-c", ""], ())
    both_fail = pairs.Program(lambda folder, _: ["-c", "raise SystemExit(2)"], ())
    once = "import os, sys; os.mkdir(sys.argv[1])"
    one_fails = pairs.Program(lambda folder, _: ["-c", once, str(folder)], ())
    for number, program in enumerate((both_work, both_fail, one_fails)):
        assert pairs.flaw(program, tmp_path / str(number), checkpoint).startswith("statuses")
    silent = "import os, sys\ntry: os.mkdir(sys.argv[1])\nexcept OSError: sys.exit(2)"
    program = pairs.Program(lambda folder, _: ["-c", silent, str(folder)], ())
    assert pairs.flaw(program, tmp_path / "silent", checkpoint).startswith("the second said")


TIMMS_TESTS = """
import pytest

@pytest.mark.parametrize("model_name", [])
@pytest.mark.parametrize("batch_size", [3])
def test_model_forward(model_name, batch_size):
    assert batch_size == 3

@pytest.mark.parametrize("batch_size", [1])
def test_model_odd(model_name, batch_size):
    if model_name == "attnet_xs":
        pytest.skip("too small")
    raise RuntimeError("no such luck\\\\nat all")

@pytest.mark.parametrize("batch_size", [1])
def test_model_inference(model_name, batch_size):
    raise RuntimeError("not to be called")

def test_something_else():
    raise RuntimeError("not of a model")
"""


def test_timms_tests_are_called_and_counted(tmp_path, monkeypatch, capsys):
    """A file like timm's, with one test that passes, one that skips or fails, and two that are not called."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_models.py").write_text(TIMMS_TESTS.replace("\\\\n", "\\n"))
    words = ["--models", "attnet_xs", "attnet_t2", "--json", str(tmp_path / "counts.json")]
    monkeypatch.setattr(sys, "argv", ["scripts/peers_timm.py", *words])
    monkeypatch.setenv("TIMM_CHECKOUT", str(tmp_path))
    with pytest.raises(SystemExit) as end:
        peers_timm.main()
    assert end.value.code == 1
    found = json.loads((tmp_path / "counts.json").read_text())
    assert found["counts"] == {"passed": 2, "failed": 1, "skipped": 1}
    (failed,) = [one for one in found["outcomes"] if one["result"] == "failed"]
    assert failed == {"test": "test_model_odd", "model": "attnet_t2", "result": "failed",
                      "why": "RuntimeError: no such luck"}  # fmt: skip
    assert "skipped: test_model_odd[attnet_xs] too small" in capsys.readouterr().out
    monkeypatch.setenv("TIMM_CHECKOUT", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no checkout of timm"):
        peers_timm.run(peers_timm.Arguments())
