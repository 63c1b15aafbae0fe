"""ATConv as a module, with the published parameter names."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F

from atconv.functional import ACTIVATIONS, BACKENDS, depthwise_conv, inhibit, load_triton, make_kernels, mix_taps
from atconv.scopes import SCOPES, around, convolve_tokens, pad, pool_windows, smallest_window, window_kernels

INITIAL_VALUES = ("xavier", "conv")
WINDOW = 4
"""Side of the windows that make the kernels with ``scope=window``, in tokens."""


def is_count(value: object) -> bool:
    """Whether it is a positive int, and not True."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_kernel_size(kernel_size: object) -> None:
    """Raise ValueError unless it is an odd positive int."""
    if not is_count(kernel_size) or kernel_size % 2 == 0:  # type: ignore[operator]
        raise ValueError(f"`kernel_size` must be an odd number, not {kernel_size!r}")


class Weights(nn.Linear):
    """A linear layer that is computed elsewhere: called without an input, it gives its weight and bias.

    They are not read as attributes, because what offloads or casts a layer's weights (Accelerate, diffusers) puts them
    right as the layer is called, and takes them away after it; another tensor of the same memory outlives that. FSDP2
    frees the memory itself: shard the mixer or its block, not this layer alone, which ends in an error of PyTorch's.
    """

    def forward(self, x: torch.Tensor | None = None) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        if x is not None:
            return super().forward(x)
        with torch.enable_grad():  # a view made without says that it has a gradient, and has none
            return self.weight.view_as(self.weight), self.bias.view_as(self.bias)


class ATConv(nn.Module):
    """Attentive Convolution (arXiv 2510.20092) in place of self-attention: tokens (B, N, C) to (B, N, C).

    A depthwise k×k convolution of the projected tokens on their grid, with kernels that each image generates for
    each channel (*adaptive routing*) and whose taps compete (*lateral inhibition*). It has no positional embedding:
    the zero padding tells where the border is.

    Args:
        dim: C.
        num_heads: has no effect, as a convolution has no heads; every mixer is given it.
        kernel_size: k, odd.
        inhibition: False leaves out lateral inhibition (the paper's ablation).
        routing: False replaces the generated kernels by learned ones, the same for all images (the paper's ablation).
        activation: the kernel branch's: ``gelu_tanh`` (published SiT variant), ``gelu`` (AttNet), ``silu`` (REPA).
        init: initial values of the three projections: ``xavier`` (published SiT variant), or ``conv``, PyTorch's for
            1×1 convolutions, weights and biases uniform within ±1/√C (published REPA variant).
        backend: one of :data:`atconv.functional.BACKENDS`; None takes the one for the device.
        scope: what a kernel is made from: the whole ``image``, as published; the ``window`` that a token is in; or the
            k² tokens around each ``token`` (:mod:`atconv.scopes`). The latter two run by plain operations.
        window: side of the windows, in tokens.

    Raises:
        ValueError: a size that is no positive int; an even kernel size; an unknown activation, backend or scope; a
            backend that this machine can't run, or that is named for another scope than the image; another scope
            without routing.
    """

    positional_embedding = False

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        kernel_size: int = 3,
        inhibition: bool = True,
        routing: bool = True,
        activation: str = "gelu_tanh",
        init: str = "xavier",
        backend: str | None = None,
        scope: str = "image",
        window: int = WINDOW,
    ) -> None:
        super().__init__()
        check_kernel_size(kernel_size)
        for name, size in (("dim", dim), ("window", window)):
            if not is_count(size):
                raise ValueError(f"`{name}` must be at least 1, not {size!r}")
        choices = (
            (activation, ACTIVATIONS, "activation"), (backend, BACKENDS, "backend"), (init, INITIAL_VALUES, "init"),
            (scope, SCOPES, "scope"),
        )  # fmt: skip
        for value, known, what in choices:
            if value is not None and value not in known:
                raise ValueError(f"`{what}` must be one of {', '.join(known)}, not {value!r}")
        if scope != "image" and (backend is not None or not routing):
            given = f"backend={backend}" if backend is not None else "routing=false"
            raise ValueError(f"`scope={scope}` makes kernels by plain operations: it does not go with `{given}`")
        if scope != "window" and window != WINDOW:
            raise ValueError(f"`window` is of `scope=window`, not of {scope}: leave it out")
        if backend == "triton":  # to fail here, not in the first forward pass
            load_triton(on_cpu=not torch.accelerator.is_available())
        self.kernel_size, self.inhibition, self.routing = kernel_size, inhibition, routing
        self.activation, self.init, self.backend = activation, init, backend
        self.scope, self.window = scope, window
        taps = kernel_size**2
        if routing:
            self.kernel_proj = Weights(dim, dim)
            self.kernel_gen = Weights(taps, taps)
        else:
            self.kernel = nn.Parameter(torch.empty(taps, dim))
        self.x_proj = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        if inhibition:
            self.difference_control = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The published initial values: linear layers as ``init`` says, d = 0 (half the mean subtracted).

        The mixing of the taps is Xavier-uniform with a zero bias in both.
        """
        for name, module in self.named_children():
            if isinstance(module, nn.Linear):
                if self.init == "conv" and name != "kernel_gen":
                    bound = module.in_features**-0.5
                    nn.init.uniform_(module.weight, -bound, bound)
                    nn.init.uniform_(module.bias, -bound, bound)
                else:
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)
        if not self.routing:
            bound = 1 / self.kernel_size  # PyTorch's for a depthwise convolution
            nn.init.uniform_(self.kernel, -bound, bound)
        if self.inhibition:
            nn.init.zeros_(self.difference_control)

    def extra_repr(self) -> str:
        scope = "" if self.scope == "image" else f", scope={self.scope}"
        return f"kernel_size={self.kernel_size}, inhibition={self.inhibition}, routing={self.routing}{scope}"

    def kernels(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The kernels before and after inhibition, for tokens x (B, N, C): :func:`atconv.functional.make_kernels`.

        Autocast is disabled in it.

        Returns:
            Two tensors (B, k², C), row-major taps, float32 or float64; (1, k², C) with routing off.

        Raises:
            ValueError: of another scope, an image has many.
        """
        if self.scope != "image":
            raise ValueError(f"with scope={self.scope} an image has a kernel for each {self.scope}, not one")
        kind = x.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            control = self.difference_control if self.inhibition else None
            if self.routing:
                weights = (*self.kernel_proj(), *self.kernel_gen())
                return make_kernels(x, *weights, control=control, activation=self.activation, backend=self.backend)
            wide = torch.promote_types(x.dtype, torch.float32)
            raw = self.kernel[None].to(wide)
            return raw, raw if control is None else inhibit(raw, control.to(wide))

    def plain_backend(self, device: torch.device) -> str:
        """The backend to take on ``device`` where forward-mode derivatives are wanted, which ``triton`` has none of."""
        if self.backend in (None, "triton"):
            return "channels_last" if device.type == "cpu" else "taps"
        return self.backend

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raise ValueError unless ``grid`` = (H, W) has at least as many tokens as the generated kernels have taps.

        And each of its windows, where these make the kernels.
        """
        tokens, side = grid[0] * grid[1], self.kernel_size
        if self.scope == "token":
            return
        if self.scope == "window" and (least := smallest_window(grid, self.window)) < side**2:
            raise ValueError(
                f"the {least} tokens of a window can't be pooled into the {side**2} taps of a {side}x{side} kernel: "
                "use a larger `window` or a smaller `kernel_size`"
            )
        if self.routing and tokens < side**2:
            raise ValueError(
                f"the {tokens} tokens of a {grid[0]} x {grid[1]} grid can't be pooled into the {side**2} taps of a "
                f"{side}x{side} kernel: use a smaller `kernel_size` or smaller patches"
            )

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Mix tokens x (B, N, C), row-major over ``grid`` = (H, W).

        Raises:
            ValueError: N is not H·W, or there are fewer tokens than kernel taps.
        """
        batch, tokens, dim = x.shape
        if tokens != grid[0] * grid[1]:
            raise ValueError(f"{tokens} tokens are no grid of {grid[0]} x {grid[1]}")
        self.check_grid(grid)
        kind = x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))  # once, for both branches; autocast leaves float64 alone
        if self.scope != "image":
            y = convolve_tokens(self.x_proj(x).view(batch, *grid, dim), self._token_kernels(x, grid), self.kernel_size)
            return self.proj(y.reshape(batch, tokens, dim))
        _, kernels = self.kernels(x)
        v = self.x_proj(x)
        y = depthwise_conv(v.view(batch, *grid, dim), kernels, self.backend)
        return self.proj(y.reshape(batch, tokens, dim))

    def _token_kernels(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """The kernel of each token of x (B, N, C): (B, N, k², C), float32 or float64; autocast is disabled in it."""
        kind, side = x.device.type, self.kernel_size
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            weight, bias = self.kernel_proj()
            if self.scope == "window":
                logits = F.linear(pool_windows(x, grid, self.window, side**2, weight.dtype), weight, bias)
            else:
                logits = around(F.linear(pad(x.to(weight.dtype).unflatten(1, grid), side), weight, bias), side)
            wide = torch.promote_types(logits.dtype, torch.float32)
            weight, bias = (part.to(wide) for part in self.kernel_gen())
            kernels = mix_taps(logits.to(wide).flatten(0, 1), weight, bias, self.activation)
            kernels = kernels.unflatten(0, logits.shape[:2])
            if self.inhibition:
                kernels = inhibit(kernels, self.difference_control.to(wide))
        return window_kernels(kernels, grid, self.window) if self.scope == "window" else kernels
