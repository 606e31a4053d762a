"""Captioning throughput: ours against native `BlipForConditionalGeneration.generate`, same weights and images.

    python benchmarks/blip_captioning.py                       # ViT-B/16 at 384 px, batch 16, float32 on the CPU
    python benchmarks/blip_captioning.py --device cuda --batch 64
    python benchmarks/blip_captioning.py --small --repeats 1   # a tiny model, in a second

Both sides caption from pixels, with beam search (3 beams) and by nucleus sampling (p 0.9). The native class projects
an image's keys and values once a beam, ours once an image. Before anything is timed the ids of both are compared: of
beam search under transformers' own rule for the length of a beam (`count_prompt=False`), of sampling from the same
seed with the same settings.
FLOPs are counted with the attention written out, since the counter does not know every fused kernel.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from hf_vlp.models.blip.modeling_blip import BlipForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent))
from _blip import base_config, native_config, spread  # noqa: E402
from _flops import counted_flops  # noqa: E402
from _measure import in_turns, print_sides  # noqa: E402

MIN_RATIO = 1.2


@torch.inference_mode()
def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--beams", type=int, default=3)
    parser.add_argument("--length", type=int, default=20, help="tokens of a caption, prompt included")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs a side; the median is shown")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    config = base_config(384, small=args.small)
    ours = BlipForConditionalGeneration(config)
    spread(ours)
    ours = ours.to(args.device).eval()
    native = transformers.BlipForConditionalGeneration(native_config(config))
    native.load_state_dict(ours.state_dict())
    native = native.to(args.device).eval()
    side = config.vision_config.image_size
    pixels = torch.randn(args.batch, 3, side, side, generator=torch.Generator().manual_seed(1)).to(args.device)
    # "a picture of", as the released captioners are prompted.
    prompt = torch.tensor([[101, 201, 202, 203, 102]], device=args.device).repeat(args.batch, 1)

    def run(model: Any, options: dict[str, Any]) -> Tensor:
        torch.manual_seed(2)
        return model.generate(pixel_values=pixels, input_ids=prompt.clone(), **options)

    lengths = {"max_length": args.length, "min_length": 5}
    modes: dict[str, dict[str, Any]] = {
        f"beam {args.beams}": {"num_beams": args.beams, **lengths},
        "nucleus": {"do_sample": True, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1, **lengths},
    }
    report: dict[str, Any] = {}
    slow = []
    for mode, options in modes.items():
        sides: dict[str, Callable[[], Tensor]] = {
            "native": lambda options=options: run(native, options),
            "ours": lambda options=options: run(ours, options | {"count_prompt": False}),
        }
        ids = {name: function() for name, function in sides.items()}
        equal = torch.equal(ids["native"], ids["ours"])
        print(f"{mode}: ids of both sides {'are equal' if equal else 'differ'}")
        seconds = in_turns(sides, args.repeats, args.device)
        results = {}
        for name, function in sides.items():
            with counted_flops() as flops:
                function()
            results[name] = {"GFLOP an image": flops.get_total_flops() / args.batch / 1e9}
            if name in seconds:
                results[name]["images/s"] = args.batch / seconds[name]
        kind = "tiny BLIP" if args.small else "BLIP ViT-B/16, 384 px"
        title = f"{kind}, {mode}, batch {args.batch}, float32, {args.device}"
        report[mode] = print_sides(title, results, "native", equal=equal)
        if not equal:
            slow.append(f"{mode}: other ids than the native class")
        if not args.small and args.repeats and report[mode]["ratios"]["images/s"] < MIN_RATIO:
            slow.append(f"{mode}: less than {MIN_RATIO} times the native throughput")
    if slow:
        raise SystemExit("; ".join(slow))
    return report


if __name__ == "__main__":
    main()
