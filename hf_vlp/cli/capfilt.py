"""`hf-vlp capfilt`: captions and filters image-text data into the next pretraining set."""

import argparse
import dataclasses
import typing
from typing import Any

from hf_vlp.bootstrapping.arguments import CapFiltArguments
from hf_vlp.cli.main import parser

_EXAMPLES = """\
  hf-vlp capfilt --data web.parquet --captioner outputs/captioner --filter outputs/filter --output outputs/capfilt
  hf-vlp capfilt --data shards/ --filter org/blip2-stage1 --itm_threshold 0.6 --output outputs/filtered
  hf-vlp capfilt --data shapes --shapes size=2000 caption_noise=0.4 --captioner outputs/c --output outputs/captioned
  accelerate launch --num_processes 8 training_scripts/capfilt.py ...       # the same job on several processes

The same command started again goes on where it was stopped; on a set that is ready it does nothing."""


def main(argv: list[str]) -> int:
    command = parser(
        "capfilt",
        "Makes the next pretraining set: a captioner writes texts for the images, a filter drops the ones that do not "
        "fit (arXiv 2201.12086).",
        _EXAMPLES,
    )
    hints = typing.get_type_hints(CapFiltArguments)
    for entry in dataclasses.fields(CapFiltArguments):
        add_flag(command, entry, hints[entry.name])
    given = vars(command.parse_args(argv))

    from hf_vlp.bootstrapping import JobError, run_arguments

    try:
        run_arguments(CapFiltArguments(**given), lambda line: print(line, flush=True))
    except JobError as error:
        raise ValueError(str(error)) from error
    return 0


def add_flag(command: argparse.ArgumentParser, entry: "dataclasses.Field[Any]", kind: Any) -> None:
    """The flag of a field: a switch for bool, several words for a list, else one value."""
    text = entry.metadata["help"].replace("%", "%%")
    if entry.default not in (dataclasses.MISSING, None, "", False):
        text = f"{text} (by default {entry.default})"
    flag = f"--{entry.name}"
    if kind is bool:
        command.add_argument(flag, action=argparse.BooleanOptionalAction, default=entry.default, help=text)
    elif typing.get_origin(kind) is list:
        command.add_argument(flag, nargs="+", default=[], metavar="TEXT", help=text)
    else:
        one = next((part for part in typing.get_args(kind) if part is not type(None)), kind)
        choices = entry.metadata.get("choices")
        metavar = None if choices else {int: "INT", float: "FLOAT"}.get(one, "TEXT")
        command.add_argument(
            flag, type=one, default=entry.default, choices=choices, metavar=metavar, help=text,
            required=entry.name == "output",
        )  # fmt: skip
