"""diffusers' own test mixins on attention and ATConv networks, from a checkout of diffusers.

    DIFFUSERS_CHECKOUT=FOLDER python scripts/peers_diffusers.py --json docs/compatibility-diffusers.json

``peers_diffusers_cases.py`` adapts PipelineTesterMixin, ModelTesterMixin, MemoryTesterMixin and TrainingTesterMixin,
and tests the diffusers that is installed. Exits with 1 if one failed.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import tyro

from sit.utils.cli import one_line_errors
from sit.utils.device import pick_device
from sit.utils.errors import UserError, entry_point
from sit.utils.record import write_record
from sit.utils.tables import markdown_table

CASES = Path(__file__).parent / "peers_diffusers_cases.py"


@dataclass(frozen=True)
class Arguments:
    """Run diffusers' tests."""

    only: str = ""
    """only tests that this selects, as pytest's -k"""
    json: Path | None = None
    """file for the outcomes"""


@dataclass(frozen=True)
class Outcome:
    """What a test of a class came to: ``passed``, ``skipped`` or ``failed``, and why it was skipped."""

    group: str
    test: str
    result: str
    why: str = ""


def outcomes_of(report: ElementTree.Element) -> list[Outcome]:
    """The outcomes in pytest's report; an error before or after a test is a failure."""
    found = []
    for case in report.iter("testcase"):
        group, test = case.get("classname", "").rpartition(".")[2], case.get("name", "")
        if (skip := case.find("skipped")) is not None:
            found.append(Outcome(group, test, "skipped", skip.get("message", "")))
        else:
            failed = case.find("failure") is not None or case.find("error") is not None
            found.append(Outcome(group, test, "failed" if failed else "passed"))
    return found


def run_tests(checkout: Path, only: str) -> list[Outcome]:
    """Run the tests in a process of their own, whose settings are not this repository's.

    Raises:
        UserError: it is no checkout, or its tests can't be run.
    """
    if not (checkout / "tests" / "pipelines" / "test_pipelines_common.py").is_file():
        raise UserError(f"{checkout}: no checkout of diffusers, it has no tests/pipelines/test_pipelines_common.py")
    with tempfile.TemporaryDirectory() as folder:
        settings, report = Path(folder) / "pytest.ini", Path(folder) / "report.xml"
        settings.write_text("[pytest]\n")
        command = [sys.executable, "-m", "pytest", "-q", "-c", settings, "--rootdir", CASES.parent, "-W", "ignore"]
        command += ["-p", "no:cacheprovider", "--tb=short", f"--junitxml={report}", "-k", only, CASES]
        status = subprocess.run(command, env=os.environ | {"DIFFUSERS_CHECKOUT": str(checkout.resolve())}).returncode
        if status not in (0, 1):
            raise UserError(f"{checkout}: its tests can't be run, pytest ended with {status}")
        return outcomes_of(ElementTree.parse(report).getroot())


def table(outcomes: Iterable[Outcome]) -> str:
    """Passed, failed and skipped tests of each group, in Markdown, and how many were skipped for which reason."""
    rows = []
    for group in dict.fromkeys(one.group for one in outcomes):
        ours = [one for one in outcomes if one.group == group]
        counts = Counter(one.result for one in ours)
        reasons = Counter(one.why for one in ours if one.result == "skipped")
        why = "; ".join(f"{count}: {reason.rstrip('.')}" for reason, count in reasons.items())
        rows.append((group.removeprefix("Test"), *(counts[kind] for kind in ("passed", "failed", "skipped")), why))
    return markdown_table(("tests", "passed", "failed", "skipped", "why skipped"), rows, align="lrrrl")


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="scripts/peers_diffusers.py")
    if "DIFFUSERS_CHECKOUT" not in os.environ:
        raise UserError("set the environment variable DIFFUSERS_CHECKOUT to a folder with diffusers' repository")
    outcomes = run_tests(Path(os.environ["DIFFUSERS_CHECKOUT"]), arguments.only)
    print(table(outcomes))
    if arguments.json:
        figures = {"diffusers": version("diffusers"), "outcomes": [dataclasses.asdict(one) for one in outcomes]}
        write_record(arguments.json, pick_device(None), figures)
    raise SystemExit(any(one.result == "failed" for one in outcomes))


if __name__ == "__main__":
    main()
