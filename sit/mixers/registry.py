"""The token-mixer slot: what a mixer is, the registry, and patterns over depth.

A mixer is any ``nn.Module`` called as ``mixer(x, grid)`` with tokens ``x`` (B, N, C) in row-major order over
``grid = (H, W)``, N = H·W, that returns (B, N, C). A *factory* ``factory(dim, num_heads, **options)`` makes it, and
the factory's attribute ``positional_embedding`` (bool) says whether a network of it needs a positional embedding.
A factory is found under its name if it was registered with :func:`register_mixer`, or if an installed package
names it in the entry-point group ``sit.mixers``.

- **Initial values** are the mixer's own: the network replaces none of them. It makes each mixer while torch's global
  generator is at a state that depends on the seed and the block alone, so the constructor draws as usual.
- **Grids**: one mixer is called on grids of any shape, also on others than it was built for. One that can't work on
  every grid has ``check_grid(grid)``, which raises ValueError; :func:`build_mixer` calls it.
- **Dtype**: the result has the dtype of the linear layers: x's, or autocast's where that is on, which leaves float64
  alone. What needs more is computed in float32 inside.
- **Batch**: any number of images, none too.
- **Derivatives**: a mixer of plain PyTorch operations has forward-mode derivatives (``torch.func.jvp``) too. Fused
  kernels have none; :func:`sit.mixers.forward_mode.plain_operations` sets them aside.

Options that a network's block may set (:data:`sit.blocks.MIXER_OPTIONS`), where the factory has them by name and the
pattern does not say: ``qk_norm`` and ``rope``, both bools.

Optional methods:

- ``lay_over(grid)``: from now on tokens have the coordinates of ``grid``, whatever grid the mixer is called on; for
  those with positions of their own. :func:`build_mixer` calls it.
- ``masked_multiply_accumulates(grid)``: how many of the multiply-accumulates that it computes for one image a mask
  hides; :func:`sit.training.plan.multiply_accumulates` leaves them out.
- ``plain_backend(device)``: the name of a backend whose operations have forward-mode derivatives; it becomes the
  attribute ``backend`` while these are taken.
- ``kernels(x)``: two tensors (B, k², C), the kernels made for tokens x before and after inhibition, taps in row-major
  order; (1, k², C) if all images share them. The demo draws them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from inspect import signature
from typing import Any

import yaml
from torch import nn

from sit.utils.errors import UserError, first_line
from sit.utils.options import check_options, parse_entry

ENTRY_POINT_GROUP = "sit.mixers"
FORMER_NAMES = {"neighbourhood": "neighborhood"}
"""names in configurations that version 0.1.0 wrote, and what they are now"""
_registry: dict[str, Callable[..., nn.Module]] = {}


def register_mixer(name: str) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Class or function decorator: make a factory known as ``name``.

    Raises:
        TypeError: the factory lacks the attribute ``positional_embedding``.
        ValueError: the name is taken, or has a character that patterns use (``,``, ``:``, ``=``).
    """

    def register(factory: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        if not name or set(name) & set(",:= "):
            raise ValueError(f"mixer name {name!r} must be non-empty, without ',', ':', '=' or spaces")
        if _registry.get(name, factory) is not factory:
            raise ValueError(f"the mixer name {name!r} is taken by {_registry[name]!r}")
        _registry[name] = _checked(name, factory)
        return factory

    return register


def known_mixers() -> list[str]:
    """The names that a pattern may have, registered and installed, each once, sorted."""
    return sorted({*_registry, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def _checked(name: str, factory: Any) -> Callable[..., nn.Module]:
    if not callable(factory) or not isinstance(getattr(factory, "positional_embedding", None), bool):
        raise TypeError(f"mixer {name!r}: {factory!r} must be callable and have a bool attribute positional_embedding")
    return factory


def _factory(name: str) -> Any:
    if name not in _registry:
        for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
            try:
                _registry[name] = _checked(name, point.load())
            except (ImportError, AttributeError, TypeError) as error:
                raise UserError(f"mixer {name!r} of {point.value} can't be loaded: {error}") from error
            break
        else:
            raise UserError(f"unknown mixer {name!r}; known mixers: {', '.join(known_mixers())}")
    return _registry[name]


@dataclass(frozen=True)
class MixerSpec:
    """One entry of a mixer pattern: a registered name and the options its factory gets."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return ":".join([self.name, *(f"{k}={yaml.safe_dump(v).split()[0]}" for k, v in self.options.items())])


def parse_mixers(pattern: str, wanted: Sequence[str] = ()) -> list[MixerSpec]:
    """Read ``name[:option=value…]`` entries separated by commas; the list is repeated over the depth.

    Values are YAML scalars: ``atconv:kernel_size=5:inhibition=false`` gives an int and a bool. A former name
    (:data:`FORMER_NAMES`) is read as today's.

    Args:
        pattern: the entries.
        wanted: options that are true for those mixers that have them, unless the entry says otherwise.

    Raises:
        UserError: an unknown name, an option that is not ``key=value``, that the mixer does not have, or whose value is
            of another type than its default.
    """
    specs = []
    for entry in pattern.split(","):
        name, options = parse_entry(entry, f"mixer {entry.strip()!r}")
        name = FORMER_NAMES.get(name, name)
        check_options(options, _factory(name), f"mixer {name!r}", reserved=("dim", "num_heads"))
        has = signature(_factory(name)).parameters
        specs.append(MixerSpec(name, options | {option: True for option in wanted if option in has.keys() - options}))
    return specs


def build_mixer(
    spec: MixerSpec,
    dim: int,
    num_heads: int,
    grid: tuple[int, int] | None = None,
    *,
    laid_over: tuple[int, int] | None = None,
) -> nn.Module:
    """Make one mixer for tokens of ``dim`` channels.

    Args:
        spec: which, with its options.
        dim: C.
        num_heads: attention heads.
        grid: (H, W) of the tokens, if that is known.
        laid_over: the grid whose coordinates they have; None is ``grid``.

    Raises:
        UserError: the mixer refuses the values of its options, or the grid.
    """
    try:
        mixer = _factory(spec.name)(dim, num_heads, **spec.options)
        check_grid: Callable[[tuple[int, int]], None] | None = getattr(mixer, "check_grid", None)
        if grid is not None and check_grid is not None:
            check_grid(grid)
        lay_over: Callable[[tuple[int, int]], None] | None = getattr(mixer, "lay_over", None)
        if lay_over is not None and (coordinates := laid_over or grid) is not None:
            lay_over(coordinates)
        return mixer
    except (ValueError, TypeError, AssertionError) as error:
        reason = first_line(error).replace("`", "")  # a command would print an option in backquotes as a flag
        raise UserError(f"mixer {str(spec)!r} with {dim} channels and {num_heads} heads: {reason}") from error


def needs_positional_embedding(specs: Sequence[MixerSpec]) -> bool:
    """Whether any mixer of the pattern needs the network to add a positional embedding to its tokens."""
    return any(_factory(spec.name).positional_embedding for spec in specs)
