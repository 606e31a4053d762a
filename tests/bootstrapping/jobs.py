"""A job with fake models, and what two sets must have in common to be the same set."""

import json
from pathlib import Path
from typing import Any

from hf_vlp.bootstrapping import CapFiltSettings, Captioner, Source, TextFilter, capfilt
from hf_vlp.bootstrapping.captioner import CaptionSettings
from hf_vlp.bootstrapping.text_filter import FilterSettings
from tests.bootstrapping.fakes import FakeJudge, FakeProcessor, FakeWriter, picture, rows


def captioner(seconds: float = 0.0, salt: float = 0.0, **settings: Any) -> Captioner:
    return Captioner(FakeWriter(seconds, salt), FakeProcessor(), CaptionSettings(**{"max_new_tokens": 6, **settings}))


def text_filter(
    seconds: float = 0.0, salt: float = 0.0, itm: float | None = 0.5, itc: float | None = None
) -> TextFilter:
    return TextFilter(FakeJudge(seconds, salt), FakeProcessor(), FilterSettings(itm, itc, max_length=100))


def human_rows(count: int) -> list[dict[str, Any]]:
    return [
        {"image": picture(500 + number), "text": f"by hand {number}", "key": str(number)} for number in range(count)
    ]


def run(output: Path, seconds: float = 0.0, count: int = 23, **options: Any) -> dict[str, Any]:
    """The whole job: web and human data, both models, units of 4 records."""
    settings = {"unit_size": 4, "gallery": 6} | options.pop("settings", {})
    sources = options.pop("sources", None) or [Source(rows(count)), Source(human_rows(5), "human")]
    defaults = {
        "captioner": captioner(seconds),
        "text_filter": text_filter(seconds),
        "batch_size": 2,
        "workers": 0,
        "say": lambda line: None,
    }
    return capfilt(output, sources, settings=CapFiltSettings(**settings), **{**defaults, **options})


def contents(output: Path) -> dict[str, Any]:
    """Every file of a set by name: bytes, and of the accounts everything but times."""
    found: dict[str, Any] = {}
    for path in sorted(output.rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(output).as_posix()
        if path.suffix != ".json":
            found[name] = path.read_bytes()
            continue
        value = json.loads(path.read_text())
        if isinstance(value, dict):
            value.pop("seconds", None)
            value.pop("text", None)
        found[name] = value
    return found
