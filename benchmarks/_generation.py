"""What the benchmarks of generation share: both sides write the same ids, then they take turns and are measured."""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from _flops import counted_flops  # noqa: E402
from _measure import in_turns, print_sides  # noqa: E402


def generation_parser(description: str, *, batch: int, new_tokens: int, repeats: int) -> argparse.ArgumentParser:
    """The arguments that all have, with their defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--new-tokens", type=int, default=new_tokens)
    parser.add_argument("--repeats", type=int, default=repeats, help="timed runs a side; the median is shown")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    return parser


def compare_generation(
    title: str, sides: Mapping[str, Callable[[], Tensor]], other: str, args: argparse.Namespace, max_time: float
) -> dict[str, Any]:
    """Compares what the sides write, then measures and prints them.

    Args:
        sides: name -> a run that gives ids (B, … + new tokens); one is `"ours"`.
        other: the side that ours is measured by.
        args: of `generation_parser`.
        max_time: share of the other side's time that ours may take; not held with `--small`.

    Raises:
        SystemExit: the sides write different ids, or ours takes too long.
    """
    new = args.new_tokens
    ids = {name: run()[:, -new:] for name, run in sides.items()}
    for name, written in ids.items():
        if not written.equal(ids["ours"]):
            raise SystemExit(f"{title}: ours and {name} write different ids, so figures would mean nothing")
    seconds = in_turns(sides, args.repeats, args.device)
    results: dict[str, dict[str, float]] = {}
    for name, run in sides.items():
        with counted_flops() as flops:
            run()
        results[name] = {"GFLOP": flops.get_total_flops() / 1e9}
        if name in seconds:
            results[name] |= {"seconds": seconds[name], "tokens/s": ids[name].numel() / seconds[name]}
    setting = {name: value for name, value in vars(args).items() if name != "repeats"}
    report = print_sides(f"{title}, {args.batch} x {new} new tokens", results, other, setting=setting)
    if seconds and not args.small and report["ratios"]["seconds"] > max_time:
        raise SystemExit(f"{title}: {report['ratios']['seconds']:.3f} of the time of {other}, more than {max_time}")
    return report
