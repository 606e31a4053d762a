"""The account of a finished job: JSON, a text for people, and the data card of the set."""

import json
from collections.abc import Mapping
from typing import Any

from hf_vlp.bootstrapping.ledger import Ledger, Totals, report_dict
from hf_vlp.bootstrapping.progress import duration, yield_of
from hf_vlp.bootstrapping.writing import suffix, write_atomically, write_json


def write_summary(ledger: Ledger, settings: Mapping[str, Any], totals: Totals, *, write: bool) -> dict[str, Any]:
    """The summary of a set.

    Args:
        write: write `_capfilt/summary.json` and `README.md` as well.

    Returns:
        `settings`, `records`, `texts`, `images`, `files` (which two runs of the same job agree on), `seconds` (process
        time), and `text`, a few lines of it all.
    """
    names = {name for entry in ledger.entries.values() for name in entry.files}
    summary: dict[str, Any] = {
        "settings": dict(settings),
        "records": report_dict(totals.report),
        "texts": {origin: counts.as_dict() for origin, counts in sorted(totals.texts.items())},
        "images": totals.images,
        "files": sorted(name for name in names if not name.startswith("_")),
        "seconds": round(totals.seconds, 1),
    }
    summary["text"] = summary_text(ledger, totals)
    if write:
        path = ledger.folder / "summary.json"
        # A set that is ready stays as it is, down to its dates.
        if not path.is_file() or json.loads(path.read_text()) != json.loads(json.dumps(summary)):
            write_json(path, summary)
            card = card_text(summary).encode()
            write_atomically(ledger.output / "README.md", lambda file: file.write(card))
    return summary


def summary_text(ledger: Ledger, totals: Totals) -> str:
    """What came of a job, in lines."""
    rate = totals.report.seen / totals.seconds if totals.seconds else 0.0
    kept = sum(counts.kept for counts in totals.texts.values())
    lines = [
        f"{ledger.output}: {totals.images:,} images with {kept:,} texts in {totals.files:,} files, from "
        f"{totals.report.seen:,} records in {duration(totals.seconds)} of process time ({rate:,.1f} records a second "
        f"and process)"
    ]
    for origin, counts in sorted(totals.texts.items()):
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in counts.dropped.most_common())
        lines.append(f"  {yield_of(origin, counts)}" + (f" (dropped: {reasons})" if reasons else ""))
    if totals.report.bad_total:
        lines.append(totals.report.table())
    if not kept:
        lines.append(
            "  no text was kept: the set is empty; look at the scores in gallery.html before lowering a limit"
        )
    return "\n".join(lines)


def card_text(summary: Mapping[str, Any]) -> str:
    """`README.md` of the set: the Hub reads its head, people the rest."""
    settings = summary["settings"]
    pattern = f"train-*{suffix(settings['format'])}"
    rows = [
        f"| {origin} | {counts['seen']:,} | {counts['kept']:,} | {counts['kept'] / max(1, counts['seen']):.1%} |"
        for origin, counts in summary["texts"].items()
    ]
    details = json.dumps({name: settings[name] for name in ("sources", "captioner", "filter", "seed")}, indent=2)
    return "\n".join(
        [
            "---",
            "configs:",
            "- config_name: default",
            "  data_files:",
            "  - split: train",
            f'    path: "{pattern}"',
            "---",
            "# Image-text pairs made by CapFilt",
            "",
            f"{summary['images']:,} images. Each row has an `image`, its kept texts (`text`) and, in lists that run",
            "parallel to them, where each text is from (`origin`: web, synthetic, human), its matching probability",
            "(`itm`), its contrastive cosine (`itc`), the seed that it was sampled with (`sampling_seed`) and the",
            "fingerprints of the models that wrote it (`captioner`) and judged it (`filter`).",
            "",
            "| origin | texts | kept | share |",
            "|---|---|---|---|",
            *rows,
            "",
            "What decided the set:",
            "",
            "```json",
            details,
            "```",
            "",
        ]
    )
