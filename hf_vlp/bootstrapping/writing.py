"""Files of the written set: parquet or WebDataset tars, the same bytes for the same rows, whole or not there."""

import io
import json
import os
import socket
import tarfile
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, List, Value
from PIL import Image as Pillow

FORMATS = ("parquet", "webdataset")
TEMPORARY = ".part-"

_TEXT, _NUMBER = Value("string"), Value("float32")
# One row an image; the lists run parallel to `text`.
PAIR_FEATURES = Features(
    {
        "image": Image(decode=False),
        "text": List(_TEXT),
        "image_id": _TEXT,
        "source": _TEXT,
        "key": _TEXT,
        "origin": List(_TEXT),
        "itm": List(_NUMBER),
        "itc": List(_NUMBER),
        "sampling_seed": List(Value("int64")),
        "captioner": List(_TEXT),
        "filter": List(_TEXT),
    }
)
# One row a text, kept or not, without pictures.
TEXT_FEATURES = Features(
    {
        "source": _TEXT,
        "key": _TEXT,
        "image_id": _TEXT,
        "text": _TEXT,
        "origin": _TEXT,
        "kept": Value("bool"),
        "reason": _TEXT,
        "itm": _NUMBER,
        "itc": _NUMBER,
        "sampling_seed": Value("int64"),
    }
)
_EXTENSIONS = {
    "JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "PPM": "ppm",
    "JPEG2000": "jp2", "AVIF": "avif",
}  # fmt: skip


def write_atomically(path: Path, fill: Callable[[Any], None]) -> tuple[int, str]:
    """Writes a file under another name and renames it, so that `path` never is a part of itself.

    Returns:
        Size in bytes and SHA-256.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of this process alone: another one may be at the same file.
    temporary = path.with_name(f"{TEMPORARY}{socket.gethostname()}-{os.getpid()}-{path.name}")
    try:
        with open(temporary, "w+b") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
            file.seek(0)
            digest = sha256()
            while block := file.read(1 << 20):
                digest.update(block)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)
    return size, digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """JSON, atomically."""
    content = json.dumps(value, indent=1, ensure_ascii=False).encode()
    write_atomically(path, lambda file: file.write(content))


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], features: Features) -> tuple[int, str]:
    """A parquet file of rows that fit `features`, atomically; size and SHA-256."""
    table = pa.Table.from_pylist(list(rows), schema=features.arrow_schema)
    return write_atomically(path, lambda file: pq.write_table(table, file))


def write_tar(path: Path, rows: Sequence[Mapping[str, Any]]) -> tuple[int, str]:
    """A WebDataset tar of rows of `PAIR_FEATURES`: `<number>.<extension>` and `<number>.json` each; size and SHA-256.

    Every member has the same owner and time, so that the same rows are the same bytes.
    """

    def fill(file: Any) -> None:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for number, row in enumerate(rows):
                content, extension = _storable(row["image"]["bytes"])
                entries = {name: value for name, value in row.items() if name != "image"}
                text = json.dumps(entries, ensure_ascii=False).encode()
                for name, data in ((f"{number:06d}.{extension}", content), (f"{number:06d}.json", text)):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, BytesIO(data))

    return write_atomically(path, fill)


def write_pairs(path: Path, rows: Sequence[Mapping[str, Any]], kind: str) -> tuple[int, str]:
    """A data file of the chosen kind."""
    return write_table(path, rows, PAIR_FEATURES) if kind == "parquet" else write_tar(path, rows)


def suffix(kind: str) -> str:
    """Of the data files of a kind.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in FORMATS:
        raise ValueError(f"format={kind!r}: sets are written as one of {FORMATS}")
    return ".parquet" if kind == "parquet" else ".tar"


def png_bytes(image: Pillow.Image) -> bytes:
    """A picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _storable(content: bytes) -> tuple[bytes, str]:
    """A picture file and its extension; as PNG where readers of tars would not know the kind by its name."""
    image = Pillow.open(BytesIO(content))
    if image.format in _EXTENSIONS:
        return content, _EXTENSIONS[image.format]
    return png_bytes(image.convert("RGB")), "png"


def _sync_folder(folder: Path) -> None:
    # The rename itself has to survive a power cut; not every file system can be asked for that.
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
