"""Cached generation of Qwen-VL: ours against an implementation in the style of the remote code, on the same weights.

    python benchmarks/qwen_vl_generation.py                        # a small model, batch 4, 32 new tokens, float32
    python benchmarks/qwen_vl_generation.py --device cuda --hidden 2048 --layers 24 --batch 8
    python benchmarks/qwen_vl_generation.py --small --repeats 1    # a tiny model, in a second

The other side computes what the published remote code does, in the same `generate`: one packed query-key-value matrix
a layer, a plain matrix product with a mask and a softmax for attention, the logits of every position of the prompt.
The ids of both sides are compared before anything is timed.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, PreTrainedModel, Qwen2Config
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_vlp.models.qwen_vl.configuration_qwen_vl import QwenVLConfig, QwenVLVisionConfig
from hf_vlp.models.qwen_vl.modeling_qwen_vl import QwenVLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent))
from _generation import compare_generation, generation_parser  # noqa: E402

MAX_TIME = 1.0
START, END, PAD = 10, 11, 12


def make_model(args: argparse.Namespace) -> QwenVLForConditionalGeneration:
    text = Qwen2Config(
        vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=args.hidden * 3,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64, num_key_value_heads=args.hidden // 64,
        initializer_range=0.1, tie_word_embeddings=False,
    )  # fmt: skip
    vision = QwenVLVisionConfig(
        hidden_size=args.hidden // 2, intermediate_size=args.hidden, num_hidden_layers=args.vision_layers,
        num_attention_heads=max(args.hidden // 128, 1), image_size=args.image_size, patch_size=14,
        num_query_tokens=args.queries, output_dim=args.hidden,
    )  # fmt: skip
    config = QwenVLConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), image_start_token_id=START,
        image_end_token_id=END, image_token_id=PAD,
    )  # fmt: skip
    return QwenVLForConditionalGeneration(config).to(args.device).eval().requires_grad_(False)


class RemoteStyle(nn.Module):
    """A Qwen language model as the remote code computes it, with the weights of `language_model`."""

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.config, self.wrapped = language_model.config, [language_model]
        self.heads = self.config.num_attention_heads
        self.base = self.config.rope_parameters["rope_theta"]
        self.packed = [
            (
                torch.cat([getattr(layer.self_attn, f"{part}_proj").weight for part in "qkv"]),
                torch.cat([getattr(layer.self_attn, f"{part}_proj").bias for part in "qkv"]),
            )
            for layer in language_model.model.layers
        ]

    def get_input_embeddings(self) -> nn.Module:
        return self.wrapped[0].get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.wrapped[0].get_output_embeddings()

    def rotate(self, states: Tensor, start: int) -> Tensor:
        """Rotary positions from `start` on for (B, heads, L, size)."""
        length, size = states.shape[2:]
        frequencies = self.base ** -(torch.arange(0, size, 2, device=states.device).float() / size)
        angles = torch.arange(start, start + length, device=states.device).float()[:, None] * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        first, second = states.chunk(2, dim=-1)
        return states * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()

    def forward(self, inputs_embeds: Tensor, past_key_values: Cache, **_: Any) -> CausalLMOutputWithPast:
        language_model, states = self.wrapped[0], inputs_embeds
        batch, length, width = states.shape
        start = past_key_values.get_seq_length()
        for index, (layer, packed) in enumerate(zip(language_model.model.layers, self.packed, strict=True)):
            mixed = F.linear(layer.input_layernorm(states), *packed).view(batch, length, 3, self.heads, -1)
            query, key, value = mixed.permute(2, 0, 3, 1, 4)
            query, key = self.rotate(query, start), self.rotate(key, start)
            key, value = past_key_values.update(key, value, index)
            scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
            total = key.shape[2]
            causal = torch.ones(total, total, dtype=torch.bool, device=states.device).tril()[total - length :]
            scores = scores.masked_fill(~causal, torch.finfo(scores.dtype).min).softmax(dim=-1)
            seen = (scores @ value).transpose(1, 2).reshape(batch, length, width)
            states = states + layer.self_attn.o_proj(seen)
            states = states + layer.mlp(layer.post_attention_layernorm(states))
        # All logits of the call, as the remote code makes them.
        logits = language_model.get_output_embeddings()(language_model.model.norm(states))
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


@torch.inference_mode()
def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = generation_parser(__doc__, batch=4, new_tokens=32, repeats=3)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vision-layers", type=int, default=4)
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--vocabulary", type=int, default=32000)
    args = parser.parse_args(argv)
    if args.small:
        args.hidden, args.layers, args.vision_layers, args.queries = 128, 2, 1, 16
        args.image_size, args.vocabulary, args.batch, args.new_tokens = 28, 200, 2, 6

    torch.manual_seed(0)
    model = make_model(args)
    model.generation_config.pad_token_id = 0
    theirs = make_model(args)
    theirs.load_state_dict(model.state_dict())
    theirs.language_model = RemoteStyle(theirs.language_model)
    theirs.generation_config.pad_token_id = 0
    places = torch.tensor([START, *[PAD] * args.queries, END], device=args.device).repeat(args.batch, 1)
    words = torch.randint(20, args.vocabulary, (args.batch, 24), device=args.device)
    input_ids = torch.cat([places, words], dim=1)
    pixels = torch.randn(args.batch, 3, args.image_size, args.image_size, device=args.device)
    options = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens, "do_sample": False}

    def run(side: Any) -> Callable[[], Tensor]:
        return lambda: side.generate(input_ids, pixel_values=pixels, eos_token_id=None, **options)

    sides = {"remote style": run(theirs), "ours": run(model)}
    return compare_generation("Qwen-VL", sides, "remote style", args, MAX_TIME)


if __name__ == "__main__":
    main()
