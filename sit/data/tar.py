"""Images inside tar files, read in place: ImageNet's training tar as downloaded, tars of class folders, or any tar."""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from sit.data.classes import check_class_names, check_none_beside, check_none_empty, wrapping_folders
from sit.data.dataset import hash_contents, hash_names
from sit.data.folder import only_tars, tars_in
from sit.data.reading import EXTENSIONS, ONE_CLASS, is_image_name
from sit.utils.errors import UserError

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

WANTED = (*EXTENSIONS, ".tar")
"""Endings of what is looked for in a tar of classes."""


_Found = tuple[bytes, int, int, int]
"""an image's name, the number of its file, and its offset and size there, in bytes"""


def is_tar(path: str) -> bool:
    """Whether ``path`` is a tar file, or a folder of one tar a class."""
    return (path.lower().endswith((".tar", *COMPRESSED)) and Path(path).is_file()) or only_tars(Path(path))


class TarSource:
    """Images inside uncompressed tar files, found once by their headers and read by offset.

    A class is a tar (``n01440764.tar``, inside the tar or the folder given) or a folder inside the tar; a folder around
    all of these is looked through (:func:`sit.data.classes.wrapping_folders`).

    Args:
        path: a tar, or a folder of one tar a class.
        flat: take all images, at any depth and those of tars inside too, as one class.

    Raises:
        UserError: a tar can't be read, is compressed or cut off, there are no images, a link leaves some out, or,
            unless ``flat``, a class has none, some lie beside the classes, or it holds the parts of a data set rather
            than classes.
    """

    native_size = 256
    test_set = None

    def __init__(self, path: str, flat: bool = False) -> None:
        self.name = f"flat:{path}" if flat else path
        one = Path(path).is_file()
        if one and path.lower().endswith(COMPRESSED):
            raise UserError(
                f"`data={self.name}` is compressed, which forbids random access; uncompress it to a .tar first"
            )
        self.files = [Path(path)] if one else tars_in(Path(path))
        found: list[_Found] = []
        folders: set[str] = set()  # and tars, which classes are to be among
        for number, file in enumerate(self.files):
            with self._opened(file) as archive:
                if not flat and _has_labels_beside(archive):
                    raise UserError(f"`data={path}` holds WebDataset shards ({file}): give webdataset:{path}")
                found += [(name, number, *place) for name, *place in _images(archive, "" if one else file.stem)]
                folders |= _folders(archive) if one else {file.stem}
        if not found:
            raise UserError(f"`data={self.name}` has no images ({', '.join(EXTENSIONS)} are looked for)")
        if not one:
            check_none_beside(sorted(name for name in os.listdir(path) if is_image_name(name)), path, None)
        if not flat:
            found = _from_classes_on(found, folders, path)
        images = [(ONE_CLASS if flat else os.fsdecode(image[0].partition(b"/")[0]), *image) for image in found]
        images.sort(key=lambda image: image[:2])
        self.classes = sorted({image[0] for image in images})
        check_class_names(self.classes, path)
        number_of = {name: number for number, name in enumerate(self.classes)}
        self.labels = np.array([number_of[image[0]] for image in images], dtype=np.int64)
        self.names = np.array([image[1] for image in images], dtype=np.bytes_)
        self.places = np.array([image[2:] for image in images], dtype=np.int64)
        self._real_files = [os.path.realpath(file) for file in self.files]
        self._descriptors: dict[tuple[int, int], int] = {}

    @contextlib.contextmanager
    def _opened(self, file: Path) -> Iterator[tarfile.TarFile]:
        """One of the files, open; what fails while it is used becomes a UserError that names it."""
        try:
            with tarfile.open(file, "r:") as archive:
                yield archive
        except tarfile.TarError as error:
            raise UserError(
                f"`data={self.name}`: {file} can't be read as an uncompressed tar ({error}); unzip or download it again"
            ) from error
        except OSError as error:
            raise UserError(f"`data={self.name}`: {file} can't be read: {error.strerror}") from error

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_descriptors": {}}

    def read(self, index: int) -> Image.Image:
        return Image.open(io.BytesIO(self._bytes(index)))

    def _bytes(self, index: int) -> bytes:
        file, offset, size = (int(value) for value in self.places[index])
        key = (os.getpid(), file)
        if key not in self._descriptors:
            self._descriptors[key] = os.open(self.files[file], os.O_RDONLY)
        return os.pread(self._descriptors[key], size, offset)

    def describe(self, index: int) -> str:
        return f"{os.fsdecode(bytes(self.names[index]))} in {self.files[int(self.places[index, 0])]}"

    def place(self, index: int) -> str:
        file, offset, _ = self.places[index]
        return f"{self._real_files[file]} at {offset}"

    def fingerprint(self) -> str:
        return hash_names((bytes(name) for name in self.names), self.labels)

    def source_files(self) -> Iterable[Path]:
        return self.files

    def contents(self) -> str:
        return hash_contents(self, self.places[:, 2], self._bytes)


def _has_labels_beside(archive: tarfile.TarFile) -> bool:
    """Whether labels lie beside the images, under their names, as in WebDataset's shards."""
    names = [member.name.lower() for member in files_in(archive)]
    images = {name.rpartition(".")[0] for name in names if name.endswith(EXTENSIONS)}
    return any(name.endswith(".cls") or (name.endswith(".json") and name[:-5] in images) for name in names)


def _images(archive: tarfile.TarFile, folder: str = "") -> Iterator[tuple[bytes, int, int]]:
    """(name, offset, size in bytes) of the images in a tar and in the tars inside it, which count as folders.

    Args:
        archive: the tar.
        folder: what it counts as itself; its names begin with it.
    """
    for member in files_in(archive, WANTED):
        name = posixpath.join(folder, member.name)
        if name.lower().endswith(".tar"):
            label = f"{archive.name}/{member.name}"  # for messages
            with tarfile.open(label, fileobj=archive.extractfile(member), mode="r:") as inner:
                for image in files_in(inner, EXTENSIONS):
                    inside = posixpath.join(name[: -len(".tar")], posixpath.basename(image.name))
                    yield os.fsencode(inside), member.offset_data + image.offset_data, image.size
        else:
            yield os.fsencode(name), member.offset_data, member.size


def _folders(archive: tarfile.TarFile) -> set[str]:
    """The folders of a tar and the tars inside it, these without their ending; what is hidden left out."""
    tars = {member.name[: -len(".tar")] for member in files_in(archive, (".tar",))}
    folders = {member.name for member in archive.getmembers() if member.isdir()}
    return tars | {name for name in folders if not _is_hidden(name)}


def _from_classes_on(found: list[_Found], folders: set[str], path: str) -> list[_Found]:
    """The images with names that begin with their class; folders around the classes are left out of them.

    Args:
        found: images under their names in the data set.
        folders: those of the data set.
        path: what it is given as, for messages.

    Raises:
        UserError: images are in no class, a class has none, or the folders are parts of a data set.
    """
    beside = sorted(os.fsdecode(name) for name, *_ in found if b"/" not in name)
    if len(beside) == len(found):
        raise UserError(
            f"`data={path}`: no images in class folders or class tars inside; give flat:{path}, which takes all images "
            f"as one class, or, if these are WebDataset shards, webdataset:{path}"
        )
    check_none_beside(beside, path, f"flat:{path}")
    prefix = wrapping_folders((name for name, *_ in found), path)
    found = [(name[len(prefix) :], *place) for name, *place in found]
    check_none_empty(folders, os.fsdecode(prefix), {os.fsdecode(name.partition(b"/")[0]) for name, *_ in found}, path)
    return found


def files_in(archive: tarfile.TarFile, endings: tuple[str, ...] = ("",)) -> Iterator[tarfile.TarInfo]:
    """The files of a tar with one of the ``endings``, what is hidden left out, their names without a leading ``./``.

    Links to files in the tar are the files that they lead to, under their own names. Of several files of one name, as
    ``tar -r`` leaves them, there is the last, which unpacking leaves.

    Raises:
        tarfile.ReadError: the tar is cut off, or a header in it is damaged: tarfile itself takes the edge of a member,
            and what is no header, for the end, which two blocks of zeros mark.
        UserError: a link leaves images out.
    """
    members = archive.getmembers()
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it has no end")
    for member in members:
        member.name = posixpath.normpath(member.name).lstrip("/")
    if any(map(_is_link, members)):
        _follow_links(members, archive.name)
    last = {member.name: member for member in members if member.isfile()}
    for member in last.values():
        if not _is_hidden(member.name) and member.name.lower().endswith(endings):
            yield member


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part != ".." for part in name.split("/"))


def _is_link(member: tarfile.TarInfo) -> bool:
    return member.islnk() or member.issym()


def _follow_links(members: list[tarfile.TarInfo], tar: str) -> None:
    """Make links to files into these files, in place: GNU tar stores the second name of a file as a hard link.

    Raises:
        UserError: a link that is named as an image or as a class's tar leads to no file in the tar, or another to a
            folder of such, or stands beside the classes like one of them: images would be left out. What is hidden, or
            leads elsewhere under another name, may.
    """
    files = {member.name: member for member in members if member.isfile()}
    links: dict[str, tarfile.TarInfo] = {}
    for member in filter(_is_link, members):
        if member.name not in files:  # GNU tar, given a file twice, stores the second as a hard link to itself
            links.setdefault(member.name, member)
    targets = {}
    for name, link in links.items():
        folder = posixpath.dirname(name) if link.issym() else ""  # a hard link's target is from the top
        targets[name] = posixpath.normpath(posixpath.join(folder, link.linkname)).lstrip("/")
    ends = {name: _end_of_links(name, targets) for name in links}
    left = [name for name in links if ends[name] not in files and not _is_hidden(name)]
    folders = _folders_of_images(members) if left else set()
    around = {posixpath.dirname(folder) for folder in folders - {"."}}
    for name in left:
        in_folder = ends[name] in folders
        like_a_class = not posixpath.splitext(name)[1] and posixpath.dirname(name) in around
        if in_folder or like_a_class or name.lower().endswith(WANTED):
            what = "a folder, whose images would be left out" if in_folder else "which is no file in the tar"
            raise UserError(
                f"{tar}: the link {name} leads to {links[name].linkname}, {what}; make the tar without it, or with "
                f"{'-h' if links[name].issym() else '--hard-dereference'}, which stores what is there"
            )
    for name, link in links.items():
        if file := files.get(ends[name]):
            link.type, link.size, link.offset_data = tarfile.REGTYPE, file.size, file.offset_data


def _end_of_links(name: str, targets: dict[str, str]) -> str:
    """Where a name leads, if any beginning of it may be a link; where links go in circles, one of them."""
    for _ in range(40):  # as many as Linux follows
        parts = name.split("/")
        starts = ("/".join(parts[:count]) for count in range(1, len(parts) + 1))
        link = next((start for start in starts if start in targets), None)
        if link is None:
            break
        name = posixpath.normpath(targets[link] + name[len(link) :])
    return name


def _folders_of_images(members: list[tarfile.TarInfo]) -> set[str]:
    """All folders, at any depth and "." among them, that hold images or tars."""
    folders: set[str] = set()
    for member in members:
        name = member.name if member.name.lower().endswith(WANTED) and not member.isdir() else ""
        while name and (name := posixpath.dirname(name)) not in folders:
            folders.add(name)
    return {name or "." for name in folders}
