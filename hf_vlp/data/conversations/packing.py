"""Conversations of different lengths laid end to end, so that a batch holds hardly any padding."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of at most `capacity` tokens that hold sequences of the given lengths: best fit, longest first.

    Args:
        lengths: tokens of each sequence.
        capacity: most tokens of a row.

    Returns:
        The sequences of each row by number, in ascending order; rows in the order of their first sequences. The same
        lengths always give the same rows.

    Raises:
        ValueError: a sequence is longer than a row, or has no token.
    """
    rows: list[list[int]] = []
    # (room left, row) of the rows that have room, ascending.
    open_rows: list[tuple[int, int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        length = lengths[number]
        if not 0 < length <= capacity:
            raise ValueError(f"sequence {number} has {length} tokens; a row holds 1 to {capacity}")
        place = bisect_left(open_rows, (length, -1))
        if place < len(open_rows):
            room, row = open_rows.pop(place)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(number)
        if room > length:
            insort(open_rows, (room - length, row))
    return sorted(sorted(row) for row in rows)
