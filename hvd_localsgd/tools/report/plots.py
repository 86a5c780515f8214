"""What there is to see of runs, described once: for a page that answers to clicks, and for a picture."""

from __future__ import annotations

import csv
import io
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np

from hvd_localsgd.core.timing import PARTS
from hvd_localsgd.tools.report.condense import MEANS, condense, over_ranks, paces, together, totals
from hvd_localsgd.tools.report.runs import Run

CELLS = 6_000  # of all ranks together: more would make the page large, and slow to draw
POINTS = 400  # of a curve
BARS = 60
SLOWEST = 16
WIDTH = 1080
COLOURS = {
    "compute": "#4c78a8",
    "input": "#72b7b2",
    "wait": "#f2cf5b",
    "pack": "#d8a6c0",
    "communicate": "#e45756",
    "unpack": "#b279a2",
    "outer": "#54a24b",
    "residual": "#bab0ac",
    "hidden": "#222222",
}
_CELL = ("round", "wall", *PARTS, "residual", "hidden", "steps", "interval", "loss", "drift")
_TITLES = {"loss": "loss", "drift": "drift", "interval": "H"}


def figure(runs: Sequence[Run]) -> Any:
    """All plots, as an ``altair.VConcatChart``: ranks over time, parts, the slowest ranks, loss, drift and H. A click chooses a rank in all."""
    numbers = sorted({rank.number for run in runs for rank in run.ranks})
    chosen = alt.selection_point(
        name="rank",
        fields=["rank"],
        on="click",
        clear="dblclick",
        toggle=False,
        bind=alt.binding_select(options=[None, *numbers], labels=["all", *map(str, numbers)], name="Rank "),
    )
    zoom = alt.selection_interval(name="zoom", bind="scales", encodings=["x"], zoom="wheel![event.altKey]")
    clock = _clock(runs)
    sums = [totals(rank) for run in runs for rank in run.ranks]
    parts = [part for part in COLOURS if any(each[part] for each in sums)]
    count = together(runs, CELLS)
    data = _csv(_cells(runs, count, clock))
    lanes = [_timeline(run, data, parts, chosen, zoom, clock) for run in runs]
    below = [_shares(run, data, parts, chosen, count, len(runs)) for run in runs]
    below += [
        _slowest(run, parts, chosen, len(runs)) for run in runs if any(rank.rounds["steps"].any() for rank in run.ranks)
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Automatically deduplicated selection parameter")  # one for all is meant
        everything = alt.vconcat(
            alt.vconcat(*lanes).resolve_scale(x="shared"),
            alt.concat(*below, columns=max(2, len(runs))),
            *_courses(runs, data, clock),
            spacing=30,
        )
    return (
        everything.resolve_scale(color="independent")
        .configure_view(stroke="#dddddd")
        .configure_axis(
            gridColor="#eeeeee",
            domainColor="#999999",
            tickColor="#999999",
            labelColor="#444444",
            titleFontWeight="normal",
        )
        .configure_title(anchor="start", fontSize=14, subtitleColor="#666666")
        .configure_legend(titleFontWeight="normal")
    )


@dataclass(frozen=True, slots=True)
class Clock:
    """The unit of the time axes."""

    unit: str
    seconds: float

    @property
    def title(self) -> str:
        """Of an axis."""
        return f"time ({self.unit})"


def _clock(runs: Sequence[Run]) -> Clock:
    ends = [
        float(rank.rounds["start"][-1] + rank.rounds["wall"][-1]) - run.start
        for run in runs
        for rank in run.ranks
        if len(rank.rounds)
    ]
    return next(
        c for c in (Clock("h", 3600), Clock("min", 60), Clock("s", 1)) if max(ends) >= 3 * c.seconds or c.seconds == 1
    )


# Plots.


def _timeline(run: Run, cells: Any, parts: Sequence[str], chosen: Any, zoom: Any, clock: Clock) -> Any:
    """A lane for each rank, in which the parts of a round stand one after another; a line where an average was on its way."""
    lane = min(22.0, max(3.0, 560 / len(run.ranks)))
    y = alt.Y(
        "rank:O", title="rank", axis=alt.Axis(labelOverlap=True), scale=alt.Scale(paddingInner=0.2 if lane > 8 else 0.0)
    )
    base = alt.Chart(cells).transform_filter(alt.datum.run == run.name)
    bars = (
        base.transform_fold([part for part in parts if part != "hidden"], as_=["part", "seconds"])
        .transform_filter(alt.datum.seconds > 0)
        .transform_stack(stack="seconds", groupby=["rank", "begin"], as_=["before", "after"])
        .transform_calculate(
            left=f"datum.begin + datum.before / {clock.seconds}", right=f"datum.begin + datum.after / {clock.seconds}"
        )
        .mark_rect()
        .encode(
            x=alt.X("left:Q", title=clock.title, scale=alt.Scale(nice=False)),
            x2="right:Q",
            y=y,
            color=_part(parts),
            opacity=alt.when(chosen).then(alt.value(1)).otherwise(alt.value(0.2)),
            tooltip=[
                "part:N", alt.Tooltip("seconds:Q", format=".4~g", title="seconds"), "rank:O", "host:N", alt.Tooltip("round:Q", title="round (from)"),
                "steps:Q", alt.Tooltip("interval:Q", format=".4~g", title="H"), alt.Tooltip("loss:Q", format=".4~g"), alt.Tooltip("drift:Q", format=".4~g"),
            ],
        )
        .add_params(chosen, zoom)
    )  # fmt: skip
    hidden = (
        base.transform_filter(alt.datum.hidden > 0)
        .transform_calculate(right=f"datum.begin + datum.hidden / {clock.seconds}", part="'hidden'")
        .mark_rule(strokeWidth=min(2.0, lane / 3))
        .encode(x="begin:Q", x2="right:Q", y=y, color=_part(parts))
    )
    title = f"{run.name}: where each rank's time went"
    return alt.layer(bars, *([hidden] if "hidden" in parts else [])).properties(
        width=WIDTH, height=lane * len(run.ranks), title=title
    )


def _part(parts: Sequence[str]) -> Any:
    scale = alt.Scale(domain=list(parts), range=[COLOURS[part] for part in parts])
    return alt.Color("part:N", scale=scale, legend=alt.Legend(orient="top", title=None))


def _shares(run: Run, cells: Any, parts: Sequence[str], chosen: Any, count: int, runs: int) -> Any:
    """The parts' shares of the time, of all ranks together or of the one that was chosen."""
    step = count * math.ceil(run.rounds / count / BARS)  # whole cells
    bins = alt.Bin(extent=[0, step * math.ceil(run.rounds / step)], step=step, maxbins=2 * BARS)
    title = f"{json.dumps(run.name + ': shares of the time')} + (rank.rank ? ', rank ' + rank.rank : ', all ranks')"
    return (
        alt.Chart(cells, title=alt.Title(alt.expr(title)), width=_width(max(2, runs)), height=260)
        .transform_filter(alt.datum.run == run.name)
        .transform_filter(chosen)
        .transform_fold([part for part in parts if part != "hidden"], as_=["part", "seconds"])
        .mark_bar()
        .encode(
            x=alt.X("round:Q", bin=bins, title="round", axis=alt.Axis(format="d")),
            y=alt.Y("sum(seconds):Q", stack="normalize", title=None, axis=alt.Axis(format="%")),
            color=_part(parts).legend(None),
            order=alt.Order("place:Q"),
            tooltip=[
                "part:N",
                alt.Tooltip("sum(seconds):Q", format=".4~g", title="seconds"),
                alt.Tooltip("round:Q", bin=bins),
            ],
        )
        .transform_calculate(place=f"indexof({list(parts)}, datum.part)")
    )


def _slowest(run: Run, parts: Sequence[str], chosen: Any, runs: int) -> Any:
    """The ranks whose local steps take longest, compute and input; a line where the median of all ranks is."""
    known = [(rank, pace) for rank in run.ranks if math.isfinite(sum(pace := paces(rank)))]
    known.sort(key=lambda each: -sum(each[1]))
    median = float(np.median([sum(pace) for _, pace in known])) * 1e3
    rows = [
        {"rank": rank.number, "host": rank.host, "place": place, "part": part, "milliseconds": 1e3 * seconds}
        for place, (rank, pace) in enumerate(known[:SLOWEST])
        for part, seconds in zip(("compute", "input"), pace, strict=True)
    ]
    bars = (
        alt.Chart(_csv(rows))
        .mark_bar()
        .encode(
            x=alt.X("milliseconds:Q", title="milliseconds of a typical local step"),
            y=alt.Y("rank:O", sort=alt.EncodingSortField("place"), title="rank"),
            color=_part(parts).legend(None),
            opacity=alt.when(chosen).then(alt.value(1)).otherwise(alt.value(0.3)),
            tooltip=["rank:O", "host:N", "part:N", alt.Tooltip("milliseconds:Q", format=".4~g")],
        )
        .add_params(chosen)
    )
    line = alt.Chart(_csv([{"median": median}])).mark_rule(strokeDash=[4, 3]).encode(x="median:Q")
    shown = f"the slowest {SLOWEST} of {len(run.ranks)} ranks" if len(run.ranks) > SLOWEST else "ranks, slowest first"
    title = alt.Title(f"{run.name}: {shown}", subtitle=f"dashed: the median rank, {median:.3g} ms")
    return alt.layer(bars, line).properties(title=title, width=_width(max(2, runs)), height=240)


def _courses(runs: Sequence[Run], cells: Any, clock: Clock) -> list[Any]:
    """Loss, drift and H, of those that any rank knows: against rounds and against time."""
    curves = _curves(runs, clock)
    data = _csv(curves)
    pairs: list[Any] = []
    for name in MEANS:
        known = [
            point for point in curves if math.isfinite(point[name]) and (name != "drift" or point["drift_min"] > 0)
        ]
        if not known:
            continue
        ends = [min(point[f"{name}_min"] for point in known), max(point[f"{name}_max"] for point in known)]
        if name == "interval":
            ends = [0.0, 1.1 * ends[1]]
        scale = alt.Scale(type="log" if name == "drift" else "linear", domain=ends, nice=True)
        legend = alt.Legend(orient="top", title=None, symbolOpacity=1) if len(runs) > 1 and not pairs else None
        colour = alt.Color("run:N", scale=alt.Scale(scheme="category10"), legend=legend)
        pair = []
        for axis, title in (("round", "round"), ("time", clock.title)):
            whole = alt.Scale(domain=[0, max(0.001, *(point[axis] for point in curves))], nice=False)
            pair.append(_course(name, data, cells, clock, alt.X(f"{axis}:Q", title=title, scale=whole), scale, colour))
        pairs.append(alt.hconcat(*pair))
    return pairs


def _course(name: str, curves: Any, cells: Any, clock: Clock, x: Any, scale: Any, colour: Any) -> Any:
    """The mean over ranks, between the least and the most; and of the rank that was chosen."""
    y, low = (alt.Y(f"{column}:Q", title=_TITLES[name], scale=scale) for column in (name, f"{name}_min"))
    known = f"isValid(datum.{name})" + (" && datum.drift > 0" if name == "drift" else "")
    curve: Any = "step-after" if name == "interval" else "linear"
    base = alt.Chart(curves).transform_filter(known)
    tips = [alt.Tooltip(f"{name}{which}:Q", format=".4~g") for which in ("", "_min", "_max")]
    band = base.mark_area(opacity=0.2, interpolate=curve, clip=True).encode(
        x=x, y=low, y2=f"{name}_max:Q", color=colour
    )
    line = base.mark_line(interpolate=curve, clip=True).encode(
        x=x,
        y=y,
        color=colour,
        tooltip=["run:N", "round:Q", alt.Tooltip("time:Q", format=".4~g", title=clock.title), *tips],
    )
    own = (
        alt.Chart(cells)
        .transform_filter({"param": "rank", "empty": False})
        .transform_filter(known)
        .transform_calculate(time=f"datum.begin + datum.wall / {clock.seconds}")
        .mark_line(color="#222222", strokeWidth=1.5, strokeDash=[5, 3], interpolate=curve, clip=True)
        .encode(x=x, y=y, detail="run:N")
    )
    return alt.layer(band, line, own).properties(width=_width(2), height=200)


def _width(columns: int) -> float:
    return WIDTH / columns - 40


# Data. As CSV, which is a third of the same as JSON.


def _csv(rows: Sequence[dict[str, Any]]) -> Any:
    """Rows with the same keys, as data of a chart; numbers to five digits, which is more than a screen has; NaN as nothing."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow(_shown(value) for value in row.values())
    parse = {key: "string" if isinstance(value, str) else "number" for key, value in rows[0].items()}
    return alt.InlineData(values=text.getvalue(), format=alt.CsvDataFormat(type="csv", parse=parse))


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.6g}" if math.isfinite(value) else ""


def _cells(runs: Sequence[Run], count: int, clock: Clock) -> list[dict[str, Any]]:
    """A row for each ``count`` rounds of each rank; ``begin`` by the clock, parts in seconds."""
    rows = []
    for run in runs:
        start = run.start
        for rank in run.ranks:
            who = {"run": run.name, "rank": rank.number, "host": rank.host}
            for row in condense(rank.rounds, count):
                rows.append(
                    {**who, "begin": (row["start"] - start) / clock.seconds, **{name: row[name] for name in _CELL}}
                )
    return rows


def _curves(runs: Sequence[Run], clock: Clock) -> list[dict[str, Any]]:
    rows = []
    for run in runs:
        table = over_ranks(run, POINTS)
        table["time"] = table["time"] / clock.seconds
        for values in zip(*table.values(), strict=True):
            rows.append({"run": run.name, **dict(zip(table, values, strict=True))})
    return rows
