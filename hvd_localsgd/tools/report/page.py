"""One HTML file with everything in it: nothing is fetched when it is looked at."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vl_convert

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
  body {{ font: 14px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2em auto; padding: 0 1em; }}
  h1 {{ font-size: 1.5em; }}
  table {{ border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }}
  th, td {{ padding: .2em .6em; font-size: 13px; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }}
  th:first-child, td:first-child {{ text-align: left; }}
  th {{ font-weight: normal; color: #666; }}
  .scroll {{ overflow-x: auto; }}
  .notes {{ color: #a33; }}
  #rank {{ position: sticky; top: 0; background: #fffd; padding: .6em 0; z-index: 1; }}
</style>
</head>
<body>
<h1>{title}</h1>
{tables}
{notes}
<div id="rank"></div>
<p>A click on a lane or a bar chooses its rank: shares are then its own, and the dashed lines below. A double click chooses all again. In the lanes:
drag to move, Alt and the wheel to zoom. Inside a round the parts stand one after another, for of each there is the sum.{together}</p>
<div id="plots"></div>
<script>{library}</script>
<script>
const plots = vegaEmbed("#plots", {figure}, {{renderer: "canvas", bind: "#rank", tooltip: {{theme: "light"}}}});
</script>
</body>
</html>
"""


def write(
    path: Path,
    title: str,
    tables: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]],
    notes: Sequence[str],
    count: int,
    figure: Any,
) -> None:
    """Write the page.

    Args:
        tables: headings and rows of cells.
        notes: what a reader should know of the files.
        count: how many rounds are drawn as one.
        figure: the plots, of altair.
    """
    page = _PAGE.format(
        title=html.escape(title),
        tables="\n".join(_table(*table) for table in tables),
        notes="".join(f'<p class="notes">{html.escape(note)}</p>' for note in notes),
        together=f" Here {count} rounds are drawn as one." if count > 1 else "",
        library=vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace(
            "</script", r"<\/script"
        ),  # which would end the element
        figure=figure.to_json(indent=None).replace("<", r"\u003c"),
    )
    path.write_text(page, encoding="utf-8")


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [_row("th", headings), *(_row("td", row) for row in rows)]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _row(kind: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells) + "</tr>"
