"""The plan of a sync: which stretches of the weights are averaged at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

Array = Any  # one-dimensional: a numpy array, or a tensor of a framework that may lie on a device
_WORTH_A_CHUNK = 1 / 16  # of a chunk: from here on a block is averaged where it lies


@dataclass(frozen=True, slots=True)
class Block:
    """What a memory hands out as one array: a variable, or several of a dtype laid end to end.

    Attributes:
        size: elements.
        wire: the dtype that travels, float32 or float64.
        whole: the array is of that dtype, so that its memory can be the reduction's buffer.
        plain: of statistics, which are averaged and no more, whatever becomes of the weights' average.
        every: averaged at every so manieth sync.
    """

    size: int
    wire: np.dtype
    whole: bool
    plain: bool = False
    every: int = 1


@dataclass(frozen=True, slots=True)
class Chunk:
    """What is reduced at a time: a stretch of the blocks, small enough to stay in cache.

    Attributes:
        number: its place in the plan.
        pieces: (block, start, stop, offset in the chunk) of each.
        direct: one piece of one block that can be reduced where it is.
        every: averaged at every so manieth sync.
    """

    number: int
    dtype: np.dtype
    elements: int
    pieces: list[tuple[int, int, int, int]]
    direct: bool
    every: int = 1

    def load(self, arrays: Sequence[Array], scratch: np.ndarray) -> Array:
        """The values, to be changed: the block's own memory, or a copy of several blocks in ``scratch`` (bytes)."""
        if self.direct:
            index, start, stop, _ = self.pieces[0]
            block = arrays[index]
            return block if stop - start == block.shape[0] else block[start:stop]
        values = scratch[: self.elements * self.dtype.itemsize].view(self.dtype)
        for index, start, stop, offset in self.pieces:
            values[offset : offset + stop - start] = arrays[index][start:stop]
        return values

    def save(self, arrays: list[Array], values: Array) -> None:
        """The inverse; tensors, which cannot be written to, take the place of their block."""
        for index, start, stop, offset in self.pieces:
            if isinstance(values, np.ndarray):
                target, piece = arrays[index][start:stop], values[offset : offset + stop - start]
                if not (self.direct and np.may_share_memory(target, piece)):
                    target[:] = piece
            else:
                arrays[index] = values


def plan(blocks: Sequence[Block], chunk_bytes: int | None) -> list[Chunk]:
    """Every element of every block in exactly one chunk.

    A block of at least a sixteenth of a chunk has chunks of its own, which are reduced where they lie; smaller ones
    are laid end to end. Chunks of float64 are apart from the others, which travel as float32; so are those of other periods.

    Args:
        blocks: what a memory hands out.
        chunk_bytes: of a chunk, at most; None: blocks that can be are reduced whole, as tensors have to be.
    """
    return [Chunk(number, *parts) for number, parts in enumerate(_chunks(blocks, chunk_bytes))]


_Parts = tuple[np.dtype, int, list[tuple[int, int, int, int]], bool, int]


def _chunks(blocks: Sequence[Block], chunk_bytes: int | None) -> Iterator[_Parts]:
    wires: tuple[np.dtype, ...] = (np.dtype(np.float32), np.dtype(np.float64))
    for every, wire in product(sorted({block.every for block in blocks}), wires):
        alike = [(index, block) for index, block in enumerate(blocks) if (block.every, block.wire) == (every, wire)]
        own = [(index, block) for index, block in alike if block.size]
        largest = max((block.size for _, block in own), default=1)
        capacity = largest if chunk_bytes is None else max(1, chunk_bytes // wire.itemsize)
        pieces: list[tuple[int, int, int, int]] = []
        used = 0
        for index, block in own:
            if block.whole and (chunk_bytes is None or block.size >= capacity * _WORTH_A_CHUNK):
                for start in range(0, block.size, capacity):
                    stop = min(block.size, start + capacity)
                    yield wire, stop - start, [(index, start, stop, 0)], True, every
                continue
            start = 0
            while start < block.size:
                stop = min(block.size, start + capacity - used)
                pieces.append((index, start, stop, used))
                used += stop - start
                start = stop
                if used == capacity:
                    yield wire, used, pieces, False, every
                    pieces, used = [], 0
        if used:
            yield wire, used, pieces, False, every
