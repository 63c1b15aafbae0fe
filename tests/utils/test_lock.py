"""A folder is held by one process at a time, and by none that has ended."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from processes import holder_of

from sit.utils.errors import UserError
from sit.utils.files import LOCK
from sit.utils.lock import locked


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    with holder_of(tmp_path) as process:
        yield process


def test_the_holder_is_named(holder, tmp_path):
    with pytest.raises(UserError, match=f"`output_dir={tmp_path}` is in use by process {holder.pid} on .+ since 20"):
        with locked(tmp_path, "output_dir"):
            raise AssertionError("it is held twice")
    assert (tmp_path / LOCK).is_file(), "who is refused must not remove it"


def test_a_killed_holder_holds_nothing(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with locked(tmp_path, "output_dir"):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_forked_child_holds_nothing(tmp_path):
    """DataLoader's workers may outlive a killed process for a while."""
    with locked(tmp_path, "output_dir"):
        child = os.fork()
        if not child:
            signal.pause()
    try:
        with holder_of(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_block_that_fails_lets_go(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), locked(tmp_path, "out"):
            raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_made_for_nothing_goes_again(tmp_path):
    for name, kept in (("empty", False), ("used", True)):
        with locked(tmp_path / name, "out"):
            if kept:
                (tmp_path / name / "result").touch()
        assert (tmp_path / name).exists() == kept


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc, where nobody can make a folder")
@pytest.mark.parametrize("folder", ["/proc/nowhere", "/proc/nowhere/deeper/still"])
@pytest.mark.parametrize("beside", [False, True])
def test_a_folder_that_can_not_be_made_is_named(folder, beside):
    with pytest.raises(UserError, match=f"{folder} can't be made there"), locked(folder, "out", beside=beside):
        raise AssertionError


def test_a_folder_that_is_yet_to_be_made_is_held_beside_its_place(tmp_path):
    """As sampling does; what a forked process meets is what another program does."""
    folder = tmp_path / "samples"
    with locked(folder, "out", beside=True):
        assert not folder.exists() and [path.name for path in tmp_path.iterdir()] == [".samples.lock"]
        child = os.fork()
        if child == 0:
            try:
                with locked(folder, "out", beside=True):
                    os._exit(1)
            except UserError as error:
                os._exit(0 if f"`out={folder}` is in use by process {os.getppid()} on" in str(error) else 2)
        assert os.waitpid(child, 0)[1] == 0
    assert not list(tmp_path.iterdir())
