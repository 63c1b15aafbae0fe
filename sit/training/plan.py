"""What a training run would be and cost, counted on the meta device: nothing is trained, downloaded or allocated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode

from sit.data.factory import open_images
from sit.latents.cache import MANIFEST, Manifest, is_cache
from sit.latents.vae import downsampling, empty_vae, latent_shape
from sit.model import SiT, create_model
from sit.training.config import TrainConfig
from sit.training.frozen import freeze
from sit.training.heldout import EIGHTHS, heldout_is_due
from sit.training.meanflow import check_meanflow
from sit.training.muon import hidden_matrices
from sit.training.posthoc_ema import snapshot_steps
from sit.transport.meanflow import MeanFlow
from sit.transport.transport import Transport
from sit.utils.errors import UserError
from sit.utils.tables import text_table

CLASSES = 1000
"""ImageNet's, planned with where the data is not at hand"""

VAE = dict(
    latent_channels=4,
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)
"""Stable Diffusion's, planned with where the VAE is not at hand"""


def plan(config: TrainConfig, gpus: int, images_per_second: float | None, done: int = 0) -> str:
    """A table, as text: parameters, multiply-accumulates, tokens, memory per GPU, epochs, days.

    Args:
        config: the run.
        gpus: GPUs to plan for; the batch is divided among them.
        images_per_second: measured training speed of all of them together.
        done: steps that a run to be resumed has behind it; the time is that of the others.

    Raises:
        UserError: settings that don't fit together; the message tells what was assumed.
    """
    parts = gpus * config.gradient_accumulation
    if config.batch_size % parts:
        raise UserError(f"`batch_size={config.batch_size}` can't be divided into {parts} micro-batches: see `gpus`")
    micro_batch = config.batch_size // parts
    shape, classes, images, assumed = describe_data(config)
    with naming(assumed), torch.device("meta"):
        network = create_model(config.model, **config.network_options(shape, classes))
        word = SiT.PROJECTOR.rstrip(".")  # a part that is not here
        patterns = ([one for one in some if word not in one] for some in (config.freeze, config.train_only))
        frozen = set(freeze(network, *patterns))
    parameters = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for name, p in network.named_parameters() if name not in frozen)
    forward = multiply_accumulates(network, shape)
    passes = 3.0  # forward, and backward as two
    if config.averages:
        check_meanflow(config)
        passes += MeanFlow(Transport(**config.transport_options()), **config.meanflow_options()).evaluations
    averages = len(config.posthoc_ema)
    # weights; of what is trained, gradients, two moments (of Muon's matrices one) and the averages; float32
    with_one = sum(p.numel() for p in hidden_matrices(network)) if config.optimizer == "muon" else 0
    state = 4 * parameters + (16 + 4 * averages) * trained - 4 * with_one
    half = config.mixed_precision in ("bf16", "fp16")
    activations = saved_bytes(
        network, shape, micro_batch, half=half, gradient_checkpointing=config.gradient_checkpointing
    )
    tokens = network.grid[0] * network.grid[1]
    shown = config.steps * config.batch_size
    rows = [
        ("network", f"{config.model}, mixer {config.mixer}" + (", modern block" if config.block == "modern" else "")),
        ("positional table", "yes" if network.config.positional_embedding else "no"),
        ("parameters", f"{parameters:,}" + (f", of which {trained:,} are trained" if frozen else "")),
        ("latent, tokens", f"{'x'.join(map(str, shape))}, {tokens}"),
        ("multiply-accumulates, forward", f"{forward / 1e9:.2f} G an image (matrix products and convolutions)"),
        ("multiply-accumulates, training", f"{passes * forward * shown / 1e18:.3g} E for the whole run"),
        ("batch", f"{config.batch_size} = {gpus} GPUs x {config.gradient_accumulation} micro-batches x {micro_batch}"),
        ("images shown", f"{shown:,}" + (f" = {shown / images:.1f} epochs of {images:,}" if images else "")),
        ("memory per GPU, state", f"{state / 2**30:.2f} GiB, not sharded (FSDP divides it by the GPUs)"),
        ("memory per GPU, activations", f"{activations / 2**30:.2f} GiB saved for the backward pass"),
    ]
    if config.distill_from is not None:
        rows.append(("not counted", f"the teacher {config.distill_from} of the first {config.distill_steps:,} steps"))
    if config.heldout != "none":
        evaluations = config.heldout_images * len(EIGHTHS)
        times = sum(heldout_is_due(config, step) for step in range(1, config.steps + 1))
        cost = f"{100 * times * evaluations / (passes * shown):.2g} % of training's multiply-accumulates"
        rows.append(
            ("held-out loss", f"at most {config.heldout_images:,} images x {len(EIGHTHS)} times x {times}: {cost}")
        )
    if averages:
        count, size = len(snapshot_steps(config)), 2 * averages * parameters  # float16
        disk = f"{count} snapshots of {size / 2**30:.3g} GiB = {count * size / 2**30:.3g} GiB of disk"
        rows.append(("post-hoc EMA", f"{2 * size / 2**30:.2f} GiB of that state; {disk}"))
    left = config.steps - done
    if done:
        rows.append(("steps left", f"{left:,} of {config.steps:,}"))
    if images_per_second:
        days = left * config.batch_size / images_per_second / 86400
        rows.append(("time", f"{days:.2f} days at {images_per_second:g} images/s"))
    else:
        rows.append(("time", "not known without the measured images per second"))
    if assumed:
        rows.append(("assumed", assumed))
    return text_table(rows)


def describe_data(config: TrainConfig) -> tuple[tuple[int, int, int], int, int | None, str]:
    """Shape (c, h, w) of the latents, classes and count of the data, and what was assumed as it is not at hand.

    The count is None where the data is not at hand.
    """
    if is_cache(config.data):
        manifest = Manifest.read(Path(config.data) / MANIFEST)
        return tuple(manifest.latent_shape), len(manifest.classes), manifest.count, ""
    assumed = []
    try:
        images = open_images(config.data, config.image_size)
        classes, count = len(images.classes), len(images)
    except UserError:
        classes, count = CLASSES, None
        assumed.append(f"no data {config.data} is here: {classes} classes")
    vae = empty_vae(config.vae)
    if vae is None:
        with torch.device("meta"):
            vae = AutoencoderKL(**VAE)
        assumed.append(
            f"no folder of the VAE {config.vae} is here: {vae.config.latent_channels} channels, "
            f"1/{downsampling(vae)} of the image's side"
        )
    told = "; ".join(assumed)
    with naming(told):
        return latent_shape(vae, config.image_size), classes, count, told


@contextlib.contextmanager
def naming(assumed: str) -> Iterator[None]:
    """Let a refusal tell what was assumed, as it may be due to that."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error} (assumed: {assumed})" if assumed else str(error)) from error


def multiply_accumulates(network: SiT, latent_shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image's forward pass in matrix products, convolutions and attention.

    Products that a mask hides are not among them: those are as many as the method needs, and kernels may do more.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*_inputs(network, latent_shape, 1, torch.float32))
    grid = tuple(side // network.config.patch_size for side in latent_shape[1:])
    mixers = (block.attn for block in network.blocks if hasattr(block.attn, "masked_multiply_accumulates"))
    return counter.get_total_flops() // 2 - sum(mixer.masked_multiply_accumulates(grid) for mixer in mixers)


def saved_bytes(
    network: SiT, latent_shape: tuple[int, int, int], batch: int, *, half: bool, gradient_checkpointing: bool
) -> int:
    """Bytes of the activations that autograd keeps for the backward pass of one micro-batch.

    An estimate: kernels' work spaces and the allocator's reserve come on top. In half precision all are taken to be
    of two bytes.
    """
    dtype = torch.bfloat16 if half else torch.float32
    torch.nn.Module.to(network, dtype)  # ModelMixin.to warns without need
    if gradient_checkpointing:
        network.enable_gradient_checkpointing()
    own = {p.untyped_storage()._cdata for p in network.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # so that no later storage gets the same address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(*_inputs(network, latent_shape, batch, dtype))
    return sum(kept.values())


def _inputs(network: SiT, latent_shape: tuple[int, int, int], batch: int, dtype: torch.dtype) -> tuple:
    x = torch.empty(batch, *latent_shape, device="meta", dtype=dtype)
    t = torch.empty(batch, device="meta")
    return x, t, torch.empty(batch, device="meta", dtype=torch.int64)
