"""CogVLM's forward beside that of its bare language model on the same number of tokens.

    python benchmarks/cogvlm_forward.py                       # a Llama 512 wide, 24 layers, float32 on the CPU
    python benchmarks/cogvlm_forward.py --device cuda --batch 16
    python benchmarks/cogvlm_forward.py --small --repeats 1   # a tiny model, in a second

Both sides give all logits. The image encoder's states are given, since the language model has no eyes to compare with;
the adapter is part of ours and is shown apart. Text alone is compared bit by bit.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from _cogvlm import make_batch, make_model  # noqa: E402
from _flops import counted_flops  # noqa: E402
from _measure import in_turns, print_sides  # noqa: E402

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
        "ours": lambda: model(batch["input_ids"], image_embeds=states).logits,
        "language model": lambda: model.language_model(batch["input_ids"]).logits,
        "our adapter alone": lambda: model.get_image_features(image_embeds=states),
    }
    results: dict[str, dict[str, float]] = {}
    for name, run in sides.items():
        with counted_flops() as flops:
            run()
        results[name] = {"GFLOP": flops.get_total_flops() / 1e9}
    for name, seconds in in_turns(sides, args.repeats, args.device).items():
        results[name]["seconds"] = seconds
    title = f"CogVLM's forward, {batch['input_ids'].numel()} tokens"
    report = print_sides(title, results, "language model", text_is_bit_identical=same)
    if not same:
        raise SystemExit("the logits of a text alone are not those of the language model")
    for column, ratio in report["ratios"].items():
        if not args.small and ratio > MAX_RATIO:
            raise SystemExit(f"{column}: {ratio:.3f} of the language model's, more than {MAX_RATIO}")
    return report


if __name__ == "__main__":
    main()
