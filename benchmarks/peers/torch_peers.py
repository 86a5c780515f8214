"""One averaging by PyTorch's PeriodicModelAverager and by Accelerate's LocalSGD, over Gloo; started by compare.py, a process per rank.

Reads {"shapes": [...], "repeats": n} from standard input, writes {"PyTorch ...": [seconds], ...} to standard output.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch
import torch.distributed as dist


def main() -> None:
    """Time both, the slowest rank's seconds."""
    job = json.load(sys.stdin)
    torch.set_num_threads(1)
    import accelerate
    from accelerate.local_sgd import LocalSGD
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

    accelerator = accelerate.Accelerator(cpu=True)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    assert dist.get_backend() == "gloo"
    assert dist.get_world_size() == int(os.environ["WORLD_SIZE"])
    model = torch.nn.Module()
    for i, shape in enumerate(job["shapes"]):
        parameter = torch.nn.Parameter(torch.randn(shape))
        parameter.grad = torch.zeros(shape)  # PyTorch leaves out those without
        model.register_parameter(f"p{i}", parameter)
    averager = PeriodicModelAverager(period=1)
    local = LocalSGD(accelerator, model, local_sgd_steps=1)
    ways = {
        f"PyTorch {torch.__version__.split('+')[0]} PeriodicModelAverager": lambda: averager.average_parameters(
            model.parameters()
        ),
        f"Accelerate {accelerate.__version__} LocalSGD": local.step,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(job["repeats"] + 1):
        for way, average in ways.items():
            dist.barrier()
            began = time.perf_counter()
            average()
            elapsed = torch.tensor([time.perf_counter() - began])
            dist.all_reduce(elapsed, dist.ReduceOp.MAX)
            if turn:
                seconds[way].append(float(elapsed))
    if dist.get_rank() == 0:
        print(json.dumps(seconds))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
