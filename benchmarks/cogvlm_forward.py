"""CogVLM's forward beside that of its bare language model on the same number of tokens.

    python benchmarks/cogvlm_forward.py                       # a Llama 512 wide, 24 layers, float32 on the CPU
    python benchmarks/cogvlm_forward.py --device cuda --batch 16
    python benchmarks/cogvlm_forward.py --small --repeats 1   # a tiny model, in a second

Both sides give all logits. The image encoder's states are given, since the language model has no eyes to compare with;
the adapter is part of ours and is shown apart. Text alone is compared bit by bit.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
from _cogvlm import make_batch, make_model, ratio_of_medians, timed  # noqa: E402
from _memory import table  # noqa: E402

MAX_RATIO = 1.15


@torch.inference_mode()
def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--words", type=int, default=128)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs a side; the median is shown")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    args = parser.parse_args(argv)

    model = make_model(args.small, 2 if args.small else args.layers).to(args.device)
    batch = {name: value.to(args.device) for name, value in make_batch(model, args.batch, args.words).items()}
    states = model.encode_images(batch["pixel_values"])
    # Read to the end before timing: routing must change nothing but the experts.
    same = torch.equal(
        model(batch["input_ids"][:, -10:]).logits, model.language_model(batch["input_ids"][:, -10:]).logits
    )
    sides = {
        "CogVLM": lambda: model(batch["input_ids"], image_embeds=states).logits,
        "language model": lambda: model.language_model(batch["input_ids"]).logits,
        "CogVLM's adapter": lambda: model.get_image_features(image_embeds=states),
    }
    seconds, flops = {name: [] for name in sides}, {}
    for name, run in sides.items():
        with FlopCounterMode(display=False) as counter:
            run()
        flops[name] = counter.get_total_flops()
    for _ in range(args.repeats):
        # Side by side, so that what else the machine does hits both.
        for name, run in sides.items():
            seconds[name] += timed(run, 1, args.device)
    result = {
        "tokens": batch["input_ids"].numel(),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "gflops": {name: value / 1e9 for name, value in flops.items()},
        "time_ratio": ratio_of_medians(seconds["language model"], seconds["CogVLM"]),
        "flops_ratio": flops["CogVLM"] / flops["language model"],
        "text_is_bit_identical": same,
    }
    rows = [[name, f"{result['gflops'][name]:.2f}", f"{result['seconds'][name]:.4f}"] for name in sides]
    print(table(f"forward, {result['tokens']} tokens", ["side", "GFLOP", "seconds"], rows))
    print(f"time {result['time_ratio']:.3f} x, FLOPs {result['flops_ratio']:.3f} x (at most {MAX_RATIO})")
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    found = main()
    sys.exit(not (found["time_ratio"] <= MAX_RATIO and found["flops_ratio"] <= MAX_RATIO))
