"""``hvd-localsgd report``: each number that it shows is recomputed from the lines of the files, and the page is looked at in a browser."""

import json
import math
import random
import re
import shutil
import xml.etree.ElementTree
from collections import defaultdict
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from hvd_localsgd.communicators.serial import SerialCommunicator
from hvd_localsgd.core.timing import PARTS, Round
from hvd_localsgd.tools import cli
from hvd_localsgd.tools.report import condense, plots, runs

from .test_wings import HEAVY, run_without

RANKS, ROUNDS = 3, 7
ALL = (*PARTS, "residual")
ODD = """b's "<!--<script>&"""  # the name of a folder


def records(rank, rounds=ROUNDS, start=1e9, ended=True, seed=0):
    """Lines as one rank writes them: H = 4, an average in all rounds but the last, which is the time after training."""
    draw = random.Random(100 * rank + seed)
    lines = []
    for number in range(rounds):
        last = ended and number == rounds - 1
        parts = {part: draw.uniform(0.01, 1) for part in ALL}
        own = {
            "round": number, "first_step": 4 * number + 1, "last_step": 4 * number + 4, "interval": 0 if last else 4,
            "steps": 0 if last else 4, "start": start, "wall": sum(parts.values()), **parts, "bytes": 0 if last else 1000,
            "drift": 0.0 if last else draw.uniform(0.1, 2), "staleness": 0, "error": 0.0, "hidden": draw.uniform(0, 0.1),
            "loss": None if last else draw.uniform(0.5, 3), "rank": rank, "size": RANKS, "host": f"node{rank}",
        }  # fmt: skip
        start += own["wall"]
        lines.append(own)
    return lines


def write(folder: Path, ranks) -> Path:
    folder.mkdir(exist_ok=True)
    for number, lines in enumerate(ranks):
        (folder / f"rank-{number}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def lines():
    return [records(rank) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def made(tmp_path_factory, lines):
    """Everything that the command writes of a run and of one that goes on, in a process that cannot load TensorFlow or MPI."""
    folder = tmp_path_factory.mktemp("report")
    write(folder / "a", lines)
    write(folder / ODD, [records(rank, 5, ended=False, seed=1) for rank in range(RANKS)])
    files = [
        f"{option}={folder / name}"
        for option, name in (("--html", "page.html"), ("--png", "plots.png"), ("--svg", "plots.svg"))
    ]
    command = ["report", str(folder / "a"), str(folder / ODD), *files, f"--trace={folder / 'trace.json'}"]
    result = run_without(HEAVY, f"from hvd_localsgd.tools import cli; sys.exit(cli.main({command}))")
    assert result.status == 0, result.output
    return folder


def test_files_of_a_training_are_read_as_it_saw_them(tmp_path):
    import hvd_localsgd as lsgd

    with lsgd.ModelAverager([np.zeros(3)], 2, timings=tmp_path, communicator=SerialCommunicator()) as averager:
        for step in range(5):
            averager.tell(loss=float(step))
            averager.step()
    (run,) = runs.read_all([tmp_path])
    (rank,) = run.ranks
    assert rank.finished
    assert not run.notes
    for record, row in zip(averager.timings, rank.rounds, strict=True):
        for each in fields(Round):
            if each.name != "host":
                value = getattr(record, each.name)
                assert row[each.name] == value or (value is None and math.isnan(row[each.name])), each.name
    own = averager.totals[0]
    assert condense.totals(rank) == pytest.approx(own)


def test_tables_say_where_the_time_went(tmp_path, capsys, lines):
    assert cli.main(["report", str(write(tmp_path / "a", lines)), "--ranks"]) == 0
    shown = capsys.readouterr().out.splitlines()
    mean = {part: sum(line[part] for rank in lines for line in rank) / RANKS for part in (*ALL, "wall")}
    (row,) = (line for line in shown if line.split()[:1] == ["a"] and f"{mean['wall']:.2f} s" in line)
    for part in ("compute", "input", "wait", "communicate", "outer", "residual"):
        assert f"{mean[part]:.2f} s {100 * mean[part] / mean['wall']:.1f}%" in row
    for rank in range(RANKS):
        (row,) = (line for line in shown if line.split()[:2] == [str(rank), f"node{rank}"])
        assert f"{sum(line['wait'] for line in lines[rank]):.2f} s" in row
        assert row.split()[-3:-1] == [str(ROUNDS - 1), f"{(ROUNDS - 1) / 1e3:.1f}"]
    (row,) = (line for line in shown if "→" in line)
    losses = [sum(lines[rank][number]["loss"] for rank in range(RANKS)) / RANKS for number in (0, ROUNDS - 2)]
    assert f"{losses[0]:.4g} → {losses[1]:.4g}" in row


def test_a_run_that_goes_on_is_read_as_far_as_it_is(tmp_path, capsys):
    folder = write(tmp_path / "a", [records(rank, ended=False) for rank in range(RANKS - 1)])
    with (folder / "rank-1.jsonl").open("a") as file:
        file.write('{"round": 7, "first_st')
    assert cli.main(["report", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "2 of 2 ranks have not come to the end" in shown
    assert f"of {RANKS} ranks 2 have a file here" in shown
    assert f"rank-1.jsonl:{ROUNDS + 1} is not complete, and is left out" in shown
    (run,) = runs.read_all([folder])
    assert [len(rank.rounds) for rank in run.ranks] == [ROUNDS, ROUNDS]


def test_rounds_count_on_where_a_run_was_started_again(tmp_path):
    first = [records(rank, 5, ended=False) for rank in range(RANKS)]
    folder = write(tmp_path / "a", first)
    for rank in (0, 2):  # rank 1 is not there the second time
        with (folder / f"rank-{rank}.jsonl").open("a") as file:
            file.write('{"round": 5, "fi\n' if rank else "")
            file.writelines(json.dumps(line) + "\n" for line in records(rank, 3, start=1.1e9, ended=False))
    with (folder / "rank-1.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in records(1, 2, start=1.2e9))
    (run,) = runs.read_all([folder])
    counted = [rank.rounds["round"].tolist() for rank in run.ranks]
    assert counted == [[*range(8)], [*range(5), 8, 9], [*range(8)]]
    assert [note for note in run.notes if "cut off" in note] == ["rank-2.jsonl:6 was cut off, and is left out"]


@pytest.mark.parametrize(
    ("line", "text", "words"),
    [
        (3, '{"round": 2, "fi', "rank-1.jsonl:3 .* not complete"),
        (2, "hello", "rank-1.jsonl:2 .* not JSON"),
        (2, "\0" * 50, "rank-1.jsonl:2 .* not JSON"),
        (4, '{"epoch": 1, "loss": 0.1}', "rank-1.jsonl:4 .* no 'round'"),
        (4, json.dumps({**records(1)[3], "wall": "long"}), "rank-1.jsonl:4 .* 'wall' is 'long', and no number"),
        (1, "[1, 2]", "rank-1.jsonl:1 .* is a list"),
    ],
)
def test_what_is_no_record_is_named_by_file_and_line(tmp_path, capsys, line, text, words):
    folder = write(tmp_path / "a", [records(rank) for rank in range(RANKS)])
    own = (folder / "rank-1.jsonl").read_text().splitlines()
    own[line - 1] = text
    (folder / "rank-1.jsonl").write_text("\n".join(own) + "\n")
    assert cli.main(["report", str(folder)]) == 2
    (shown,) = capsys.readouterr().err.splitlines()
    assert re.search(words, shown), shown


def test_large_files_are_read_by_all_cores_alike(tmp_path, monkeypatch, lines):
    folder = write(tmp_path / "a", lines)
    (alone,) = runs.read_all([folder])
    monkeypatch.setattr(runs, "_LARGE", 0)
    (run,) = runs.read_all([folder])
    for one, other in zip(alone.ranks, run.ranks, strict=True):
        assert (one.number, one.host) == (other.number, other.host)
        assert one.rounds.tobytes() == other.rounds.tobytes()
    with (folder / "rank-2.jsonl").open("a") as file:
        file.write("hello\n")
    with pytest.raises(ValueError, match=rf"rank-2.jsonl:{ROUNDS + 1} is no record"):
        runs.read_all([folder])


def test_what_is_no_run_is_refused_in_words(tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    write(tmp_path / "begun", [[], []])
    write(tmp_path / "good", [records(0)])
    for arguments, words in (
        ([tmp_path / "none"], "none, which does not exist"),
        ([tmp_path / "file"], "file, which is a file"),
        ([tmp_path / "empty"], "no timing file"),
        ([tmp_path / "begun"], "No round has ended yet"),
        ([tmp_path / "good", tmp_path / "begun" / ".." / "good"], "given twice"),
        ([tmp_path / "good", "--trace", tmp_path / "none" / "trace.json"], "none/trace.json: No such file"),
    ):
        assert cli.main(["report", *map(str, arguments)]) == 2
        assert words in capsys.readouterr().err


def test_rounds_taken_together_are_sums_and_means(lines):
    draw = random.Random(0)
    own = [
        {**line, "round": number, "loss": draw.choice([None, line["loss"]])} for number, line in enumerate(lines[0] * 9)
    ]
    table = np.array(
        [tuple(math.nan if line[name] is None else line[name] for name in runs.RECORD.names) for line in own],
        runs.RECORD,
    )
    for count in (1, 4, 1000):
        cells = condense.condense(table, count)
        groups = [own[first : first + count] for first in range(0, len(own), count)]
        assert len(cells) == len(groups)
        for cell, group in zip(cells, groups, strict=True):
            assert (cell["round"], cell["start"]) == (group[0]["round"], group[0]["start"])
            for name in (*ALL, "wall", "hidden", "bytes", "steps"):
                assert cell[name] == pytest.approx(sum(line[name] for line in group))
            for name, kept in (("loss", "loss"), ("drift", "bytes"), ("interval", "interval")):
                known = [line[name] for line in group if line[kept]]
                assert cell[name] == pytest.approx(sum(known) / len(known) if known else math.nan, nan_ok=True)


def test_the_trace_has_a_process_for_each_rank_and_every_second(made, lines):
    events = json.loads((made / "trace.json").read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert list(names.values())[:RANKS] == [f"a rank {rank} on node{rank}" for rank in range(RANKS)]
    assert len(names) == 2 * RANKS
    for rank in range(RANKS):
        own = [event for event in events if event["pid"] == rank and event["ph"] == "X"]
        for part in (*ALL, "hidden"):
            seconds = sum(event["dur"] for event in own if event["name"] == part) / 1e6
            assert seconds == pytest.approx(sum(line[part] for line in lines[rank]))
        for thread in (0, 1):  # one after another: nothing overlaps
            spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in own if event["tid"] == thread)
            assert all(end <= begin + 1 for (_, end), (begin, _) in pairwise(spans))
        losses = [event["args"]["loss"] for event in events if event["pid"] == rank and event["name"] == "loss"]
        assert losses == [line["loss"] for line in lines[rank] if line["loss"] is not None]


def test_pictures_are_pictures(made):
    assert (made / "plots.png").read_bytes().startswith(b"\x89PNG")
    drawn = xml.etree.ElementTree.parse(made / "plots.svg").getroot()
    assert f"{ODD}: where each rank's time went" in {
        text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")
    }


def test_a_large_run_makes_a_small_page():
    """256 ranks and their rounds are no more cells, and points of a curve, than a few thousand."""
    rounds = np.zeros(1000, runs.RECORD)
    rounds["round"] = rounds["start"] = np.arange(1000)
    for name in ("wall", "compute", "steps", "interval", "loss", "drift", "bytes"):
        rounds[name] = 1 + np.arange(1000) % 7
    run = runs.Run("large", [runs.Rank(number, f"node{number}", rounds) for number in range(256)])
    assert len(plots.figure([run]).to_json(indent=None)) < 2e6


def test_what_is_missing_for_plots_is_named(tmp_path):
    folder = write(tmp_path / "a", [records(0)])
    command = ["report", str(folder), "--html", str(tmp_path / "page.html")]
    missing = ("altair", "vl_convert", "orjson")
    result = run_without((*HEAVY, *missing), f"from hvd_localsgd.tools import cli; sys.exit(cli.main({command}))")
    assert result.status == 2
    assert "altair, vl_convert. pip install 'hvd-localsgd[report]'" in result.output
    result = run_without((*HEAVY, *missing), f"from hvd_localsgd.tools import cli; sys.exit(cli.main({command[:2]}))")
    assert result.status == 0, result.output


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no browser test: pip install playwright")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no browser test: Chromium is not installed (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


# Of the plots of shares, the seconds of each part that their bars stand for.
_SHARES = """plots.then(async result => {
  await result.view.runAsync();
  const sums = {};
  const look = item => {
    if (item.datum && 'sum_seconds' in item.datum && item.mark.marktype === 'rect')
      sums[item.datum.part] = (sums[item.datum.part] || 0) + item.datum.sum_seconds;
    for (const each of item.items || []) look(each);
  };
  look(result.view.scenegraph().root);
  return sums;
})"""


def test_the_page_is_drawn_without_network_and_a_click_chooses_a_rank(made, lines, browser):
    said = []
    page = browser.new_context(offline=True, viewport={"width": 1240, "height": 900}).new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("file:", "data:", "blob:")) or said.append(request.url))
    page.goto(f"file://{made / 'page.html'}")

    def expected(ranks):
        everything = defaultdict(float)
        for rank in ranks:
            for line in [*lines[rank], *records(rank, 5, ended=False, seed=1)]:
                for part in ALL:
                    everything[part] += line[part]
        return pytest.approx(everything, rel=1e-4)

    assert page.evaluate(_SHARES) == expected(range(RANKS))
    canvas = page.locator("#plots canvas").bounding_box()
    lane = page.evaluate(
        """plots.then(result => {
          let found = null;
          const look = (item, x, y) => {
            if (!found && item.mark && item.mark.marktype === 'rect' && item.datum && item.datum.rank === 1 && item.width > 3)
              found = [x + item.x + item.width / 2, y + item.y + item.height / 2];
            const inner = item.mark && item.mark.marktype === 'group' ? [x + (item.x || 0), y + (item.y || 0)] : [x, y];
            for (const each of item.items || []) look(each, ...inner);
          };
          const origin = result.view.origin(), padding = result.view.padding();
          look(result.view.scenegraph().root, origin[0] + padding.left, origin[1] + padding.top);
          return found;
        })"""
    )
    page.mouse.click(canvas["x"] + lane[0], canvas["y"] + lane[1])
    page.wait_for_function("document.querySelector('#rank select').value === '1'", timeout=10_000)
    assert page.evaluate(_SHARES) == expected([1])
    page.mouse.dblclick(canvas["x"] + lane[0], canvas["y"] + lane[1])
    page.wait_for_function("document.querySelector('#rank select').value === 'null'", timeout=10_000)
    assert page.evaluate(_SHARES) == expected(range(RANKS))
    page.select_option("#rank select", "2")
    assert page.evaluate(_SHARES) == expected([2])
    assert not said
