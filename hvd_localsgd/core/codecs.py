"""How numbers are sent in fewer bits: blocks of them, each with its own scale.

A block's scale is its largest magnitude, so that neither a large number next to small ones in another block, nor how small all of them
are, matters: changes of 1e-8 lose no more than changes of 1. All arithmetic is in float32. Zeros stay zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

BLOCK = 512  # numbers with a scale of their own
WARM_UP = 2  # averages of the whole model, in which weights move far, before changes are encoded
_STRETCH = 128 * BLOCK  # stays in cache
_HALF = np.float32(0.5)


class Codec(Protocol):
    """Encodes finite float32, of a multiple of ``BLOCK`` numbers, as bytes; all arrays are flat."""

    def bytes(self, elements: int) -> int:
        """So many numbers, a multiple of ``BLOCK``, as so many bytes."""

    def encode(self, values: np.ndarray, raw: np.ndarray) -> tuple[float, float]:
        """``values`` (float32) into ``raw`` (uint8); afterwards ``values`` is what was lost. The squared norms of both."""

    def decode(self, raw: np.ndarray, values: np.ndarray) -> None:
        """What was encoded into ``values``, which may be shorter: the same bits on every machine."""

    def add(self, raw: np.ndarray, values: np.ndarray) -> None:
        """Likewise, added to ``values``."""


class Scaled:
    """A scale for each block, then its numbers in [-1, 1] times ``_top``, in a dtype of fewer bits."""

    _dtype: np.dtype
    _top = np.float32(1)

    def bytes(self, elements: int) -> int:
        """Scales in front."""
        return elements // BLOCK * 4 + elements * self._dtype.itemsize

    def encode(self, values: np.ndarray, raw: np.ndarray) -> tuple[float, float]:
        """Stretch by stretch."""
        squared, lost = 0.0, 0.0
        scales, codes = self.split(raw)
        scratch = np.empty(min(_STRETCH, values.size), np.float32)
        for start in range(0, values.size, _STRETCH):
            stretch = values[start : start + _STRETCH]
            blocks = stretch.reshape(-1, BLOCK)
            squared += float(stretch.dot(stretch))
            own, of = scales[start // BLOCK :][: len(blocks)], codes[start : start + blocks.size]
            np.maximum(blocks.max(1), -blocks.min(1), out=own)
            inverse = np.zeros_like(own)  # a block whose inverse overflows is sent as zeros
            np.divide(self._top, own, out=inverse, where=own > self._top / np.finfo(np.float32).max)
            scaled = scratch[: blocks.size].reshape(-1, BLOCK)
            np.multiply(blocks, inverse[:, None], out=scaled)
            self._round(scaled.reshape(-1), of)
            own /= self._top
            if self._top > 1:
                np.nextafter(own, np.float32(0), out=own)  # or the largest number of all would come back as infinity
            self._widen(of, scaled.reshape(-1))
            scaled *= own[:, None]
            blocks -= scaled
            lost += float(stretch.dot(stretch))
        return squared, lost

    def decode(self, raw: np.ndarray, values: np.ndarray) -> None:
        """Stretch by stretch."""
        for start, numbers in self._numbers(raw):
            own = values[start : start + numbers.size]
            own[:] = numbers[: own.size]

    def add(self, raw: np.ndarray, values: np.ndarray) -> None:
        """Stretch by stretch."""
        for start, numbers in self._numbers(raw):
            own = values[start : start + numbers.size]
            own += numbers[: own.size]

    def _numbers(self, raw: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        scales, codes = self.split(raw)
        scratch = np.empty(min(_STRETCH, codes.size), np.float32)
        for start in range(0, codes.size, _STRETCH):
            of = codes[start : start + _STRETCH]
            numbers = scratch[: of.size]
            self._widen(of, numbers)
            blocks = numbers.reshape(-1, BLOCK)
            blocks *= scales[start // BLOCK :][: len(blocks), None]
            yield start, numbers

    def split(self, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Its scales, and its numbers."""
        per_block = 4 + BLOCK * self._dtype.itemsize
        scales = raw.size // per_block * 4
        return raw[:scales].view(np.float32), raw[scales:].view(self._dtype)

    def _round(self, scaled: np.ndarray, codes: np.ndarray) -> None:
        raise NotImplementedError

    def _widen(self, codes: np.ndarray, values: np.ndarray) -> None:
        np.copyto(values, codes)


class Int8(Scaled):
    """-127 to 127, rounded to the nearest."""

    _dtype, _top = np.dtype(np.int8), np.float32(127)

    def _round(self, scaled: np.ndarray, codes: np.ndarray) -> None:
        np.rint(scaled, out=scaled)
        np.copyto(codes, scaled, casting="unsafe")


class Fp16(Scaled):
    """Eleven significant bits. The bits are shifted by hand: numpy's own cast takes ten times as long on some machines."""

    _dtype = np.dtype(np.uint16)

    def _round(self, scaled: np.ndarray, codes: np.ndarray) -> None:
        bits = scaled.view(np.uint32)
        sign = (bits >> 16) & 0x8000
        bits &= 0x7FFFFFFF
        # Numbers too small for float16's exponents are rounded by an addition that shifts their bits to where they belong.
        small = (scaled + _HALF).view(np.uint32) - _HALF.view(np.uint32)
        is_small = bits < 113 << 23
        bits += 0xC8000FFF + ((bits >> 13) & 1)
        bits >>= 13
        np.copyto(codes, np.where(is_small, small, bits) | sign, casting="unsafe")

    def _widen(self, codes: np.ndarray, values: np.ndarray) -> None:
        wide = codes.astype(np.uint32)
        size = (wide & 0x7FFF) << 13
        # Likewise read: never as float32 of that size, which TensorFlow's threads take for zero.
        small = ((size + (113 << 23)).view(np.float32) - np.float32(2.0**-14)).view(np.uint32)
        bits = np.where(size < 1 << 23, small, size + (112 << 23))
        np.bitwise_or(bits, (wide & 0x8000) << 16, out=values.view(np.uint32))


class Bf16(Scaled):
    """Eight significant bits: the upper half of float32, rounded to the nearest even."""

    _dtype = np.dtype(np.uint16)

    def _round(self, scaled: np.ndarray, codes: np.ndarray) -> None:
        bits = scaled.view(np.uint32)
        bits += 0x7FFF + ((bits >> 16) & 1)
        bits >>= 16
        np.copyto(codes, bits, casting="unsafe")

    def _widen(self, codes: np.ndarray, values: np.ndarray) -> None:
        np.left_shift(codes, 16, out=values.view(np.uint32), dtype=np.uint32, casting="unsafe")


CODECS: dict[str, Scaled] = {"bf16": Bf16(), "fp16": Fp16(), "int8": Int8()}
