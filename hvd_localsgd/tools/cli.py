"""The command ``hvd-localsgd``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hvd_localsgd.errors import LocalSGDError
from hvd_localsgd.tools import doctor, launch, plan
from hvd_localsgd.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and do what it says; the exit status."""
    parser = argparse.ArgumentParser(prog="hvd-localsgd", description="Local SGD for Keras on MPI clusters.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="start a script on several ranks of this machine",
        description="Find mpirun and start a Python script on several ranks of this machine, with the flags that "
        "running as root, or on fewer cores than ranks, needs. On a cluster use mpirun or srun itself.",
    )
    run.add_argument("-np", "--ranks", type=int, required=True, help="number of processes")
    run.add_argument("script", help="Python script")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    plan.add_arguments(
        commands.add_parser(
            "plan",
            help="how often to communicate: H, rounds, bytes and time",
            description="Print the H that the papers' theory allows, rounds, bytes and predicted time against H = 1.",
        )
    )
    doctor.add_arguments(
        commands.add_parser(
            "doctor",
            help="what is installed, how it fits together, how fast ranks talk, and what to change",
            description="Look at this machine; under mpirun, srun or horovodrun at all ranks, and at what connects them.",
        )
    )
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "doctor":
            return doctor.examine(chosen.json, chosen.timeout)
        if chosen.command == "plan":
            plan.show(chosen)
            return 0
        return launch.run(chosen.ranks, [sys.executable, chosen.script, *chosen.arguments])
    except (LocalSGDError, ValueError) as error:
        print(f"hvd-localsgd: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
