"""Which split a file belongs to, and which part of a split is asked for."""

import re
from collections.abc import Iterable
from pathlib import Path

# Word in a file's or folder's name -> split.
_WORDS = {
    "train": "train",
    "training": "train",
    "restval": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "heldout": "heldout",
}
ALL = "all"
_PART = re.compile(r"^(?P<name>[\w-]+)(?:\[(?P<part>[^\]]*)\])?$")
_BOUND = re.compile(r"^(-?\d+)(%?)$")


class NoSplitError(ValueError):
    """The data has no split of the name that was asked for; the message lists those that it has."""

    def __init__(self, where: str, split: str, there: Iterable[str]) -> None:
        super().__init__(f"{where} has no split {split!r}; it has {', '.join(there) or 'none'}")


def as_no_split(error: ValueError, where: str, split: str) -> ValueError:
    """What `datasets.load_dataset` raised, as `NoSplitError` if it is about a split that is missing."""
    # It words the two cases, as a table and as a stream, differently.
    there = re.search(r"\[(.*)\]", str(error))
    if not str(error).startswith(("Unknown split", "Bad split")) or there is None:
        return error
    return NoSplitError(where, split, there[1].replace("'", "").split(", "))


def canonical_split(name: str) -> str:
    """`"val"` and `"dev"` are `"validation"`, `"restval"` is `"train"`; unknown names stay as they are."""
    return _WORDS.get(name.lower(), name)


def split_of(path: str | Path) -> str | None:
    """The split that a path's words name, the last one winning: `captions_val2017.json` -> `"validation"`."""
    found = None
    for word in re.findall(r"[a-z]+", str(path).lower()):
        found = _WORDS.get(word, found)
    return found


def by_split(files: Iterable[Path], root: Path) -> dict[str, list[Path]]:
    """Files by the split that their place below `root` names. If no file names one, all are `"train"`.

    Raises:
        ValueError: some files name a split and others do not.
    """
    groups: dict[str, list[Path]] = {}
    unnamed = []
    for file in sorted(files):
        split = split_of(file.relative_to(root)) if file != root else split_of(file.name)
        if split is None:
            unnamed.append(file)
        else:
            groups.setdefault(split, []).append(file)
    if unnamed and groups:
        raise ValueError(
            f"{root}: {unnamed[0].name} names no split but other files do ({', '.join(sorted(groups))}); put each "
            f"file's split into its name or its folder's"
        )
    return groups or ({"train": unnamed} if unnamed else {})


def chosen(groups: dict[str, list[Path]], split: str, where: str) -> list[Path]:
    """The files of a split; of all of them for `"all"`.

    Raises:
        NoSplitError: there is no such split.
    """
    if split == ALL:
        return [file for files in groups.values() for file in files]
    name = canonical_split(split)
    if name not in groups:
        raise NoSplitError(where, split, [*sorted(groups), *([ALL] if groups else ())])
    return groups[name]


def parse_split(split: str) -> tuple[str, str | None]:
    """`"train[:100]"` -> (`"train"`, `":100"`).

    Raises:
        ValueError: not of the form `name` or `name[from:to]`.
    """
    match = _PART.match(split)
    if match is None:
        raise ValueError(f"split={split!r}: write a name such as 'train', or a part of one such as 'train[:1000]'")
    return match["name"], match["part"]


def part_bounds(part: str, length: int | None) -> tuple[int, int | None]:
    """First and last-plus-one row of a part such as `":100"`, `"10%:20%"`, `"-50:"`.

    Args:
        part: two bounds, each a number of rows or a percentage, each optional.
        length: rows there are; None if that is unknown, as in a stream.

    Raises:
        ValueError: not such a part, or one that needs the length where it is unknown.
    """
    pieces = part.split(":")
    if len(pieces) != 2:
        raise ValueError(f"[{part}]: write two bounds with a colon between them, such as [:1000] or [10%:20%]")
    bounds: list[int | None] = []
    for piece in pieces:
        if not piece:
            bounds.append(None)
            continue
        match = _BOUND.match(piece)
        if match is None:
            raise ValueError(f"[{part}]: {piece!r} is neither a number of rows nor a percentage")
        number, percent = int(match[1]), bool(match[2])
        if (percent or number < 0) and length is None:
            raise ValueError(f"[{part}]: a stream has no known length; give numbers of rows from the start")
        bounds.append(length * number // 100 if percent else number)
    if length is None:
        return bounds[0] or 0, bounds[1]
    start, stop, _ = slice(*bounds).indices(length)
    return start, max(start, stop)
