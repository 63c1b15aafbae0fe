"""WebDataset shards: tars whose members belong together by name, ``0001.jpg`` with ``0001.cls`` or ``0001.json``."""

from __future__ import annotations

import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sit.data.reading import EXTENSIONS, ONE_CLASS
from sit.data.tar import COMPRESSED, TarSource, files_in
from sit.utils.errors import UserError

LABELS = (".cls", ".json")
"""endings of the members that have a label, the preferred first: a number as text, or JSON"""

MOST_CLASSES = 100_000


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern stands for: ``a-{000..002}.tar`` or ``{a,b}-{0..1}.tar``, as a shell expands it."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_alternatives(piece) if at % 2 else [piece] for at, piece in enumerate(pieces)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _alternatives(inside: str) -> list[str]:
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = map(int, bounds.groups())
        step = 1 if last >= first else -1
        digits = max(map(len, bounds.groups())) if any(re.match(r"0\d", bound) for bound in bounds.groups()) else 0
        return [f"{number:0{digits}d}" for number in range(first, last + step, step)]
    return inside.split(",")


@dataclass
class _Sample:
    """The members of a shard under one key."""

    name: str | None = None
    place: tuple[int, int] = (0, 0)
    label: int | None = None
    class_name: str | None = None
    ending: str | None = None


class WebDatasetSource(TarSource):
    """Images of WebDataset shards, read in place in the order of the shards and of the images in them.

    A label is the number in ``.cls``, or in ``.json`` as it is or under ``label``; ``class_name`` beside it names the
    class, its number if there is none. Images without any label are of one class.

    Args:
        pattern: a shard, a pattern such as ``train-{0000..0146}.tar``, or a folder of shards.

    Raises:
        UserError: a shard is missing, compressed or can't be read, an image would be left out, as it has a dot in its
            name, or labels are missing, no numbers, or contradict.
    """

    def __init__(self, pattern: str) -> None:
        self.name = f"webdataset:{pattern}"
        found = sorted(Path(pattern).glob("*.tar")) if Path(pattern).is_dir() else map(Path, expand_braces(pattern))
        self.files = [file for file in found if not file.name.startswith(".")]
        if not self.files:
            raise UserError(f"`data={self.name}`: no .tar files in this folder")
        samples: list[tuple[int, _Sample]] = []
        for number, file in enumerate(self.files):
            if file.name.lower().endswith(COMPRESSED):
                raise UserError(f"`data={self.name}`: {file} is compressed, which forbids random access; uncompress it")
            with self._opened(file) as archive:
                samples += [(number, sample) for sample in self._samples(archive, file) if sample.name]
        if not samples:
            raise UserError(f"`data={self.name}`: no images in its shards ({', '.join(EXTENSIONS)} are looked for)")
        self.labels, self.classes = self._labels([sample for _, sample in samples])
        self.names = np.array([os.fsencode(sample.name or "") for _, sample in samples], dtype=np.bytes_)
        self.places = np.array([(number, *sample.place) for number, sample in samples], dtype=np.int64)
        self._real_files = [os.path.realpath(file) for file in self.files]
        self._descriptors = {}

    def _samples(self, archive: tarfile.TarFile, file: Path) -> Iterator[_Sample]:
        samples: dict[str, _Sample] = {}
        others: dict[str, str] = {}  # images under longer endings, such as .seg.png
        for member in files_in(archive):
            folder, _, base = member.name.rpartition("/")
            stem, _, ending = base.partition(".")
            ending = "." + ending.lower()
            sample = samples.setdefault(f"{folder}/{stem}", _Sample())
            if ending in EXTENSIONS:
                if sample.name is not None:
                    raise UserError(f"`data={self.name}`: {file} has two images for {stem}: {sample.name} and {base}")
                sample.name, sample.place = member.name, (member.offset_data, member.size)
            elif ending.endswith(EXTENSIONS):
                others.setdefault(f"{folder}/{stem}", member.name)
            elif ending in LABELS and (sample.ending is None or LABELS.index(ending) < LABELS.index(sample.ending)):
                content = archive.extractfile(member).read()
                label, class_name = self._label(content, ending, f"{member.name} in {file}")
                if label is not None:
                    sample.label, sample.ending = label, ending
                sample.class_name = class_name or sample.class_name
            elif ending == ".json":  # the label is known by .cls, the name of its class is here
                content = archive.extractfile(member).read()
                name = self._label(content, ending, f"{member.name} in {file}", wanted=False)[1]
                sample.class_name = name or sample.class_name
        for key, name in others.items():
            if samples[key].name is None:
                raise UserError(
                    f"`data={self.name}`: {name} in {file} would be left out, as all after the first dot of a name is "
                    f"its ending in WebDataset; rename it, or give flat:{file}, which takes all images as one class"
                )
        return iter(samples.values())

    def _label(self, content: bytes, ending: str, where: str, *, wanted: bool = True) -> tuple[int | None, str | None]:
        """(label, name of its class) that a member tells; the name alone if no label is ``wanted`` of it."""
        try:
            said: Any = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"`data={self.name}`: {where} is no {'number' if ending == '.cls' else 'JSON'}") from error
        class_name = None
        if ending == ".json" and type(said) is not int:  # a caption or other notes have no label
            said = said if isinstance(said, dict) else {}
            class_name = said["class_name"] if isinstance(said.get("class_name"), str) else None
            said = said.get("label")
            if said is None or not wanted:
                return None, class_name
        if type(said) is not int or not 0 <= said < MOST_CLASSES:
            raise UserError(f"`data={self.name}`: {where} has the label {str(said)[:40]!r}, which is no class's number")
        return said, class_name

    def _labels(self, samples: list[_Sample]) -> tuple[np.ndarray, list[str]]:
        """(labels (count,) int64, names of the classes); classes up to the largest label are there, seen or not."""
        bare = next((sample for sample in samples if sample.label is None), None)
        if bare is not None:
            if labeled := next((sample for sample in samples if sample.label is not None), None):
                raise UserError(
                    f"`data={self.name}`: {labeled.name} has a label and {bare.name} has none; give all a .cls"
                )
            return np.zeros(len(samples), dtype=np.int64), [ONE_CLASS]
        labels = np.array([sample.label for sample in samples], dtype=np.int64)
        names: dict[int, str] = {}
        for sample in samples:
            if sample.class_name is not None and names.setdefault(sample.label, sample.class_name) != sample.class_name:
                raise UserError(
                    f"`data={self.name}`: label {sample.label} is {names[sample.label]} and {sample.class_name}"
                )
        classes = [names.get(label, str(label)) for label in range(int(labels.max()) + 1)]
        if len(set(classes)) < len(classes):  # synonyms, as ImageNet's two cranes
            classes = [f"{name} ({label})" if classes.count(name) > 1 else name for label, name in enumerate(classes)]
        return labels, classes
