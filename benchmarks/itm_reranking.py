"""Matching one image with its 128 nearest texts: ours against the native Q-Former.

    python benchmarks/itm_reranking.py                       # base size, 128 texts, float32 on the CPU
    python benchmarks/itm_reranking.py --device cuda
    python benchmarks/itm_reranking.py --small --repeats 1   # a tiny model, in a second

The first other side is the Q-Former of transformers' `Blip2ForImageTextRetrieval` with the image features given to
it, as they are to ours: it projects them to keys and values for every pair, and computes padding. The second is the
class as it is, called as its documentation shows: it encodes the image for every pair (here with an EVA-ViT of
`--vision-layers` blocks, 39 in the published model; the figure for more blocks follows, as each costs the same). All
sides have the same weights and texts, and their scores are compared before anything is timed.
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

from hf_vlp.models.blip2.modeling_blip_2 import Blip2ForImageTextRetrieval
from hf_vlp.models.retrieval import ImageEmbeds

sys.path.insert(0, str(Path(__file__).parent))
from _blip2 import IMAGE_TOKENS, LONGEST, TEXT_LENGTH, captions, set_attention, stage1_config  # noqa: E402
from _memory import TrackedAllocations, table  # noqa: E402

MIN_SPEEDUP = 2.0
TOLERANCE = 1e-4


def native_qformer_scores(
    model: transformers.Blip2ForImageTextRetrieval, features: Tensor, texts: dict[str, Tensor]
) -> Tensor:
    """(P,) match logits by the native Q-Former, features (1, 257, 1408) given."""
    pairs, queries = len(texts["input_ids"]), model.config.num_query_tokens
    tokens = model.query_tokens.expand(pairs, -1, -1)
    mask = torch.cat([texts["attention_mask"].new_ones(pairs, queries), texts["attention_mask"]], dim=1)
    states = model.qformer(
        query_embeds=model.embeddings(texts["input_ids"], query_embeds=tokens),
        query_length=queries,
        attention_mask=mask,
        encoder_hidden_states=features.expand(pairs, -1, -1),
    ).last_hidden_state
    return model.itm_head(states[:, :queries]).mean(dim=1)[:, 1]


def native_class_scores(
    model: transformers.Blip2ForImageTextRetrieval, pixel_values: Tensor, texts: dict[str, Tensor]
) -> Tensor:
    """(P,) match logits by the native class, one copy of the image a text."""
    pairs = len(texts["input_ids"])
    output = model(pixel_values.expand(pairs, -1, -1, -1), **texts, use_image_text_matching_head=True)
    return output.logits_per_image[:, 1]


@torch.inference_mode()
def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs a side; the median is shown")
    parser.add_argument("--vision-layers", type=int, default=1, help="blocks of the tower of the class as it is")
    parser.add_argument("--class-texts", type=int, default=16, help="texts for the class as it is")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    config = stage1_config(args.small)
    config.vision_config.num_hidden_layers = args.vision_layers
    ours = Blip2ForImageTextRetrieval(config).to(args.device).eval()
    native = transformers.Blip2ForImageTextRetrieval(config).to(args.device).eval()
    native.load_state_dict(ours.state_dict())
    padded = captions(args.texts, TEXT_LENGTH, config.qformer_config.vocab_size)
    padded = {name: value.to(args.device) for name, value in padded.items()}
    texts = {name: value[:, :LONGEST] for name, value in padded.items()}
    features = torch.randn(1, IMAGE_TOKENS, config.vision_config.hidden_size, device=args.device)
    images = ImageEmbeds(torch.empty(1, 0, 0), features)
    same_image = torch.zeros(args.texts, dtype=torch.long, device=args.device)
    few = {name: value[: args.class_texts] for name, value in texts.items()}
    side = config.vision_config.image_size
    pixel_values = torch.randn(1, 3, side, side, device=args.device)

    def ours_from_pixels() -> Tensor:
        return ours.matching_scores(ours.embed_images(pixel_values), same_image[: args.class_texts], **few)

    sides: dict[str, tuple[Callable[[], Tensor], torch.nn.Module, int]] = {
        "native Q-Former": (lambda: native_qformer_scores(native, features, padded), native, args.texts),
        "to the longest": (lambda: native_qformer_scores(native, features, texts), native, args.texts),
        "ours": (lambda: ours.matching_scores(images, same_image, **padded), ours, args.texts),
        "native class": (lambda: native_class_scores(native, pixel_values, few), native, args.class_texts),
        "ours from pixels": (ours_from_pixels, ours, args.class_texts),
    }
    scores = {name: run() for name, (run, _, _) in sides.items()}
    differences = {}
    for a, b in (("native Q-Former", "ours"), ("to the longest", "ours"), ("native class", "ours from pixels")):
        differences[a] = ((scores[a] - scores[b]).abs().max() / scores[a].abs().max()).item()
    worst = max(differences.values())
    print(f"largest relative difference of the scores: {worst:.1e}")
    if worst > TOLERANCE:
        raise SystemExit(f"the scores differ by more than {TOLERANCE:.0e}")

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, (run, _, _) in sides.items():
            start = time.perf_counter()
            run()
            if args.device.startswith("cuda"):
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    results = {}
    for name, (run, model, pairs) in sides.items():
        with TrackedAllocations(*model.parameters(), features, *texts.values()) as tracked:
            run()
        set_attention(model, "eager")
        with FlopCounterMode(display=False) as flops:
            run()
        set_attention(model, "sdpa")
        results[name] = {
            "pairs": pairs,
            "GFLOP a pair": flops.get_total_flops() / pairs / 1e9,
            "pairs a second": pairs / statistics.median(seconds[name]),
            "MiB at peak": tracked.peak / 2**20,
        }
    columns = list(results["ours"])
    rows = [[name, *(f"{row[column]:.4g}" for column in columns)] for name, row in results.items()]
    kind = "tiny Q-Former" if args.small else "BLIP-2 Q-Former, base"
    print(table(f"{kind}, one image, float32, {args.device}", ["", *columns], rows))
    speedup = results["ours"]["pairs a second"] / results["native Q-Former"]["pairs a second"]
    shorter = results["ours"]["pairs a second"] / results["to the longest"]["pairs a second"]
    whole = results["ours from pixels"]["pairs a second"] / results["native class"]["pairs a second"]
    print(
        f"{speedup:.2f} times the pairs a second of the native Q-Former at {TEXT_LENGTH} tokens, {shorter:.2f} at "
        f"{LONGEST}"
    )
    print(
        f"{whole:.2f} times those of the native class with {args.vision_layers} vision blocks, "
        f"on {args.class_texts} texts"
    )
    report = {
        "results": results,
        "speedup": speedup,
        "speedup_at_the_longest": shorter,
        "speedup_of_the_class": whole,
        "difference": worst,
    }
    print(json.dumps(report))
    if not args.small and speedup < MIN_SPEEDUP:
        raise SystemExit(f"less than {MIN_SPEEDUP} times the pairs a second")
    return report


if __name__ == "__main__":
    main()
