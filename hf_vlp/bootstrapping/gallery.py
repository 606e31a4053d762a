"""A page with pictures: which texts were kept, which were dropped, and their scores."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from hf_vlp.bootstrapping.ledger import BINS, Ledger
from hf_vlp.bootstrapping.sources import UnitName
from hf_vlp.bootstrapping.writing import write_atomically
from hf_vlp.data.hashing import stable_hash

TEMPLATE = Path(__file__).with_name("gallery.html.jinja")
_SIDE = 192


@dataclass
class GalleryRecord:
    """A record as the page shows it: a small picture (JPEG, base64) and its texts with what became of them."""

    order: int
    key: str
    picture: str
    texts: list[dict[str, Any]]

    @classmethod
    def of(cls, unit: str, place: int, key: str, picture: str, texts: Iterable[Any]) -> "GalleryRecord":
        """From a record of the job."""
        shown = [
            {
                "text": text.text,
                "origin": text.origin,
                "reason": text.reason,
                "itm": text.score and text.score.itm,
                "itc": text.score and text.score.itc,
            }
            for text in texts
        ]
        return cls(stable_hash("gallery", unit, place), key, picture, shown)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"order": self.order, "key": self.key, "picture": self.picture, "texts": self.texts}

    def dropped(self, origin: str) -> bool:
        """Whether the filter dropped one of its texts of an origin."""
        return any(text["origin"] == origin and text["reason"] in ("itm", "itc") for text in self.texts)


def sample_size(wanted: int, name: UnitName) -> int:
    """How many records a unit puts up for the page: many of the first units and fewer of later ones, so that a job of
    any size, killed at any time, has enough and never too many."""
    return wanted >> (name.shard + name.chunk).bit_length()


def sampled(name: UnitName, rows: int, count: int) -> frozenset[int]:
    """`count` places of a unit, drawn by the unit's name."""
    order = sorted(range(rows), key=lambda place: stable_hash("shown", str(name), place))
    return frozenset(order[:count])


def thumbnail(image: Image.Image) -> str:
    """A small JPEG in base64. Pictures that are small already are not enlarged."""
    small = image.copy()
    small.thumbnail((_SIDE, _SIDE))
    buffer = BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()


def write_gallery(path: Path, ledger: Ledger, summary: Mapping[str, Any], count: int) -> None:
    """Writes the page of a set.

    Args:
        count: records on it, at most.
    """
    records = []
    for file in sorted(ledger.gallery.glob("[!.]*.json")) if ledger.gallery.is_dir() else ():
        if file.stem in ledger.entries:
            records += [GalleryRecord(**value) for value in json.loads(file.read_text())]
    records.sort(key=lambda record: record.order)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        summary=summary,
        sections=sections(records, count),
        histograms=[
            {"origin": origin, "bars": bars(counts["histogram"])}
            for origin, counts in summary["texts"].items()
            if any(counts["histogram"])
        ],
        threshold=threshold(summary["settings"]["filter"]),
    )
    write_atomically(path, lambda file: file.write(page.encode()))


def sections(records: Sequence[GalleryRecord], count: int) -> list[dict[str, Any]]:
    """The records in three groups, each in the order of their draws and shown once."""
    groups = [
        ("A web text was dropped", [record for record in records if record.dropped("web")]),
        ("A synthetic text was dropped", [record for record in records if record.dropped("synthetic")]),
        ("Nothing was dropped by the filter", list(records)),
    ]
    shown: set[int] = set()
    found = []
    for number, (title, members) in enumerate(groups):
        room = -(-(count - len(shown)) // (len(groups) - number))
        chosen = [record for record in members if record.order not in shown and (number < 2 or _clean(record))][:room]
        shown |= {record.order for record in chosen}
        if chosen:
            found.append({"title": title, "records": chosen})
    return found


def _clean(record: GalleryRecord) -> bool:
    return not (record.dropped("web") or record.dropped("synthetic"))


def bars(histogram: Sequence[int]) -> list[dict[str, Any]]:
    """Bars of a histogram over [0, 1], heights as shares of the highest."""
    highest = max(histogram) or 1
    return [
        {"height": round(100 * count / highest, 1), "label": f"{i / BINS:.2f} to {(i + 1) / BINS:.2f}: {count:,}"}
        for i, count in enumerate(histogram)
    ]


def threshold(filter_settings: Mapping[str, Any] | None) -> str:
    """What a text had to reach, in words."""
    if filter_settings is None:
        return "There was no filter: every text that could be read was kept."
    parts = []
    if filter_settings["itm_threshold"] is not None:
        parts.append(f"a matching probability of at least {filter_settings['itm_threshold']:g}")
    if filter_settings["itc_threshold"] is not None:
        parts.append(f"a cosine of at least {filter_settings['itc_threshold']:g}")
    return f"A text was kept if it reached {' and '.join(parts)}."
