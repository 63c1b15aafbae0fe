"""Whole-file writing, keyed randomness, and how mistakes are reported."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from sit.utils.errors import UserError, entry_point
from sit.utils.files import LOCK, atomic_folder, atomic_write, new_output, refuse_used, replaced_folder
from sit.utils.random import generator, key, randn


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.fixture
def events(tmp_path, monkeypatch) -> list[tuple[str, ...]]:
    """What is flushed and renamed, in order: names within tmp_path, of a file that is flushed also its text."""
    found: list[tuple[str, ...]] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def short(path: str | os.PathLike) -> str:
        return re.sub(rf"(\w+-)?{os.getpid()}", "PID", os.path.relpath(path, tmp_path))

    def watch_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        found.append(("fsync", short(path), path.read_text()) if path.is_file() else ("fsync", short(path)))
        fsync(descriptor)

    def watch(original):
        def move(source, target):
            found.append(("rename", short(source), short(target)))
            original(source, target)

        return move

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch(replace))
    monkeypatch.setattr(os, "rename", watch(rename))
    return found


def test_a_file_is_flushed_before_it_takes_its_place_and_its_folder_after(tmp_path, events):
    with atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("all of it")
    assert events == [
        ("fsync", ".file.PID.tmp", "all of it"),
        ("rename", ".file.PID.tmp", "file"),
        ("fsync", "."),
    ]


def test_a_folders_files_are_flushed_before_it_takes_its_place_and_its_parent_after(tmp_path, events):
    with atomic_folder(tmp_path / "a") as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "one").write_text("1")
        (temporary / "two").write_text("2")
    *flushed, moved, last = events
    assert sorted(flushed) == [
        ("fsync", ".a.PID.tmp"),
        ("fsync", ".a.PID.tmp/deep"),
        ("fsync", ".a.PID.tmp/deep/one", "1"),
        ("fsync", ".a.PID.tmp/two", "2"),
    ]
    assert moved == ("rename", ".a.PID.tmp", "a") and last == ("fsync", ".")
    events.clear()
    with replaced_folder(tmp_path / "a") as temporary:
        (temporary / "new").write_text("3")
    assert events[:2] in (
        [("fsync", "..a.PID.new.PID.tmp/new", "3"), ("fsync", "..a.PID.new.PID.tmp")],
        [("fsync", "..a.PID.new.PID.tmp"), ("fsync", "..a.PID.new.PID.tmp/new", "3")],
    )
    assert events[2:] == [
        ("rename", "..a.PID.new.PID.tmp", ".a.PID.new"),
        ("fsync", "."),
        ("rename", "a", ".a.PID.old"),
        ("rename", ".a.PID.new", "a"),
        ("fsync", "."),
    ]


def test_a_failed_folder_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "inside").write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_folder_takes_the_place_of_an_empty_one_alone(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    with atomic_folder(path) as temporary:
        (temporary / "inside").write_text("whole")
    assert (path / "inside").read_text() == "whole"
    (tmp_path / "empty").mkdir()
    for name, target in (("link", "empty"), ("dangling", "nowhere")):
        (tmp_path / name).symlink_to(target)
        with atomic_folder(tmp_path / name) as temporary:
            (temporary / "inside").write_text(name)
        assert (tmp_path / name).is_symlink() and (tmp_path / target / "inside").read_text() == name
    for there in (path, path / "inside"):
        with pytest.raises(UserError, match="exists already; it is not overwritten"), atomic_folder(there):
            pass
    assert (path / "inside").read_text() == "whole" and not list(tmp_path.glob(".*"))


def test_a_folder_is_replaced_only_by_a_whole_one(tmp_path, monkeypatch):
    path = tmp_path / "folder"

    def write(text: str) -> None:
        with replaced_folder(path) as temporary:
            (temporary / text).write_text(text)
            if path.exists():
                assert [entry.name for entry in path.iterdir()] == ["old"]
            if text == "bad":
                raise RuntimeError

    def there() -> list[list[str]]:
        return [[entry.name for entry in folder.iterdir()] for folder in tmp_path.iterdir()]

    write("old")
    with pytest.raises(RuntimeError):
        write("bad")
    assert there() == [["old"]]
    monkeypatch.chdir(path)
    write("new")
    assert there() == [["new"]]


def test_a_replaced_folder_is_put_back_if_the_new_one_cant_take_its_place(tmp_path, monkeypatch):
    path, rename = tmp_path / "folder", os.rename
    path.mkdir()
    (path / "old").write_text("old")

    def refuse(source, target):
        if str(source).endswith(".new"):
            raise OSError(errno.EROFS, "refused")
        rename(source, target)

    monkeypatch.setattr("os.rename", refuse)
    with pytest.raises(UserError, match="can't be written"), replaced_folder(path) as temporary:
        (temporary / "new").write_text("new")
    assert [entry.name for entry in path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    "number, words",
    [(errno.ENOSPC, "disk is full"), (errno.EROFS, "can't be written"), (errno.ENOTDIR, "a file stands")],
)
def test_the_systems_refusals_become_one_line(tmp_path, number, words):
    with pytest.raises(UserError, match=words), atomic_write(tmp_path / "file"):
        raise OSError(number, "refused")


def test_an_output_folder_in_use_is_refused(tmp_path):
    assert new_output(tmp_path / "new" / "deep", "out").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="`out=.*` exists and is not empty"):
        new_output(tmp_path, "out")
    with pytest.raises(UserError, match="`out=.*file` is a file; choose a new folder"):
        new_output(tmp_path / "file", "out")
    (tmp_path / "new" / LOCK).write_text("")
    (tmp_path / "new" / "deep").rmdir()
    refuse_used(tmp_path / "new", "out")
    with pytest.raises(UserError, match="`out=.*new` exists and is not empty"):
        refuse_used(tmp_path / "new", "out", but=None)
    with pytest.raises(UserError, match="a file stands"):
        new_output(tmp_path / "file" / "inside", "out")


def test_an_entry_point_prints_one_line_and_exits_2(capsys):
    @entry_point
    def main():
        raise UserError("a\n  b")

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and capsys.readouterr().err == "error: a b\n"


def test_streams_are_named_not_ordered():
    rows = randn((3, 2), [generator(7, "noise", i) for i in range(4)])
    alone = randn((3, 2), [generator(7, "noise", 2)])
    assert torch.equal(rows[2:3], alone)
    assert len({key(seed, name, i) for seed in range(3) for name in "ab" for i in range(50)}) == 300


def test_streams_are_standard_normal_and_independent():
    rows = randn((4000,), [generator(0, "noise", i) for i in range(20)]).double().numpy()
    assert stats.kstest(rows.ravel(), "norm").pvalue > 1e-3
    off_diagonal = np.corrcoef(rows)[~np.eye(20, dtype=bool)]
    assert abs(off_diagonal).max() < 5 / 4000**0.5
