"""The plan of a sync: which stretches of the weights are averaged at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np

Array = Any  # one-dimensional: a numpy array, or a tensor of a framework that may lie on a device
_WORTH_A_CHUNK = 1 / 16  # of a chunk: from here on a block is averaged where it lies


@dataclass(frozen=True, slots=True, order=True)
class Kind:
    """What becomes of a variable, beyond being averaged.

    Attributes:
        plain: of statistics, which are averaged and no more, whatever becomes of the weights' average.
        exact: never compressed.
        every: averaged at every so manieth sync.
    """

    plain: bool = False
    exact: bool = False
    every: int = 1


@dataclass(frozen=True, slots=True)
class Block:
    """What a memory hands out as one array: a variable, or several of a dtype laid end to end.

    Attributes:
        size: elements.
        wire: the dtype that travels, float32 or float64.
        whole: the array is of that dtype, so that its memory can be the reduction's buffer.
        kind: of its variables.
    """

    size: int
    wire: np.dtype
    whole: bool
    kind: Kind = Kind()


@dataclass(frozen=True, slots=True)
class Chunk:
    """What is reduced at a time: a stretch of the blocks, small enough to stay in cache.

    Attributes:
        number: its place in the plan.
        pieces: (block, start, stop, offset in the chunk) of each.
        direct: one piece of one block that can be reduced where it is.
        part: the fragment of the model that it belongs to.
        exact, every: as of the kind of its blocks; float64 is exact.
    """

    number: int
    dtype: np.dtype
    elements: int
    pieces: list[tuple[int, int, int, int]]
    direct: bool
    part: int = 0
    exact: bool = False
    every: int = 1

    def places(self) -> Iterator[tuple[int, slice, slice]]:
        """Of each piece: its block, where it is in the block, where in the chunk."""
        for index, start, stop, offset in self.pieces:
            yield index, slice(start, stop), slice(offset, offset + stop - start)

    def load(self, arrays: Sequence[Array], scratch: np.ndarray) -> Array:
        """The values, to be changed: the block's own memory, or a copy of several blocks in ``scratch`` (bytes)."""
        if self.direct:
            index, start, stop, _ = self.pieces[0]
            block = arrays[index]
            return block if stop - start == block.shape[0] else block[start:stop]
        values = scratch[: self.elements * self.dtype.itemsize].view(self.dtype)
        for index, own, place in self.places():
            values[place] = arrays[index][own]
        return values

    def save(self, arrays: list[Array], values: Array) -> None:
        """The inverse; tensors, which cannot be written to, take the place of their block."""
        if not isinstance(values, np.ndarray):
            arrays[self.pieces[0][0]] = values
        elif not (self.direct and np.may_share_memory(arrays[self.pieces[0][0]], values)):
            for index, own, place in self.places():
                arrays[index][own] = values[place]


Stretch = tuple[int, int, int]  # block, start, stop


def stretches(chunks: Sequence[Chunk]) -> list[Stretch]:
    """What these chunks cover; neighbours are one."""
    found: list[Stretch] = []
    for index, start, stop, _ in sorted(piece for chunk in chunks for piece in chunk.pieces):
        if found and found[-1][0] == index and found[-1][2] == start:
            start = found.pop()[1]
        found.append((index, start, stop))
    return found


def plan(blocks: Sequence[Block], chunk_bytes: int | None, parts: int = 1) -> list[Chunk]:
    """Every element of every block in exactly one chunk.

    A block of at least a sixteenth of a chunk has chunks of its own, which are reduced where they lie; smaller ones
    are laid end to end. Chunks of float64 are apart from the others, which travel as float32; so are those of other periods, those that
    are never compressed, and those of other fragments.

    Args:
        blocks: what a memory hands out.
        chunk_bytes: of a chunk, at most; None: blocks that can be are reduced whole, as tensors have to be.
        parts: fragments of the model, of equal size.
    """
    found: list[Chunk] = []
    stretches = _cut(blocks, parts)
    kinds = {(part, *_kind(blocks[index])[:2]) for part, (index, _, _) in stretches}
    wires: tuple[np.dtype, ...] = (np.dtype(np.float32), np.dtype(np.float64))
    for (part, every, exact), wire in product(sorted(kinds), wires):
        own = [stretch for cut, stretch in stretches if (cut, *_kind(blocks[stretch[0]])) == (part, every, exact, wire)]
        for elements, pieces, direct in _chunks(blocks, own, wire, chunk_bytes):
            found.append(Chunk(len(found), wire, elements, pieces, direct, part, exact, every))
    return found


def _kind(block: Block) -> tuple[int, bool, np.dtype]:
    return block.kind.every, block.kind.exact or block.wire == np.float64, block.wire


def _cut(blocks: Sequence[Block], parts: int) -> list[tuple[int, Stretch]]:
    """The stretches of each fragment: the model laid end to end, and cut into parts of equal size."""
    total = sum(block.size for block in blocks)
    cuts = [total * part // parts for part in range(parts + 1)]
    found, before = [], 0
    for index, block in enumerate(blocks):
        for part, (low, high) in enumerate(pairwise(cuts)):
            start, stop = max(0, low - before), min(block.size, high - before)
            if start < stop:
                found.append((part, (index, start, stop)))
        before += block.size
    return found


_Pieces = list[tuple[int, int, int, int]]


def _chunks(
    blocks: Sequence[Block], own: Sequence[Stretch], wire: np.dtype, chunk_bytes: int | None
) -> Iterator[tuple[int, _Pieces, bool]]:
    """Elements, pieces and whether they are direct, of each chunk for these stretches."""
    largest = max((stop - start for _, start, stop in own), default=1)
    capacity = largest if chunk_bytes is None else max(1, chunk_bytes // wire.itemsize)
    pieces: _Pieces = []
    used = 0
    for index, first, last in own:
        if blocks[index].whole and (chunk_bytes is None or last - first >= capacity * _WORTH_A_CHUNK):
            for start in range(first, last, capacity):
                stop = min(last, start + capacity)
                yield stop - start, [(index, start, stop, 0)], True
            continue
        start = first
        while start < last:
            stop = min(last, start + capacity - used)
            pieces.append((index, start, stop, used))
            used += stop - start
            start = stop
            if used == capacity:
                yield used, pieces, False
                pieces, used = [], 0
    if used:
        yield used, pieces, False
