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
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_vlp.models.blip.modeling_blip import BlipForImageTextRetrieval

sys.path.insert(0, str(Path(__file__).parent))
from _blip import Composed, base_config, captions, spread  # noqa: E402
from _fusion import rerank  # noqa: E402

PADDED = 35


def original_scores(model: Composed, images: Tensor, top: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """(images, k) matching logits, image by image, of the texts `top` (images, k)."""
    scores = []
    for image, texts in zip(images, top):
        repeated = image[None].repeat(len(texts), 1, 1)
        scores.append(model.model.itm_head(model.text(ids[texts], mask[texts], repeated)[:, 0])[:, 1])
    return torch.stack(scores)


def build(args: argparse.Namespace) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Both sides and the captions."""
    config = base_config(384, small=args.small)
    ours = BlipForImageTextRetrieval(config)
    spread(ours)
    theirs = Composed(config, ours.state_dict())
    return ours, theirs, *captions(args.texts, config.text_config.vocab_size, PADDED)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    return rerank(__doc__, argv, "BLIP", build, original_scores)


if __name__ == "__main__":
    main()
