"""Writes what the random kills have shown into docs/reliability.md.

python benchmarks/faults/page.py runs/kills.json runs/resume_callback.json runs/resume_averager.json

The first is from kills.py, the others are from resume_kills.py.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from kills import summary

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


def ranks_killed(result: dict[str, Any]) -> list[str]:
    """A row for each place, and one for all."""
    lines = ["| place of the first kill | jobs | good | recovery, median (ms) | most (ms) |", "|---|---|---|---|---|"]
    for row in summary(result["rows"]):
        median, most = (1e3 * row[name] for name in ("recovery_median_s", "recovery_max_s"))
        lines.append(f"| {row['place']} | {row['jobs']} | {row['good']} | {median:.0f} | {most:.0f} |")
    return lines


def jobs_killed(results: list[dict[str, Any]]) -> list[str]:
    """A row for each front end."""
    lines = [
        "| front end | ranks | kills | of them in the middle of writing | jobs | in the same bits |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        half, exact = (
            result[name] for name in ("kills that left a half checkpoint", "jobs that ended in the same bits")
        )
        options = " ".join(each for each in result["training"] if not each.startswith(("rounds", "pause", "wide")))
        front = f"{result['front']} {options}".strip()
        lines.append(f"| {front} | {result['ranks']} | {result['kills']} | {half} | {result['jobs']} | {exact} |")
    return lines


def put(page: str, name: str, lines: list[str]) -> str:
    """The page with these lines between the marks of that name."""
    pattern = rf"(?s)(<!-- {name}: .*? -->\n).*?(\n<!-- /{name} -->)"
    page, found = re.subn(pattern, lambda marks: marks[1] + "\n".join(lines) + marks[2], page)
    assert found == 1, name
    return page


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=Path)
    parser.add_argument("resumed", type=Path, nargs="+")
    chosen = parser.parse_args()
    page = put(PAGE.read_text(), "kills.py", ranks_killed(json.loads(chosen.kills.read_text())))
    results = [json.loads(path.read_text()) for path in chosen.resumed]
    PAGE.write_text(put(page, "resume_kills.py", jobs_killed(results)))


if __name__ == "__main__":
    main()
