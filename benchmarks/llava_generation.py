"""Generation with LLaVA: ours against the native class, on the same weights, pictures and prompts.

    python benchmarks/llava_generation.py                      # a small Llama, float32 on the CPU
    python benchmarks/llava_generation.py --device cuda --hidden 2048 --layers 16
    python benchmarks/llava_generation.py --small --repeats 1  # a tiny model, in a second

Left-padded prompts with a picture each, greedy and by beams, with a key-value cache. The ids are compared before
anything is timed; the two sides are timed in turn.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from hf_vlp.models.llava.modeling_llava import LlavaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent))
from _generation import compare_generation, generation_parser  # noqa: E402

# Both sides do the same; the rest is left to the clock.
MAX_TIME = 1.05


def make_config(args: argparse.Namespace) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6, projection_dim=64,
        image_size=32 if args.small else 224, patch_size=8 if args.small else 14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=1000 if args.small else 32_064, hidden_size=args.hidden, intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers, num_attention_heads=8, num_key_value_heads=8, initializer_range=0.1,
    )  # fmt: skip
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=text.vocab_size - 1)


def make_inputs(config: LlavaConfig, batch: int, text: int) -> dict[str, Tensor]:
    """Prompts of several lengths, padded on the left."""
    generator = torch.Generator().manual_seed(0)
    side = config.vision_config.image_size
    tokens = (side // config.vision_config.patch_size) ** 2
    ids = torch.randint(3, config.text_config.vocab_size - 1, (batch, tokens + text), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch):
        padding = row % (text // 2)
        mask[row, :padding] = 0
        ids[row, :padding] = 0
        ids[row, padding : padding + tokens] = config.image_token_id
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(batch, 3, side, side, generator=generator),
    }


@torch.inference_mode()
def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    parser = generation_parser(__doc__, batch=4, new_tokens=32, repeats=5)
    parser.add_argument("--text", type=int, default=32, help="tokens of a prompt beside the picture's")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    args = parser.parse_args(argv)
    if args.small:
        args.hidden, args.layers, args.new_tokens = 64, 2, 8

    torch.manual_seed(0)
    config = make_config(args)
    native = transformers.LlavaForConditionalGeneration(config).to(args.device).eval()
    ours = LlavaForConditionalGeneration(config).to(args.device).eval()
    ours.load_state_dict(native.state_dict())
    inputs = {name: value.to(args.device) for name, value in make_inputs(config, args.batch, args.text).items()}
    options = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens, "do_sample": False}

    def run(model: Any, beams: int) -> Callable[[], Tensor]:
        return lambda: model.generate(**inputs, **options, num_beams=beams)

    return {
        name: compare_generation(
            f"LLaVA, {name}", {"native": run(native, beams), "ours": run(ours, beams)}, "native", args, MAX_TIME
        )
        for name, beams in (("greedy", 1), ("3 beams", 3))
    }


if __name__ == "__main__":
    main()
