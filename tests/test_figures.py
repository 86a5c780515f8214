"""No number in README or docs is another than in docs/figures.json, and all that was measured is shown."""

import json
import sys

import pytest

from . import launched

sys.path.insert(0, str(launched.ROOT / "benchmarks"))
import figures


@pytest.mark.parametrize("page", figures.pages(), ids=lambda page: page.name)
def test_tables_are_what_was_measured(page):
    measured = figures.known()
    for name, text in figures.tables(page).items():
        assert text == figures.table(name, measured[name]), f"{page}: {name}. Run benchmarks/all --write"


def test_all_that_was_measured_is_shown_with_its_commands():
    shown = {}
    for page in figures.pages():
        for name in figures.tables(page):
            shown[name] = page.read_text()
    assert set(shown) == set(figures.known()) == set(figures.FIGURES)
    for name, page in shown.items():
        for command in figures.FIGURES[name].commands:
            assert f"\n{command}\n" in page, name


def test_a_table_has_the_figures():
    rows = [
        {"model": "tiny", "ranks": 2, "sync_s": 0.01234, "ratio_raw": -0.5},
        {"model": "large", "ranks": 4, "sync_s": None},
    ]
    machine = {"date": "2026-01-02", "cores": 2, "python": "3.11.1", "versions": {"keras": "3.9", "numpy": "2"}}
    lines = figures.table("sync_cost", {"commit": "abc", "machine": machine, "rows": rows}).splitlines()
    assert lines[0] == "| model | ranks | sync (ms) | ratio raw |"
    assert lines[2:4] == ["| tiny | 2 | 12.3 | −0.5 |", "| large | 4 | – | – |"]
    assert lines[-1] == "Commit abc, 2026-01-02, 2 cores; Python 3.11.1, keras 3.9."


def test_the_file_holds_only_what_is_in_tables():
    for name, measured in json.loads(figures.FILE.read_text()).items():
        for row in measured["rows"]:
            assert set(row) <= set(figures.FIGURES[name].columns)
