"""Random numbers by index: the only source of chance in Shapes.

Philox is a counter-based generator: its key (seed, stream, index) *is* its state, so scene 7,000,000 costs as much
as scene 0. Only raw 64-bit words are taken from it, because numpy promises them across versions and platforms but
does not promise the same for `Generator.integers` and its kin.
"""

import threading
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.random import Philox

T = TypeVar("T")
_MASK = (1 << 64) - 1
_CHUNK = 64
# Philox makes four words a count.
_COUNTS = _CHUNK // 4


class Draws:
    """A stream of random choices that is a function of (seed, stream, index) alone.

    Args:
        seed: any integer; taken modulo 2**64.
        stream: which use of the index this is (split, purpose), 0 to 65,535.
        index: number of the scene, 0 to 2**48 - 1.
    """

    __slots__ = ("_chunk", "_high", "_low", "_words")

    def __init__(self, seed: int, stream: int, index: int) -> None:
        if not 0 <= index < 1 << 48:
            raise ValueError(f"index must lie in [0, 2**48), not {index}")
        self._low, self._high = seed & _MASK, (stream << 48) | index
        self._chunk = 0
        self._words: list[int] = []

    def word(self) -> int:
        """64 random bits."""
        if not self._words:
            self._words = _words(self._low, self._high, self._chunk)
            self._chunk += 1
        return self._words.pop()

    def below(self, count: int) -> int:
        """Uniform integer in [0, count). The bias of the multiply-and-shift is below count / 2**64."""
        return (self.word() * count) >> 64

    def between(self, low: int, high: int) -> int:
        """Uniform integer in [low, high], both ends included."""
        return low + ((self.word() * (high - low + 1)) >> 64)

    def chance(self, probability: float) -> bool:
        """True with the given probability. One word is used whatever the probability is, and an event that happens at
        one probability happens at every higher one."""
        return self.word() * 2.0**-64 < probability

    def choice(self, options: Sequence[T]) -> T:
        """One of `options`, uniformly."""
        return options[(self.word() * len(options)) >> 64]

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different positions of `options`, in random order."""
        pool = list(options)
        for position in range(count):
            other = position + ((self.word() * (len(pool) - position)) >> 64)
            pool[position], pool[other] = pool[other], pool[position]
        return pool[:count]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        """All of `options`, in random order."""
        return self.sample(options, len(options))


_scratch = threading.local()


def _words(low: int, high: int, chunk: int) -> list[int]:
    """Words 64 * chunk to 64 * chunk + 63 of `Philox(key=(high << 64) | low)`.

    Setting the state of one generator is ten times as fast as making another, which asks the system for entropy even
    when it is given a key.
    """
    if not hasattr(_scratch, "bits"):
        _scratch.bits = Philox(key=0)
        _scratch.key, _scratch.counter = np.zeros(2, np.uint64), np.zeros(4, np.uint64)
        _scratch.state = {
            "bit_generator": "Philox",
            "state": {"counter": _scratch.counter, "key": _scratch.key},
            "buffer": np.zeros(4, np.uint64),
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
    state: dict[str, Any] = _scratch.state
    _scratch.key[0], _scratch.key[1] = low, high
    _scratch.counter[0] = chunk * _COUNTS
    _scratch.bits.state = state
    return _scratch.bits.random_raw(_CHUNK).tolist()
