"""CogVLM's cached generation beside the way of the code that lies beside the published checkpoints.

    python benchmarks/cogvlm_generation.py                       # a Llama 512 wide, 12 layers, float32 on the CPU
    python benchmarks/cogvlm_generation.py --device cuda --batch 16
    python benchmarks/cogvlm_generation.py --small --repeats 1   # a tiny model, in a second

The same weights, images and prompts; see `_cogvlm.py` for what the other sides do. The ids are compared before
anything is timed.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from _cogvlm import MaskedCogVLM, make_batch, make_model, ratio_of_medians, timed  # noqa: E402
from _memory import table  # noqa: E402

MIN_RATIO = 1.0


@torch.inference_mode()
def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--words", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs a side; the median is shown")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    args = parser.parse_args(argv)

    model = make_model(args.small, 2 if args.small else args.layers).to(args.device)
    batch = {name: value.to(args.device) for name, value in make_batch(model, args.batch, args.words).items()}
    masked, double = MaskedCogVLM(model), MaskedCogVLM(model, double=True)
    number = args.new_tokens
    sides = {
        "ours": lambda: model.generate(**batch, max_new_tokens=number, min_new_tokens=number, do_sample=False),
        "masked": lambda: masked.generate(**batch, max_new_tokens=number),
        "masked, double work": lambda: double.generate(**batch, max_new_tokens=number),
    }
    ids = {name: run() for name, run in sides.items()}
    same = all(torch.equal(one[:, -number:], ids["ours"][:, -number:]) for one in ids.values())
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, run in sides.items():
            seconds[name] += timed(run, 1, args.device)
    result = {
        "ids_equal": same,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "speedup": ratio_of_medians(seconds["ours"], seconds["masked"]),
        "speedup_over_double_work": ratio_of_medians(seconds["ours"], seconds["masked, double work"]),
    }
    rows = [[name, f"{value:.3f}", f"{args.batch * number / value:.1f}"] for name, value in result["seconds"].items()]
    print(table(f"{args.batch} x {number} new tokens", ["side", "seconds", "tokens/s"], rows))
    print(f"ids equal: {same}; {result['speedup']:.2f} x (at least {MIN_RATIO})")
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    found = main()
    sys.exit(not (found["ids_equal"] and found["speedup"] >= MIN_RATIO))
