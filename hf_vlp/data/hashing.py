"""Hashes that are the same on every machine, in every process and for every version of Python.

Python's own `hash` of a string changes from process to process, so nothing that must survive a restart may use it.
"""

from hashlib import blake2b


def stable_hash(*parts: int | str) -> int:
    """63-bit non-negative hash of a sequence of numbers and strings; `1` and `"1"` hash differently.

    Args:
        parts: integers of any size and strings, in order.
    """
    digest = blake2b(digest_size=8)
    for part in parts:
        kind, content = (
            (b"i", b"%d" % part) if isinstance(part, int) else (b"s", part.encode("utf-8", "surrogatepass"))
        )
        # With its length in front, no part can pass for the end of one and the beginning of the next.
        digest.update(b"%b%d:%b" % (kind, len(content), content))
    return int.from_bytes(digest.digest(), "little") >> 1


def record_seed(seed: int, epoch: int, index: int) -> int:
    """Seed of everything that is random about record `index` in `epoch`.

    It depends on nothing else, so neither a restart nor another number of workers changes what a record becomes.
    """
    return stable_hash("record", seed, epoch, index)


def drawn_text(seed: int, epoch: int, index: int, count: int) -> int:
    """Which of the `count` texts of record `index` is read in `epoch`.

    Epochs come in rounds of `count`: a round starts at a text drawn for it and walks on through the others, so that
    in every round each text is read exactly once.

    Args:
        count: how many texts the record has, at least 1.

    Raises:
        ValueError: `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    turn, step = divmod(epoch, count)
    start = stable_hash("text", seed, turn, index)
    return (start + step) % count


def image_id_hash(image_id: int | str) -> int:
    """63-bit hash of an image id, as it stands in `image_ids` of a batch; `42` and `"42"` name the same image."""
    return stable_hash(str(image_id))
