"""What rank 0 prints."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from hvd_localsgd.tools.doctor.checks import Finding
from hvd_localsgd.tools.doctor.facts import Job, Link

_ROWS = 32  # of hosts, and of ranks


def as_json(job: Job, findings: Sequence[Finding]) -> str:
    """Everything, with versions, ranks, links and findings."""
    ranks = [{**dataclasses.asdict(rank), "gpu": job.gpu(rank)} for rank in job.ranks]
    found = {
        "versions": job.ranks[0].versions,
        "machine": {"system": platform.platform(), "cores": os.cpu_count()},
        "launcher": job.ranks[0].launcher,
        "hosts": {host: [rank.rank for rank in members] for host, members in job.hosts().items()},
        "ranks": ranks,
        "links": [dataclasses.asdict(link) for link in job.links],
        "allreduce": job.allreduce and dict(zip(("latency", "bandwidth"), job.allreduce, strict=True)),
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }
    return json.dumps(found, indent=1)


def show(job: Job, findings: Sequence[Finding]) -> None:
    """Tables, then the verdict in words."""
    console = Console(color_system=None, highlight=False, markup=False)
    for table in (_installed(job), _hosts(job), _ranks(job), _speeds(job)):
        if table.row_count:
            console.print(table)
    console.print("Nothing was found that is wrong or slow." if not _serious(findings) else "Verdict")
    for finding in findings:
        console.print(f"  {finding.level}: {finding.what}", soft_wrap=True)
        if finding.do:
            console.print(f"    what to do: {finding.do}", soft_wrap=True)


def _serious(findings: Sequence[Finding]) -> bool:
    return any(finding.level != "note" for finding in findings)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=bool(headings))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _installed(job: Job) -> Table:
    table, first = _table("What is here"), job.ranks[0]
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, version in first.versions.items():
        table.add_row(name, version)
    built = first.framework.get("horovod")
    if built is not None:
        table.add_row("Horovod was built with", ", ".join(built))
    table.add_row(
        "launcher", f"{first.launcher}, {first.launched} started" + (f", {first.slots} slots" if first.slots else "")
    )
    table.add_row("ranks talk through", first.communicator)
    if mpi := first.mpi:
        ulfm = "on" if mpi["ulfm_is_on"] else "there, not on" if mpi["ulfm"] else "no"
        cuda = {None: "not known", True: "yes", False: "no"}[mpi["cuda"]]
        table.add_row("MPI library", f"{mpi['library']} (MPI {mpi['standard']})")
        table.add_row("  it lies in", str(mpi["file"]))
        table.add_row("  threads, ULFM, CUDA", f"{mpi['threads']}, {ulfm}, {cuda}")
    for name, value in first.steering.items():
        table.add_row(name, value)
    return table


def _hosts(job: Job) -> Table:
    table = _table("Hosts", "host", "ranks", "cores", "GPUs", "networks that are up", "traffic was on")
    for host, ranks in list(job.hosts().items())[:_ROWS]:
        first, sent = ranks[0], sum(sum(rank.sent) for rank in ranks)
        cores = len({core for rank in ranks for core in rank.cores})
        carried = [f"{network.name} {network.moved / 1e6:.0f} MB" for network in first.networks if network.moved > 1e6]
        table.add_row(
            host,
            str(len(ranks)),
            # A scheduler that binds nobody lets ranks have others' cores.
            f"{cores} of {first.job_cores}" if cores <= first.job_cores else f"{cores}; the job has {first.job_cores}",
            str(len(first.gpus)),
            ", ".join(f"{n.name} {n.mbits / 1000:g} Gbit/s" if n.mbits else n.name for n in first.networks),
            ", ".join(carried) or ("shared memory" if sent else "-"),
        )
    return table


def _ranks(job: Job) -> Table:
    table = _table("Ranks", "rank", "host", "cores", "GPU")
    for rank in job.ranks[:_ROWS]:
        gpu = job.gpu(rank)
        table.add_row(str(rank.rank), rank.host, _ranges(rank.cores), f"{gpu[1]} {gpu[0]}" if gpu else "-")
    return table


def _speeds(job: Job) -> Table:
    table = _table("Messages", "between", "latency", "of the worst", "MB/s", "of the worst", "which is")
    for words, inside in (("ranks of a host", True), ("hosts", False)):
        if links := job.links_where(inside):
            worst: Link = min(links, key=lambda link: link.bandwidth)
            table.add_row(
                words,
                f"{statistics.median(link.latency for link in links):.1f} us",
                f"{max(link.latency for link in links):.1f} us",
                f"{statistics.median(link.bandwidth for link in links):.0f}",
                f"{worst.bandwidth:.0f}",
                f"{worst.a} to {worst.b}",
            )
    if job.allreduce:
        table.add_row("all, allreduce", f"{job.allreduce[0]:.1f} us", "", f"{job.allreduce[1]:.0f}", "", "")
    return table


def _ranges(cores: list[int]) -> str:
    """``0-3, 8``."""
    words: list[str] = []
    start = cores[0]
    for core, following in zip(cores, [*cores[1:], None], strict=True):
        if following != core + 1:
            words.append(str(core) if start == core else f"{start}-{core}")
            start = following if following is not None else core
    return ", ".join(words)
