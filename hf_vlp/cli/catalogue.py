"""`hf-vlp list`: what there is."""

import json

from hf_vlp.cli.convert import FORMATS
from hf_vlp.cli.main import parser
from hf_vlp.cli.train import scripts, summary
from hf_vlp.models.catalog import ARCHITECTURES

_EXAMPLES = """\
  hf-vlp list
  hf-vlp list --json"""


def main(argv: list[str]) -> int:
    command = parser("list", "Shows the architectures, the training scripts and the formats of `convert`.", _EXAMPLES)
    command.add_argument("--json", action="store_true", help="as JSON")
    options = command.parse_args(argv)
    if options.json:
        print(json.dumps(catalogue(), indent=2))
        return 0
    rows = [("model type", "name", "paper", "format", "objectives", "scripts")]
    for row in catalogue()["architectures"]:
        rows.append(
            (
                row["model_type"],
                row["title"],
                f"arXiv:{row['paper']}",
                "native" if row["native"] else "own code",
                ", ".join(row["objectives"]),
                ", ".join(dict.fromkeys(row["scripts"].values())),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for title, entries in (("scripts (hf-vlp train)", "scripts"), ("formats (hf-vlp convert)", "formats")):
        print(f"\n{title}")
        for name, text in catalogue()[entries].items():
            print(f"  {name:<20} {text}")
    return 0


def catalogue() -> dict:
    """Architectures, scripts and formats, as `--json` prints them."""
    return {
        "architectures": [
            {
                "model_type": architecture.model_type,
                "title": architecture.title,
                "paper": architecture.paper,
                "native": architecture.native,
                "objectives": list(architecture.objectives),
                "scripts": architecture.script,
                "roles": sorted(architecture.classes),
            }
            for architecture in ARCHITECTURES.values()
        ],
        "scripts": {name: summary(path) for name, path in scripts().items()},
        "formats": {name: entry.summary for name, entry in FORMATS.items()},
    }
