"""Two models, any steps and sync times, and ranks that are killed in a step of their own: python tests/programs/dying_sequence.py NUMBER.

Prints what each rank that is left holds, as JSON. It needs mpirun --with-ft ulfm.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

import hvd_localsgd as lsgd
from hvd_localsgd import devices
from hvd_localsgd.core.schedules import SyncSteps
from tests.programs.steps import change

SHAPES = [(3,), (), (0,), (7, 5)]
RANKS = 4


def drawn(number):
    """Of this number: steps that each rank has data for, sync times of two models, and who is killed in which step."""
    draw = random.Random(number)
    counts = [draw.randint(8, 24) for _ in range(RANKS)]
    times = [draw.randint(1, 7), sorted(draw.sample(range(1, 25), 5))]
    dead = draw.sample(range(RANKS), draw.choice((1, 2, 3)))
    return counts, times, [(rank, draw.randrange(counts[rank])) for rank in dead]


def main():
    counts, times, kills = drawn(int(sys.argv[1]))
    sys.modules["tensorflow"] = None  # whose import takes longer than all the rest
    lsgd.init()
    rank = lsgd.rank()
    models = [[np.zeros(shape) for shape in SHAPES] for _ in times]
    training = [
        lsgd.ModelAverager(arrays, every if isinstance(every, int) else SyncSteps(every), on_failure="continue")
        for arrays, every in zip(models, times, strict=True)
    ]
    with training[0], training[1]:
        for step in range(counts[rank]):
            for number, arrays in enumerate(models):
                for array in arrays:
                    array += change(rank, step, number, array.shape, "float64")
            if (rank, step) in kills:
                os.kill(os.getpid(), signal.SIGKILL)
            for each in training:
                each.step()
    values = [[array.tolist() for array in arrays] for arrays in models]
    print(f"rank {rank} holds " + json.dumps({"values": values, "size": devices.get().size}) + " .", flush=True)


if __name__ == "__main__":
    main()
