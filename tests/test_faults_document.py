"""docs/reliability.md names only tests that exist, and all 21 faults."""

import re

from runs import ROOT


def test_every_test_that_the_document_names_exists():
    text = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    assert len(named) >= 40
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(), re.M), f"{file}::{test}"
    rows = re.findall(r"^\| (\d+) \|(.*)$", text, re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 22)) and all("::" in row for _, row in rows)


def test_the_published_counts_are_those_of_perfect_drills():
    """Every row of the table of kills: as many exact recoveries as kills."""
    text = (ROOT / "docs" / "reliability.md").read_text()
    rows = re.findall(r"^\| (lbm|stereo|moge|pi3|mvdiff) \| (\d+) \| (\d+) \|", text, re.M)
    assert len({name for name, *_ in rows}) == len(rows) >= 3
    assert all(int(kills) == int(exact) >= 10 for _, kills, exact in rows), rows
