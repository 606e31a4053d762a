"""Captioning throughput: ours against native `generate`, on the same weights and images.

    python benchmarks/captioning.py                       # OPT-125m's size, batch 16, 3 beams, float32 on the CPU
    python benchmarks/captioning.py --device cuda --batch 64
    python benchmarks/captioning.py --small --repeats 1   # a tiny model, in a second

Both sides caption from pixels with beam search: the native `Blip2ForConditionalGeneration` reads every prompt once a
beam, ours once an image. The ids are compared before anything is timed. The vision tower has `--vision-layers` blocks
(39 in the published model); it costs both sides the same.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import Blip2Config, OPTConfig

from hf_vlp.models.blip2.modeling_blip_2 import Blip2ForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent))
from _blip2 import set_attention, stage1_config  # noqa: E402
from _memory import TrackedAllocations, table  # noqa: E402

MIN_RATIO = 1.0


def make_config(small: bool, vision_layers: int) -> Blip2Config:
    text = OPTConfig(init_std=0.2)
    if small:
        text = OPTConfig(
            vocab_size=500, hidden_size=48, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, init_std=0.2,
            word_embed_proj_dim=48, max_position_embeddings=128,
        )  # fmt: skip
    base = stage1_config(small, use_qformer_text_input=False)
    base.vision_config.num_hidden_layers = vision_layers
    return Blip2Config(
        vision_config=base.vision_config.to_dict(),
        qformer_config=base.qformer_config.to_dict(),
        text_config=text.to_dict(),
        image_token_index=text.vocab_size - 1,
    )


@torch.inference_mode()
def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--beams", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--vision-layers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs a side; the median is shown")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    config = make_config(args.small, args.vision_layers)
    ours = Blip2ForConditionalGeneration(config).to(args.device).eval()
    native = transformers.Blip2ForConditionalGeneration(config).to(args.device).eval()
    native.load_state_dict(ours.state_dict())
    side = config.vision_config.image_size
    pixel_values = torch.randn(args.batch, 3, side, side, device=args.device)
    prompt = [config.image_token_index] * config.num_query_tokens + [config.text_config.bos_token_id]
    input_ids = torch.tensor([prompt], device=args.device).repeat(args.batch, 1)
    search = {
        "num_beams": args.beams,
        "max_new_tokens": args.new_tokens,
        "min_new_tokens": args.new_tokens,
        "do_sample": False,
    }

    def caption(model: torch.nn.Module) -> Tensor:
        return model.generate(pixel_values=pixel_values, input_ids=input_ids, **search)

    sides: dict[str, tuple[Callable[[], Tensor], torch.nn.Module]] = {
        "native": (lambda: caption(native), native),
        "ours": (lambda: caption(ours), ours),
    }
    ids = {name: run() for name, (run, _) in sides.items()}
    if not torch.equal(ids["native"], ids["ours"]):
        raise SystemExit("the captions differ")
    print("the captions are equal")

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, (run, _) in sides.items():
            start = time.perf_counter()
            run()
            if args.device.startswith("cuda"):
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    results = {}
    for name, (run, model) in sides.items():
        with TrackedAllocations(*model.parameters(), pixel_values, input_ids) as tracked:
            run()
        set_attention(model, "eager")
        with FlopCounterMode(display=False) as flops:
            run()
        set_attention(model, "sdpa")
        results[name] = {
            "GFLOP a caption": flops.get_total_flops() / args.batch / 1e9,
            "captions a second": args.batch / statistics.median(seconds[name]),
            "MiB at peak": tracked.peak / 2**20,
        }
    columns = list(results["ours"])
    ratios = {column: results["ours"][column] / results["native"][column] for column in columns}
    rows = [[name, *(f"{row[column]:.4g}" for column in columns)] for name, row in results.items()]
    rows.append(["ratio", *(f"{ratios[column]:.3f}" for column in columns)])
    kind = "tiny BLIP-2" if args.small else "BLIP-2 on OPT-125m"
    print(
        table(
            f"{kind}, batch {args.batch}, {args.beams} beams, {args.new_tokens} tokens, float32, {args.device}",
            ["", *columns],
            rows,
        )
    )
    report = {"results": results, "ratios": ratios}
    print(json.dumps(report))
    if not args.small and ratios["captions a second"] < MIN_RATIO:
        raise SystemExit(f"less than {MIN_RATIO} of native generate's throughput")
    return report


if __name__ == "__main__":
    main()
