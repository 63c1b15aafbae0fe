"""How mistakes are told: arguments as flags, in one line, and the first line of others' errors."""

from __future__ import annotations

import pytest

from sit.utils.errors import UserError, entry_point, first_line, with_flags


@pytest.mark.parametrize(
    "message, printed",
    [
        ("`batch_size` must be at least 1, not 0", "--batch-size must be at least 1, not 0"),
        ("`data=nowhere`: no such folder", "--data nowhere: no such folder"),
        ("`data=a folder=b/c d`: no such folder", "--data a folder=b/c d: no such folder"),
        ("`ckpt` and `image_size=32 64` exclude each other", "--ckpt and --image-size 32 64 exclude each other"),
        ("`resume=` names nothing", "--resume names nothing"),
        ("leave out `compile=True`, or use `tf32=False`", "leave out --compile, or use --no-tf32"),
        # what no argument can be called stays: paths, attributes, calls, classes, commands
        ("`/tmp/run=1` and `runs/a` hold `torch.compile`", "`/tmp/run=1` and `runs/a` hold `torch.compile`"),
        ("`SiT(depth=2)`, `Image`, `pip install x`", "`SiT(depth=2)`, `Image`, `pip install x`"),
        ("one line\n  and another", "one line and another"),
    ],
)
def test_arguments_in_backquotes_are_printed_as_flags(message, printed):
    assert with_flags(message) == printed


def test_a_command_tells_a_mistake_in_one_line_and_an_interruption_in_a_word(capsys):
    @entry_point
    def main(error: BaseException) -> None:
        raise error

    for error, status, said in (
        (UserError("`batch_size=0`\n is too small"), 2, "error: --batch-size 0 is too small\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(error)
        assert (stop.value.code, capsys.readouterr().err) == (status, said)
    with pytest.raises(ValueError, match="not the user's"):  # only a UserError is the user's
        main(ValueError("not the user's"))


def test_the_first_line_of_an_error():
    assert first_line(RuntimeError("\n  first  \nsecond")) == "first"
    assert first_line(KeyError()) == "KeyError"


def test_a_file_that_the_system_refuses_is_one_line_wherever_it_is_met(tmp_path, capsys):
    """And a file that the program itself should have had is still a traceback."""
    deep = tmp_path
    for _ in range(3):
        deep = deep / ("x" * 300)

    @entry_point
    def reads_what_can_not_be(path):
        open(path)  # noqa: SIM115

    with pytest.raises(SystemExit) as stop:
        reads_what_can_not_be(deep)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {deep}: File name too long\n"
    with pytest.raises(FileNotFoundError):
        reads_what_can_not_be(tmp_path / "nowhere")
