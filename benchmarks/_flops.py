"""Floating-point operations of a piece of code, attention included. Shared by the benchmarks here."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    """Counts what runs inside, with attention written out: the counter does not know every fused kernel, of those for
    the CPU none. What attention computes again in its backward is not counted so. Read with `get_total_flops()`.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        yield flops
