"""Sharded training state: on two processes with FSDP2, what is saved and taken up again equals one process's.

Previews, which make no backward pass, come in between and change nothing.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import Connected
from safetensors.torch import load_file

from sit.training.run_folder import read_metrics

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.distributed

PROGRAM = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from sit.model import SiT
from sit.training.ema import averaged_parameters, ema_weights, trained_parameters
from sit.training.frozen import freeze
from sit.training.posthoc_ema import PowerAverage
from sit.training.state import TrainingState

folder, world = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo")
assert dist.get_world_size() == world
rank = dist.get_rank()
torch.manual_seed(0)
network = SiT(8, hidden_size=32, depth=2, num_heads=2, num_classes=5, mixer="attention,atconv")
for parameter in network.parameters():
    parameter.data.normal_(std=0.1)
frozen = freeze(network, ["x_embedder.*", "blocks.1.mlp.*"], ())
start = {name: parameter.detach().clone() for name, parameter in network.named_parameters() if name in frozen}
if world > 1:
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    for number, block in enumerate(network.blocks):
        fully_shard(block, mesh=mesh, reshard_after_forward=number > 0)
    fully_shard(network, mesh=mesh)  # as Accelerate does it: torch leaves the root whole after a forward pass
averaged = averaged_parameters(network)
optimizer = torch.optim.AdamW(trained_parameters(network), lr=1e-2, eps=1e-3)  # of a key bias only rounding
ema = EMAModel(averaged, decay=0.9, foreach=True)
averages = {sigma: PowerAverage(averaged, sigma) for sigma in (0.05, 0.1)}
state = TrainingState(network, optimizer, ema, averages=averages)

def steps(first, last):
    for step in range(first, last):
        g = torch.Generator().manual_seed(step)
        x, t, y = torch.randn(4, 4, 8, 8, generator=g), torch.rand(4, generator=g), torch.arange(4)
        mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
        network(x[mine], t[mine], y[mine]).square().mean().backward()
        optimizer.step()
        for average in (ema, *averages.values()):
            average.step(averaged)
        optimizer.zero_grad()

def preview():
    g = torch.Generator().manual_seed(7)
    with ema_weights(network, ema), torch.no_grad():
        return network(torch.randn(4, 4, 8, 8, generator=g), torch.rand(4, generator=g), torch.arange(4))

def save(name):
    whole, raw, optim = state.gather()
    kept = state.gather_averages()
    if rank == 0:
        assert all(torch.equal(weights[name], value) for name, value in start.items() for weights in (whole, raw))
        place = folder / name
        (place / "transformer").mkdir(parents=True)
        save_file(whole, place / "transformer" / "diffusion_pytorch_model.safetensors")
        state.save(place / "training", raw, optim, kept)
    dist.barrier()

steps(0, 3)
seen = preview()
save("three")
preview()
steps(3, 5)
save("five")
if rank == 0:
    torch.save(seen, folder / "preview.pt")
state.load(folder / "three")
steps(3, 5)
save("again")
dist.destroy_process_group()
os._exit(0)  # torch's own threads now and then abort an exit on a busy machine: "terminate called"
"""

TRAINING = """
import dataclasses, os, sys
from pathlib import Path
import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
import sit.training.distributed
import sit.training.trainer
from sit.model import SiT, TimestepEmbedder
from sit.training.optimization import gradient_norm
from sit.training.recipes import load_recipe

folder = Path(sys.argv[1])
given, seen, norms = [], [], []

def on_a_cpu(**settings):
    # Accelerate itself shards on accelerators alone
    accelerator = Accelerator(**settings)
    assert accelerator.num_processes == int(sys.argv[2])
    if accelerator.num_processes > 1:
        settings = yaml.safe_load(Path("docs/accelerate/8gpus-fsdp2.yaml").read_text())["fsdp_config"]
        os.environ.update({name.upper(): str(value) for name, value in settings.items()})  # as the launcher does
        plugin = FullyShardedDataParallelPlugin()
        plugin.set_mixed_precision(accelerator.mixed_precision)
        accelerator.state.fsdp_plugin, accelerator.state.distributed_type = plugin, DistributedType.FSDP
    return accelerator

def note(module, args):
    if isinstance(module, SiT):
        given.append(args[1])
    if isinstance(module, TimestepEmbedder):
        seen.append(args[0])

def checked(parameters, limit):
    norms.append(limit)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in parameters)
    if PartialState().num_processes > 1:
        policy = AcceleratorState().fsdp_plugin.mixed_precision_policy
        assert policy.param_dtype == torch.bfloat16 and policy.reduce_dtype == torch.float32
    return gradient_norm(parameters, limit)

torch.nn.modules.module.register_module_forward_pre_hook(note)  # before a module's own, FSDP's among them
sit.training.distributed.Accelerator = on_a_cpu
sit.training.trainer.gradient_norm = checked
sit.training.trainer.train(dataclasses.replace(
    load_recipe("digits"), model="SiT-XS/2", mixer="attention,atconv", steps=4, batch_size=8, log_every=1,
    preview_every=2, preview_steps=2, checkpoint_every=2, trackers=(), cpu_threads=1, mixed_precision="bf16",
    output_dir=str(folder / "run"), learning_rate=1e-3, heldout="auto", heldout_every=2, heldout_images=3,
))
assert len(norms) == 4
assert len(given) == len(seen) > 4
for before, after in zip(given, seen):
    assert after.dtype == torch.float32 and torch.equal(before, after)
os._exit(0)
"""


def run(folder: Path, processes: int, program: str = PROGRAM) -> Path:
    folder.mkdir()
    (folder / "program.py").write_text(program)
    Connected(processes, folder / "program.py", folder, processes).output()
    return folder


PARTS = (
    "transformer/diffusion_pytorch_model",
    "training/model",
    "training/posthoc-ema-0.05",
    "training/posthoc-ema-0.1",
)


def contents(checkpoint: Path) -> dict[str, torch.Tensor]:
    found = {
        f"{part}/{name}": tensor
        for part in PARTS
        for name, tensor in load_file(checkpoint / f"{part}.safetensors").items()
    }
    optimizer = torch.load(checkpoint / "training" / "optimizer.pt", weights_only=True)["optimizer"]
    for name, moments in optimizer["state"].items():
        found |= {f"{name}/{kind}": value for kind, value in moments.items()}
    return found


def test_two_shards_save_and_take_up_what_one_process_does(tmp_path):
    one, two = run(tmp_path / "one", 1), run(tmp_path / "two", 2)
    for name in ("three", "five"):
        whole, sharded = contents(one / name), contents(two / name)
        assert whole.keys() == sharded.keys() and len(whole) > 100
        for key in whole:
            torch.testing.assert_close(sharded[key], whole[key], rtol=1e-3, atol=1e-5, msg=key)
    previews = [torch.load(folder / "preview.pt", weights_only=True) for folder in (one, two)]
    torch.testing.assert_close(*previews, rtol=1e-3, atol=1e-4)
    for folder in (one, two):
        once, again = contents(folder / "five"), contents(folder / "again")
        assert all(torch.equal(once[key], again[key]) for key in once)


def test_bfloat16_rounds_neither_times_nor_sums_of_gradients(tmp_path):
    """Trained as docs/accelerate/8gpus-fsdp2.yaml says, with previews and all, it is one process's autocast."""
    one, two = (run(tmp_path / str(processes), processes, TRAINING) / "run" for processes in (1, 2))
    rows = [read_metrics(folder / "metrics.jsonl") for folder in (one, two)]
    losses = [[row["loss"] for row in these if "loss" in row] for these in rows]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    heldout = [[row["heldout_loss"] for row in these if "heldout_loss" in row] for these in rows]
    assert len(heldout[0]) == 2 and heldout[1] == pytest.approx(heldout[0], rel=1e-3)
    assert (two / "samples" / "step-0000004.png").is_file()
