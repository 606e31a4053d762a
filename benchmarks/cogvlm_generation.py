"""CogVLM's cached generation beside the way of the code that lies beside the published checkpoints.

    python benchmarks/cogvlm_generation.py                       # a Llama 512 wide, 12 layers, float32 on the CPU
    python benchmarks/cogvlm_generation.py --device cuda --batch 16
    python benchmarks/cogvlm_generation.py --small --repeats 1   # a tiny model, in a second

The same weights, images and prompts; see `_cogvlm.py` for what the other sides do. The ids are compared before
anything is timed.
"""

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from _cogvlm import MaskedCogVLM, make_batch, make_model  # noqa: E402
from _generation import compare_generation, generation_parser  # noqa: E402

# Once the image is read, both sides do the same; the rest is left to the clock.
MAX_TIME = 1.05


@torch.inference_mode()
def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = generation_parser(__doc__, batch=4, new_tokens=32, repeats=3)
    parser.add_argument("--words", type=int, default=16)
    parser.add_argument("--layers", type=int, default=12)
    args = parser.parse_args(argv)

    model = make_model(args.small, 2 if args.small else args.layers).to(args.device)
    batch = {name: value.to(args.device) for name, value in make_batch(model, args.batch, args.words).items()}
    masked, double = MaskedCogVLM(model), MaskedCogVLM(model, double=True)
    number = args.new_tokens
    search = {"max_new_tokens": number, "min_new_tokens": number, "do_sample": False}
    sides = {
        "ours": lambda: model.generate(**batch, **search),
        "masked": lambda: masked.generate(**batch, **search),
        "masked, double work": lambda: double.generate(**batch, **search),
    }
    return compare_generation("CogVLM", sides, "masked", args, MAX_TIME)


if __name__ == "__main__":
    main()
