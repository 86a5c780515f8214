"""Where in its data a ``fit`` goes on: what was seen is taken from iterators like those of before, and not trained on.

Iterators are made for each epoch again, since a shuffle draws a new order with each. Of earlier epochs the first batch is taken, and of data
that go on from epoch to epoch (``steps_per_epoch``), or do not say how long they are, all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


def skip(
    batches: Any, epochs: int, seen: int, over: bool, before: Callable[[], None], after: Callable[[], None]
) -> None:
    """What the next epoch gives begins later.

    Args:
        batches: Keras' ``epoch_iterator``.
        epochs: that lie behind.
        seen: batches of the next.
        over: whether that one's data have ended, and only what follows them is to come.
        before: called before that epoch's data begin.
        after: called before its first batch that is new.
    """
    for _ in range(epochs):
        with batches.catch_stop_iteration():
            for number, entry in enumerate(batches):
                all_of_it = batches.steps_per_epoch or batches.data_adapter.num_batches is None
                if (number == 0 or all_of_it) and not _take(entry, batches.steps_per_execution):
                    raise StopIteration  # as the step does in which data end
    every = batches._enumerate_iterator

    def rest() -> Iterator[Any]:
        del batches._enumerate_iterator  # for the epochs that follow
        before()
        remaining = every()
        for _ in range(0, seen, batches.steps_per_execution):
            if (entry := next(remaining, None)) is None:
                break  # with other ranks the number of batches is an estimate
            _take(entry, batches.steps_per_execution)
        if over:
            next(remaining, None)  # the end, where data may be shuffled
        after()
        if not over:
            yield from remaining

    batches._enumerate_iterator = rest


def _take(entry: Any, steps: int) -> int:
    """Of one execution, whose last element is an iterator, the batches; how many there were."""
    return sum(1 for _ in zip(range(steps), entry[-1], strict=False))
