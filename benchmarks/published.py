"""A training step and sampling of the published SiT and ATConv against ours, from end to end and on the same weights.

    python benchmarks/published.py --json docs/performance/published.json

The environment variables SIT_CHECKOUT and ATCONV_CHECKOUT name the folders of their repositories. One process; every
round runs each program once, in turn; medians. Training is the body of their loop and of ours from latents on: draws,
loss, gradients, optimizer, moving average, and what each reads of the step. Sampling is their sampler and ours, from
the same noise. In bfloat16 they compute under autocast, as ATConv's flag for it does; ours trains under autocast and
samples with weights in bfloat16. The difference is the norm of what ours answers minus theirs, by that of theirs:
latents of sampling, and the network's output for training.
"""

from __future__ import annotations

import ast
import copy
import gc
import importlib
import itertools
import math
import os
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import tyro
from checks import at_least_one
from torch import nn

from sit.latents.datasets import LatentData
from sit.model import SiT, check_model_name, create_model
from sit.sampling.config import SamplerConfig
from sit.sampling.sampler import sample
from sit.training.config import TrainConfig
from sit.training.ema import averaged_parameters, moving_average, trained_parameters
from sit.training.loader import training_batches
from sit.training.objective import TransportObjective
from sit.training.optimization import gradient_norm, make_optimizer
from sit.transport.transport import Transport
from sit.utils.cli import one_line_errors
from sit.utils.device import pick_device
from sit.utils.errors import UserError, entry_point, first_line
from sit.utils.record import machine, write_record
from sit.utils.tables import markdown_table
from sit.utils.threads import CpuThreads
from sit.utils.timing import interleaved

CLASSES, IMAGES = 1000, 64
"""of the networks, and of the latents that ours draws its batches from"""
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""a greater difference means that the programs don't compute the same"""
Scope = Literal["training", "sde", "ode"]
Mixer = Literal["attention", "atconv"]


@dataclass(frozen=True)
class Repository:
    """Where a published program is, and what it does otherwise than the other one.

    Attributes:
        variable: of the environment, which names the checkout.
        name: on GitHub.
        program: the folder of SiT's program in it.
        prefix: what its networks' names begin with.
        fused: whether it asks for the fused optimizer.
        memory_format: of the weights that it trains.
    """

    variable: str
    name: str
    program: str
    prefix: str
    fused: bool | None
    memory_format: torch.memory_format


REPOSITORIES = {
    "attention": Repository("SIT_CHECKOUT", "willisma/SiT", ".", "SiT-", None, torch.preserve_format),
    "atconv": Repository(
        "ATCONV_CHECKOUT",
        "price112/Attentive-Convolution",
        "generation/SiT",
        "SiT-ATConv-",
        True,
        torch.channels_last,
    ),
}
"""by the mixer of their networks"""


@dataclass
class Arguments:
    """Time the published programs and ours."""

    scopes: tuple[Scope, ...] = ("training", "sde", "ode")
    """a training step; sampling by the SDE, as SiT's evaluation does, and by Euler's method for the ODE"""
    sizes: tuple[str, ...] = ("S/2", "B/2")
    tokens: tuple[int, ...] = (256, 1024)
    """256 are those of 256x256 pixels"""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    mixers: tuple[Mixer, ...] = ("attention", "atconv")
    """attention takes SIT_CHECKOUT, atconv ATCONV_CHECKOUT"""
    batch_size: int = 4
    steps: int = 4
    """of sampling"""
    repeats: int = 7
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    threads: tyro.conf.OmitArgPrefixes[CpuThreads] = field(default_factory=CpuThreads)
    json: Path | None = None
    """file for all numbers, rewritten after every case"""

    def __post_init__(self) -> None:
        at_least_one(self, "batch_size", "repeats")
        if self.steps < 2:
            raise UserError(f"`steps` must be at least 2, not {self.steps}")
        for size in self.sizes:
            check_model_name(f"SiT-{size}")
        for count in self.tokens:
            if count < 1 or math.isqrt(count) ** 2 != count:
                raise UserError(f"`tokens={count}`: the grid is square, such as 256 or 1024")


@dataclass(frozen=True)
class Case:
    """What is timed together."""

    scope: Scope
    size: str
    tokens: int
    batch: int
    dtype: str

    @property
    def latent(self) -> tuple[int, int, int]:
        """The latents' shape (C, h, w)."""
        side = math.isqrt(self.tokens) * int(self.size.partition("/")[2])
        return 4, side, side


@dataclass(frozen=True)
class Row(Case):
    """A mixer's result; seconds are medians."""

    mixer: str
    published_seconds: float
    ours_seconds: float
    difference: float

    @property
    def ratio(self) -> float:
        """How many times as fast ours is."""
        return self.published_seconds / self.ours_seconds


# --- what the checkouts have ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """What is called of a published program."""

    repository: Repository
    networks: dict[str, Callable[..., nn.Module]]
    transport: ModuleType
    update_ema: Callable[[nn.Module, nn.Module], None]

    def network(self, size: str, side: int) -> nn.Module:
        """A network with random weights, none of which are zero, for latents of ``side`` by ``side``.

        Raises:
            UserError: it has none of that size.
        """
        name = self.repository.prefix + size
        if name not in self.networks:
            raise UserError(f"{self.repository.name} has no network {name}; it has {', '.join(self.networks)}")
        network = self.networks[name](input_size=side, num_classes=CLASSES)
        source = torch.Generator().manual_seed(0)
        for parameter in network.parameters():
            if parameter.requires_grad:  # not the positional table
                nn.init.normal_(parameter, std=0.02, generator=source)
        return network


def open_checkout(repository: Repository) -> Published:
    """Import what a checkout has.

    Raises:
        UserError: no checkout is named, or it is another one.
    """
    told = os.environ.get(repository.variable)
    if not told:
        raise UserError(f"{repository.variable} is not set: let it name the folder of a checkout of {repository.name}")
    folder = Path(told) / repository.program
    for name in ("models.py", "train.py", "transport/__init__.py"):
        if not (folder / name).is_file():
            raise UserError(f"{repository.variable}: {told} is no checkout of {repository.name}: no {folder / name}")
    try:
        models, transport = imported(folder, "models", "transport")
        update_ema = function_of(folder / "train.py", "update_ema")
        return Published(repository, models.SiT_models, transport, update_ema)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UserError(f"{repository.variable}: {folder} can't be imported: {first_line(error)}") from error


def imported(folder: Path, *names: str) -> list[ModuleType]:
    """Modules of a folder, which others of the same names may follow."""

    def remove() -> dict[str, ModuleType]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in names}

    before = remove()
    sys.path.insert(0, str(folder.resolve()))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(folder.resolve()))
        remove()
        sys.modules.update(before)


def function_of(file: Path, name: str) -> Callable[..., Any]:
    """A function of a program whose imports need more than a training step does.

    Raises:
        AttributeError: it has none of that name.
    """
    found = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
    chosen: list[ast.stmt] = [node for node in found if node.name == name]
    if not chosen:
        raise AttributeError(f"{file} has no function {name}")
    scope: dict[str, Any] = {"torch": torch, "OrderedDict": OrderedDict}
    exec(compile(ast.Module(chosen, []), str(file), "exec"), scope)
    return scope[name]


# --- what is timed -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """Of a case, on the device: latents (or noise), labels, times and the autocast that its dtype means."""

    x: torch.Tensor
    labels: torch.Tensor
    t: torch.Tensor
    dtype: str

    def autocast(self) -> torch.autocast:
        """bfloat16, or nothing."""
        return torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Random ones."""
    source = torch.Generator().manual_seed(1)
    x = torch.randn(case.batch, *case.latent, generator=source)
    labels = torch.randint(CLASSES, (case.batch,), generator=source)
    return Inputs(x.to(device), labels.to(device), torch.rand(case.batch, generator=source).to(device), case.dtype)


def their_step(published: Published, network: nn.Module, inputs: Inputs) -> Callable[[], float]:
    """The body of the published loop, from latents on."""
    network.train()
    average = copy.deepcopy(network).eval().requires_grad_(False)
    transport = published.transport.create_transport()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0, fused=published.repository.fused)

    def step() -> float:
        with inputs.autocast():
            loss = transport.training_losses(network, inputs.x, dict(y=inputs.labels))["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        published.update_ema(average, network)
        return loss.item()

    return step


def our_step(network: SiT, inputs: Inputs, config: TrainConfig) -> Callable[[], float]:
    """The body of the trainer's loop on a CPU, batches from latents in memory and all.

    On a GPU the trainer does not wait for each step's norm (:mod:`sit.training.step_checks`), and this does.
    """
    network.train()
    network.forward = inputs.autocast()(network.forward)  # as Accelerate has it
    shape = (IMAGES, *inputs.x.shape[1:])
    moments = torch.randn(shape), torch.full(shape, 0.1)
    labels = torch.arange(IMAGES).numpy() % CLASSES
    data = LatentData(*moments, labels, [str(number) for number in range(CLASSES)], {"scaling_factor": 0.18215})
    batches = training_batches(data, seed=0, global_batch=len(inputs.x))
    objective = TransportObjective(Transport(**config.transport_options()), config.class_dropout, network.null_label)
    optimizer, parameters = make_optimizer(network, config), trained_parameters(network)
    averaged = averaged_parameters(network)
    ema = moving_average(averaged, config.ema_decay, config.ema_warmup)

    def step() -> float:
        batch = {name: tensor.to(inputs.x.device, non_blocking=True) for name, tensor in next(batches).items()}
        loss, _ = objective(network, batch)
        loss.mean().backward()
        norm = gradient_norm(parameters, config.max_grad_norm).item()
        if math.isfinite(norm):
            optimizer.step()
            ema.step(averaged)
        optimizer.zero_grad()
        return norm

    return step


def their_sampling(published: Published, network: nn.Module, inputs: Inputs, case: Case, steps: int) -> Callable:
    """The published sampler: latents (B, C, h, w). It counts the ODE's points in time, one more than its steps."""
    sampler = published.transport.Sampler(published.transport.create_transport())
    if case.scope == "sde":
        draw = sampler.sample_sde(diffusion_form="sigma", num_steps=steps)
    else:
        draw = sampler.sample_ode(sampling_method="euler", num_steps=steps + 1)

    def run() -> torch.Tensor:
        with torch.no_grad(), inputs.autocast():
            return draw(inputs.x, network.forward, y=inputs.labels)[-1]

    return run


def our_sampling(network: SiT, inputs: Inputs, case: Case, steps: int) -> Callable[[], torch.Tensor]:
    """Our sampler; the SDE's noise is drawn as the published one draws it."""
    config = SamplerConfig(case.scope, steps, "euler")

    def step_noise(_number: int) -> torch.Tensor:
        return torch.randn(inputs.x.shape).to(inputs.x.device)

    return lambda: sample(network, Transport(), inputs.x, inputs.labels, config, step_noise=step_noise)


def difference(theirs: Callable[[], torch.Tensor], ours: Callable[[], torch.Tensor]) -> float:
    """How far apart they are, with the same state of torch's generator."""
    found = []
    for run in (theirs, ours):
        torch.manual_seed(2)
        with torch.no_grad():
            found.append(run().float())
    return ((found[1] - found[0]).norm() / found[0].norm()).item()


def programs(case: Case, mixer: Mixer, published: Published, arguments: Arguments) -> tuple[Callable, Callable, float]:
    """What is timed of theirs and of ours, and their difference.

    Raises:
        UserError: they don't compute the same.
    """
    device, side = torch.device(arguments.device), case.latent[1]
    inputs, config = make_inputs(case, device), TrainConfig(model=f"SiT-{case.size}", mixer=mixer)
    theirs, ours = published.network(case.size, side), create_model(config.model, input_size=side, mixer=mixer)
    try:
        ours.load_state_dict(theirs.state_dict())
    except RuntimeError as error:
        raise UserError(f"{published.repository.name} has other weights than ours: {first_line(error)}") from error
    theirs, ours = theirs.eval().to(device), ours.eval().to(device)
    x, t, y = inputs.x, inputs.t, inputs.labels
    if case.scope == "training":
        theirs = theirs.to(memory_format=published.repository.memory_format)
        with inputs.autocast():
            apart = difference(lambda: theirs(x, t, y), lambda: ours(x, t, y))
        timed: tuple[Callable, Callable] = their_step(published, theirs, inputs), our_step(ours, inputs, config)
    else:
        ours = nn.Module.to(ours, dtype=getattr(torch, case.dtype))
        timed = (
            their_sampling(published, theirs, inputs, case, arguments.steps),
            our_sampling(ours, inputs, case, arguments.steps),
        )
        apart = difference(*timed)
    if not apart <= TOLERANCE[case.dtype]:
        raise UserError(
            f"{case.scope} of SiT-{case.size}, {mixer}, in {case.dtype} differs by {apart:.2g} from "
            f"{published.repository.name}: one of the two computes something else"
        )
    return *timed, apart


def measure(case: Case, checkouts: dict[Mixer, Published], arguments: Arguments) -> list[Row]:
    """A row for each mixer; all of a case take turns."""
    timed, apart = {}, {}
    for mixer, published in checkouts.items():
        timed[f"{mixer}, published"], timed[f"{mixer}, ours"], apart[mixer] = programs(
            case, mixer, published, arguments
        )
    seconds = interleaved(timed, torch.device(arguments.device), arguments.repeats)
    return [
        Row(**asdict(case), mixer=mixer, published_seconds=seconds[f"{mixer}, published"],
            ours_seconds=seconds[f"{mixer}, ours"], difference=apart[mixer])
        for mixer in checkouts
    ]  # fmt: skip


HEADER = ("", "model", "tokens", "images", "dtype", "mixer", "published ms", "ours ms", "x its published",
          "x published attention", "difference")  # fmt: skip


def table_rows(made: list[Row]) -> list[tuple[object, ...]]:
    """The cells of a case's rows under :data:`HEADER`."""
    attention = {row.mixer: row.published_seconds for row in made}.get("attention")
    lines: list[tuple[object, ...]] = []
    for row in made:
        times = [f"{1e3 * seconds:.4g}" for seconds in (row.published_seconds, row.ours_seconds)]
        against = f"{attention / row.ours_seconds:.2f}" if attention else ""
        cells = row.scope, f"SiT-{row.size}", row.tokens, row.batch, row.dtype, row.mixer
        lines.append((*cells, *times, f"{row.ratio:.2f}", against, f"{row.difference:.1e}"))
    return lines


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="benchmarks/published.py")
    before = torch.get_num_threads()
    arguments.threads.use()
    try:
        run(arguments)
    finally:
        torch.set_num_threads(before)


def run(arguments: Arguments) -> None:
    """Measure all cases, print the rows of each as soon as they are there, and keep them as JSON."""
    device = pick_device(arguments.device)
    checkouts = {mixer: open_checkout(REPOSITORIES[mixer]) for mixer in arguments.mixers}
    print(f"{machine(device)}; medians of {arguments.repeats}\n")
    print(markdown_table(HEADER, []), flush=True)
    rows: list[Row] = []
    loads = [os.getloadavg()[0]]
    choices = itertools.product(arguments.scopes, arguments.sizes, arguments.tokens, arguments.dtypes)
    for scope, size, tokens, dtype in choices:
        made = measure(Case(scope, size, tokens, arguments.batch_size, dtype), checkouts, arguments)
        gc.collect()
        rows += made
        loads.append(os.getloadavg()[0])
        print(*markdown_table(HEADER, table_rows(made)).splitlines()[2:], sep="\n", flush=True)
        if arguments.json:  # after every case: a long run may be cut off
            figures = [asdict(row) | {"ratio": row.ratio} for row in rows]
            write_record(arguments.json, device, {"steps": arguments.steps, "loads": loads, "rows": figures})


if __name__ == "__main__":
    main()
