"""Which folders are the classes: those at the top, or, where these only hold the whole set, those below."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from sit.utils.errors import UserError

PARTS = {"train", "training", "val", "valid", "validation", "test", "testing"}
"""Names of the parts of a data set, of which one is to be given."""


def wrapping_folders(names: Iterable[bytes], spec: str) -> bytes:
    """The folders around the classes, as a beginning of every name (``b"dir/"``); empty where the classes are on top.

    A folder alone at the top, with at least two folders of images and no image beside them, is no class: it is what
    ``tar cf x.tar dir`` puts around them. Several folders at the top are the classes, with images at any depth below,
    as torchvision's ``ImageFolder`` has it; but not if they are parts of one data set.

    Args:
        names: paths of the images in the data set, class folders first.
        spec: the data set, for messages.

    Raises:
        UserError: the folders at the top are named train, val or so, or have no images but the same folders below.
    """
    names, looked, prefix = list(names), b"", b""
    while True:
        below, directly = _folders_below(names, len(looked))
        if len(below) > 1:
            _refuse_parts(below, directly, looked, spec)
        if directly or len(below) > 1:
            return prefix
        ((top, inner),) = below.items()
        looked += top + b"/"
        if len(inner) > 1:
            prefix = looked


def _folders_below(names: Sequence[bytes], start: int) -> tuple[dict[bytes, set[bytes]], bool]:
    """Each folder on top, by name, with those in it; and whether an image lies directly in one, which is a class."""
    below: dict[bytes, set[bytes]] = {}
    directly = False
    for name in names:
        top, _, rest = name[start:].partition(b"/")
        inner, slash, _ = rest.partition(b"/")
        folders = below.setdefault(top, set())
        if slash:
            folders.add(inner)
        directly = directly or not slash
    return below, directly


def _refuse_parts(below: dict[bytes, set[bytes]], directly: bool, prefix: bytes, spec: str) -> None:
    shared = set() if directly else set.intersection(*below.values())
    if {top.decode(errors="replace").lower() for top in below} <= PARTS or len(shared) > 1:
        tops = [(prefix + top).decode(errors="replace") for top in sorted(below)]
        what = f"{', '.join(tops[:3])}{' …' if len(tops) > 3 else ''}"
        mend = "rename those that are classes" if directly else "put the images of each class directly into its folder"
        raise UserError(
            f"`data={spec}` holds {what}, which look like parts of one data set rather than classes: give one of them, "
            f"or {mend}"
        )


def check_none_beside(names: Sequence[str], spec: str, one_class: str | None) -> None:
    """Raise UserError if there are images beside the classes, in none of them.

    Args:
        names: of these images.
        spec: the data set, for the message.
        one_class: the data set of all images as one class; None if there is no such.
    """
    if names:
        more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
        other = f", or give {one_class}, which takes all image files as one class" if one_class else ""
        raise UserError(
            f"`data={spec}`: {names[0]}{more} lie{'' if more else 's'} beside the classes; move such images into a "
            f"class or elsewhere{other}"
        )


def check_none_empty(folders: Iterable[str], prefix: str, classes: Collection[str], spec: str) -> None:
    """Raise UserError if a folder that lies where the classes do has no images.

    Args:
        folders: paths of the folders in the data set, at any depth, tars that count as such among them.
        prefix: what :func:`wrapping_folders` gives.
        classes: those that have images.
        spec: the data set, for the message.
    """
    tops = {name[len(prefix) :].split("/")[0] for name in folders if name.startswith(prefix)} - {"", "."}
    if empty := sorted(tops - set(classes)):
        raise UserError(f"`data={spec}`: class {prefix}{empty[0]} has no images; fill it or remove it")


def check_class_names(names: Iterable[str], spec: str) -> None:
    """Raise UserError, which names it, unless every class can be written in a checkpoint: its name is UTF-8."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"`data={spec}`: the class folder {ascii(name)} has a name that is not UTF-8: rename it"
            ) from error
