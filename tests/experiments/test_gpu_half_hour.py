"""What is ready for a GPU: pieces that are killed and gone on with, bounds that find what is wrong, the tiny form."""

from __future__ import annotations

import collections
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import gpu_half_hour
import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from gpu_parts import device as devices  # noqa: E402
from gpu_parts import errors, kernels, pieces, report, sampling, study, training  # noqa: E402
from gpu_parts.pieces import Clock, Part, Piece, carry_out  # noqa: E402

from atconv import functional  # noqa: E402
from sit.study.cli import Arguments as StudyArguments  # noqa: E402
from sit.study.config import read_study  # noqa: E402
from sit.study.runs import planned  # noqa: E402
from sit.utils.cli import parse  # noqa: E402
from sit.utils.errors import UserError  # noqa: E402

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "experiments" / "gpu_half_hour.py"
CPU = torch.device("cpu")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the tiny form is for a CPU")


# --- pieces ----------------------------------------------------------------------------------------------------------


class Fakes:
    """Parts of pieces that only note that they were run."""

    def __init__(self, monkeypatch, folder: Path) -> None:
        monkeypatch.setattr(pieces, "ROOT", folder)
        self.source, self.out, self.ran = folder / "code.py", folder / "out", []
        self.source.write_text("1")

    def piece(self, name: str, seconds: float = 1, answer=None, **options) -> Piece:
        def run(done, left):
            self.ran.append((name, sorted(done)))
            if isinstance(answer, BaseException):
                raise answer
            return answer if answer != "further" else None

        return Piece(name, seconds, run, **options)

    def do(self, *made: Piece, limit: float = 100, settings=None, started: float | None = None) -> bool:
        part = Part("some", list(made), ("code.py",), settings or {"tiny": True})
        clock = Clock(time.monotonic() if started is None else started, limit)
        self.ran.clear()
        return carry_out([part], self.out, CPU, clock)

    @property
    def json(self) -> dict:
        return json.loads((self.out / "some.json").read_text())


@pytest.fixture
def fakes(monkeypatch, tmp_path) -> Fakes:
    return Fakes(monkeypatch, tmp_path)


PASSED = {"passed": True}


def test_pieces_that_are_done_are_not_done_again_and_an_end_in_one_loses_that_one_alone(fakes):
    one, two = fakes.piece("one", answer=PASSED), fakes.piece("two", answer=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        fakes.do(one, two)
    assert fakes.ran == [("one", []), ("two", ["one"])] and not fakes.json["done"]
    assert fakes.do(one, fakes.piece("two", answer={"passed": None, "rows": [1]}))
    assert fakes.ran == [("two", ["one"])] and fakes.json["done"] and fakes.json["pieces"]["two"]["rows"] == [1]
    assert fakes.do(one, two) and fakes.ran == []
    assert {"machine", "date", "command", "torch"} <= set(fakes.json) and fakes.json["hardware"]["triton"]


def test_other_code_is_done_again_and_what_was_found_is_kept(fakes):
    one = fakes.piece("one", answer=PASSED)
    assert fakes.do(one)
    before = fakes.json["code"]
    fakes.source.write_text("2")
    assert fakes.do(one) and len(fakes.ran) == 1
    assert json.loads((fakes.out / f"some-{before}.json").read_text())["done"] and fakes.json["code"] != before


def test_other_settings_machines_and_files_are_refused(fakes, monkeypatch):
    one = fakes.piece("one", answer=PASSED)
    fakes.do(one)
    with pytest.raises(UserError, match="some.json was made with settings {'tiny': True}, not {'tiny': False}: choose"):
        fakes.do(one, settings={"tiny": False})
    monkeypatch.setattr(pieces, "hardware", lambda device: {"machine": "another"})
    with pytest.raises(UserError, match="was made with machine .*, not another: choose another `out`"):
        fakes.do(one)
    (fakes.out / "some.json").write_text("{}")
    with pytest.raises(UserError, match="some.json is no JSON of this program"):
        fakes.do(one)


def test_no_piece_is_begun_that_would_not_end_in_time(fakes):
    short, long, last = (
        fakes.piece("short", 5, PASSED),
        fakes.piece("long", 500, PASSED),
        fakes.piece("last", 5, PASSED),
    )
    assert not fakes.do(short, long, last)
    assert [name for name, _ in fakes.ran] == ["short", "last"], "what fits is done"
    with pytest.raises(UserError, match="`minutes=1.66667` is too little: some, long may take 250 s"):
        fakes.do(short, long, last)
    assert not fakes.do(fakes.piece("more", 5, PASSED), long, started=time.monotonic() - 90), "10 s are left"


def test_what_ends_it_before_the_first_piece_is_told(fakes, monkeypatch):
    """Not that there is no page to write."""
    monkeypatch.setattr(pieces, "carry_out", lambda *_: (_ for _ in ()).throw(UserError("`minutes` is too little")))
    arguments = gpu_half_hour.Arguments(out=fakes.out / "new", tiny=True)
    with pytest.raises(UserError, match="`minutes` is too little"):
        gpu_half_hour.run(arguments)


def test_estimates_learn_from_what_pieces_took(fakes):
    part = Part("some", [], ("code.py",), {})
    kept = pieces.Kept(
        part, Path("x"), CPU, {str(n): {"seconds": took, "expected": 10} for n, took in ((1, 20), (2, 30), (3, 900))}
    )
    assert kept.expected(fakes.piece("four", 7)) == pytest.approx(7 * 3), "the median of 2, 3 and 90"


def test_an_error_is_a_figure_and_a_piece_that_never_ends_is_given_up(fakes, capsys):
    wrong, right = fakes.piece("wrong", answer=RuntimeError("no kernel\nimage")), fakes.piece("right", answer=PASSED)
    assert fakes.do(wrong, right) and [name for name, _ in fakes.ran] == ["wrong", "right"]
    assert fakes.json["pieces"]["wrong"]["error"] == "RuntimeError: no kernel"
    assert "some, wrong: failed: RuntimeError: no kernel\n" in capsys.readouterr().out
    found = fakes.json | {"begun": {"hangs": 1}}
    (fakes.out / "some.json").write_text(json.dumps(found))  # as after a kill
    assert fakes.do(wrong, right, fakes.piece("hangs", answer=PASSED), fakes.piece("new", answer=PASSED))
    assert [name for name, _ in fakes.ran] == ["new", "hangs"], "it comes last"
    (fakes.out / "some.json").write_text(json.dumps(found | {"begun": {"hangs": 2}}))
    assert fakes.do(wrong, right, fakes.piece("hangs", answer=PASSED)) and fakes.ran == []
    assert fakes.json["pieces"]["hangs"]["error"] == "it was begun 2 times and never ended"


def test_a_piece_that_goes_on_is_left_without_being_counted(fakes):
    for _ in range(3):
        assert not fakes.do(fakes.piece("study", answer="further", goes_on=True)) and len(fakes.ran) == 1
    assert fakes.json["begun"] == {}


def test_a_lost_device_ends_the_call(fakes, monkeypatch, capsys):
    monkeypatch.setattr(pieces, "is_lost", lambda device: True)
    assert not fakes.do(fakes.piece("one", answer=PASSED), fakes.piece("two", answer=PASSED))
    assert [name for name, _ in fakes.ran] == ["one"] and "the device is lost" in capsys.readouterr().out


def test_which_device(monkeypatch):
    assert devices.gpu(True) == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device here: give `tiny=True`"):
        devices.gpu(False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UserError, match="Tesla T4 has compute capability 7.5 and so no bfloat16: take a GPU of 8.0"):
        devices.gpu(False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert devices.gpu(False) == torch.device("cuda", 0)


@pytest.mark.parametrize("options, message", [({"minutes": 0}, "`minutes` must be"), ({"parts": ()}, "`parts` must")])
def test_what_cant_be_done_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        gpu_half_hour.Arguments(**options)


# --- bounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", errors.UNIT)
def test_the_bound_holds_for_sums_and_finds_a_missing_term(dtype, monkeypatch):
    """Against sums that numpy makes in float32, one product after the other."""
    monkeypatch.setattr(errors, "INTERPRETED", False)
    source = np.random.default_rng(0)
    a, b = (source.standard_normal((2000, 9)).astype(np.float32) for _ in range(2))
    total = np.zeros(2000, np.float32)
    for tap in range(9):
        total = total + a[:, tap] * b[:, tap]
    products = a.astype(np.float64) * b
    exact, scale = (torch.from_numpy(terms.sum(1)) for terms in (products, abs(products)))
    bound = errors.rounded(scale, exact, 10, dtype)
    worst = errors.Worst()
    worst.each("sum", "all", torch.from_numpy(total).to(dtype), exact, bound)
    assert worst.figures()["passed"] and worst.rows["sum"]["share"] > (0.05 if dtype == torch.float32 else 0.8)
    spoilt = torch.from_numpy(total).to(dtype)
    place = int((exact.abs() / scale).argmin())  # where rounding to the dtype hides the least
    for wrong in (spoilt[place] + float(scale[place]) / 9, float("nan"), float("inf")):
        spoilt[place] = wrong
        worst.each("sum", "spoilt", spoilt, exact, bound)
        found = worst.figures()
        assert not found["passed"] and found["compared"]["sum"]["where"] == "spoilt"
        json.dumps(found, allow_nan=False)


def test_one_wrong_pixel_of_a_convolution_is_found(monkeypatch):
    """Plain operations in the kernels' place: they pass, but not with one value that is off by a hundredth."""
    right = functional.BACKENDS["taps"]
    words = (3, torch.float32, (8, 8), ((2, 5), (1, 3)), CPU)
    monkeypatch.setitem(functional.BACKENDS, "triton", right)
    found = kernels.convolution(*words)
    assert found["passed"] and set(found["compared"]) == {
        "output", "gradient by values", "gradient by kernels", "a second time"
    }  # fmt: skip

    def wrong(v, kernels, side):
        factor = torch.ones_like(v)
        factor[0, -1, -1, 0] = 1.01
        return right(v, kernels, side) * factor

    monkeypatch.setitem(functional.BACKENDS, "triton", wrong)
    found = kernels.convolution(*words)
    assert not found["passed"] and all(found["compared"][name]["share"] > 1 for name in list(found["compared"])[:3])


def test_losses_apart():
    base = [1.0 + step for step in range(60)]
    found = training.agreement([loss * (1 + 1e-4 * (step == 3)) for step, loss in enumerate(base)], base, "no")
    assert found["first"]["difference"] == pytest.approx(1e-4) and not found["first"]["passed"]
    assert found["means"]["difference"] == pytest.approx(4e-4 / sum(base[:50])) and found["means"]["passed"]
    assert training.agreement(base[:5], base, "bf16")["means"]["difference"] == 0
    late = training.agreement(base[:50] + [loss * 1.01 for loss in base[50:]], base, "no")
    assert late["first"]["difference"] == 0 and late["means"]["difference"] == pytest.approx(0.01)


def test_waits_are_counted_by_line(monkeypatch):
    modes, found = [], collections.Counter()
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with training.waits(torch.device("cuda"), found):
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert modes == ["warn", "default"]
    ((place, count),) = found.items()
    assert place.startswith("tests/experiments/test_gpu_half_hour.py:") and count == 3
    with training.waits(CPU, found):
        pass
    assert len(modes) == 2


# --- the study -------------------------------------------------------------------------------------------------------


def test_the_study_goes_on_in_the_time_that_is_left(monkeypatch, tmp_path):
    """Its command is one that ``python -m sit.study`` takes, and its exit status is understood."""
    ended = SimpleNamespace(returncode=85, stderr="")
    commands = []
    monkeypatch.setattr(study.subprocess, "run", lambda command, **options: commands.append(command) or ended)
    (piece,) = study.part(tmp_path, False).pieces
    assert piece.goes_on and piece.run({}, 405.0) is None
    python, *words = commands[0]
    arguments = parse(StudyArguments, "sit.study", words[2:])
    assert words[:2] == ["-m", "sit.study"] and arguments.hours == pytest.approx(0.1) and arguments.jobs == 0
    assert Path(arguments.study) == ROOT / "experiments" / "fashion-pixels-gpu.yaml"
    assert arguments.out == str(tmp_path / "study")
    ended.returncode = 0
    assert piece.run({}, 405.0) == {"passed": None, "report": "study/report/README.md"}
    ended.returncode, ended.stderr = 2, "note\nerror: --data fashion-mnist:data: no such folder\n"
    with pytest.raises(UserError, match="^the study stopped: --data fashion-mnist:data: no such folder$"):
        piece.run({}, 405.0)
    (piece,) = study.part(tmp_path, True).pieces
    with pytest.raises(UserError):
        piece.run({}, 405.0)
    made = read_study(tmp_path / "tiny-study.yaml", str(tmp_path))
    assert [run.name for run in planned(made, {})] == ["attention-seed0", "ATConv-seed0"]


# --- the tiny form ---------------------------------------------------------------------------------------------------


def when(path: Path) -> dict[str, str]:
    return {name: piece["date"] for name, piece in json.loads(path.read_text())["pieces"].items()}


@no_gpu
def test_killed_and_gone_on_with(tmp_path, monkeypatch, capsys):
    """The kernels, in the interpreter: a process is killed after its first piece; what it made stays as it is."""
    path = tmp_path / "kernels.json"
    command = [sys.executable, str(PROGRAM), "--tiny", "--parts", "kernels", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        limit = time.monotonic() + 120
        while not path.is_file() or not when(path):
            assert killed.poll() is None and time.monotonic() < limit
            time.sleep(0.05)
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    before = when(path)
    assert 0 < len(before) < 18
    monkeypatch.setattr(kernels, "KERNEL_SIZES", (3,))  # the others are the same code, and take longer
    assert gpu_half_hour.run(gpu_half_hour.Arguments(parts=("kernels",), tiny=True, out=tmp_path, minutes=1e3))
    found = json.loads(path.read_text())
    assert found["done"] and before.items() <= when(path).items()
    assert all(piece["passed"] for piece in found["pieces"].values()), found["pieces"]
    kinds = {name.split(",")[0] for name in found["pieces"]}
    assert kinds == {"convolution", "pooling", "branch", "module"}
    page = (tmp_path / "README.md").read_text()
    assert page.count("| passed |") == len(found["pieces"]) and "done; 0 failed" in page


@no_gpu
@pytest.mark.usefixtures("fresh_accelerate")
def test_the_tiny_form_of_sampling_speed_and_training(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "MIXERS", ("attention,atconv",))
    monkeypatch.setattr(sampling, "BOUNDS", {torch.bfloat16: sampling.BOUNDS[torch.bfloat16]})
    monkeypatch.delitem(training.WAYS, "compiled")  # the test below has it
    threads = torch.get_num_threads()
    arguments = gpu_half_hour.Arguments(parts=("training", "sampling", "speed"), tiny=True, out=tmp_path, minutes=1e3)
    assert gpu_half_hour.run(arguments)
    torch.set_num_threads(threads)
    found = {name: json.loads((tmp_path / f"{name}.json").read_text())["pieces"] for name in arguments.parts}
    told = {f"{name}, {key}": piece["passed"] for name, made in found.items() for key, piece in made.items()}
    assert told == {key: None if key.startswith("speed") else True for key in told}, found
    (made,) = found["sampling"].values()
    assert made["compared"]["compiled by eager"]["comparisons"] == 5
    assert 0 < made["compared"]["eager by float64"]["error"] < 0.03, "bfloat16 is in use"
    rows = [row for piece in found["speed"].values() for row in piece.get("rows", [])]
    assert {row["scope"] for row in rows} == {"mixer", "network", "training", "sampling"}
    assert all(row["sdpa"] in ("flash", "math") for row in rows if row["variant"] == "attention")
    page = (tmp_path / "README.md").read_text()
    assert page.index("## Sampling") < page.index("## Speed") < page.index("## Training")
    # a layer that computes something else is found
    monkeypatch.setitem(training.WAYS, "plain operations", "taps:inhibition=false")
    other = training.piece("plain operations", "bf16", 2, True, found["training"])
    assert not other["passed"] and not other["agreement"]["first"]["passed"]


@no_gpu
@pytest.mark.slow
def test_the_tiny_form_of_training_and_the_study(tmp_path):
    """By its command; the compiled way is among those of training."""
    parts = ["training", "study"]
    command = [sys.executable, str(PROGRAM), "--tiny", "--parts", *parts, "--out", str(tmp_path), "--minutes", "60"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in parts:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["done"] and all(piece["passed"] in (True, None) for piece in found["pieces"].values()), found
    assert (tmp_path / "study" / "report" / "README.md").is_file()
    assert "failed:" not in (tmp_path / "README.md").read_text()


def test_exit_status_and_page(monkeypatch, tmp_path, capsys):
    """85 if something is left; the page of nothing is refused in a line."""
    monkeypatch.setattr(sys, "argv", ["gpu_half_hour.py", "--parts", "kernels"])
    for left, status in ((True, 85), (False, None)):
        monkeypatch.setattr(gpu_half_hour, "run", lambda arguments, left=left: not left)
        if status is None:
            gpu_half_hour.main()
        else:
            with pytest.raises(SystemExit) as stopped:
                gpu_half_hour.main()
            assert stopped.value.code == status
    with pytest.raises(UserError, match="has no JSON of a part"):
        report.write(tmp_path)
    (tmp_path / "kernels.json").write_text('{"pieces": []}')
    with pytest.raises(UserError, match="kernels.json is no JSON of this program"):
        report.write(tmp_path)
