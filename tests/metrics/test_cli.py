"""eval_fid.py: from images, files and checkpoints to numbers, with both kinds of features, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from few_directions import use_few_directions
from PIL import Image
from processes import Connected
from safetensors.torch import load_file, save_file
from torch_fidelity import calculate_metrics, register_feature_extractor

from sit.checkpoint.hints import FileHints
from sit.checkpoint.load import load_for_sampling
from sit.data.digits import digits_arrays
from sit.data.factory import open_images
from sit.metrics import cli as eval_fid
from sit.metrics.arguments import Arguments
from sit.metrics.classifier import LabelClassifier
from sit.metrics.digits import EXTRACTOR, DigitsFeatureExtractor
from sit.metrics.estimate import half_width
from sit.metrics.evaluate import evaluate
from sit.metrics.extraction import CHUNK, Wanted, extract
from sit.metrics.features import get_extractor
from sit.metrics.generated import GeneratedImages
from sit.metrics.identity import canonical
from sit.metrics.image_sets import ArrayImages, DataImages, SomeImages, drawn, open_samples
from sit.metrics.statistics_files import open_reference
from sit.sampling.config import SamplerConfig
from sit.utils.errors import UserError
from sit.utils.weight_files import WEIGHTS

CPU = torch.device("cpu")
EIGHT = dict(device=CPU, batch_size=8)
ROOT = Path(__file__).parents[2]


def write_npz(path: Path, count: int, size: int = 32, seed: int = 0, **extra) -> Path:
    images = np.random.default_rng(seed).integers(0, 256, size=(count, size, size, 3), dtype=np.uint8)
    np.savez(path, arr_0=images, **extra)
    return path


def numbers(report) -> dict[str, float]:
    return {number.name.split(" (")[0]: number.value for number in report.numbers}


@pytest.mark.slow
def test_the_classifier_knows_digits():
    data = open_images("digits:heldout")
    images = torch.stack([data[i][0] for i in range(len(data))])
    _, logits = DigitsFeatureExtractor(features_list=["features", "logits"])(images)
    assert (logits.argmax(1).numpy() == data.labels).mean() > 0.97


def test_digits_fid_is_torch_fidelitys(tmp_path):
    """The whole of torch-fidelity, on the same images with the registered features."""

    class Images(torch.utils.data.Dataset):
        def __init__(self, part):
            self.data = open_images(f"digits:{part}")

        def __len__(self):
            return 200

        def __getitem__(self, index):
            return self.data[index][0]

    register_feature_extractor(EXTRACTOR, DigitsFeatureExtractor)
    theirs = calculate_metrics(
        input1=Images("heldout"), input2=Images("train"), feature_extractor=EXTRACTOR, fid=True, cuda=False,
        verbose=False, save_cpu_ram=True, cache=False,
    )["frechet_inception_distance"]  # fmt: skip
    first = np.arange(200)
    samples, reference = (SomeImages(DataImages(f"digits:{part}", None), first) for part in ("heldout", "train"))
    report = evaluate(samples, reference, get_extractor("digits", CPU), device=CPU)
    assert report.numbers[0].name == "FID (digits features, not comparable with Inception FID)"
    assert report.numbers[0].value == pytest.approx(theirs, rel=1e-3)
    accuracy = next(number for number in report.numbers if number.name == "Class accuracy")
    assert 0.97 < accuracy.value < 1
    means = np.array(accuracy.replicates)  # of random groups of 20
    assert means.mean() == pytest.approx(accuracy.value) and accuracy.error == pytest.approx(half_width(means))


def test_folder_npz_and_statistics_agree(tmp_path, capsys):
    images, _ = digits_arrays()
    rgb = np.repeat(images[:120, :, :, None], 3, axis=3)
    np.savez(tmp_path / "samples.npz", arr_0=rgb)
    (tmp_path / "png").mkdir()
    for number, image in enumerate(rgb):
        Image.fromarray(image).save(tmp_path / "png" / f"{number:03}.png")
    stats = tmp_path / "stats.npz"
    sys_argv = ["eval_fid.py", "reference", "--data", "digits:heldout", "--features", "digits", "--out", str(stats)]
    run_command(sys_argv)
    with np.load(stats) as archive:
        assert archive["mu"].shape == (64,) and archive["sigma"].shape == (64, 64) and archive["arr_0"].shape[0] == 360
    fids = []
    for samples, reference in (
        ("samples.npz", "digits:heldout"),
        ("png", "digits:heldout"),
        ("samples.npz", str(stats)),
    ):
        out = tmp_path / "out.json"
        run_command(["eval_fid.py", "--samples", str(tmp_path / samples), "--reference", reference, "--features",
                  "digits",
                  "--json", str(out)])  # fmt: skip
        fids.append(json.loads(out.read_text())["numbers"][0]["value"])
    assert fids[0] == pytest.approx(fids[1], rel=1e-9) and fids[0] == pytest.approx(fids[2], rel=1e-6)


def run_command(argv: list[str]) -> None:
    before, sys.argv = sys.argv, argv
    try:
        eval_fid.main()
    finally:
        sys.argv = before


@pytest.mark.slow
def test_the_inception_path_from_end_to_end(inception_weights, tmp_path, monkeypatch):
    use_few_directions(monkeypatch)
    extractor = get_extractor("inception", CPU, str(inception_weights))
    stats = tmp_path / "stats.npz"
    write_npz(tmp_path / "real.npz", 6, seed=1)
    run_command(["eval_fid.py", "reference", "--data", str(tmp_path / "real.npz"), "--out", str(stats),
              "--inception-weights", str(inception_weights), "--images", "6"])  # fmt: skip
    with np.load(stats) as archive:
        shapes = {name: archive[name].shape for name in archive}
    assert shapes.pop("about") == ()
    assert shapes == {
        "mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023), "arr_0": (6, 32, 32, 3),
    }  # fmt: skip

    # the spatial features by hand: hook-free, from the modules in turn, in TensorFlow's order
    images = torch.from_numpy(np.load(tmp_path / "real.npz")["arr_0"]).permute(0, 3, 1, 2)[:2]
    found = extractor(images)
    assert found["features"].shape == (2, 2048) and found["logits"].shape == (2, 1008)
    inputs = []
    handle = extractor.network.inception.Mixed_6d.register_forward_pre_hook(lambda m, i: inputs.append(i[0]))
    extractor(images)
    handle.remove()
    branch = extractor.network.inception.Mixed_6d.branch1x1(inputs[0])
    assert branch.shape == (2, 192, 17, 17)
    expected = [[branch[n, c, h, w].item() for h in range(17) for w in range(17) for c in range(7)] for n in range(2)]
    np.testing.assert_allclose(found["spatial"], expected, rtol=1e-5)

    samples, reference = open_samples(str(tmp_path / "real.npz")), open_reference(str(stats))
    report = evaluate(samples, reference, extractor, device=CPU)
    assert {"FID", "sFID", "KID", "Precision", "Recall"} <= set(numbers(report))
    scale = np.trace(reference.of(extractor).features.sigma)
    assert abs(numbers(report)["FID"]) < 1e-6 * max(1, scale)
    assert numbers(report)["Precision"] == 1


def test_missing_inception_weights_are_asked_for_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None, raising=False)
    with pytest.raises(
        UserError, match="weights-inception-2015-12-05-6726825d.pth .* at .* or name them by `inception_weights`"
    ):
        get_extractor("inception", CPU)
    (tmp_path / "wrong.pth").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="wrong.pth`: not the weights"):
        get_extractor("inception", CPU, str(tmp_path / "wrong.pth"))
    evaluate_digits = evaluate(
        DataImages("digits:heldout", None), DataImages("digits:train", None), get_extractor("digits", CPU), device=CPU
    )
    assert evaluate_digits.numbers


class Counting(ArrayImages):
    """Images that count how often they are read, and fail at one of them if told to."""

    reads, fail_at = 0, None

    def batch(self, numbers):
        if self.fail_at is not None and self.fail_at in numbers:
            raise KeyboardInterrupt
        Counting.reads += len(numbers)
        return super().batch(numbers)


def test_a_restart_does_not_repeat_what_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr("sit.metrics.extraction.CHUNK", 16)
    array = np.random.default_rng(0).integers(0, 256, size=(50, 32, 32, 3), dtype=np.uint8)
    extractor = get_extractor("digits", CPU)
    whole = extract(Counting(Path("x"), array, None), [Wanted(extractor)], tmp_path / "a", **EIGHT)["digits"]
    images = Counting(Path("x"), array, None)
    images.fail_at = 40
    with pytest.raises(KeyboardInterrupt):
        extract(images, [Wanted(extractor)], tmp_path / "b", **EIGHT)
    images.fail_at, Counting.reads = None, 0
    resumed = extract(images, [Wanted(extractor)], tmp_path / "b", **EIGHT)["digits"]
    assert Counting.reads == 18
    np.testing.assert_array_equal(whole.rows()["features"], resumed.rows()["features"])
    np.testing.assert_allclose(whole.sums["features"].moments().sigma, resumed.sums["features"].moments().sigma)
    extract(Counting(Path("y"), array, None), [Wanted(extractor)], tmp_path / "b", **EIGHT)
    assert Counting.reads == 18 + 50, "other images are another entry of the work folder"


@pytest.mark.parametrize(
    "arrays, words",
    [
        (dict(images=np.zeros((2, 4, 4, 3), np.uint8)), "has no arr_0 with images; it has images"),
        (dict(arr_0=np.zeros((2, 4, 4, 3), np.float32)), r"must be uint8 images of shape \(N, H, W, 3\), not float32"),
        (dict(arr_0=np.zeros((2, 3, 4, 4), np.uint8)), r"not uint8 \(2, 3, 4, 4\)"),
        (dict(arr_0=np.zeros((2, 4, 4, 3), np.uint8), arr_1=np.zeros(3)), "arr_1 has 3 labels for 2 images"),
        (dict(arr_0=np.zeros((2, 4, 4, 3), np.uint8), arr_1=np.array(["a", "b"])), "arr_1 must be whole numbers"),
        (dict(arr_0=np.zeros((2, 4, 4, 3), np.uint8), arr_1=np.eye(2, dtype=int)), "arr_1 must be whole numbers"),
        (dict(mu=np.zeros(4)), "mu and sigma must both be there"),
        (dict(mu=np.zeros(4), sigma=np.full((4, 4), np.nan)), "sigma .* must be finite real numbers"),
        (dict(mu=np.zeros(4), sigma=np.eye(4) * 1j), "sigma .* must be finite real numbers"),
        (dict(mu=np.array(["a"]), sigma=np.eye(1)), "mu .* must be finite real numbers"),
        (dict(mu=np.zeros(4), sigma=np.zeros((3, 3))), "are not moments of one thing"),
    ],
)
def test_npz_files_of_a_wrong_form(tmp_path, arrays, words):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=words):
        open_reference(str(tmp_path / "bad.npz"))


def test_other_mistakes(tmp_path):
    path = write_npz(tmp_path / "cut.npz", 4)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="is not a complete npz"):
        open_samples(str(path))
    with pytest.raises(UserError, match="no such file"):
        open_samples(str(tmp_path / "none.npz"))
    with pytest.raises(UserError, match="no such folder, npz file or data set"):
        open_samples(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no images"):
        open_samples(str(tmp_path / "empty"))
    (tmp_path / "empty" / "a.png").write_bytes(b"no")
    with pytest.raises(UserError, match="corrupt image .*a.png"):
        open_samples(str(tmp_path / "empty")).batch(np.array([0]))
    with pytest.raises(UserError, match="`features=vgg`: unknown; known features: digits, inception, dinov2"):
        get_extractor("vgg", CPU)
    with pytest.raises(UserError, match="needs at least 2 images, and there are 1"):
        one = open_samples(str(write_npz(tmp_path / "one.npz", 1)))
        evaluate(one, DataImages("digits", None), get_extractor("digits", CPU), device=CPU)
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(UserError, match="statistics of 2048 features, and digits has 64"):
        few = open_samples(str(write_npz(tmp_path / "few.npz", 5)))
        evaluate(few, open_reference(str(tmp_path / "stats.npz")), get_extractor("digits", CPU), device=CPU)
    with pytest.raises(UserError, match="`num_samples=9`: .* has only 5 images"):
        drawn(few, 9)


def test_a_single_array_odd_sizes_and_counts_below_one(tmp_path, capsys):
    with open(tmp_path / "array.npz", "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(UserError, match="is a single array"):
        open_samples(str(tmp_path / "array.npz"))
    np.savez(tmp_path / "odd.npz", arr_0=np.zeros((12, 30, 31, 3), np.uint8))
    with pytest.raises(UserError, match="odd.npz: digits must be square .* not 30x31"):
        odd = open_samples(str(tmp_path / "odd.npz"))
        evaluate(odd, DataImages("digits:heldout", None), get_extractor("digits", CPU), device=CPU)
    for flag in ("--images", "--batch-size"):
        with pytest.raises(SystemExit):
            run_command(["eval_fid.py", "reference", "--data", "digits", "--features", "digits",
                      "--out", str(tmp_path / "stats.npz"), flag, "0"])  # fmt: skip
        assert f"error: {flag} must be at least 1, not 0" in capsys.readouterr().err
    assert not (tmp_path / "stats.npz").exists()


def test_the_order_of_the_reference_does_not_decide_precision(monkeypatch):
    """A folder is sorted by class: its first images must not stand for all of it."""
    monkeypatch.setattr("sit.metrics.evaluate.REFERENCE_IMAGES", 100)
    images, labels = digits_arrays()
    rgb = np.repeat(images[..., None], 3, axis=3)
    mixed = np.random.default_rng(0).permutation(len(rgb))
    one, other = mixed[:800], mixed[800:1600]
    by_class = other[np.argsort(labels[other], kind="stable")]
    samples, reference = (ArrayImages(Path("x"), rgb[part], None) for part in (one, by_class))
    report = evaluate(samples, reference, get_extractor("digits", CPU), device=CPU)
    assert numbers(report)["Precision"] > 0.7


def test_a_replaced_file_or_other_weights_are_another_evaluation(tmp_path):
    """In one work folder, and each beside the others."""
    first, other = get_extractor("digits", CPU), get_extractor("digits", CPU)
    other.network.classifier.classifier.body[0].bias.data += 1
    path, found = tmp_path / "samples.npz", []
    for seed in range(2):
        images = open_samples(str(write_npz(path, 8, seed=seed)))
        for extractor in (first, other):
            rows = extract(images, [Wanted(extractor)], tmp_path / "work", **EIGHT)["digits"].rows("features")
            found.append(rows["features"])
            pixels = torch.from_numpy(images.array).permute(0, 3, 1, 2)
            np.testing.assert_array_equal(found[-1], extractor(pixels)["features"])
        os.utime(path, ns=(0, seed))
    assert len({rows.tobytes() for rows in found}) == 4


def test_everything_that_features_depend_on_tells_an_evaluation_from_others(checkpoint, classifier_of_three, tmp_path):
    """Each change gives another identity, and no change the same."""

    def change(path: Path) -> None:
        state = path.stat()
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))

    write_wide_images(tmp_path / "flat", ("a.png", "b.png"))
    write_wide_images(tmp_path / "classes", ("n1/a.png", "n2/b.png"))
    with tarfile.open(tmp_path / "classes.tar", "w") as archive:
        archive.add(tmp_path / "classes", arcname=".")
    changing = {"flat": "flat/a.png", "classes": "classes/n1/a.png", "classes.tar": "classes.tar"}
    for name, file in changing.items():
        seen = [identity(open_samples(str(tmp_path / name), size)) for size in (32, 16)]
        change(tmp_path / file)
        seen.append(identity(open_samples(str(tmp_path / name), 32)))
        assert len(set(seen)) == 3 and seen[-1] == identity(open_samples(str(tmp_path / name), 32))
    (tmp_path / "flat" / "b.png").rename(tmp_path / "flat" / "c.png")
    seen = [identity(open_samples(str(tmp_path / "flat"), None))]
    (tmp_path / "flat" / "c.png").unlink()
    assert identity(open_samples(str(tmp_path / "flat"), None)) not in seen


def test_everything_that_samples_depend_on_tells_them_from_others(checkpoint, classifier_of_three, tmp_path):
    """The weights themselves, not their place or time; each change gives another identity, and no change the same."""
    run, vae = tmp_path / "run", tmp_path / "vae"
    shutil.copytree(checkpoint, run)
    (run / "sit.json").unlink()  # else other weights are damaged ones
    shutil.copytree(run / "vae", vae)
    few = SamplerConfig(steps=2)

    def one(place: Path = run, config: SamplerConfig = few, **more) -> str:
        return identity(GeneratedImages(load_for_sampling(place, vae=vae), 20, config=config, **more))

    told = GeneratedImages(load_for_sampling(run, vae=vae), 20, config=few).about["config"]
    assert not {"average_velocity", "positional_grid"} & set(told), "features that were made before are found again"
    first = one()
    assert one(config=SamplerConfig(steps=2, cfg_channels=3)) == first, "as samples of 4 channels were told before"
    seen = [first, one(image_size=(64, 64)), one(seed=1), one(labels="uniform"), one(config=SamplerConfig(steps=3))]
    seen += [one(config=SamplerConfig(steps=2, cfg_scale=1.5)), one(config=SamplerConfig("ode", 2, "euler"))]
    for folder in (run / "transformer", vae):
        (path,) = folder.glob("*.safetensors")
        state = load_file(path)
        name = next(name for name, tensor in state.items() if tensor.ndim > 1)
        state[name] = state[name] * 1.5
        save_file(state, path, metadata={"format": "pt"})
        seen.append(one())
    assert len(set(seen)) == len(seen) and one() == seen[-1]
    (run / "training").mkdir()  # what is removed to make a checkpoint small
    shutil.copytree(run, tmp_path / "elsewhere")
    assert one() == one(tmp_path / "elsewhere") == seen[-1]
    network = load_for_sampling(run, vae=vae, dtype=torch.bfloat16)
    assert identity(GeneratedImages(network, 20, config=few)) not in seen

    def identities() -> tuple[str, str]:
        extractor = get_extractor(f"classifier:{classifier_of_three}", CPU)
        return identity(extractor), identity(LabelClassifier.load(classifier_of_three, CPU))

    assert identities() == identities()
    changed = LabelClassifier.load(classifier_of_three, CPU)
    next(changed.classifier.parameters()).data += 1
    assert identity(changed) != identities()[1]


def identity(thing) -> str:
    return canonical(thing.about)


def test_the_same_command_reads_what_it_made_and_replaced_weights_are_sampled_anew(checkpoint, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(checkpoint, run)
    (run / "sit.json").unlink()  # else other weights are damaged ones
    words = ["--ckpt", str(run), "--reference", "digits:heldout", "--num-samples", "12", "--steps", "2"]
    words += ["--work-dir", str(tmp_path / "work")]

    def printed() -> str:
        run_command(["eval_fid.py", *words])
        return capsys.readouterr().out

    first = printed()
    assert printed() == first and len(list((tmp_path / "work").glob("samples-*"))) == 1
    (path,) = (run / "transformer").glob("*.safetensors")
    state = {name: tensor * 1.5 for name, tensor in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})
    assert printed() != first and len(list((tmp_path / "work").glob("samples-*"))) == 2


@pytest.mark.distributed
def test_from_a_checkpoint_on_one_process_and_on_two(checkpoint, tmp_path, monkeypatch):
    """Sampled on the fly: the same numbers however many processes share the work."""
    monkeypatch.setattr("sit.metrics.extraction.CHUNK", 32)
    values = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.json"
        words = ["--ckpt", checkpoint, "--num-samples", 80, "--reference", "digits:heldout", "--steps", 2]
        said = Connected(processes, "eval_fid.py", *words, "--json", out).output()
        assert said.count("80 samples of") == 1
        values.append([number["value"] for number in json.loads(out.read_text())["numbers"]])
    np.testing.assert_allclose(values[0], values[1], rtol=1e-6)


SHARES = """
import sys
from pathlib import Path
import numpy as np
import torch
from accelerate import PartialState
from sit.metrics.extraction import CHUNK, Wanted, extract
from sit.metrics.features import get_extractor
from sit.metrics.image_sets import ArrayImages

class Noting(ArrayImages):
    def batch(self, numbers):
        seen.extend(numbers.tolist())
        return super().batch(numbers)

folder, seen = Path(sys.argv[1]), []
images = Noting(folder / "none", np.zeros((3 * CHUNK + 5, 32, 32, 3), np.uint8), None)
cpu = torch.device("cpu")
found = extract(images, [Wanted(get_extractor("digits", cpu))], folder / "work", device=cpu, batch_size=100)
assert (found is not None) == (PartialState().process_index == 0)
assert found is None or found["digits"].rows()["features"].shape == (len(images), 64)
np.save(folder / f"seen-{PartialState().process_index}.npy", seen)
"""


@pytest.mark.distributed
def test_two_processes_make_every_other_chunk_each(tmp_path):
    (tmp_path / "program.py").write_text(SHARES)
    Connected(2, tmp_path / "program.py", tmp_path).output()
    first, second = (np.load(tmp_path / f"seen-{process}.npy").tolist() for process in range(2))
    assert first == [*range(CHUNK), *range(2 * CHUNK, 3 * CHUNK)]
    assert second == [*range(CHUNK, 2 * CHUNK), *range(3 * CHUNK, 3 * CHUNK + 5)]


@pytest.mark.distributed
def test_a_reference_is_made_by_two_processes_as_by_one(tmp_path):
    words = ["eval_fid.py", "reference", "--data", "digits:heldout", "--features", "digits", "--images", "100", "--out"]
    run_command([*words, str(tmp_path / "one.npz")])
    assert Connected(2, *words, tmp_path / "two.npz").output().count("reference: ") == 1
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        assert np.array_equal(one["arr_0"], two["arr_0"]) and set(one) == set(two)
        np.testing.assert_allclose(one["mu"], two["mu"], rtol=1e-6)


def test_the_images_of_a_reference_are_drawn_at_random(tmp_path):
    """Image i has i in its first two bytes; 60 of 400 drawn without replacement have this mean and deviation."""
    images = np.zeros((400, 32, 32, 3), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.divmod(np.arange(400), 256)
    np.savez(tmp_path / "images.npz", arr_0=images)
    kept = []
    for name, count in (("a", 60), ("b", 60), ("all", 1000)):
        out = tmp_path / f"{name}.npz"
        run_command(["eval_fid.py", "reference", "--data", str(tmp_path / "images.npz"), "--features", "digits",
                  "--images", str(count), "--out", str(out)])  # fmt: skip
        with np.load(out) as archive:
            shown = archive["arr_0"].astype(int)
        kept.append((256 * shown[:, 0, 0, 0] + shown[:, 0, 0, 1]).tolist())
    assert kept[0] == kept[1] and len(set(kept[0])) == 60
    deviation = ((400**2 - 1) / 12 / 60 * (400 - 60) / (400 - 1)) ** 0.5
    assert abs(np.mean(kept[0]) - 199.5) < 4 * deviation
    gaps = np.diff(sorted(kept[0]))
    assert gaps.max() > 2 * gaps.mean()  # nor at even distances
    assert sorted(kept[2]) == list(range(400))


def test_saved_samples_are_those_that_were_evaluated(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("sit.metrics.extraction.CHUNK", 16)
    saved = tmp_path / "samples.npz"
    run_command(["eval_fid.py", "--ckpt", str(checkpoint), "--reference", "digits:heldout", "--num-samples", "40",
              "--steps", "2", "--save", str(saved), "--json", str(tmp_path / "a.json")])  # fmt: skip
    with np.load(saved) as archive:
        assert archive["arr_0"].shape == (40, 32, 32, 3) and archive["arr_0"].dtype == np.uint8
        assert archive["arr_1"].tolist() == [i % 10 for i in range(40)]
    run_command(
        ["eval_fid.py", "--samples", str(saved), "--reference", "digits:heldout", "--json", str(tmp_path / "b.json")]
    )
    values = [[n["value"] for n in json.loads((tmp_path / f).read_text())["numbers"]] for f in ("a.json", "b.json")]
    np.testing.assert_allclose(*values, rtol=1e-9)


def test_a_weights_file_that_does_not_tell_its_size_is_told(checkpoint, tmp_path, capsys):
    """The checkpoint's weights alone, without a positional table, as ATConv's are published."""
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes((checkpoint / "transformer" / WEIGHTS).read_bytes())
    words = ["--reference", "digits:heldout", "--num-samples", "12", "--steps", "2"]
    whole = ["--ckpt", str(checkpoint), "--image-size", "64", "64"]
    run_command(["eval_fid.py", "--save", str(tmp_path / "a.npz"), *whole, *words])
    words += ["--ckpt", str(bare), "--vae", "digits"]
    with pytest.raises(SystemExit):
        run_command(["eval_fid.py", *words])
    assert "--image-size" in capsys.readouterr().err
    run_command(["eval_fid.py", "--image-size", "64", "--save", str(tmp_path / "b.npz"), *words])
    with np.load(tmp_path / "a.npz") as one, np.load(tmp_path / "b.npz") as other:
        assert one["arr_0"].shape == (12, 64, 64, 3) and np.array_equal(one["arr_0"], other["arr_0"])


def test_samples_of_another_size_than_the_training(checkpoint, tmp_path, capsys):
    loaded = load_for_sampling(checkpoint)
    wide = GeneratedImages(loaded, 2, config=SamplerConfig(steps=2), image_size=(32, 64))
    assert wide.batch(np.arange(2)).shape == (2, 3, 32, 64)
    for words, said in (
        (["--ckpt", str(checkpoint), "--image-size", "30"], "--image-size 30 30: both must be multiples of 8"),
        (["--samples", "digits", "--image-size", "32", "64"], "--image-size 32 64: --samples are cropped to squares"),
    ):
        with pytest.raises(SystemExit):
            run_command(["eval_fid.py", "--reference", "digits", *words])
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings",
    [
        dict(ema=0.1), dict(guide="y"), dict(label_order="uniform"), dict(seed=1), dict(precision="bfloat16"),
        dict(compile=True), dict(published=FileHints(time_reversed=False)), dict(sampler=SamplerConfig(steps=25)),
        dict(sampler=SamplerConfig(diffusion_norm=0.0)), dict(sampler=SamplerConfig("ode")),
        dict(sampler=SamplerConfig(cfg_scale=0.0)),
    ],
)  # fmt: skip
def test_settings_of_how_samples_are_made_are_refused_for_those_that_are(settings):
    with pytest.raises(UserError, match="is for `ckpt`: samples are as they were made"):
        Arguments("digits", samples="x", **settings)
    made = dict(num_samples=5, batch_size=8, image_size=32, save="a.npz", device="cpu", compile=False)
    assert Arguments("digits", samples="x", **made).num_samples == 5


@pytest.mark.slow
def test_a_latent_cache_is_a_reference_through_its_vae(tmp_path, monkeypatch):
    from sit.latents.encode import Encode, encode
    from sit.latents.vae import decode, encode_images, load_vae

    encode(Encode(out=tmp_path / "cache", data="digits:heldout", vae="digits", image_size=32))
    images = open_samples(str(tmp_path / "cache"))
    data, vae = open_images("digits:heldout"), load_vae("digits")
    assert len(images) == len(data) and (images.labels == data.labels).all()
    assert images.classes == 10
    mean, _ = encode_images(vae, torch.stack([data[i][0] for i in range(4)]))
    expected = decode(vae, mean.half().float() * vae.config.scaling_factor)
    assert torch.equal(images.batch(np.arange(4)), expected.permute(0, 3, 1, 2))

    asked = []  # for the VAE on a device
    monkeypatch.setattr("sit.metrics.image_sets.load_vae", lambda name, device: asked.append((name, device)) or vae)
    for opened in (open_samples, open_reference):
        opened(str(tmp_path / "cache"), device="cuda:1")
    run_command(["eval_fid.py", "reference", "--data", str(tmp_path / "cache"), "--features", "digits", "--device",
                  "cpu",
              "--out", str(tmp_path / "stats.npz")])  # fmt: skip
    run_command(["eval_fid.py", "--samples", str(tmp_path / "cache"), "--reference", str(tmp_path / "cache"),
              "--features", "digits", "--device", "cpu", "--num-samples", "4"])  # fmt: skip
    assert asked == [("digits", "cuda:1")] * 2 + [("digits", CPU)] * 3


def write_wide_images(folder: Path, names: tuple[str, ...]) -> np.ndarray:
    """Images of 32 rows and different widths; answers their middle 32 columns: (len(names), 3, 32, 32)."""
    rng, middles = np.random.default_rng(0), []
    for number, name in enumerate(names):
        pixels = rng.integers(0, 256, size=(32, 32 + 2 * number, 3), dtype=np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
        middles.append(pixels[:, number : number + 32].transpose(2, 0, 1))
    return np.stack(middles)


def test_folders_and_tars_are_cropped_as_training_data_are(tmp_path):
    flat = write_wide_images(tmp_path / "flat", ("a.png", "b.png", "c.png"))
    names = ("n1/a.png", "n1/b.png", "n2/deeper/c.png")
    assert (write_wide_images(tmp_path / "classes", names) == flat).all()
    with tarfile.open(tmp_path / "classes.tar", "w") as archive:
        archive.add(tmp_path / "classes", arcname=".")
    labels = {"flat": None, "classes": [0, 0, 1], "classes.tar": [0, 0, 1]}
    for name, known in labels.items():
        for images in (open_samples(str(tmp_path / name), 32), open_reference(str(tmp_path / name), 32)):
            assert (images.batch(np.arange(3)).numpy() == flat).all(), name
            assert images.labels is known or images.labels.tolist() == known
        out = tmp_path / f"{name}.npz"
        run_command(["eval_fid.py", "reference", "--data", str(tmp_path / name), "--image-size", "32", "--features",
                  "digits", "--out", str(out)])  # fmt: skip
        with np.load(out) as archive:
            assert (archive["arr_0"].transpose(0, 3, 1, 2) == flat).all()
    smaller = open_samples(str(tmp_path / "flat"), 16).batch(np.arange(3))
    assert smaller.shape == (3, 3, 16, 16)
    for name in ("flat", "classes"):
        with pytest.raises(UserError, match="are of different sizes: crop them by `image_size`"):
            open_samples(str(tmp_path / name)).batch(np.arange(3))
    with pytest.raises(UserError, match="`image_size=0` must be positive"):
        open_samples(str(tmp_path / "flat"), 0)
    (tmp_path / "notes.txt").write_text("no data")
    with pytest.raises(UserError, match="notes.txt"):
        open_samples(str(tmp_path / "notes.txt"))


def test_a_classifier_of_other_classes_is_refused(checkpoint, classifier_of_three, tmp_path, capsys):
    write_wide_images(tmp_path / "classes", ("n1/a.png", "n2/b.png"))
    samples = {"--ckpt": (str(checkpoint), 10), "--samples": (str(tmp_path / "classes"), 2)}
    for flag, (source, classes) in samples.items():
        with pytest.raises(SystemExit):
            run_command(["eval_fid.py", flag, source, "--image-size", "32", "--reference", "digits", "--classifier",
                      classifier_of_three])  # fmt: skip
        assert f"knows 3 classes, and the samples have {classes}" in capsys.readouterr().err


def test_data_sets_that_torch_fidelity_has_registered(monkeypatch):
    from torch_fidelity.registry import DATASETS_REGISTRY

    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    monkeypatch.setitem(DATASETS_REGISTRY, "five-images", lambda root, download: list(images))
    opened = open_samples("five-images")
    assert len(opened) == 5 and torch.equal(opened.batch(np.array([3, 1])), images[[3, 1]])
    means = images[:1].unfold(2, 2, 2).unfold(3, 2, 2).float().mean(dim=(4, 5))  # the box filter that halves
    torch.testing.assert_close(open_samples("five-images", 4).batch(np.array([0])).float(), means, atol=1, rtol=0)

    def refuse(root, download):
        raise RuntimeError("no network")

    monkeypatch.setitem(DATASETS_REGISTRY, "far-away", refuse)
    with pytest.raises(UserError, match="far-away can't be had .no network.: put torchvision's files into"):
        open_samples("far-away")


def test_labels_of_generated_images(checkpoint):
    loaded = load_for_sampling(checkpoint)
    few = SamplerConfig(steps=2)
    balanced = GeneratedImages(loaded, 25, config=few)
    assert np.bincount(balanced.labels).tolist() == [3] * 5 + [2] * 5
    uniform = GeneratedImages(loaded, 2000, labels="uniform", config=few).labels
    assert (np.abs(np.bincount(uniform, minlength=10) - 200) < 5 * 180**0.5).all()
    assert (GeneratedImages(loaded, 10, labels="uniform", config=few).labels == uniform[:10]).all()
    assert balanced.note is None
    told = "only the first 6 of 10 classes: there are no more samples than that"
    assert GeneratedImages(loaded, 6, config=few).note == told
    assert GeneratedImages(loaded, 6, labels="uniform", config=few).note is None
