"""SiT, the Scalable Interpolant Transformer (arXiv 2401.08740): DiT's network with a token-mixer slot in each block.

Key names and initial values are those of the published code, so its weights load as they are; the mixer stands under
``blocks.{i}.attn`` whatever it is, and its initial values are its own. Each initial value is keyed by the seed and the
parameter's name, so that networks that differ in the mixer alone begin alike everywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from timm.layers import PatchEmbed
from torch import nn

from sit.blocks import MIXER_OPTIONS, FinalLayer, SiTBlock, check_block
from sit.mixers import MixerSpec, build_mixer, needs_positional_embedding, parse_mixers
from sit.mixers.layers import places_along
from sit.utils.constant_tensors import made_once
from sit.utils.errors import UserError
from sit.utils.precision import is_autocast
from sit.utils.random import draw_seed, generator, global_generator, key

# depth, hidden size, heads (those of DiT and SiT; XS is ours, for data of a few thousand small images, XS12 is twice as
# deep)
SIZES = {
    "XS": (6, 128, 4),
    "XS12": (12, 128, 4),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
PATCHES = (1, 2, 4, 8)
MODELS = {
    f"SiT-{size}/{patch}": dict(depth=depth, hidden_size=hidden, num_heads=heads, patch_size=patch)
    for size, (depth, hidden, heads) in SIZES.items()
    for patch in PATCHES
}
ZERO = ("bias", "adaLN_modulation.1.weight", "final_layer.linear.weight", "duration_embedder.mlp.2.weight")
"""Ends of the names of parameters outside the mixers that begin at zero (DiT's adaLN-Zero); the last one lets a network
of average velocities begin as the plain one, whatever the duration."""
NORMAL = (
    "y_embedder.embedding_table.weight",
    "t_embedder.mlp.0.weight",
    "t_embedder.mlp.2.weight",
    "duration_embedder.mlp.0.weight",
)
"""Those that begin with a standard deviation of 0.02; all others begin Xavier-uniform, as matrices (out, in)."""


def sincos_table(hidden_size: int, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The fixed 2-D sine-cosine positional table (DiT): (1, H·W, C) float32, row-major.

    The first half of the channels encodes the column coordinate, the second half the row, each as sines, then cosines.

    Args:
        hidden_size: C, a multiple of 4.
        rows: (H,) coordinates of the grid's rows, in patches.
        columns: (W,) coordinates of its columns.
    """
    if hidden_size % 4:
        raise UserError(f"a positional table needs a hidden size divisible by 4, not {hidden_size}")
    quarter = hidden_size // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)

    def encode(coordinate: torch.Tensor) -> torch.Tensor:
        angles = coordinate.double()[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    height, width = len(rows), len(columns)
    column_half = encode(columns)[None].expand(height, -1, -1)
    row_half = encode(rows)[:, None].expand(-1, width, -1)
    return torch.cat([column_half, row_half], dim=2).reshape(1, height * width, hidden_size).float()


def stretched_table(hidden_size: int, trained: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """The table (1, H·W, C) of ``grid`` laid over the ``trained`` one, centers of pixels mapped as resizing does."""
    return sincos_table(hidden_size, *map(places_along, trained, grid))


@made_once
def _kept_table(
    hidden_size: int, trained: tuple[int, int], grid: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """:func:`stretched_table`, kept on the device: the steps of a sampling do not wait for its transfer."""
    return stretched_table(hidden_size, trained, grid).to(device)


class TimestepEmbedder(nn.Module):
    """Embeds times t in [0, 1], used as they are (not scaled by 1000), through sinusoids and an MLP."""

    def __init__(self, hidden_size: int, frequencies: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.frequencies = frequencies

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """(B,) times to (B, C)."""
        half = self.frequencies // 2
        omega = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = t.to(torch.promote_types(t.dtype, torch.float32))[:, None] * omega
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Embeds class labels; with a null class, its row is the last one."""

    def __init__(self, num_classes: int, hidden_size: int, null_class: bool) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + null_class, hidden_size)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """(B,) integer labels to (B, C)."""
        return self.embedding_table(labels)


class SiT(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """A Scalable Interpolant Transformer over latents of shape (in_channels, h, w).

    A model of diffusers; where PEFT is installed it takes LoRA adapters (``add_adapter``, ``load_lora_adapter``).

    Args:
        input_size: latent height and width of the training, or one number for a square.
        patch_size: side p of the square patches that become tokens; the grid is (h/p, w/p).
        in_channels: channels of the latent.
        hidden_size: C, the width of the tokens.
        depth: number of blocks.
        num_heads: attention heads (mixers without heads ignore it).
        mlp_ratio: hidden width of the MLP over C.
        num_classes: number of classes, labels 0 … num_classes − 1.
        null_class: one more label, :attr:`null_label`, means "no class". Training without labels now and then needs
            it (its ``class_dropout``), and so does classifier-free guidance.
        mixer: the mixer pattern, e.g. ``attention``, ``atconv``, ``attention,atconv:kernel_size=5``; repeated over
            the depth (see :mod:`sit.mixers`).
        learn_sigma: twice the output channels, of which the first half is the prediction (as published).
        positional_embedding: whether the sine-cosine table is added; None asks the mixers.
        time_reversed: the network was trained with time s = 1 − t from data (0) to noise (1) to predict the velocity
            dx/ds (REPA's convention); ``forward`` still takes t and gives dx/dt, so that all else is unaware of it.
        positional_grid: the (H, W) that the positional table and rotary positions are laid over; None is the network's
            own. A network that goes on from one of another size keeps that one's, and its coordinates with it.
        average_velocity: the network also embeds how long a step from t is, and predicts the average velocity over it
            (:mod:`sit.transport.meanflow`); a step of no length has the velocity at t.
        block: ``published``, or ``modern``: RMSNorm, SwiGLU, and the mixers' options that belong to it
            (:mod:`sit.blocks`).
        seed: of the initial values, no part of the configuration. None draws it from torch's global generator, and
            that one draw is all that the generator is used for.

    Raises:
        UserError: sizes that do not fit together, or an unknown mixer or block.
    """

    PROJECTOR = "projector."
    """Where the keys of a projector begin, which training by alignment alone adds (:mod:`sit.training.repa`)."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SiTBlock"]
    _skip_layerwise_casting_patterns = ["t_embedder"]  # its input takes the dtype that its weights have
    main_input_name = "hidden_states"
    ignore_for_config = ["seed"]

    @register_to_config
    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        null_class: bool = True,
        mixer: str = "attention",
        learn_sigma: bool = True,
        positional_embedding: bool | None = None,
        time_reversed: bool = False,
        positional_grid: tuple[int, int] | None = None,
        average_velocity: bool = False,
        block: str = "published",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
        check_sizes(height=height, width=width, patch_size=patch_size, in_channels=in_channels, depth=depth,
                    hidden_size=hidden_size, num_heads=num_heads, num_classes=num_classes)  # fmt: skip
        if positional_grid is not None:
            check_sizes(positional_grid=min(positional_grid))
        if not 1 <= hidden_size * mlp_ratio < math.inf:
            raise UserError(f"`mlp_ratio={mlp_ratio}` must be positive and finite")
        check_block(block)
        if positional_embedding is None:
            positional_embedding = needs_positional_embedding(parse_mixers(mixer))
        self.register_to_config(input_size=(height, width), positional_embedding=positional_embedding)
        self.grid = self._grid(height, width)
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.gradient_checkpointing = False
        self.projected_block = 0
        self.register_module("projector", None)

        seed = draw_seed() if seed is None else seed
        mixers = self._make_mixers(seed)
        with global_generator(seed):  # the layers' own initial values, which ours replace
            self.x_embedder = PatchEmbed(None, patch_size, in_channels, hidden_size, strict_img_size=False)
            self.t_embedder = TimestepEmbedder(hidden_size)
            self.duration_embedder = TimestepEmbedder(hidden_size) if average_velocity else None
            self.y_embedder = LabelEmbedder(num_classes, hidden_size, null_class)
            if positional_embedding:
                self.register_buffer("pos_embed", stretched_table(hidden_size, self.laid_over, self.grid))
            self.blocks = nn.ModuleList(SiTBlock(hidden_size, mlp_ratio, mixer, block) for mixer in mixers)
            self.final_layer = FinalLayer(hidden_size, patch_size * patch_size * self.out_channels, block)
        self._initialize_around_mixers(seed)
        if (device := torch.get_default_device()).type not in ("cpu", "meta"):
            nn.Module.to(self, device)

    def _make_mixers(self, seed: int) -> Iterator[nn.Module]:
        """The mixers of the blocks, each made while torch's global generator is at a state of its own."""
        config, specs = self.config, mixer_specs(self.config)
        for number in range(config.depth):
            spec = specs[number % len(specs)]
            with global_generator(key(seed, "initial weights", f"blocks.{number}.attn")):
                mixer = build_mixer(spec, config.hidden_size, config.num_heads, self.grid, laid_over=self.laid_over)
            yield mixer

    def initialize_weights(self, seed: int) -> None:
        """Give every parameter its initial value under ``seed``, and the positional table its own, as a network made
        with this seed has them; so one that was made on the meta device becomes whole.

        The published ones outside the mixers: Xavier-uniform linear layers, zero biases, adaLN and output zero, and
        embeddings of standard deviation 0.02. A mixer gets those of a fresh one of its kind. A projector
        (:func:`sit.training.repa.attach_projector`) is left as it is.
        """
        self._initialize_around_mixers(seed)
        if self.config.positional_embedding:
            self.pos_embed.copy_(stretched_table(self.config.hidden_size, self.laid_over, self.grid))
        for block, fresh in zip(self.blocks, self._make_mixers(seed), strict=True):
            block.attn.load_state_dict(fresh.state_dict())
            for name, buffer in block.attn.named_buffers():  # those that no state_dict has, too
                buffer.copy_(fresh.get_buffer(name))

    @torch.no_grad()
    def _initialize_around_mixers(self, seed: int) -> None:
        others = (self.PROJECTOR, *(f"blocks.{number}.attn." for number in range(len(self.blocks))))
        for name, parameter in self.named_parameters():
            if parameter.is_meta or name.startswith(others):
                continue
            source = generator(seed, "initial weights", name)
            value = torch.zeros(parameter.shape, dtype=parameter.dtype, device="cpu")  # the same numbers on any device
            if name.endswith(NORMAL):
                value.normal_(std=0.02, generator=source)
            elif not name.endswith(ZERO):
                nn.init.xavier_uniform_(value.flatten(1), generator=source)
            parameter.copy_(value)

    @classmethod
    def extract_init_dict(
        cls, config_dict: Mapping[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """diffusers' way from a stored configuration to the arguments; older configurations are read too."""
        return super().extract_init_dict(current_config(config_dict), **kwargs)

    @property
    def null_label(self) -> int:
        """The label that means "no class".

        Raises:
            UserError: the network was built without one.
        """
        if not self.config.null_class:
            raise UserError("this network was trained without class dropout and has no null class: use `cfg_scale=1`")
        return self.config.num_classes

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise UserError(f"a latent of {height}x{width} can't be cut into patches of {patch}x{patch}")
        return height // patch, width // patch

    @property
    def laid_over(self) -> tuple[int, int]:
        """The grid whose coordinates the positional table and rotary positions have."""
        return tuple(self.config.positional_grid or self.grid)

    def positional_table(self, grid: tuple[int, int]) -> torch.Tensor:
        """The positional table for a grid: (1, H·W, C); the trained one on the trained grid.

        On another grid each token gets the sines and cosines of where its center lies in the trained grid, each axis
        stretched by itself. So coordinates stay within half a patch of those of the training, which they would leave
        if the table were continued; and the formula is evaluated between its points, not blended as an image is.
        """
        if grid == self.grid:
            return self.pos_embed
        table = _kept_table(self.config.hidden_size, self.laid_over, grid, self.pos_embed.device)
        return table.to(self.pos_embed.dtype)

    def forward(
        self,
        x: torch.Tensor | None = None,
        t: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
        *,
        end: torch.Tensor | None = None,
        project: bool = False,
        hidden_states: torch.Tensor | None = None,
        timestep: torch.Tensor | float | None = None,
        class_labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ...] | Transformer2DModelOutput:
        """The prediction (velocity, score, noise or average velocity, as it was trained) at the noisy latents.

        Args:
            x: (B, in_channels, h, w) latents.
            t: (B,) times in [0, 1], 0 noise and 1 data.
            y: (B,) int64 labels; :attr:`null_label` is the null class.
            end: (B,) times from t on: the average velocity from t to there is asked for; None is t itself.
            project: answer also with the projected tokens (:func:`sit.training.repa.attach_projector`).
            hidden_states, timestep, class_labels: diffusers' names of x, t and y. The time may be one for all.
            return_dict: answer as diffusers' networks do, with an output that has ``sample``, or, if false, with a
                tuple. None does so where ``hidden_states`` is given.

        Returns:
            (B, in_channels, h, w), of the network's dtype, or autocast's; with ``project``, that and (B, N, features).

        Raises:
            TypeError: an argument is missing.
            UserError: an ``end`` for a network without ``average_velocity``.
        """
        if hidden_states is not None:
            x, t, y = hidden_states, timestep, class_labels
            if t is not None:
                t = torch.as_tensor(t, device=x.device).expand(x.shape[0])
            return_dict = True if return_dict is None else return_dict
        if x is None or t is None or y is None:
            raise TypeError("a SiT needs x, t and y; in diffusers' words hidden_states, timestep and class_labels")
        t = t.to(torch.promote_types(t.dtype, torch.float32))  # differences of times in half precision lose bits
        height, width = x.shape[-2:]
        grid = self._grid(height, width)
        x = self.x_embedder(x).contiguous()  # the convolution leaves channels first, which each block would put right
        if is_autocast(x.device.type):  # the residual stream is wide, as the published positional table makes it
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.config.positional_embedding:
            x = x + self.positional_table(grid)
        c = self.t_embedder(1 - t if self.config.time_reversed else t) + self.y_embedder(y)
        if self.duration_embedder is not None:
            c = c + self.duration_embedder(torch.zeros_like(t) if end is None else end - t)
        elif end is not None:
            raise UserError("this network predicts no average velocity: it was not trained with MeanFlow")
        projected = None
        for number, block in enumerate(self.blocks, start=1):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, c, grid)
            else:
                x = block(x, c, grid)
            if project and number == self.projected_block:
                projected = self.projector(x)
        x = self.final_layer(x, c)
        x = self._unpatchify(x, grid)[:, : self.config.in_channels]
        x = -x if self.config.time_reversed else x
        if return_dict is not None:
            return Transformer2DModelOutput(sample=x) if return_dict else (x,)
        return (x, projected) if project else x

    def _unpatchify(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(B, N, p·p·channels) to (B, channels, H·p, W·p)."""
        patch = self.config.patch_size
        x = x.reshape(-1, *grid, patch, patch, self.out_channels)
        x = x.permute(0, 5, 1, 3, 2, 4)
        return x.reshape(-1, self.out_channels, grid[0] * patch, grid[1] * patch)


def mixer_specs(config: Mapping[str, Any]) -> list[MixerSpec]:
    """The mixers of a network's configuration, repeated over the depth, with the options that its block sets."""
    return parse_mixers(config["mixer"], MIXER_OPTIONS[config.get("block", "published")])


def check_sizes(**sizes: int) -> None:
    """Raise UserError, which names the first, unless all sizes are at least 1."""
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"`{name}` must be at least 1, not {size}")


def check_model_name(name: str) -> None:
    """Raise UserError unless the size table has the name."""
    if name not in MODELS:
        sizes, patches = ", ".join(SIZES), ", ".join(map(str, PATCHES))
        raise UserError(f"unknown model {name!r}; models are SiT-SIZE/PATCH with sizes {sizes} and patches {patches}")


def current_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A stored configuration with today's names: version 0.1.0 wrote ``class_dropout``, of training, for null_class."""
    config = dict(config)
    if "class_dropout" in config:
        config.setdefault("null_class", bool(config.pop("class_dropout")))
    return config


def create_model(name: str, seed: int | None = None, **options: Any) -> SiT:
    """Make a network of the size table, e.g. ``create_model("SiT-XL/2", mixer="atconv", input_size=32)``.

    Args:
        name: SiT-SIZE/PATCH.
        seed: of the initial values; None draws it from torch's global generator.
        **options: further arguments of :class:`SiT`.

    Raises:
        UserError: a name that the table lacks.
    """
    check_model_name(name)
    return SiT(**{**MODELS[name], **options}, seed=seed)
