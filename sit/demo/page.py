"""A page to play with: ``python -m sit.demo RUN [RUN2]`` samples from one or two checkpoints in the browser.

Choose a class, a seed and a sampler; see the images of both runs from the same noise, how they came about, and the
kernels that ATConv made for them. The images are those of ``sample.py`` with the flags that the page tells.
"""

from __future__ import annotations

import os
import re
import socket
from typing import TYPE_CHECKING, Any

import torch

from sit.demo.arguments import Arguments
from sit.demo.session import Player, Trajectory, command, kernel_view, names_of, open_players, play, sheet, strip
from sit.sampling.config import METHODS, SDE_METHODS, SamplerConfig
from sit.utils.device import pick_device
from sit.utils.errors import UserError

if TYPE_CHECKING:
    import gradio


MOST_IMAGES = 16


LARGEST_SEED = 2**53 - 1
"""the largest whole number that a browser has exactly"""


CONTROLS = {"steps": "Steps", "cfg_scale": "Guidance scale", "method": "Method", "sampler": "Sampler"}
"""settings of the sampler → what the page calls them"""


NO_GRADIO = "the page needs Gradio: pip install gradio"


BEFORE = "Press *Generate* first."


CSS = """
.gradio-container { width: 100% !important; max-width: 1440px !important; margin: auto !important; }
.result-image .image-container { padding-top: 2.2rem; }
#controls { position: sticky; top: 1rem; align-self: flex-start; }
"""


def import_gradio() -> Any:
    """Gradio, which is not needed by anything else, with its reports to its makers and its history turned off.

    Raises:
        UserError: it is not installed, or too old.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = os.environ["GRADIO_RUN_HISTORY"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise UserError(NO_GRADIO) from error
    if int(gradio.__version__.split(".")[0]) < 6:
        raise UserError(f"the page needs Gradio 6 or newer, not {gradio.__version__}: pip install --upgrade gradio")
    return gradio


def read_controls(*controls: Any) -> tuple[int, int, int, SamplerConfig]:
    """The page's controls as (label, seed, count, config).

    Args:
        controls: class, seed, number of images, sampler, method, steps and guidance, as Gradio gives them.

    Raises:
        UserError: something is left empty, is no whole number where it must be, or is refused by the sampler.
    """
    label, seed, count, sampler, method, steps, scale = controls
    for value, name in ((label, "class"), (sampler, "sampler"), (scale, "guidance scale")):
        if value is None:
            raise UserError(f"choose a {name}")
    if METHODS[sampler.lower()] and method is None:
        raise UserError("choose a method")
    seed = whole_number(seed, "Seed", 0, LARGEST_SEED)
    count = whole_number(count, "Images", 1, MOST_IMAGES)
    steps = whole_number(steps, f"Steps of the {sampler}", fewest_steps(sampler))
    config = SamplerConfig(sampler=sampler.lower(), method=method or None, steps=steps, cfg_scale=float(scale))
    return int(label), seed, count, config


def whole_number(value: float | None, name: str, least: int, most: int | None = None) -> int:
    """The value of the control of that name.

    Raises:
        UserError: it is empty, no whole number, or out of bounds.
    """
    if value is None:
        raise UserError(f"{name}: there is no number")
    if not (float(value).is_integer() and least <= value <= (value if most is None else most)):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise UserError(f"{name}: {value} is no whole number {bounds}")
    return int(value)


def fewest_steps(sampler: str) -> int:
    """The fewest steps that a sampler takes: the SDE has a last step of its own kind."""
    return 2 if sampler == "SDE" else 1


def in_the_pages_words(message: str) -> str:
    """A message of the library, with the names of the page's controls for the settings in backquotes."""

    def named(match: re.Match[str]) -> str:
        name, value = CONTROLS.get(match[1], match[1].replace("_", " ")), match[2]
        return name if value is None else f"{name} {value}"

    return re.sub(r"`([a-z][a-z0-9_]*)(?:=([^`]*))?`", named, message)


def build_page(players: list[Player]) -> gradio.Blocks:
    """The page for one or two players.

    Raises:
        UserError: Gradio is not installed.
    """
    gr = import_gradio()
    first = players[0].loaded
    names = dict(enumerate(names_of(players)))
    classes = [
        (f"{label}: {names[label]}" if names.get(label, str(label)) != str(label) else str(label), label)
        for label in range(first.model.config.num_classes)
    ]
    guidable = all(player.loaded.model.config.null_class for player in players)
    averages = all(player.loaded.transport.averages for player in players)
    depth = max(len(player.loaded.model.blocks) for player in players)

    def generate(*controls, progress=gr.Progress()):  # noqa: B008
        with _told_in_the_page(gr):
            label, seed, count, config = read_controls(*controls)
            shown, trajectories = [], []
            for number, player in enumerate(players):

                def on_step(step: int, total: int | None, x: torch.Tensor, t: Any, player=player) -> None:
                    progress((step, total), desc=player.loaded.model.config.mixer, unit="steps")

                played = play(player, label, seed, count, config, on_step=on_step)
                if not bool(torch.isfinite(played.trajectory.states).all()):
                    gr.Warning(f"Run {number + 1} left the finite numbers: take more steps or another method.")
                whole = f" ({played.seconds * count:.2f} s for {count})" if count > 1 else ""
                shown += [sheet(played.images), f"**{played.seconds:.3f} s an image**{whole}, decoding included"]
                shown += [strip(player, played.trajectory), command(player, label, seed, count, config)]
                trajectories.append(played.trajectory)
            return [trajectories, *shown]

    def look(trajectories: list[Trajectory] | None, block: int, t: float):
        with _told_in_the_page(gr):
            answers = []
            for number, player in enumerate(players):
                text, image = BEFORE, None
                if trajectories:
                    shown = whole_number(block, "Block", 0, depth - 1)
                    text, image = kernel_view(player, trajectories[number], shown, t or 0.0)
                answers += [text, gr.Image(image, visible=image is not None)]
            return answers

    def methods_of(sampler: str):
        known, chosen = METHODS[sampler.lower()], {"SDE": "euler", "ODE": "dopri5"}.get(sampler)
        return gr.Dropdown(choices=list(known), value=chosen), heeds_steps(sampler, chosen)

    def heeds_steps(sampler: str, method: str | None):
        adaptive = method in METHODS[sampler.lower()] and (
            SamplerConfig(sampler=sampler.lower(), method=method).adaptive
        )
        told = f"{method} chooses its steps itself" if adaptive else f"at least {fewest_steps(sampler)}"
        return gr.Number(interactive=not adaptive, info=told)

    with gr.Blocks(title="SiT-ATConv", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as page:
        gr.Markdown(
            "# Play with SiT-ATConv\nImages from noise, "
            + ("two networks on the same noise, " if len(players) == 2 else "")
            + f"how they come about, and the kernels that ATConv makes for them. Sampling on {_machine(first.device)}."
        )
        trajectories = gr.State(None)
        with gr.Row():
            with gr.Column(scale=1, min_width=260, elem_id="controls"):
                label = gr.Dropdown(classes, value=0, label="Class", elem_id="class")
                # Gradio's own limits raise errors that name no control, with a traceback in the terminal
                seed = gr.Number(0, label="Seed", step=1, elem_id="seed")
                count = gr.Slider(1, MOST_IMAGES, 4, step=1, label="Images", elem_id="count")
                samplers, first_methods = ["SDE", "ODE"], SDE_METHODS
                if averages:
                    samplers, first_methods = ["MeanFlow", *samplers], ()
                sampler = gr.Radio(samplers, value=samplers[0], label="Sampler", elem_id="sampler")
                method = gr.Dropdown(
                    list(first_methods), value=next(iter(first_methods), None), label="Method", elem_id="method"
                )
                steps = gr.Number(
                    1 if averages else 50, label="Steps", step=1, info=f"at least {fewest_steps(samplers[0])}",
                    elem_id="steps",
                )  # fmt: skip
                scale = gr.Number(
                    1.5 if guidable and not averages else 1, step=0.1, label="Guidance scale", elem_id="scale",
                    interactive=guidable, info="1 is none" if guidable else "trained without a null class",
                )  # fmt: skip
                button = gr.Button("Generate", variant="primary", elem_id="generate")
            with gr.Column(scale=4, min_width=340 * len(players)):
                outputs, views, images = [], [], []
                with gr.Row():
                    for number, player in enumerate(players):
                        with gr.Column(min_width=320):
                            gr.Markdown(player.heading)
                            images.append(_image(gr, "Samples 0, 1, … from the left", f"images-{number}"))
                            outputs += [images[-1], gr.Markdown(elem_id=f"time-{number}")]
                            outputs.append(_image(gr, "Sample 0 on its way from noise", f"strip-{number}"))
                            with gr.Accordion("The same by the command line", open=False):
                                outputs.append(_command_line(gr, f"command-{number}"))
                gr.Markdown(
                    "## Kernels\nThe k×k kernels that a block makes for sample 0 at a moment of its way, one a channel."
                )
                with gr.Row():
                    block = gr.Slider(0, max(depth - 1, 1), depth // 2, step=1, label="Block", elem_id="block")
                    moment = gr.Slider(0, 1, 0.5, step=0.01, label="Time t: 0 noise, 1 image", elem_id="moment")
                for number, player in enumerate(players):
                    gr.Markdown(f"**{player.loaded.model.config.mixer}**, `{player.path}`")
                    views.append(gr.Markdown(BEFORE, elem_id=f"kernel-text-{number}"))
                    views.append(_image(gr, "Kernels", f"kernels-{number}", visible=False))

        alone = dict(concurrency_id="network", concurrency_limit=1)  # one device, one network at a time
        controls = [label, seed, count, sampler, method, steps, scale]
        sampler.change(methods_of, sampler, [method, steps], show_progress="hidden")
        method.input(heeds_steps, [sampler, method], steps, show_progress="hidden")
        made = button.click(generate, controls, [trajectories, *outputs], show_progress_on=images, **alone)
        made.success(look, [trajectories, block, moment], views, **alone)
        gr.on(
            [block.change, moment.change], look, [trajectories, block, moment], views,
            trigger_mode="always_last", show_progress="hidden", **alone,
        )  # fmt: skip
    return page


def _image(gr: Any, label: str, name: str, **options: Any) -> gradio.Image:
    options = dict(type="pil", format="png", interactive=False, buttons=["download", "fullscreen"]) | options
    return gr.Image(label=label, elem_id=name, elem_classes="result-image", **options)


def _command_line(gr: Any, name: str) -> gradio.Textbox:
    options = dict(lines=3, interactive=False, buttons=["copy"], elem_id=name)
    return gr.Textbox(label="The same images in samples/", **options)


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"the CPU, {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else str(device)


class _told_in_the_page:
    """Within the block, a mistake of the user's and what the machine or a solver can't do are told in the page."""

    def __init__(self, gr: Any) -> None:
        self.gr = gr

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            raise self.gr.Error("There is not enough memory: make fewer images.", print_exception=False) from None
        if isinstance(error, UserError | AssertionError):  # torchdiffeq asserts that its steps don't vanish
            raise self.gr.Error(in_the_pages_words(str(error)), print_exception=False) from None


def local_theme(gr: Any) -> gradio.themes.Base:
    """Gradio's look with fonts that come with the package; their semibold lacks most letters, their bold has all."""
    text, code = (gr.themes.LocalFont(name, weights=(400, 700)) for name in ("Source Sans Pro", "IBM Plex Mono"))
    return gr.themes.Default(font=[text, "system-ui", "sans-serif"], font_mono=[code, "monospace"])


def check_address(host: str, port: int | None) -> None:
    """Raise UserError unless this machine can listen there: before any work is done for it."""
    if port is not None and not 1 <= port <= 65535:
        raise UserError(f"`port` must be 1 to 65535, not {port}")
    try:
        family = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port or 0), family=family).close()
    except OSError as error:
        place = f"`host={host}`" + (f" `port={port}`" if port else "")
        raise UserError(f"{place} can't be listened on: {error.strerror}") from error


def main(arguments: Arguments) -> None:
    """Open the page and serve it until interrupted.

    Raises:
        UserError: a run that can't be used, no Gradio, or an address that can't be listened on.
    """
    gr = import_gradio()
    check_address(arguments.host, arguments.port)
    device = pick_device(arguments.device)
    page = build_page(open_players(arguments.runs, device, arguments.image_size, arguments.vae))
    try:
        _, address, link = page.queue().launch(
            server_name=arguments.host,
            server_port=arguments.port,
            share=arguments.share,
            inbrowser=arguments.open,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            theme=local_theme(gr),
            css=CSS,
            footer_links=[],
        )
    except OSError as error:
        where = f"port {arguments.port}" if arguments.port else "a port from 7860 on"
        raise UserError(f"`port`: {where} of {arguments.host} is or just was in use; give another one") from error
    print(f"page: {address} (Ctrl-C ends it)" + (f"; public link: {link}" if link else ""), flush=True)
    page.block_thread()
