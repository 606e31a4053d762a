"""Random numbers by index: the only source of chance in Shapes.

Philox is a counter-based generator: its key (seed, stream, index) *is* its state, so scene 7,000,000 costs as much
as scene 0. Only raw 64-bit words are taken from it, because numpy promises them across versions and platforms but
does not promise the same for `Generator.integers` and its kin.
"""

from collections.abc import Sequence
from typing import TypeVar

from numpy.random import Philox

T = TypeVar("T")
_MASK = (1 << 64) - 1
_CHUNK = 64


class Draws:
    """A stream of random choices that is a function of (seed, stream, index) alone.

    Args:
        seed: any integer; taken modulo 2**64.
        stream: which use of the index this is (split, purpose), 0 to 65,535.
        index: number of the scene, 0 to 2**48 - 1.
    """

    __slots__ = ("_bits", "_words")

    def __init__(self, seed: int, stream: int, index: int) -> None:
        if not 0 <= index < 1 << 48:
            raise ValueError(f"index must lie in [0, 2**48), not {index}")
        self._bits = Philox(key=(((stream << 48) | index) << 64) | (seed & _MASK))
        self._words: list[int] = []

    def word(self) -> int:
        """64 random bits."""
        if not self._words:
            self._words = self._bits.random_raw(_CHUNK).tolist()
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
