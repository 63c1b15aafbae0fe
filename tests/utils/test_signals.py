"""How programs end on signals: small ones here, which import nothing heavy; the commands are in test_ends.py."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAD = """
import os, signal, sys, time
from sit.utils.signals import TRAINING, deferred_signals, ended_by_signals
def wait():
    print("ready", flush=True)
    time.sleep(60)
def wait_in_a_call():  # no handler runs in the main thread while it does
    import ctypes
    print("ready", flush=True)
    libc = ctypes.CDLL(None)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        libc.sleep(60)  # one call, as a handler would run between two
"""


def end_of(program: str, *numbers: int, pause: float = 0.5) -> tuple[int, str, float]:
    """Exit status, what it said, and seconds until the end, of a program that gets signals once it is ready.

    The pause between two is long, as two of one kind that are not heard in between are one.
    """
    text = HEAD + textwrap.dedent(program)
    process = subprocess.Popen(
        [sys.executable, "-c", text], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    for position, number in enumerate(numbers):
        time.sleep(pause * (position > 0))
        process.send_signal(number)
    out, err = process.communicate(timeout=30)
    return process.returncode, out + err, time.monotonic() - began


@pytest.mark.parametrize(
    "number, status", [(signal.SIGTERM, 85), (signal.SIGUSR1, 85), (signal.SIGINT, 130)], ids=["TERM", "USR1", "INT"]
)
def test_the_block_unwinds_and_one_line_says_why(number, status):
    found = end_of(
        """
        with ended_by_signals(TRAINING, "go on"):
            try:
                wait()
            finally:
                print("unwound")
        """,
        number,
    )
    assert found[:2] == (status, f"unwound\nended by {number.name}: go on\n")


def test_an_error_that_a_library_makes_of_it_is_told_as_what_it_is():
    found = end_of(
        """
        with ended_by_signals(TRAINING, "go on"):
            try:
                wait()
            except BaseException as error:
                raise ImportError("half imported") from error
        """,
        signal.SIGUSR1,
    )
    assert found[:2] == (85, "ended by SIGUSR1: go on\n")


def test_an_error_without_a_signal_stays_what_it_is():
    status, said, _ = end_of("""
        with ended_by_signals(TRAINING, "go on"):
            print("ready", flush=True)
            raise ImportError("half imported")
        """)
    assert status == 1 and said.endswith("ImportError: half imported\n")


def test_a_program_that_swallows_it_ends_all_the_same():
    status, said, seconds = end_of(
        """
        with ended_by_signals(TRAINING, "go on", grace=3):  # long enough to swallow it on a busy machine
            while True:
                try:
                    wait()
                except BaseException:
                    print("swallowed", flush=True)
        """,
        signal.SIGTERM,
    )
    assert status == 85 and "swallowed" in said and said.endswith("ended by SIGTERM\n") and seconds < 25


def test_a_call_that_waits_is_waited_for_no_longer_than_the_grace():
    program = """
    signal.pthread_sigmask(signal.SIG_BLOCK, TRAINING)  # of the main thread: another one hears them
    with ended_by_signals(TRAINING, "go on", grace=0.3):
        import threading
        threading.Thread(
            target=lambda: (signal.pthread_sigmask(signal.SIG_UNBLOCK, TRAINING), time.sleep(60)), daemon=True
        ).start()
        wait_in_a_call()
    """
    status, said, seconds = end_of(program, signal.SIGUSR1)
    assert (status, said) == (85, "ended by SIGUSR1\n") and seconds < 25
    status, said, seconds = end_of(program.replace("0.3", "50"), signal.SIGINT, signal.SIGINT)
    assert (status, said) == (130, "") and seconds < 25, "the second one at once"


def test_deferred_signals_wait_for_the_block_and_the_second_interrupt_does_not():
    program = """
    with ended_by_signals(TRAINING, "go on", grace=0.1):
        with deferred_signals(TRAINING) as came:
            print("ready", flush=True)
            until = time.monotonic() + 20
            while time.monotonic() < until and not came:
                time.sleep(0.05)
            time.sleep(LONGER)
            print("saved", came[0] == signal.SIGINT, flush=True)
            sys.exit(TRAINING[came[0]])
    """
    shortly = program.replace("LONGER", "0.3")  # longer than the grace
    assert end_of(shortly, signal.SIGINT)[:2] == (130, "saved True\n")
    assert end_of(shortly, signal.SIGTERM)[:2] == (85, "saved False\n")
    status, said, seconds = end_of(program.replace("LONGER", "60"), signal.SIGINT, signal.SIGINT)
    assert (status, said) == (130, "") and seconds < 25


def test_what_was_swallowed_before_is_among_the_deferred():
    found = end_of(
        """
        with ended_by_signals(TRAINING, "go on"):
            try:
                wait()
            except BaseException:
                pass
            with deferred_signals(TRAINING) as came:
                print(came == [signal.SIGTERM])
        """,
        signal.SIGTERM,
    )
    assert found[:2] == (0, "True\n")


def test_whoever_deferred_a_signal_tells_the_end_alone():
    found = end_of(
        """
        with ended_by_signals(TRAINING, "nothing was saved"):
            try:
                wait()
            except BaseException:
                pass
            with deferred_signals(TRAINING) as came:
                print("saved", flush=True)
                raise SystemExit(TRAINING[came[0]])
        """,
        signal.SIGTERM,
    )
    assert found[:2] == (85, "saved\n")


def test_a_childs_signals_are_its_own_and_the_end_is_undisturbed():
    found = end_of(
        """
        with ended_by_signals(TRAINING, "go on", grace=0.1):
            here, there = os.pipe()
            child = os.fork()
            if not child:
                os.write(there, b"x")  # a signal before that may be lost: Python forgets what was pending
                time.sleep(60)
            os.read(here, 1)
            os.kill(child, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
            time.sleep(0.3)
        wait_a_second = time.monotonic() + 1
        print("ready", flush=True)
        while time.monotonic() < wait_a_second:
            pass
        print("ended")
        """,
        signal.SIGTERM,
        signal.SIGUSR1,
    )
    assert found[:2] == (0, "ended\n")
