"""Beginning with another network's weights: what of them fits is taken, by name and shape, and the rest stays as it is.

Three tensors fit in part. The label table gives its rows class by class; the last layer its prediction, whichever of
the two networks has ``learn_sigma``; and the positional table, a formula, is laid over the donor's grid, so that the
coordinates of the tokens stay within those that the donor has seen (as timm resamples a learned table).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sit.checkpoint.find import resolve
from sit.checkpoint.info import read_info
from sit.checkpoint.load import network_config, read_network, stored_vae, transport_options
from sit.checkpoint.published import read_published
from sit.latents.likeness import difference
from sit.model import SiT, mixer_specs

INHERITED = ("time_reversed", "positional_grid")
"""Arguments of :class:`~sit.model.SiT` that a network has from its donor, as they belong to the weights."""

LABELS, TABLE, OUTPUT = "y_embedder.embedding_table.weight", "pos_embed", "final_layer.linear."


@dataclass(frozen=True)
class Donor:
    """A network whose weights another begins with.

    Attributes:
        place: its folder or file.
        state: its weights by their keys in our layout: those that it is sampled with.
        config: the arguments of its network, as far as they are known; ``input_size`` and ``num_heads`` may be missing.
        transport: the arguments of its transport; missing ones are the defaults.
        label_names: the names of its classes by label; empty if unknown.
        vae_source: the folder or name of the VAE of its latents; None if unknown.
    """

    place: Path
    state: Mapping[str, torch.Tensor]
    config: Mapping[str, Any]
    transport: Mapping[str, Any]
    label_names: Sequence[str]
    vae_source: str | None = None

    @property
    def grid(self) -> tuple[int, int] | None:
        """Its tokens' (H, W); None if unknown."""
        size = self.config.get("input_size")
        if size is None:
            return None
        height, width = (size, size) if isinstance(size, int) else size
        return height // self.config["patch_size"], width // self.config["patch_size"]

    def inherited(self, grid: tuple[int, int]) -> dict[str, Any]:
        """The :data:`INHERITED` arguments of a network of ``grid`` that begins with it."""
        has_positions = TABLE in self.state or any(spec.options.get("rope") for spec in mixer_specs(self.config))
        over = self.config.get("positional_grid") or (self.grid if has_positions else None)
        return {
            "time_reversed": bool(self.config.get("time_reversed", False)),
            "positional_grid": None if over is None or tuple(over) == grid else tuple(over),
        }


def read_donor(source: str | Path) -> Donor:
    """Read a network to begin with: a run, a folder, a published file, or a name (:func:`sit.checkpoint.find.resolve`).

    Raises:
        UserError: nothing usable is there.
    """
    place = resolve(source)
    if place.is_file():
        published = read_published(place)
        config = dict(published.config)
        if any("`num_heads`" in question for question in published.questions):
            del config["num_heads"]
        return Donor(place, published.state, config, published.transport_config, [], published.vae_name)
    inside = place / "transformer" if (place / "model_index.json").is_file() else place
    network = read_network(inside)
    names = read_info(place).label_names
    return Donor(place, network.state_dict(), dict(network.config), transport_options(place), names, stored_vae(place))


def inherited_by(checkpoint: Path) -> dict[str, Any]:
    """The :data:`INHERITED` arguments of the network in a checkpoint of ours."""
    config = network_config(checkpoint / "transformer")
    return {name: config[name] for name in INHERITED if name in config}


@dataclass
class Taken:
    """What a network took of a donor.

    Attributes:
        whole: the names of the tensors taken as they are.
        part: tensors taken in part, by name, and what of them.
        fresh: the names of those that stayed as they were.
        left: those of the donor that there was no place for.
        notes: what makes the same weights mean something else.
    """

    whole: list[str] = field(default_factory=list)
    part: dict[str, str] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        total = len(self.whole) + len(self.part) + len(self.fresh)
        said = [f"{len(self.whole)} of {total} tensors taken"]
        said += [f"{name}: {what}" for name, what in self.part.items()]
        said += [f"afresh: {_grouped(self.fresh)}"] if self.fresh else []
        said += [f"not used of it: {_grouped(self.left)}"] if self.left else []
        return "; ".join(said + [f"note: {note}" for note in self.notes])


def take(
    network: SiT, donor: Donor, classes: Sequence[str], transport: Mapping[str, Any], vae: str | None = None
) -> Taken:
    """Give ``network``, in place, all weights of ``donor`` that fit; what does not fit keeps its values.

    Args:
        network: with its initial values.
        donor: whose weights.
        classes: the names of the network's classes, by label.
        transport: the arguments of the transport that it will be trained with.
        vae: the folder or name of the VAE of its latents; None leaves them uncompared.
    """
    taken = Taken()
    own = network.state_dict()
    with torch.no_grad():
        for name, tensor in own.items():
            given = donor.state.get(name)
            if name == TABLE:
                if donor.grid == network.grid and given is not None and given.shape == tensor.shape:
                    tensor.copy_(given)
                continue  # else the formula's, laid over the donor's grid
            if given is not None and name == LABELS and given.shape[1] == tensor.shape[1]:
                _take_rows(tensor, given, _rows(network, donor, classes), taken)
            elif given is not None and given.shape == tensor.shape:
                tensor.copy_(given)
                taken.whole.append(name)
            elif given is not None and name.startswith(OUTPUT) and _same_prediction(network, donor):
                channels, patches = network.config.in_channels, network.config.patch_size**2
                tensor.unflatten(0, (patches, -1))[:, :channels] = given.unflatten(0, (patches, -1))[:, :channels]
                taken.part[name] = "the prediction"
            else:
                taken.fresh.append(name)
    known = {*taken.whole, *taken.part, TABLE}
    taken.left = [name for name in donor.state if name not in known]
    taken.notes = list(_notes(network, donor, transport, vae))
    return taken


def _rows(network: SiT, donor: Donor, classes: Sequence[str]) -> dict[int, int]:
    """Row of the network's label table → row of the donor's.

    Classes are matched by name where both know the names, else by number if there are as many. (timm and diffusers make
    the whole table anew where the number of classes is another.) Where the names are the same in both, so are the
    numbers; else a name that several classes have, as ImageNet's crane, matches none. The row of no class means the
    same in both.
    """
    own, given = network.config.num_classes, donor.config["num_classes"]
    rows: dict[int, int] = {}
    named = len(donor.label_names) == given and len(classes) == own
    if named and list(donor.label_names) != list(classes):
        names, others = Counter(classes), Counter(donor.label_names)
        of_donor = {name: row for row, name in enumerate(donor.label_names) if others[name] == 1}
        rows = {row: of_donor[name] for row, name in enumerate(classes) if name in of_donor and names[name] == 1}
    elif own == given:
        rows = {row: row for row in range(own)}
    if network.config.null_class and donor.config["null_class"]:
        rows[own] = given
    return rows


def _take_rows(tensor: torch.Tensor, given: torch.Tensor, rows: Mapping[int, int], taken: Taken) -> None:
    if not rows:
        taken.fresh.append(LABELS)
        return
    tensor[list(rows)] = given[list(rows.values())].to(tensor)
    if len(rows) == len(tensor):
        taken.whole.append(LABELS)
    else:
        taken.part[LABELS] = f"{len(rows)} of {len(tensor)} rows"


def _same_prediction(network: SiT, donor: Donor) -> bool:
    """Whether the first channels of both outputs are the prediction of the same patch."""
    config = network.config
    return all(config[name] == donor.config[name] for name in ("in_channels", "patch_size", "hidden_size"))


def _notes(network: SiT, donor: Donor, transport: Mapping[str, Any], vae: str | None) -> Iterable[str]:
    if None not in (vae, donor.vae_source) and (found := difference(vae, donor.vae_source)) is not None:
        yield f"its latents are {found}"
    for name, default in (("interpolant", "linear"), ("prediction", "velocity")):
        then, now = donor.transport.get(name, default), transport.get(name, default)
        if then != now:
            yield f"it was trained with {name} {then}, not {now}"
    block = donor.config.get("block", "published")
    if block != network.config.block:
        yield f"its block is {block}, not {network.config.block}"
    heads = donor.config.get("num_heads", network.config.num_heads)
    specs, given = mixer_specs(network.config), mixer_specs(donor.config)
    pairs = [
        (given[number % len(given)], specs[number % len(specs)])
        for number in range(min(len(network.blocks), donor.config["depth"]))
    ]
    if heads != network.config.num_heads and any(a.name == b.name == "attention" for a, b in pairs):
        yield f"it has {heads} attention heads, not {network.config.num_heads}"
    for then, now in dict.fromkeys((a, b) for a, b in ((str(a), str(b)) for a, b in pairs if a.name == b.name)):
        if then != now:
            yield f"its mixer is {then}, not {now}"


def _grouped(names: Iterable[str], most: int = 6) -> str:
    """Names with the blocks' numbers and what stands under a mixer or layer left out, and how many they are."""
    counts = Counter(re.sub(r"^blocks\.\d+\.(\w+)\..*", r"blocks.*.\1", name) for name in names)
    said = [f"{name} ({count})" if count > 1 else name for name, count in counts.items()]
    return ", ".join(said[:most]) + ", …" * (len(said) > most)
