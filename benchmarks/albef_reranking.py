"""Re-ranking by ALBEF's matching head: ours against the original's evaluation, on the same weights.

    python benchmarks/albef_reranking.py                          # 64 images at 384 px, the top 128 of 320 texts
    python benchmarks/albef_reranking.py --images 8 --their_images 1
    python benchmarks/albef_reranking.py --device cuda --dtype bfloat16 --their_images 64
    python benchmarks/albef_reranking.py --small                  # a tiny model, in seconds

Image tokens are given to both sides. The other side is the original's evaluation composed from native classes: texts
padded to 30 tokens are encoded once, and the fusion encoder then projects keys and values of the repeated image tokens
for each of an image's 128 texts. It runs on `--their_images` images only, since pairs are scored independently of each
other; its pairs a second are those. Ours scores all pairs through `matching_scores`, text encoding included.
FLOPs are counted with the attention written out, since the counter does not know every fused kernel.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_vlp.models.albef.modeling_albef import AlbefForImageTextRetrieval

sys.path.insert(0, str(Path(__file__).parent))
from _albef import Composed, base_config, captions  # noqa: E402
from _fusion import rerank  # noqa: E402


def original_scores(model: Composed, images: Tensor, top: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """(images, k) matching logits, image by image, of the texts `top` (images, k)."""
    states = torch.cat([model.text(*part, mode="text") for part in zip(ids.split(128), mask.split(128))])
    scores = []
    for image, texts in zip(images, top):
        repeated = image[None].repeat(len(texts), 1, 1)
        fused = model.text(states[texts], mask[texts], repeated, mode="fusion")
        scores.append(model.itm_head(fused[:, 0])[:, 1])
    return torch.stack(scores)


def build(args: argparse.Namespace) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Both sides and the captions."""
    config = base_config(384, small=args.small)
    ours = AlbefForImageTextRetrieval(config)
    return ours, Composed(config, ours), *captions(args.texts, config.text_config.vocab_size)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    return rerank(__doc__, argv, "ALBEF", build, original_scores)


if __name__ == "__main__":
    main()
