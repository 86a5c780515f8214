"""No number in README or docs is another than in docs/figures.json or docs/figures, and all that was measured is shown."""

import json
import sys

import numpy as np
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


def test_tables_go_between_their_own_marks_and_nowhere_else(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("".join(f"# {name}\n<!-- figures: {name} -->\n<!-- /figures -->\n" for name in "abc"))
    row = {"machine": {"date": "", "cores": 2, "python": "", "versions": {}}, "commit": "", "rows": [{"ranks": 2}]}
    monkeypatch.setattr(figures, "pages", lambda: [page])
    monkeypatch.setattr(figures, "known", lambda: {"a": row, "b": row})
    monkeypatch.setattr(figures, "FIGURES", dict.fromkeys("ab", figures.Figure((), ("ranks",))))
    for _ in range(2):  # the second time over what stands there
        figures.write()
    assert [line for line in page.read_text().splitlines() if line.startswith("#")] == ["# a", "# b", "# c"]
    assert page.read_text().count("| 2 |") == 2
    assert list(figures.tables(page)) == ["a", "b", "c"]


def test_the_file_holds_only_what_is_in_tables():
    for name, measured in json.loads(figures.FILE.read_text()).items():
        for row in measured["rows"]:
            assert set(row) <= set(figures.FIGURES[name].columns)


def test_the_curves_on_cifar_are_those_of_the_records():
    """Loss and accuracy after these epochs, the median of averaging, and how long epochs took."""
    lines = [line.strip("| ").split(" | ") for line in (figures.ROOT / "docs" / "papers.md").read_text().splitlines()]
    said = {(line[0], line[1].split()[0]): line[2:] for line in lines if len(line) == 6 and line[-1].endswith(" s")}
    records = sorted((figures.ROOT / "docs" / "figures" / "cifar10").glob("*.jsonl"))
    assert len(said) == len(records) > 0
    for record in records:
        rows = [json.loads(line) for line in record.read_text().splitlines()]
        assert [row["epoch"] for row in rows] == list(range(1, 16))
        shown = [rows[epoch - 1] for epoch in (1, 5, 8, 12, 15)]
        averaging = [row["averaging %"] for row in rows]
        took = np.diff([0, *(row["seconds"] for row in rows)])
        assert said[str(rows[0]["ranks"]), str(rows[0]["I"])] == [
            ", ".join(f"{row['loss']:.2f}" for row in shown),
            ", ".join(f"{row['test accuracy']:.3f}" for row in shown),
            "–" if None in averaging else f"{np.median(averaging):.2f} %",
            ", ".join(f"{function(took):.0f} s" for function in (np.min, np.median, np.max)),
        ]
