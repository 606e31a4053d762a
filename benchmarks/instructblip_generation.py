"""Generation of InstructBLIP: ours against native `generate`, on the same weights, images and instructions.

    python benchmarks/instructblip_generation.py                       # batch 8, greedy, 16 new tokens, float32
    python benchmarks/instructblip_generation.py --device cuda --hidden 2048 --layers 24
    python benchmarks/instructblip_generation.py --small --repeats 1   # a tiny model, in a second

The ids are compared before anything is timed. With beams ours reads each prompt once, not once a beam; the Q-Former
reads instructions without their padding, and leaves out the text's side of its last layer.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import InstructBlipConfig, LlamaConfig

from hf_vlp.models.instructblip.modeling_instructblip import InstructBlipForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent))
from _generation import compare_generation, generation_parser  # noqa: E402

# Greedily both sides do the same but for the Q-Former's padding; the rest is left to the clock.
MAX_TIME = 1.05


def make_config(args: argparse.Namespace) -> InstructBlipConfig:
    qformer = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 30523}
    vision = {"hidden_size": 1408, "num_hidden_layers": args.vision_layers, "num_attention_heads": 16}
    if args.small:
        qformer = {
            "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300,
            "intermediate_size": 64,
        }  # fmt: skip
        vision = {
            "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
            "image_size": 28,
        }  # fmt: skip
    text = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=args.hidden * 3,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64, initializer_range=0.1,
    )  # fmt: skip
    return InstructBlipConfig(
        vision_config=vision | {"initializer_range": 0.05},
        qformer_config=qformer | {"encoder_hidden_size": vision["hidden_size"], "initializer_range": 0.05},
        text_config=text.to_dict(),
        num_query_tokens=32,
        image_token_index=text.vocab_size - 1,
    )


@torch.inference_mode()
def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = generation_parser(__doc__, batch=8, new_tokens=16, repeats=3)
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vision-layers", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=32000)
    args = parser.parse_args(argv)
    if args.small:
        args.hidden, args.layers, args.vocabulary, args.batch, args.new_tokens = 128, 2, 300, 2, 5

    torch.manual_seed(0)
    config = make_config(args)
    ours = InstructBlipForConditionalGeneration(config).to(args.device).eval()
    native = transformers.InstructBlipForConditionalGeneration(config).to(args.device).eval()
    native.load_state_dict(ours.state_dict())
    side = config.vision_config.image_size
    # Instructions of unequal lengths: the Q-Former's padded on the right, the prompt on the left.
    lengths = torch.arange(args.batch) % 8 + 8
    longest = int(lengths.max())
    place = torch.arange(longest)
    right, left = (place < lengths[:, None]).long(), (place >= longest - lengths[:, None]).long()
    image = torch.full((args.batch, config.num_query_tokens), config.image_token_index)
    words = torch.randint(5, args.vocabulary - 1, (args.batch, longest))
    inputs = {
        "pixel_values": torch.randn(args.batch, 3, side, side),
        "qformer_input_ids": torch.randint(5, config.qformer_config.vocab_size, (args.batch, longest)),
        "qformer_attention_mask": right,
        "input_ids": torch.cat([image, words], dim=1),
        "attention_mask": torch.cat([torch.ones_like(image), left], dim=1),
    }
    inputs = {name: value.to(args.device) for name, value in inputs.items()}
    search = {
        "num_beams": args.beams, "max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens,
        "do_sample": False, "pad_token_id": 0,
    }  # fmt: skip

    def run(model: Any) -> Callable[[], Tensor]:
        return lambda: model.generate(**inputs, **search)

    title = f"InstructBLIP, {'greedy' if args.beams == 1 else f'{args.beams} beams'}"
    return compare_generation(title, {"native": run(native), "ours": run(ours)}, "native", args, MAX_TIME)


if __name__ == "__main__":
    main()
