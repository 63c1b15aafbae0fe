"""The page to play with: its images, trajectories and kernels by themselves, and the page in a real browser."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sit.checkpoint.info import CheckpointInfo
from sit.checkpoint.save import save_checkpoint
from sit.demo import cli as demo_cli
from sit.demo import page as demo
from sit.demo import session as playing
from sit.demo.kernels import draw_kernels, kernels_at, tiles
from sit.demo.session import Trajectory, command, kernel_view, open_players, play, sheet, strip
from sit.latents.vae import DIGITS_VAE, decode
from sit.model import SiT
from sit.sampling import cli as sample
from sit.sampling.config import SamplerConfig
from sit.transport.transport import Transport
from sit.utils.errors import UserError
from sit.utils.random import generator

CPU = torch.device("cpu")
FEW = SamplerConfig(steps=5)


def make_run(
    folder: Path,
    mixer: str,
    size: int = 8,
    classes: int = 10,
    names: str = "0123456789",
    *,
    transport: Transport | None = None,
    **options,
) -> str:
    """A run's folder with a checkpoint of a tiny random network."""
    torch.manual_seed(1)
    options = dict(patch_size=2, hidden_size=32, depth=2, num_heads=2, num_classes=classes) | options
    model = SiT(size, mixer=mixer, **options)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    info = CheckpointInfo(7, 7, (4 * size, 4 * size), classes, list(names), "digits", mixer)
    place = folder / "checkpoints" / "step-0000007"
    save_checkpoint(place, model=model, transport=transport or Transport(), vae_source=DIGITS_VAE, info=info)
    return str(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[str, str]:
    place = tmp_path_factory.mktemp("runs")
    return make_run(place / "a", "atconv"), make_run(place / "b", "attention")


@pytest.fixture(scope="module")
def players(runs) -> list[playing.Player]:
    return open_players(runs, CPU)


# ---------------------------------------------------------------------- images and their way


@pytest.mark.parametrize("config", [
    SamplerConfig(steps=6, cfg_scale=2.5),
    SamplerConfig(sampler="ode", method="heun2", steps=3),
    SamplerConfig(sampler="ode", method="dopri5", rtol=1e-3),
])  # fmt: skip
def test_the_images_are_those_of_sample_py(players, config, tmp_path, monkeypatch):
    """The command that the page tells makes the page's images."""
    player = players[0]
    images = play(player, 7, 3, 5, config).images
    words = shlex.split(command(player, 7, 3, 5, config))
    assert words[:2] == ["python", "sample.py"]
    monkeypatch.setattr(sys, "argv", [*words[1:], "--out", str(tmp_path / "out")])
    sample.main()
    with np.load(tmp_path / "out" / "samples.npz") as made:
        assert made["arr_1"].tolist() == [7] * 5
        assert images.shape == (5, 32, 32, 3) and np.array_equal(made["arr_0"], images)
    assert images.std() > 1 and not np.array_equal(images[0], images[1])


@pytest.mark.parametrize("config", [FEW, SamplerConfig(sampler="ode", method="dopri5")])
def test_the_way_of_sample_0(players, config):
    """From the keyed noise to the image, whatever else is made with it, in one pass of the sampler or in several."""
    one, many = (play(players[0], 4, 11, count, config) for count in (1, 5 if config.adaptive else 16))
    way = many.trajectory
    assert torch.equal(way.states[0], torch.randn(4, 8, 8, generator=generator(11, "sample", 0)))
    assert way.times[0] == 0 and way.times[-1] == 1 and way.times == sorted(set(way.times))
    assert len(way.times) == len(way.states) == (6 if not config.adaptive else len(one.trajectory.times))
    assert torch.equal(way.states, one.trajectory.states) and way.times == one.trajectory.times
    assert np.array_equal(decode(players[0].loaded.vae, way.states[-1:])[0].numpy(), many.images[0])


def test_both_runs_start_from_the_same_noise(players):
    first, second = (play(player, 4, 11, 2, FEW) for player in players)
    assert torch.equal(first.trajectory.states[0], second.trajectory.states[0])
    assert not np.array_equal(first.images, second.images)


def test_the_time_of_an_image(players, monkeypatch):
    """The clock runs over sampling and decoding, not over the reading of the VAE, and is shared by all images."""
    clock = iter([100.0, 106.0])
    monkeypatch.setattr(playing, "_now", lambda device: next(clock))
    assert play(players[0], 0, 0, 4, FEW).seconds == 1.5


def test_states_spread_over_time(players):
    way = Trajectory(0, [0.0, 0.1, 0.2, 0.9, 1.0], torch.zeros(5, 4, 8, 8))
    assert way.spread(8) == [0, 1, 2, 3, 4] and way.spread(2) == [0, 4] and way.nearest(0.6) == 3
    long = Trajectory(0, torch.linspace(0, 1, 71).tolist(), torch.randn(71, 4, 8, 8))
    assert long.spread(8) == list(range(0, 71, 10))
    assert strip(players[0], long).size[0] > 4 * playing.CELL


def test_a_sheet_keeps_every_pixel():
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 48, 3), dtype=np.uint8)
    whole = np.array(sheet(images))
    assert whole.shape == (2 * 128 + 4, 4 * 192 + 12, 3)
    assert np.array_equal(whole[132::4, 196 : 196 + 192 : 4], images[5])
    assert sheet(np.zeros((1, 256, 256, 3), np.uint8)).size == (256, 256)


# ---------------------------------------------------------------------- kernels


def float64_kernels(model: SiT, x: torch.Tensor, t: float, label: int) -> tuple[np.ndarray, np.ndarray]:
    """The kernels (9, C) of block 1 by the formulas: pooling, projection, GELU, mixing of the taps, inhibition."""
    with torch.no_grad():
        condition = model.t_embedder(torch.tensor([t])) + model.y_embedder(torch.tensor([label]))
        tokens = model.blocks[0](model.x_embedder(x[None]) + model.pos_embed, condition, (4, 4))
        shift, scale = model.blocks[1].adaLN_modulation(condition).chunk(6, dim=1)[:2]
    tokens, shift, scale = tokens[0].double().numpy(), shift[0].double().numpy(), scale[0].double().numpy()
    spread = np.sqrt(tokens.var(1, keepdims=True) + 1e-6)
    tokens = (tokens - tokens.mean(1, keepdims=True)) / spread * (1 + scale) + shift
    bins = [tokens[j * 16 // 9 : -(-(j + 1) * 16 // 9)].mean(0) for j in range(9)]
    mixer = {name: value.double().numpy() for name, value in model.blocks[1].attn.state_dict().items()}
    logits = np.stack(bins) @ mixer["kernel_proj.weight"].T + mixer["kernel_proj.bias"]
    logits = 0.5 * logits * (1 + np.tanh(math.sqrt(2 / math.pi) * (logits + 0.044715 * logits**3)))
    raw = mixer["kernel_gen.weight"] @ logits + mixer["kernel_gen.bias"][:, None]
    return raw, raw - raw.mean(0) / (1 + np.exp(-mixer["difference_control"]))


def test_kernels_of_a_block(tmp_path):
    (player,) = open_players([make_run(tmp_path / "hybrid", "attention,atconv")], CPU)
    model, x = player.loaded.model, torch.randn(4, 8, 8)
    found, expected = kernels_at(model, x, 0.3, 5, 1), float64_kernels(model, x, 0.3, 5)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == (9, 32)
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(found[0], kernels_at(model, x, 0.9, 5, 1)[0], atol=1e-4)
    assert kernels_at(model, x, 0.3, 5, 0) == "Block 0 mixes its tokens by Attention, which has no kernels to show."
    assert not model.blocks[1].attn._forward_pre_hooks
    with pytest.raises(UserError, match="this network has the blocks 0 to 1"):
        kernels_at(model, x, 0.3, 5, 2)


def test_what_is_said_of_the_kernels(players, tmp_path):
    atconv, attention = players
    way = play(atconv, 2, 0, 1, FEW).trajectory
    text, image = kernel_view(atconv, way, 1, 0.5)
    assert re.search(r"mean tap is .* before inhibition and .* after", text) and image.size[0] > 800
    assert np.array(image).std() > 10
    assert "by Attention, which has no kernels" in kernel_view(attention, way, 1, 0.5)[0]
    assert kernel_view(atconv, way, 2, 0.5) == ("This network has only the blocks 0 to 1.", None)
    lost = Trajectory(2, [0.0, 1.0], torch.stack([torch.randn(4, 8, 8), torch.full((4, 8, 8), torch.nan)]))
    assert kernel_view(atconv, lost, 1, 0.8) == ("The sampling left the finite numbers before t = 1.00.", None)
    noise = Trajectory(2, [0.0], lost.states[:1])
    assert np.array_equal(np.array(strip(atconv, lost)), np.array(strip(atconv, noise))), "what is lost is not shown"
    (plain,) = open_players([make_run(tmp_path / "plain", "atconv:inhibition=false:routing=false")], CPU)
    assert "no inhibition" in kernel_view(plain, way, 0, 0.5)[0]


def test_tiles():
    kernels = torch.arange(9 * 70.0).reshape(9, 70)
    laid = tiles(kernels, side=8)
    assert laid.shape == (31, 31) and np.isnan(laid[3]).all() and np.isnan(laid[:, 7]).all()
    channel = 8 * 3 + 5
    assert np.array_equal(laid[12:15, 20:23], np.arange(9).reshape(3, 3) * 70 + channel)
    few = tiles(kernels[:, :9], side=8)
    assert few.shape == (7, 31) and np.isnan(few[4:, 4:]).all()
    wide = tiles(kernels, side=8, tap=5, gap=2)
    assert wide.shape == (8 * 17 - 2, 8 * 17 - 2) and (wide[17:22, 0:5] == laid[4, 0]).all()


def test_the_image_shows_signs_in_one_scale():
    """Half as much after inhibition is paler, and the other sign is blue."""
    raw = torch.ones(9, 64)
    for after, redder in ((0.5 * raw, 1), (-raw, -1)):
        image = np.array(draw_kernels(raw, after, "title")).astype(int)
        height, width = image.shape[:2]
        middle = image[height // 2 - 60 : height // 2 + 60]
        left, right = middle[:, width // 8 : width // 4], middle[:, width // 2 : 5 * width // 8]
        red = [np.median(part[..., 0] - part[..., 2]) for part in (left, right)]
        assert red[0] > 0 and np.sign(red[1]) == redder
        if redder == 1:
            assert np.median(right[..., 1]) > np.median(left[..., 1]) + 50


# ---------------------------------------------------------------------- mistakes


def test_runs_that_are_refused(runs, tmp_path):
    for paths, words in (
        ((), "give one run or two, not 0"),
        ((runs[0],) * 3, "give one run or two, not 3"),
        ((str(tmp_path / "nowhere"),), "no such run, checkpoint folder or file"),
        ((runs[0], make_run(tmp_path / "large", "atconv", size=16)), r"shape \(4, 8, 8\) and .* shape \(4, 16, 16\)"),
        ((runs[0], make_run(tmp_path / "three", "atconv", classes=3, names="")), "classes 10 and .* classes 3"),
        ((runs[0], make_run(tmp_path / "letters", "atconv", names="abcdefghij")), "names of the classes"),
    ):
        with pytest.raises(UserError, match=words):
            open_players(paths, CPU)
    unnamed = make_run(tmp_path / "unnamed", "atconv", names="")
    assert len(open_players((unnamed, runs[0]), CPU)) == 2


def test_a_run_without_a_checkpoint_in_one_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gradio", reason="gradio is not installed")
    (tmp_path / "checkpoints").mkdir()
    for arguments, words in (
        ([str(tmp_path)], f"error: the run {tmp_path} has no checkpoint yet"),
        (["x", "--port", "99999"], "error: --port must be 1 to 65535, not 99999"),
        (["x", "--host", "192.0.2.7"], "error: --host 192.0.2.7 can't be listened on"),
        (["x", "--device", "abacus"], "error: --device abacus can't be used"),
    ):
        monkeypatch.setattr(sys, "argv", ["sit.demo", *arguments])
        with pytest.raises(SystemExit) as stop:
            demo_cli.main()
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith(words) and error.count("\n") == 1


def test_without_gradio(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match="pip install gradio"):
        demo.main(demo.Arguments((runs[0],)))
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(__version__="5.49.1"))
    with pytest.raises(UserError, match="Gradio 6 or newer, not 5.49.1"):
        demo.import_gradio()


def test_controls_that_are_refused():
    good = (3, 0.0, 4, "SDE", "euler", 50, 1.5)
    config = SamplerConfig(sampler="sde", method="euler", steps=50, cfg_scale=1.5)
    assert demo.read_controls(*good) == (3, 0, 4, config)
    for place, value, words in (
        (0, None, "choose a class"),
        (1, None, "Seed: there is no number"),
        (1, -1, "Seed: -1 is no whole number from 0 to 9007199254740991"),
        (1, 0.5, "Seed: 0.5 is no whole number"),
        (1, 2**53, "Seed: 9007199254740992 is no"),
        (2, 17, "Images: 17 is no whole number from 1 to 16"),
        (3, None, "choose a sampler"),
        (4, None, "choose a method"),
        (4, "dopri5", "the methods of `sampler=sde` are euler, heun"),
        (5, 1, "Steps of the SDE: 1 is no whole number of at least 2"),
        (5, 2.5, "Steps of the SDE: 2.5 is no"),
        (6, None, "choose a guidance scale"),
        (6, -1, "`cfg_scale` must be a number of at least 0"),
    ):
        with pytest.raises(UserError, match=words):
            demo.read_controls(*good[:place], value, *good[place + 1 :])
    for steps in (1, 5000):  # the sampler's limits, and no others
        assert demo.read_controls(3, 0, 4, "ODE", "euler", steps, 0.5)[3].steps == steps


@pytest.mark.parametrize("sampler", ["SDE", "ODE"])
def test_the_pages_fewest_steps_are_the_samplers(sampler):
    fewest = demo.fewest_steps(sampler)
    SamplerConfig(sampler=sampler.lower(), steps=fewest, method="euler")
    with pytest.raises(UserError, match="steps"):
        SamplerConfig(sampler=sampler.lower(), steps=fewest - 1, method="euler")


def test_mistakes_are_told_in_the_page(players, tmp_path):
    gr = pytest.importorskip("gradio", reason="gradio is not installed")
    (unguided,) = open_players([make_run(tmp_path / "unguided", "atconv", null_class=False)], CPU)
    page = demo.build_page([unguided])
    generate = next(f.fn for f in page.fns.values() if f.name == "generate")
    for controls, words in (
        ((None, 0, 1, "SDE", "euler", 4, 1), "choose a class"),
        ((3, 0, 1, "SDE", "euler", 4, 2), "no null class: use Guidance scale 1"),
        ((3, 0, 1, "SDE", "dopri5", 4, 1), "Method dopri5: the methods of Sampler sde are"),
        ((3, 0, 1, "SDE", "euler", 4, -1), "Guidance scale must be a number of at least 0"),
    ):
        with pytest.raises(gr.Error, match=words) as told:
            generate(*controls)
        assert told.value.print_exception is False and not re.search("`|--", told.value.message)
    trajectories, images, *_ = generate(3, 0, 2, "SDE", "euler", 4, 1)
    assert np.array_equal(np.array(images), np.array(sheet(play(unguided, 3, 0, 2, SamplerConfig(steps=4)).images)))
    assert len(trajectories) == 1
    look = next(f.fn for f in page.fns.values() if f.name == "look")
    assert look(trajectories, 1, 0.5)[0] != demo.BEFORE == look(None, None, None)[0]
    for block in (None, 1.5, 2):
        with pytest.raises(gr.Error, match="Block: ") as told:
            look(trajectories, block, 0.5)
        assert told.value.print_exception is False


def test_numbers_are_checked_by_the_page_alone(players):
    """Gradio's limits would raise errors of its own, with a traceback in the terminal."""
    gr = pytest.importorskip("gradio", reason="gradio is not installed")
    numbers = {block.elem_id: block for block in demo.build_page(players).blocks.values() if type(block) is gr.Number}
    assert set(numbers) == {"seed", "steps", "scale"}
    for number in numbers.values():
        assert [number.preprocess(value) for value in (-1, 2.5, 2**60, None)] == [-1, 2.5, 2**60, None]


def test_average_velocities_in_the_page(tmp_path):
    """The page begins with MeanFlow and one step, whose image is x_0 + u(x_0, 0, 1), and tells its command."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    folder = make_run(
        tmp_path / "average", "atconv", transport=Transport(prediction="average-velocity"), average_velocity=True
    )
    (player,) = open_players([folder], CPU)
    page = demo.build_page([player])
    first = {block.elem_id: getattr(block, "value", None) for block in page.blocks.values()}
    assert (first["sampler"], first["method"], first["steps"], first["scale"]) == ("MeanFlow", None, 1, 1)
    generate = next(f.fn for f in page.fns.values() if f.name == "generate")
    (trajectory,), _, _, _, told = generate(3, 0, 1, "MeanFlow", None, 1, 1)
    assert "--sampler meanflow --steps 1" in told and "--method" not in told
    start, end = trajectory.states
    with torch.no_grad():
        wanted = player.loaded.model(start[None], torch.zeros(1), torch.tensor([3]), end=torch.ones(1))
    torch.testing.assert_close(end, start + wanted[0], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- the page in a browser


@pytest.fixture
def browser():
    """A headless Chromium, driven by selenium; both must be installed, nothing is fetched."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no Chromium with chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1440,1200"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield window
    window.quit()


@pytest.fixture
def page(runs):
    """The address of the page for two tiny runs, served by a process of its own."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "sit.demo", *runs, "--no-open", "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        said = process.stdout.readline()
        assert said.startswith(f"page: http://127.0.0.1:{port}/"), said + process.stdout.read()
        yield said.split()[1]
    finally:
        process.terminate()
        process.wait(20)


PIXELS = """
const image = document.querySelector('#' + arguments[0] + ' img');
if (!image || !image.complete || !image.naturalWidth) return null;
const canvas = document.createElement('canvas');
canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
const context = canvas.getContext('2d');
context.drawImage(image, 0, 0);
const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
let sum = 0, squares = 0;
for (let i = 0; i < data.length; i += 4) { sum += data[i]; squares += data[i] * data[i]; }
const mean = sum * 4 / data.length;
return {src: image.src, width: canvas.width, variance: squares * 4 / data.length - mean * mean};
"""


def wait_for(what, patience: float = 30):
    """What ``what()`` answers once it is something; the page is drawn anew at any time, so lookups may fail."""
    from selenium.common.exceptions import WebDriverException

    end = time.monotonic() + patience
    while True:
        try:
            if found := what():
                return found
        except WebDriverException:
            pass
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.1)


@pytest.mark.browser
def test_the_page(page, browser, players):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def find(selector: str):
        return browser.find_element(By.CSS_SELECTOR, selector)

    def shown(name: str, other_than: str = "") -> dict:
        """The image in the page, once it is there and another one than that address."""

        def look():
            found = browser.execute_script(PIXELS, name)
            return found if found and found["src"] != other_than else None

        return wait_for(look)

    def fetched(image: dict) -> np.ndarray:
        with urllib.request.urlopen(image["src"]) as answer:
            return np.array(Image.open(io.BytesIO(answer.read())).convert("RGB"))

    def set_number(selector: str, value: str) -> None:
        find(selector).send_keys(Keys.CONTROL, "a")
        find(selector).send_keys(value, Keys.TAB)

    browser.get(page)
    wait_for(lambda: find("#generate").is_displayed())
    assert browser.title == "SiT-ATConv"
    find("#class input").click()
    options = wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, "[role=option]"))
    assert len(options) == 10
    options[3].click()
    set_number("#steps input[type=number]", "12")
    find("#generate").click()

    first = {name: shown(name) for name in ("images-0", "images-1", "strip-0", "strip-1", "kernels-0")}
    for name, image in first.items():
        assert image["width"] > 500 and image["variance"] > 50, name
    config = SamplerConfig(steps=12, method="euler", cfg_scale=1.5)
    for number, player in enumerate(players):
        played = play(player, 3, 0, 4, config)
        assert np.array_equal(fetched(first[f"images-{number}"]), np.array(sheet(played.images)))
        assert np.array_equal(fetched(first[f"strip-{number}"]), np.array(strip(player, played.trajectory)))
        assert re.match(r"\d+\.\d{3} s an image \(\d+\.\d\d s for 4\)", find(f"#time-{number}").text)

    kernels = find("#kernels-0")
    browser.execute_script("arguments[0].scrollIntoView()", kernels)
    assert kernels.is_displayed() and "before inhibition" in find("#kernel-text-0").text
    assert "by Attention, which has no kernels" in find("#kernel-text-1").text
    set_number("#block input[type=number]", "0")
    assert shown("kernels-0", other_than=first["kernels-0"]["src"])["variance"] > 50

    set_number("#seed input", "1")
    find("#generate").click()
    other = shown("images-0", other_than=first["images-0"]["src"])
    set_number("#seed input", "0")
    find("#generate").click()
    again = shown("images-0", other_than=other["src"])
    assert not np.array_equal(fetched(other), fetched(first["images-0"]))
    assert np.array_equal(fetched(again), fetched(first["images-0"]))

    find("#sampler input[value=ODE]").click()
    wait_for(lambda: find("#method input").get_attribute("value") == "dopri5")
    wait_for(lambda: not find("#steps input[type=number]").is_enabled())
    find("#generate").click()
    shown("images-0", other_than=again["src"])

    width, inner = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert width <= inner
    messages = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert len(asked) > 10 and not [url for url in asked if not url.startswith((page, "data:", "blob:"))]
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
