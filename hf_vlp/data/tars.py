"""WebDataset tars: files of one record share a name up to the first dot (`0001.jpg`, `0001.txt`, `0001.json`)."""

import gzip
import json
import tarfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .readers import IMAGE_SUFFIXES, RawRecord

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_TEXT_EXTENSIONS = frozenset({"txt", "text", "caption", "cap", "transcript", "cls", "id"})
# A member that claims more is not read: nothing that a record of this kind can sensibly hold.
_MEMBER_LIMIT = 1 << 30


@dataclass(frozen=True)
class TarShard:
    """The records of a tar, read from front to back.

    A record's fields are its images under their extension, its texts likewise, and the entries of its JSON member as
    `json.<name>`; the first image is also there as `image`. Where the file ends before its end marker, the record
    that was being read and all behind it are lost: that is one bad record, `shard_broken`.
    """

    path: Path

    def __iter__(self) -> Iterator[RawRecord]:
        held: RawRecord | None = None
        name = ""
        problem = None
        try:
            with closing(_Source(self.path)) as source, tarfile.open(fileobj=source, mode="r:") as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    stem, extension = _split_name(member.name)
                    if held is not None and held.key != stem:
                        yield held
                        held = None
                    if held is None:
                        held = RawRecord(stem)
                    name = member.name
                    _add_member(held, archive, member, extension)
                if not source.at_end_marker:
                    problem = "the file ends without the end marker of a tar"
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
            # Its files are incomplete; the record below stands for it and for what follows.
            held = None
        if held is not None:
            yield held
        if problem is not None:
            yield RawRecord(f"after {name}" if name else "start", problem=f"shard_broken: {problem}")


def _split_name(path: str) -> tuple[str, str]:
    """`"a/0001.img.jpg"` -> (`"a/0001"`, `"img.jpg"`)."""
    folder, _, file = path.rpartition("/")
    stem, _, extension = file.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _add_member(record: RawRecord, archive: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> None:
    kind = extension.rpartition(".")[2]
    is_image = f".{kind}" in IMAGE_SUFFIXES
    if not is_image and kind not in _TEXT_EXTENSIONS and kind != "json":
        return
    if member.size > _MEMBER_LIMIT:
        record.problem = f"record_unparsable: {member.name} claims to have {member.size} bytes"
        return
    opened = archive.extractfile(member)
    content = opened.read() if opened is not None else b""
    if len(content) != member.size:
        raise tarfile.ReadError(f"{member.name} has {len(content)} of its {member.size} bytes")
    if is_image:
        record.fields[extension] = content
        record.fields.setdefault("image", content)
    elif kind == "json":
        try:
            entries = json.loads(content)
        except (ValueError, RecursionError) as error:
            record.problem = f"record_unparsable: {member.name}: {error}"
            return
        if isinstance(entries, dict):
            record.fields.update({f"{extension}.{name}": value for name, value in entries.items()})
    else:
        record.fields[extension] = content.decode("utf-8", "surrogateescape")


class _Source:
    """The bytes of a tar, unpacked if need be, with a look at the last header read.

    `tarfile` takes the end of the file for the end of the archive. An archive that was cut off between two members
    would thus seem to be whole, but for the block of zeros that ends every archive.
    """

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as probe:
            packed = probe.read(2) == b"\x1f\x8b"
        self._file: Any = gzip.open(path, "rb") if packed else open(path, "rb")  # noqa: SIM115  closed in close()
        self._last = b""
        self.tell, self.seek, self.close = self._file.tell, self._file.seek, self._file.close

    @property
    def at_end_marker(self) -> bool:
        """The last header read is the block of zeros behind the last member."""
        return self._last == bytes(tarfile.BLOCKSIZE)

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(size)
        if size == tarfile.BLOCKSIZE:
            self._last = content
        return content
