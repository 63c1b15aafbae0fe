"""Programs that are timed in a process of their own, where what is compared is a matter of a whole process."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Literal

from sit.utils.errors import UserError


def serve(asked: Connection, make: Callable[..., Mapping[str, Callable[[], object]]], arguments: tuple) -> None:
    """Make the programs, run what is asked for by name, and say when it is done."""
    try:
        programs = make(*arguments)
    except UserError as error:
        asked.send(str(error))
        return
    asked.send("")
    with contextlib.suppress(EOFError):
        while True:
            programs[asked.recv()]()
            asked.send("")


@contextlib.contextmanager
def process_with(
    make: Callable[..., Mapping[str, Callable[[], object]]],
    *arguments: object,
    start: Literal["fork", "spawn"] = "fork",
    unset: tuple[str, ...] = (),
) -> Iterator[Callable[[str], None]]:
    """A function that has another process run a program by its name, and waits for it.

    Args:
        make: a function of a module, that makes the programs there, by name; it may raise UserError.
        arguments: what it is called with.
        start: ``spawn`` is a new interpreter, which loads its libraries itself.
        unset: variables of the environment that it is to start without.
    """
    context = multiprocessing.get_context(start)
    ours, its = context.Pipe()
    other = context.Process(target=serve, args=(its, make, arguments), daemon=True)
    kept = {name: os.environ.pop(name) for name in unset if name in os.environ}
    try:
        other.start()
    finally:
        os.environ.update(kept)
    its.close()

    def answer() -> None:
        if said := ours.recv():
            raise UserError(said)

    def run(name: str) -> None:
        ours.send(name)
        answer()

    try:
        answer()
        yield run
    finally:
        other.kill()
        other.join()
