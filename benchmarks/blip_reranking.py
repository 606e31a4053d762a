"""Re-ranking by BLIP's matching head: ours against the original's evaluation, on the same weights.

    python benchmarks/blip_reranking.py                          # 64 images at 384 px, the top 128 of 320 texts
    python benchmarks/blip_reranking.py --images 8 --their_images 1
    python benchmarks/blip_reranking.py --device cuda --dtype bfloat16 --their_images 64
    python benchmarks/blip_reranking.py --small                  # a tiny model, in seconds

Image tokens are given to both sides. The other side is the original's evaluation composed from native classes: texts
are padded to 35 tokens, and the text encoder projects keys and values of the repeated image tokens for each of an
image's 128 texts. It runs on `--their_images` images only, since pairs are scored independently of each
other; its pairs a second are those. Ours scores all pairs through `matching_scores`, text encoding included.
FLOPs are counted with the attention written out, since the counter does not know every fused kernel.
"""

import argparse
import json
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_vlp.models.blip.modeling_blip import BlipForImageTextRetrieval

sys.path.insert(0, str(Path(__file__).parent))
from _blip import Composed, base_config, captions, spread  # noqa: E402
from _flops import counted_flops  # noqa: E402
from _memory import TrackedAllocations, table  # noqa: E402

MIN_SPEEDUP, PADDED = 5.0, 35
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}


@torch.no_grad()
def original_scores(model: Composed, images: Tensor, top: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """(images, k) matching logits, image by image, of the texts `top` (images, k)."""
    scores = []
    for image, texts in zip(images, top):
        repeated = image[None].repeat(len(texts), 1, 1)
        scores.append(model.model.itm_head(model.text(ids[texts], mask[texts], repeated)[:, 0])[:, 1])
    return torch.stack(scores)


@torch.no_grad()
def our_scores(model: BlipForImageTextRetrieval, images: Tensor, top: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    index = torch.arange(len(images), device=images.device).repeat_interleave(top.shape[1])
    return model.matching_scores(images, index, ids[top.flatten()], mask[top.flatten()]).view_as(top)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--texts", type=int, default=320)
    parser.add_argument("--top", type=int, default=128)
    parser.add_argument("--their_images", type=int, default=2, help="images that the slow side scores")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of autocast")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.dtype)

    torch.manual_seed(0)
    config = base_config(384, small=args.small)
    ours = BlipForImageTextRetrieval(config)
    spread(ours)
    ours = ours.to(args.device).eval()
    theirs = Composed(config, ours.state_dict()).to(args.device).eval()
    vision = config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(args.images, tokens, vision.hidden_size, generator=generator).to(args.device)
    ids, mask = (x.to(args.device) for x in captions(args.texts, config.text_config.vocab_size, PADDED))
    top = torch.rand(args.images, args.texts, generator=generator).topk(min(args.top, args.texts)).indices
    top = top.to(args.device)

    def autocast() -> AbstractContextManager:
        return nullcontext() if dtype is torch.float32 else torch.autocast(args.device.split(":")[0], dtype=dtype)

    results: dict[str, dict[str, float]] = {}
    scores: dict[str, Tensor] = {}
    slow = min(args.their_images, args.images)
    for name, function, model, number in (
        ("original's evaluation", original_scores, theirs, slow),
        ("ours", our_scores, ours, args.images),
    ):

        def run(number: int = number, function: Any = function, model: Any = model) -> Tensor:
            with autocast():
                result = function(model, images[:number], top[:number], ids, mask)
            if args.device.startswith("cuda"):
                torch.cuda.synchronize()
            return result

        run(1)
        start = time.perf_counter()
        scores[name] = run().float()
        seconds = time.perf_counter() - start
        pairs = number * top.shape[1]
        with counted_flops() as flops:
            run(1)
        with TrackedAllocations(*model.parameters(), *model.buffers(), images, ids, mask, top) as tracked:
            run(1)
        results[name] = {
            "pairs/s": pairs / seconds,
            "GFLOP a pair": flops.get_total_flops() / top.shape[1] / 1e9,
            "MiB at peak": tracked.peak / 2**20,
        }
    wanted, found = scores["original's evaluation"], scores["ours"][:slow]
    difference = ((found - wanted).abs().max() / wanted.abs().max()).item()
    print(f"largest relative difference of {wanted.numel()} scores: {difference:.1e}")
    columns = list(results["ours"])
    ratios = {column: results["ours"][column] / results["original's evaluation"][column] for column in columns}
    rows = [[name, *(f"{row[column]:.4g}" for column in columns)] for name, row in results.items()]
    rows.append(["ratio", *(f"{ratios[column]:.3f}" for column in columns)])
    kind = "tiny BLIP" if args.small else "BLIP ViT-B/16, 384 px"
    title = f"{kind}, the top {top.shape[1]} texts of {args.images} images, {args.dtype}, {args.device}"
    print(table(title, ["", *columns], rows))
    report = {"results": results, "ratios": ratios, "difference": difference, "threads": torch.get_num_threads()}
    print(json.dumps(report))
    if difference > TOLERANCE[dtype]:
        raise SystemExit(f"the scores differ by more than {TOLERANCE[dtype]:.0e}")
    if not args.small and args.dtype == "float32" and ratios["pairs/s"] < MIN_SPEEDUP:
        raise SystemExit(f"less than {MIN_SPEEDUP} times the pairs a second")
    return report


if __name__ == "__main__":
    main()
