"""The script that runs diffusers' tests: what it counts, and what it refuses. The tests themselves need a checkout."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import peers_diffusers
import pytest

from sit.utils.errors import UserError

REPORT = """<testsuites><testsuite>
<testcase classname="peers.TestModelATConv" name="test_a"/>
<testcase classname="peers.TestModelATConv" name="test_b"><failure message="no"/></testcase>
<testcase classname="peers.TestModelATConv" name="test_c"><error message="no"/></testcase>
<testcase classname="peers.TestPipeline" name="test_a"><skipped message="needs a GPU."/></testcase>
<testcase classname="peers.TestPipeline" name="test_b"><skipped message="needs a GPU."/></testcase>
</testsuite></testsuites>"""


def test_failures_and_errors_count_as_failed_and_skips_have_their_reasons():
    outcomes = peers_diffusers.outcomes_of(ElementTree.fromstring(REPORT))
    assert [one.result for one in outcomes] == ["passed", "failed", "failed", "skipped", "skipped"]
    rows = peers_diffusers.table(outcomes).splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells == [["ModelATConv", "1", "2", "0", ""], ["Pipeline", "0", "0", "2", "2: needs a GPU"]]


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(UserError, match="no checkout of diffusers"):
        peers_diffusers.run_tests(tmp_path, "")


@pytest.mark.slow
def test_a_failing_test_of_theirs_is_counted(tmp_path, monkeypatch):
    """With a checkout and cases that hold one test each way."""
    place = tmp_path / "tests" / "pipelines"
    place.mkdir(parents=True)
    (place / "test_pipelines_common.py").write_text("")
    cases = Path(tmp_path / "cases.py")
    cases.write_text(
        "import os\nclass TestOne:\n    def test_a(self): assert os.path.isdir(os.environ['DIFFUSERS_CHECKOUT'])\n"
        "    def test_b(self): assert False\n"
    )
    monkeypatch.setattr(peers_diffusers, "CASES", cases)
    outcomes = peers_diffusers.run_tests(tmp_path, "")
    assert [(one.group, one.test, one.result) for one in outcomes] == [
        ("TestOne", "test_a", "passed"),
        ("TestOne", "test_b", "failed"),
    ]
