"""Names of files and folders to splits, and parts of splits to rows."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_vlp.data.splits import by_split, chosen, parse_split, part_bounds, split_of


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("captions_train2017.json", "train"),
        ("captions_val2014.json", "validation"),
        ("data/test-00000-of-00001.parquet", "test"),
        ("dev.jsonl", "validation"),
        ("VALID/a.tar", "validation"),
        ("pairs.jsonl", None),
        ("latest.csv", None),
        ("trainer.csv", None),
        ("00000.tar", None),
    ],
)
def test_words_of_a_path(path: str, split: str | None) -> None:
    assert split_of(path) == split


def test_files_are_grouped() -> None:
    root = Path("/set")
    files = [root / name for name in ("train-1.tar", "train-0.tar", "test/0.tar")]
    groups = by_split(files, root)
    assert groups == {"train": [files[1], files[0]], "test": [files[2]]}
    assert chosen(groups, "test", "set") == [files[2]] and len(chosen(groups, "all", "set")) == 3
    assert by_split([root / "0.tar"], root) == {"train": [root / "0.tar"]}
    # The folder's own place in the file system says nothing.
    assert by_split([Path("/home/test/set/0.tar")], Path("/home/test/set")) == {
        "train": [Path("/home/test/set/0.tar")]
    }
    with pytest.raises(ValueError, match="it has none"):
        chosen({}, "train", "set")


PERCENT = st.integers(0, 100).map(lambda number: f"{number}%")
BOUND = st.one_of(st.just(""), st.integers(-30, 30).map(str), PERCENT)


@given(BOUND, BOUND, st.integers(0, 20))
def test_parts_are_what_slices_are(first: str, last: str, length: int) -> None:
    def number(bound: str) -> int | None:
        if not bound:
            return None
        return length * int(bound[:-1]) // 100 if bound.endswith("%") else int(bound)

    name, part = parse_split(f"train[{first}:{last}]")
    start, stop = part_bounds(part, length)
    rows = list(range(length))
    assert name == "train" and rows[start:stop] == rows[number(first) : number(last)]


def test_a_whole_split_has_no_part() -> None:
    assert parse_split("train") == ("train", None)
