"""Batches of conversations of like length, in an order that is a function of (seed, epoch)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.random import Generator, Philox

from ..hashing import stable_hash

# Global batches whose records are sorted together. Fewer mix more, more sort better.
WINDOW = 50


def length_grouped_order(
    lengths: Sequence[int],
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    groups: Sequence[int] | None = None,
    world_size: int = 1,
    window: int = WINDOW,
) -> np.ndarray:
    """An order of records in which each global batch holds records of like length.

    Records are shuffled, cut into windows of `window` batches, sorted by length inside each, cut into batches, and the
    batches shuffled. Which records make up a batch depends on the size of the global batch only, not on how many
    processes share it; inside a batch, long and short records are dealt out so that the processes, which take equal
    stretches of it, have about as much to do.

    Args:
        lengths: of each record, in tokens or characters.
        batch_size: records of a global batch.
        groups: if given, a number for each record; records of different groups share a batch only where their groups
            end (LLaVA keeps conversations with and without pictures apart).
        world_size: processes that share a batch.
        window: batches sorted together.

    Returns:
        A permutation of the records. A batch that is smaller than the others stands last.

    Raises:
        ValueError: a number below 1, or other numbers of groups than of lengths.
    """
    if batch_size < 1 or world_size < 1 or window < 1:
        raise ValueError(f"batch_size={batch_size}, world_size={world_size}, window={window}: each at least 1")
    values = np.asarray(lengths, dtype=np.int64)
    kinds = np.zeros(len(values), dtype=np.int64) if groups is None else np.asarray(groups, dtype=np.int64)
    if len(kinds) != len(values):
        raise ValueError(f"{len(kinds)} groups for {len(values)} lengths")
    draws = Generator(Philox(key=stable_hash("lengths", seed, epoch)))
    full: list[np.ndarray] = []
    left: list[np.ndarray] = []
    for kind in np.unique(kinds):
        members = np.flatnonzero(kinds == kind)
        members = members[draws.permutation(len(members))]
        whole = len(members) // batch_size * batch_size
        left.append(members[whole:])
        full += _batches(members[:whole], values, batch_size, window)
    # What does not fill a batch of its own group, by length again.
    rest = np.concatenate(left) if left else np.zeros(0, dtype=np.int64)
    rest = rest[np.argsort(-values[rest], kind="stable")]
    whole = len(rest) // batch_size * batch_size
    full += [rest[start : start + batch_size] for start in range(0, whole, batch_size)]
    full = [full[place] for place in draws.permutation(len(full))]
    dealt = [_dealt(batch, values, world_size) for batch in [*full, rest[whole:]] if len(batch)]
    return np.concatenate(dealt) if dealt else np.zeros(0, dtype=np.int64)


def _batches(members: np.ndarray, values: np.ndarray, batch_size: int, window: int) -> list[np.ndarray]:
    batches = []
    for start in range(0, len(members), window * batch_size):
        held = members[start : start + window * batch_size]
        held = held[np.argsort(-values[held], kind="stable")]
        batches += [held[first : first + batch_size] for first in range(0, len(held), batch_size)]
    return batches


def _dealt(batch: np.ndarray, values: np.ndarray, world_size: int) -> np.ndarray:
    """A batch, longest first, dealt out to the stretches that `world_size` processes take of it.

    The stretches are `count * rank // world_size` to `count * (rank + 1) // world_size`, as the loader cuts them. The
    next longest record goes to the process with the least so far that has a place left.
    """
    if world_size == 1:
        return batch
    count = len(batch)
    places = [count * (rank + 1) // world_size - count * rank // world_size for rank in range(world_size)]
    hands: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for record in batch[np.argsort(-values[batch], kind="stable")]:
        open_ranks = [rank for rank in range(world_size) if len(hands[rank]) < places[rank]]
        rank = min(open_ranks, key=lambda rank: (loads[rank], rank))
        hands[rank].append(int(record))
        loads[rank] += int(values[record])
    return np.array([record for hand in hands for record in hand], dtype=np.int64)


def conversation_lengths(
    rows: Any, *, image_tokens: int = 0, measure: Callable[[str], int] | None = None
) -> tuple[list[int], list[int]]:
    """How long each conversation is, and whether it has pictures.

    Args:
        rows: with `images` and `messages`; pictures are not decoded.
        image_tokens: tokens that a picture counts for.
        measure: length of a text; words if left out, as in LLaVA.

    Returns:
        Lengths, at least 1 each, and 1 for conversations with pictures, 0 for others.
    """
    held: Iterable[Mapping[str, Any]] = rows
    if hasattr(rows, "select_columns"):
        held = rows.select_columns(["messages"])
    lengths, groups = [], []
    for row in held:
        words = images = 0
        for message in row["messages"] or ():
            for entry in message["content"]:
                if entry["type"] == "image":
                    images += 1
                else:
                    words += measure(entry["text"] or "") if measure else len((entry["text"] or "").split())
        lengths.append(max(1, words + images * image_tokens))
        groups.append(int(images > 0))
    return lengths, groups
