"""Other programs' flags: each is told with one of ours that is there and takes the value, and the page lists it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_commands_in_docs import KINDS

from sit.utils.errors import UserError
from sit.utils.flags import command_of, put_plainly
from sit.utils.habits import HABITS, PROGRAMS, Meant

PAGE = Path(__file__).parent.parent / "docs" / "compatibility.md"
COMMANDS = {name: command_of(kind, name.split()[1:]) for name, kind in KINDS.items()}
PUBLISHED = {
    "SiT, DiT, REPA": "--num-sampling-steps --path-type --data-path --results-dir --global-batch-size "
    "--num-fid-samples --epochs --ckpt-every --global-seed --num-workers --sample-dir "
    "--sampling-method --per-proc-batch-size --wandb",
    "diffusers": "--train_data_dir --max_train_steps --train_batch_size --guidance_scale --num_inference_steps "
    "--output_dir --resume_from_checkpoint --checkpointing_steps --lr_warmup_steps --report_to --resolution",
    "timm": "--lr -b -j --amp --clip-grad --opt --sched --model-ema-decay --data-dir --experiment --log-interval",
}
"""some of each program's flags as its own --help spells them"""


def here(meanings: tuple[Meant, ...]) -> str:
    """What the page says of a flag's meanings here."""
    parts = []
    for meant in meanings:
        flags = " and ".join(f"`--{flag}`" for flag in meant.flags)
        parts.append(f"{flags} ({meant.note})" if flags and meant.note else flags or meant.note)
    return "; ".join(parts)


def rows() -> list[str]:
    """The page's table, made of what the commands say."""
    found: dict[str, dict[str, list[str]]] = {}
    for program, table in PROGRAMS.items():
        for name, meanings in table.items():
            said = name.replace("-", "_") if program == "diffusers" else name
            flag = f"`-{said}`" if len(name) == 1 else f"`--{said}`"
            found.setdefault(here(meanings), {}).setdefault(program, []).append(flag)
    head = ["| " + " | ".join([*PROGRAMS, "here"]) + " |", "|" + "---|" * (len(PROGRAMS) + 1)]
    lines = []
    for ours, theirs in sorted(found.items(), key=lambda item: item[0].strip("`-").lower()):
        cells = [", ".join(theirs.get(program, [])) for program in PROGRAMS]
        lines.append("| " + " | ".join([*cells, ours]) + " |")
    return [*head, *lines]


def test_the_page_has_the_table_that_the_commands_have():
    text = PAGE.read_text()
    start = text.index("<!-- flags -->\n") + len("<!-- flags -->\n")
    assert text[start:].split("\n\n")[0].splitlines() == rows()


@pytest.mark.parametrize("name", HABITS)
def test_another_programs_flag_is_told_with_ours(name):
    """In each command that lacks it and has ours; and ours, given as the message has it, is one that it takes."""
    told = []
    for command in COMMANDS.values():
        if command.flag_of(name) is not None:
            continue
        with pytest.raises(UserError) as error:
            put_plainly([f"--{name}", "1"], command)
        message = str(error.value)
        for meant in HABITS[name]:
            for flag in meant.flags:
                if re.search(rf" --{flag}(?![\w-])", message):
                    flag, *value = flag.split()
                    known = command.flag_of(flag)
                    assert known is not None and (not known.choices or not value or value[0] in known.choices)
                    told.append(flag)
    meanings = HABITS[name]
    wanted = {meant.flags[0].split()[0] for meant in meanings if meant.flags}
    assert set(told) == wanted, "each meaning is the answer of some command"


@pytest.mark.parametrize("program", PUBLISHED)
def test_what_people_type_most_is_known(program):
    for flag in PUBLISHED[program].split():
        name = flag.lstrip("-").replace("_", "-")
        assert name in HABITS or any(command.flag_of(name) for command in COMMANDS.values()), flag
        if name not in KINDS and COMMANDS["sample"].flag_of(name) is None:
            with pytest.raises(UserError, match="there is no"):
                put_plainly([flag, "3"], COMMANDS["sample"])


def test_the_longest_message_is_one_sentence_of_one_line():
    for name in HABITS:
        for command in COMMANDS.values():
            if command.flag_of(name) is None:
                with pytest.raises(UserError) as error:
                    put_plainly([f"--{name}"], command)
                assert "\n" not in str(error.value) and len(str(error.value)) < 160
