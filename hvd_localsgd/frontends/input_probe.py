"""How long Keras' train steps wait for data."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import keras

from hvd_localsgd.core.timing import Timings


class InputProbe:
    """How long train steps wait for data.

    Keras fetches the batch inside its compiled step, where nobody can time it. So now and then one step is run
    the other way that Keras' train function knows, from a Python iterator, and the fetch is timed. Sampling at most
    every 50 ms keeps the cost low; the round's share is estimated from the latest samples.
    """

    _FIRST_SECONDS = 1.0
    _EVERY_SECONDS = 0.05

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self._inner = model.train_function
        self._waited = self._ran = self._share = 0.0
        self._next = math.inf  # set by the first step, which traces and compiles
        self._warm = False
        model.train_function = self._step

    def remove(self) -> None:
        """Give the model its own train function back."""
        if self._model.train_function == self._step:
            self._model.train_function = self._inner

    def _step(self, iterator: Any) -> Any:
        began = time.perf_counter()
        if began < self._next:
            if self._next == math.inf:
                outputs = self._inner(iterator)
                self._next = time.perf_counter() + self._FIRST_SECONDS
                return outputs
            return self._inner(iterator)
        batches = _TimedBatches(iter(iterator))
        if batches.first is None:
            raise StopIteration
        outputs = self._inner(batches)
        now = time.perf_counter()
        if self._warm:
            self._waited += batches.waited
            self._ran += now - began
        self._warm = True  # the first time, TensorFlow prepares the function for being called this way
        self._next = now + self._EVERY_SECONDS
        return outputs

    def estimate(self, timings: Timings) -> None:
        """Of the round's compute, call that share input that the samples say."""
        if self._ran:
            self._share = self._waited / self._ran
            self._waited = self._ran = 0.0
        timings.move("compute", "input", self._share * timings.parts["compute"])


class _TimedBatches:
    """An iterator that measures the time its source takes; the first batch is fetched at once."""

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self.waited = 0.0
        self.first = self._fetch()

    def _fetch(self) -> Any:
        began = time.perf_counter()
        batch = next(self._source, None)
        self.waited += time.perf_counter() - began
        return batch

    def __iter__(self) -> Iterator[Any]:
        batch = self.first
        while batch is not None:
            yield batch
            batch = self._fetch()
