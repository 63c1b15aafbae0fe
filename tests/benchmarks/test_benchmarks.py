"""Every benchmark runs in a short form, and says what it should."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from baselines import PublishedATConv
from PIL import Image

from atconv import ATConv
from sit.model import create_model
from sit.study.values import LOSS
from sit.utils.errors import UserError

FOLDER = Path(__file__).parents[2] / "benchmarks"
(
    beside,
    frechet,
    freed_memory,
    loader,
    main_job,
    mixers,
    overhead,
    reference_memory,
    sampler_order,
    sampling_cpu,
    shares,
    speed,
    training_cpu,
    xl_step,
) = map(
    importlib.import_module,
    (
        "beside",
        "frechet",
        "freed_memory",
        "loader",
        "main_job",
        "mixers",
        "overhead",
        "reference_memory",
        "sampler_order",
        "sampling_cpu",
        "shares",
        "speed",
        "training_cpu",
        "xl_step",
    ),
)
HELPERS = {"baselines", "beside", "busy", "checks", "peak"}
MODULES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in HELPERS)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """A benchmark's main function with a command line; what it printed, and its JSON, which says how it was made."""

    def run(module, *words: object) -> tuple[str, dict]:
        file = tmp_path / f"{module.__name__}.json"
        command = [f"benchmarks/{module.__name__}.py", *map(str, words), "--json", str(file)]
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # that of pytest, under python -m pytest
        module.main()
        found = json.loads(file.read_text())
        assert found["command"] == shlex.join(["python", *command])
        assert f"torch {torch.__version__}" in found["machine"] and found["date"][:2] == "20"
        return capsys.readouterr().out, found

    return run


def test_reference_memory(run):
    out, found = run(reference_memory, "--images", 1100, "--keep", 8)
    assert found["images"] == 1100 and "peak mib above the model" in out
    assert 60 < found["megabytes_of_sums_in_the_work_folder"] < 70  # 2048² + 2023² numbers of 8 bytes


def test_frechet(run):
    out, found = run(frechet, "--dimensions", 16, "--samples", 200, "--repeats", 1)
    assert float(out.rsplit(" ", 1)[1]) < 1e-6, "both ways give the same distance"
    assert set(found["seconds"]) == set(found["values"]) == {"symmetric eigenvalues", "scipy.linalg.sqrtm"}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this system has another C library than glibc")
def test_freed_memory(run, monkeypatch):
    words = ("--models", "SiT-XS/8", "--sides", 32, "--images", 2, "--dtypes", "float32", "--repeats", 1)
    before = torch.get_num_threads()
    out, found = run(freed_memory, *words, "--threads", 1)
    torch.set_num_threads(before)
    assert [row["what"] for row in found["rows"]] == ["training step", "forward pass"]
    for row in found["rows"]:
        assert row["ratio"] == pytest.approx(row["given back"] / row["kept"])
        assert f"| {row['what']} | SiT-XS/8 | 2 | 32×32 | float32 | {1e3 * row['given back']:.3g} ms |" in out
    monkeypatch.setattr(freed_memory, "keep_freed_memory", lambda: False)
    with pytest.raises(SystemExit):
        run(freed_memory, *words)


def test_loader(run, tmp_path):
    words = ("--count", 40, "--batch-size", 8, "--batches", 2, "--rounds", 1, "--workers", 0, "--large", 1000)
    out, found = run(loader, *words, "--folder", tmp_path)
    assert "| latent cache | " in out and found["sparse_cache"]["entries"] == 1000
    assert [path.name for path in tmp_path.iterdir()] == ["loader.json"], "temporary files are removed"


def test_main_job(run, monkeypatch):
    """The commands are the README's, with a number of threads."""
    text = " ".join((FOLDER.parent / "README.md").read_text().split())
    for words in main_job.Arguments(cpu_threads=(1,)).commands(Path("runs/digits"), 1).values():
        typed = [word.removesuffix(".commands.launch") for word in words[1:-2] if word != "-m"]
        command = " ".join(typed).replace("accelerate", "accelerate launch").removesuffix(" --steps 1500")
        assert command in text
    short = ("--steps", 1, "--sampler-steps", 2, 2, "--num-samples", 20, "--cpu-threads", 1)
    out, found = run(main_job, *short)
    seconds = found["seconds"]["1"]
    assert seconds["all"] == pytest.approx(seconds["training"] + seconds["sampling"] + seconds["evaluation"])
    assert f"| 1 | {seconds['training']:.0f} s | " in out
    monkeypatch.setattr(main_job, "ROOT", FOLDER)
    with pytest.raises(SystemExit):
        run(main_job, *short)


def test_overhead(run):
    out, found = run(overhead, "--model", "SiT-XS/8", "--batch-size", 1, "--rounds", 1, "--checkpoint-every", 10)
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines()[1:]}
    assert set(rows) == {"step", "moving average", "logging", "checkpoint", "together"}
    seconds, shares = found["seconds"], found["shares"]
    assert shares["checkpoint"] == pytest.approx(seconds["checkpoint"] / 10 / seconds["step"]), "spread over ten steps"
    assert rows["checkpoint"][-4] == f"{shares['checkpoint']:.2%}"


def test_sampling_cpu(run, monkeypatch):
    words = ("--images", 20, "--steps", 2, "--repeats", 1, "--busy", 0, 1, "--threads", 2)
    before = torch.get_num_threads()
    out, found = run(sampling_cpu, *words)
    assert torch.get_num_threads() == before
    rows = {(row["busy"], row["way"]): row for row in found["rows"]}
    assert len(rows) == 6 and found["threads"] == 2
    for (busy, way), row in rows.items():
        alone = rows[busy, "one thread"]["images_per_second"]
        assert row["of_one_thread"] == pytest.approx(row["images_per_second"] / alone)
        assert f"| {busy} | {way} | {row['images_per_second']:.2f} |" in out
    monkeypatch.setattr(sampling_cpu.torch, "equal", lambda *_: False)
    with pytest.raises(SystemExit):
        run(sampling_cpu, *words)


@pytest.mark.parametrize("unset, said", [((), "7"), (("GOMP_SPINCOUNT",), "it is not set")])
def test_a_process_beside_starts_without_what_is_unset(monkeypatch, tmp_path, unset, said):
    """It says what it has by an error, which also must come through."""
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "says_its_environment.py").write_text(
        "import os\nfrom sit.utils.errors import UserError\n"
        "def says(name):\n    raise UserError(os.environ.get(name, 'it is not set'))\n"
    )
    says = importlib.import_module("says_its_environment").says
    with (
        pytest.raises(UserError, match=said),
        beside.process_with(says, "GOMP_SPINCOUNT", start="spawn", unset=unset),
    ):
        pass
    assert os.environ["GOMP_SPINCOUNT"] == "7"


def test_training_cpu(run, tmp_path):
    (tmp_path / "small.yaml").write_text("base: digits\nmodel: SiT-XS/2\ndata: digits:heldout\nbatch_size: 2\n")
    words = ("--recipe", tmp_path / "small.yaml", "--steps", 1, "--repeats", 1, "--busy", 0, 1, "--threads", 2)
    before = torch.get_num_threads()
    out, found = run(training_cpu, *words)
    assert torch.get_num_threads() == before
    rows = {(row["busy"], row["way"]): row for row in found["rows"]}
    ways = ("one thread", "2 threads", "2 threads that wait as usual")
    assert set(rows) == {(busy, way) for busy in (0, 1) for way in ways}
    for (busy, way), row in rows.items():
        alone = rows[busy, "one thread"]["steps_per_second"]
        assert row["of_one_thread"] == pytest.approx(row["steps_per_second"] / alone)
        assert f"| {busy} | {way} | {row['steps_per_second']:.2f} |" in out


ORDER = ("--particles", 50, "--counts", 4, "--methods", "euler", "dopri5")


def test_sampler_order(run, tmp_path, monkeypatch):
    """All but the drawing."""
    saved = {}
    monkeypatch.setattr(sampler_order.Figure, "savefig", lambda self, path, **_: saved.update({path.name: self}))
    out, found = run(sampler_order, "--out", tmp_path, *ORDER)
    assert out.count("dopri5") == 3 and out.count("heun") > 3
    (error,) = found["ode"]["vp"]["euler"].values()
    assert f"| vp | euler | 4: {error:.1e} |" in out
    assert set(saved) == {"sampler-order-ode.png", "sampler-order-sde.png"}
    for axis in saved["sampler-order-ode.png"].axes:
        assert [line.get_label() for line in axis.lines] == ["euler", "dopri5"]
        assert list(axis.lines[0].get_xdata()) == [4], "Euler evaluates the network once a step"
    labels = {line.get_label() for line in saved["sampler-order-sde.png"].axes[0].lines}
    assert "as many exact samples" in labels and len(labels) == 2 * len(sampler_order.DIFFUSION_FORMS) + 1


@pytest.mark.slow
def test_sampler_order_is_drawn(run, tmp_path):
    run(sampler_order, "--out", tmp_path, *ORDER)
    for name in ("sampler-order-ode.png", "sampler-order-sde.png"):
        with Image.open(tmp_path / name) as image:
            assert image.size == (1280, 440)


def test_the_exact_velocity_is_the_derivative_of_the_quantiles():
    """A quantile of the mixture is carried along by the velocity."""
    for name in ("linear", "gvp"):
        velocity = sampler_order.ExactVelocity(name)
        before, x, after = (sampler_order.quantiles(velocity.path, t, 9) for t in (0.599, 0.6, 0.601))
        found = velocity(x, torch.full((9,), 0.6, dtype=torch.float64))
        torch.testing.assert_close(found, (after - before) / 0.002, rtol=1e-4, atol=1e-4)


def test_shares(run):
    """They add up to one, matrix products lead; names are put where they belong; ATConv has a branch of its own."""
    out, found = run(shares, "--model", "SiT-XS/2", "--pixels", 64, "--batch-size", 1, "--repeats", 1)
    assert list(found["shares"]) == [f"{m}, {p}" for m in ("atconv", "attention") for p in ("forward", "training")]
    for name, one in found["shares"].items():
        branch = sum(one.pop(shares.BRANCH, {"none": 0.0}).values())
        assert 0 < branch < 0.5 if name.startswith("atconv") else branch == 0
        assert sum(sum(kind.values()) for kind in one.values()) == pytest.approx(1) and one["matrix products"]
    assert found["shares"]["attention, forward"]["attention"] and "| matrix products |" in out
    names = {
        "aten::addmm": "matrix products", "aten::_to_copy": "casts and copies", "aten::copy_": "casts and copies",
        "aten::native_layer_norm_backward": "norms", "aten::gelu_backward": "activations", "aten::mul_": "modulation, "
        "gates, residuals and taps", "aten::mkldnn_convolution": "convolution", "aten::view": "other",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attention", "aten::mm": "matrix products",
    }  # fmt: skip
    assert {name: shares.kind_of(name) for name in names} == names


@pytest.mark.slow
def test_speed(run):
    words = ("--models", "SiT-XS/8", "--pixels", 256, "--repeats", 1, "--rate-repeats", 1, "--steps", 1)
    out, found = run(speed, *words)
    assert {row["scope"] for row in found["rows"]} == {"mixer", "block", "network", "training", "sampling"}
    assert found["machine"] in out
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(found["rows"]) and len({line.count("|") for line in table}) == 1
    row = next(row for row in found["rows"] if row["scope"] == "sampling" and row["variant"] == "ours")
    cells = [cell.strip() for cell in table[2 + found["rows"].index(row)].split("|")[1:-1]]
    other = found["rows"][found["rows"].index(row) - 2]
    assert other["variant"] == "attention" and cells[6] == "ours"
    assert float(cells[9]) == pytest.approx(other["seconds"] / row["seconds"], abs=0.006)


def test_speed_of_one_layer(run):
    words = ("--scopes", "mixer", "--models", "SiT-XS/8", "--pixels", 256, "--repeats", 1, "--rate-repeats", 1)
    out, found = run(speed, *words)
    table = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("| mixer")]
    for row, cells in zip(found["rows"], table, strict=True):
        assert (row["sdpa"] in ("flash", "math")) == (row["variant"] == "attention")
        assert cells[-1].strip() == (row["sdpa"] or "")
    assert [(row[0].strip(), row[6].strip()) for row in table] == [
        (f"mixer, {what}", variant) for what in ("forward", "forward+backward") for variant in speed.VARIANTS
    ]


def test_attention_has_the_fastest_backend_that_can_do_it(monkeypatch):
    """By the times that each backend is said to have taken; in the run no other is allowed."""
    arguments = speed.Arguments(models=("SiT-XS/8",), pixels=(256,), repeats=1, device="cpu")
    case = speed.Case("mixer", "SiT-XS/8", 256, 2, "float32", False)
    assert set(speed.attention_seconds(case, "forward", arguments)) == {"flash", "math"}, "what a CPU has"
    monkeypatch.setattr(speed, "MOST_SCORES", 4 * 2 * 4 * 16**2 - 1)
    assert set(speed.attention_seconds(case, "forward+backward", arguments)) == {"flash"}, "the scores are too large"
    said = {"forward": {"flash": 2.0, "math": 1.0}, "forward+backward": {"flash": 1.0, "math": 2.0}}
    monkeypatch.setattr(speed, "attention_seconds", lambda case, what, arguments: said[what])
    enabled = torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.math_sdp_enabled
    seen = {}
    timed = {what: lambda what=what: seen.update({what: [ask() for ask in enabled]}) for what in said}
    runs, best = speed.with_best_attention(case, timed, arguments)
    assert best == {"forward": "math", "forward+backward": "flash"}
    for run in runs.values():
        run()
    assert seen == {"forward": [False, True], "forward+backward": [True, False]}
    assert all(ask() for ask in enabled)


def test_multiply_accumulates_of_a_layer():
    """Against the formulas: four products of C×C and two of N×N for attention; of ATConv two, and its kernels."""
    arguments = speed.Arguments(models=("SiT-XS/8",), pixels=(256,), device="cpu")
    case = speed.Case("mixer", "SiT-XS/8", 256, 3, "float32", False)
    tokens, dim = (256 // 8 // 8) ** 2, speed.MODELS["SiT-XS/8"]["hidden_size"]
    macs, moved = speed.work(case, "forward", "attention", arguments)
    assert macs == 3 * (4 * tokens * dim**2 + 2 * tokens**2 * dim)
    streams, weights = 2 * 3 * tokens * dim, 4 * dim**2 + 4 * dim
    assert moved == 4 * (streams + weights)
    three = (3 * macs, 3 * moved)
    assert speed.work(case, "forward+backward", "attention", arguments) == three
    ours, published = (speed.work(case, "forward", name, arguments)[0] for name in ("ours", "as published"))
    assert published - ours == 3 * (tokens - 9) * dim**2, "projects every token where ours projects nine"


def test_the_baseline_computes_what_atconv_does():
    torch.manual_seed(0)
    ours = ATConv(8)
    theirs = PublishedATConv(8)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 20, 8)
    torch.testing.assert_close(theirs(x, (4, 5)), ours(x, (4, 5)))


def test_xl_step(run, monkeypatch, capsys):
    """The command of each case is run here, and its output read."""

    def here(command, **options):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command[1:])
            with contextlib.redirect_stdout(io.StringIO()) as out:
                xl_step.main()
        return subprocess.CompletedProcess(command, 0, out.getvalue(), "")

    monkeypatch.setattr(xl_step.subprocess, "run", here)
    out, found = run(xl_step, "--model", "SiT-XS/8", "--dtypes", "float32")
    rows = [line for line in out.splitlines() if "float32" in line]
    assert [row.split(" | ")[0] for row in rows] == ["| attention", "| atconv"]
    assert all(row.count("GiB") == 2 and row.count(" s |") == 2 for row in rows)
    assert [case["mixer"] for case in found["cases"]] == ["attention", "atconv"]
    assert all(case["finite"] and 0 < case["imports_gib"] <= case["peak_gib"] for case in found["cases"])

    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: no memory\n")
    monkeypatch.setattr(xl_step.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(UserError, match="atconv in bfloat16: RuntimeError: no memory"):
        xl_step.in_own_process("SiT-XS/8", "atconv", "bfloat16")


def test_machine_code(monkeypatch, capsys, tmp_path):
    """The table, of what a compiler would have found; ``tests/atconv/test_triton.py`` compiles."""
    pytest.importorskip("triton", reason="Triton is not installed")
    module = importlib.import_module("machine_code")
    monkeypatch.setattr(module, "compile_for", lambda build, target: b"")
    monkeypatch.setattr(module, "look", lambda code: (64, 0, 800))
    monkeypatch.setattr(module, "INTERPRETED", False)
    module.run(module.Arguments(images=2, channels=64, grids=(16,), json=tmp_path / "found.json"))
    assert {kernel["registers"] for kernel in json.loads((tmp_path / "found.json").read_text())["kernels"]} == {64}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows[2:]] == ["convolve", "correlate", "average", "spread", "route"]
    for row in rows[2:]:
        assert row[7:10] == ["64", "32", "800"], "65536 registers are 32 warps of 32 threads with 64 each"
    monkeypatch.setattr(module, "INTERPRETED", True)
    with pytest.raises(UserError, match="TRITON_INTERPRET is set"):
        module.run(module.Arguments())


@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_says_what_it_is_for(name, monkeypatch, capsys):
    """``--help``, and a mistake in one line."""
    if name == "machine_code":
        pytest.importorskip("triton", reason="Triton is not installed")
    module = importlib.import_module(name)
    for words, code in (["--help"], 0), (["--nonsense"], 2):
        monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}.py", *words])
        with pytest.raises(SystemExit) as stopped:
            module.main()
        assert (stopped.value.code or 0) == code
        told = capsys.readouterr()
        assert told.out.startswith(f"usage: benchmarks/{name}.py") if code == 0 else told.err.startswith("error: ")
    assert told.err.count("\n") == 1


@pytest.mark.parametrize(
    "module, options, message",
    [
        (frechet, {"repeats": 0}, "`repeats` must be at least 1, not 0"),
        (freed_memory, {"sides": (8,)}, "`sides` and `images` take one number for each model"),
        (freed_memory, {"dtypes": ("int8",)}, "`dtypes=int8`: float32 or bfloat16"),
        (main_job, {"cpu_threads": (0,)}, "`cpu_threads` must be at least 1, not 0"),
        (loader, {"rounds": 0}, "`rounds` must be at least 1, not 0"),
        (frechet, {"samples": 1}, "`samples` must be at least 2, not 1"),
        (overhead, {"rounds": 0}, "`rounds` must be at least 1, not 0"),
        (sampling_cpu, {"threads": 1}, "`threads` must be at least 2, not 1"),
        (sampling_cpu, {"busy": (-1,)}, "`busy=-1` can't be less than 0"),
        (training_cpu, {"threads": 1}, "`threads` must be at least 2, not 1"),
        (training_cpu, {"busy": (-1,)}, "`busy=-1` can't be less than 0"),
        (sampler_order, {"methods": ("guess",)}, "`method=guess`"),
        (shares, {"pixels": 250}, "`pixels=250`: the side must be a multiple of 16"),
        (speed, {"models": ("SiT-Q/2",)}, "unknown model 'SiT-Q/2'"),
        (speed, {"pixels": (250,), "models": ("SiT-B/2",)}, "`pixels=250`: the side must be a multiple of 16"),
        (xl_step, {"model": "SiT-Q/2"}, "unknown model 'SiT-Q/2'"),
    ],
)
def test_what_cant_be_measured_is_refused(module, options, message):
    with pytest.raises(UserError, match=message):
        module.Arguments(**options)


@pytest.mark.skipif(sys.platform != "linux", reason="this system does not tell a process's peak")
def test_the_peak_of_memory_is_what_a_program_took_at_once():
    """In a process of its own: this one may keep what it frees."""
    program = (
        "import json, torch, peak\n"
        "def takes(sizes):\n    for size in sizes:\n        torch.ones(size << 18)\n"  # float32; freed before the next
        "cpu = torch.device('cpu')\n"
        "print(json.dumps([peak.peak_bytes(lambda: takes(sizes), cpu) for sizes in ((64, 192, 64), (8,))]))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (FOLDER, FOLDER.parent)))}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    peaks = json.loads(done.stdout)
    assert peaks[0] == pytest.approx(192 << 20, rel=0.05) and peaks[1] == pytest.approx(8 << 20, rel=0.2)


def test_mixers(run):
    """Counts are those of the networks; the derivatives are there, and the losses of a study found."""
    report = FOLDER.parent / "docs" / "fashion-pixels-short" / "report" / "numbers.json"
    words = ("--patterns", "attention", "deformable", "atconv:scope=token", "--model", "SiT-XS/2", "--sides", 4, 5)
    more = ("--batch-size", 1, "--step-batch-size", 2, "--repeats", 1, "--device", "cpu", "--study", report)
    out, found = run(mixers, *words, *more)
    rows = {row["pattern"]: row for row in found["rows"]}
    network = create_model("SiT-XS/2", mixer="deformable", input_size=8)
    assert rows["deformable"]["parameters"] == sum(p.numel() for p in network.parameters())
    assert {name: row["forward_derivative"] for name, row in rows.items()} == {
        "attention": "slow path", "deformable": "slow path", "atconv:scope=token": "yes",
    }  # fmt: skip
    ((loss, fid),) = rows["attention"]["found"].values()
    of_study = json.loads(report.read_text())
    metrics = of_study["variants"]["attention"]["metrics"]
    assert [loss, fid] == [metrics[name]["value"] for name in (LOSS, of_study["fid"])]
    assert all(len(row["macs"]) == len(row["milliseconds"]) == 2 for row in rows.values())
    if sys.platform == "linux":
        plain, meanflow = rows["attention"]["peak_memory"]
        assert plain > 0 and meanflow > 0  # which is larger, so small a network doesn't tell
        assert f"| {meanflow / plain:.2f} |" in out
    name = "(fashion-pixels-short, attention)"
    assert out.count("| `") == 3 and f"{loss:.4f} {name} | {fid:.3g} {name} |" in out


def test_measured_mixers_with_what_a_study_found_later(run, tmp_path, monkeypatch, capsys):
    """The measurements and how they were made stay; nothing is timed."""
    words = ("--patterns", "depthwise", "--model", "SiT-XS/2", "--sides", 4, "--batch-size", 1, "--step-batch-size", 1)
    out, before = run(mixers, *words, "--repeats", 1, "--device", "cpu")
    assert before["rows"][0]["found"] == {}
    report = tmp_path / "some" / "report" / "numbers.json"
    report.parent.mkdir(parents=True)
    metrics = {LOSS: {"value": 0.25}}
    report.write_text(json.dumps({"fid": None, "variants": {"D": {"mixer": "depthwise", "metrics": metrics}}}))
    monkeypatch.setattr(mixers, "compare", None)
    again = ["--measured", str(tmp_path / "mixers.json"), "--study", str(report), "--json", str(tmp_path / "b.json")]
    monkeypatch.setattr(sys, "argv", ["benchmarks/mixers.py", *again])
    mixers.main()
    now = json.loads((tmp_path / "b.json").read_text())
    assert now["rows"][0].pop("found") == {"some, D": [0.25, None]} and before["rows"][0].pop("found") == {}
    assert f"--study {report}" in now.pop("told_again")["command"]
    assert now == before
    assert capsys.readouterr().out.replace(" 0.2500 (some, D) |", "  |") == out
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(UserError, match=r"`measured=.*b.json` is no JSON of benchmarks/mixers.py"):
        mixers.told_again(mixers.Arguments(), tmp_path / "b.json")
