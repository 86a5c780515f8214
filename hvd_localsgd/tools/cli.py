"""The command ``hvd-localsgd``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hvd_localsgd.errors import LocalSGDError
from hvd_localsgd.tools import launch, plan
from hvd_localsgd.tools.report import command as report
from hvd_localsgd.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and do what it says; the exit status."""
    parser = argparse.ArgumentParser(prog="hvd-localsgd", description="Local SGD for Keras on MPI clusters.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="start a script on several ranks",
        description="Find mpirun and start a Python script, a module (-m) or a program on several ranks, with the flags that "
        "running as root, or on fewer cores than ranks, needs.",
    )
    run.add_argument("-np", "--ranks", type=int, required=True, help="number of processes")
    run.add_argument(
        "--hosts", help="where, as in node1:4,node2:4 (name:ranks); default: this machine, or the scheduler's"
    )
    run.add_argument("--timeout", type=float, help="seconds after which all ranks are stopped; the exit status is 124")
    run.add_argument("--label", action="store_true", help="begin every line of output with the rank that wrote it")
    run.add_argument(
        "-m", dest="module", metavar="module", nargs=argparse.REMAINDER, help="run a module, as python -m does"
    )
    run.add_argument("script", nargs="?", help="Python script, or a program")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    plan.add_arguments(
        commands.add_parser(
            "plan",
            help="how often to communicate: H, rounds, bytes and time",
            description="Print the H that the papers' theory allows, rounds, bytes and predicted time against H = 1.",
        )
    )
    doctor = commands.add_parser(
        "doctor",
        help="what is installed, how it fits together, how fast ranks talk, and what to change",
        description="Look at this machine; under mpirun, srun or horovodrun at all ranks, and at what connects them.",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        help="seconds after which it ends, and says who did not answer (default 120)",
    )
    report.add_arguments(
        commands.add_parser(
            "report",
            help="where the time of runs went: tables, a page with plots, a trace",
            description="Read the files that timings= has written, of runs that have ended or still go on.",
        )
    )
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "doctor":
            from hvd_localsgd.tools.doctor import command  # the other commands load less

            return command.examine(chosen.json, chosen.timeout)
        if chosen.command == "plan":
            plan.show(chosen)
            return 0
        if chosen.command == "report":
            report.show(chosen)
            return 0
        return _run(chosen)
    except (LocalSGDError, ValueError) as error:
        print(f"hvd-localsgd: {error}", file=sys.stderr)
        return 2


def _run(chosen: argparse.Namespace) -> int:
    launch.find_mpirun()
    if chosen.module:
        program = [sys.executable, "-m", *chosen.module]
    elif chosen.script:
        program = launch.program(chosen.script, chosen.arguments)
    else:
        raise ValueError("what is to be run? Name a script, or -m and a module: hvd-localsgd run -np 2 train.py")
    return launch.run(chosen.ranks, program, chosen.hosts, chosen.label, chosen.timeout)


if __name__ == "__main__":
    sys.exit(main())
