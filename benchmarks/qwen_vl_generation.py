"""Cached generation of Qwen-VL: ours against an implementation in the style of the remote code, on the same weights.

    python benchmarks/qwen_vl_generation.py                        # a small model, batch 4, 32 new tokens, float32
    python benchmarks/qwen_vl_generation.py --device cuda --hidden 2048 --layers 24 --batch 8
    python benchmarks/qwen_vl_generation.py --small --repeats 1    # a tiny model, in a second

The other side does what the published remote code does: one packed query-key-value matrix a layer, keys and values in
tuples that are concatenated at every step, a plain matrix product with a softmax for attention, images encoded in the
first step. The ids of both sides are compared before anything is timed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2Config

from hf_vlp.models.qwen_vl.configuration_qwen_vl import QwenVLConfig, QwenVLVisionConfig
from hf_vlp.models.qwen_vl.modeling_qwen_vl import QwenVLForConditionalGeneration

MIN_RATIO = 1.0
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
    return QwenVLForConditionalGeneration(config).to(args.device).eval()


class RemoteStyle:
    """Greedy generation as the remote code does it, with the weights of `model`."""

    def __init__(self, model: QwenVLForConditionalGeneration) -> None:
        self.model, language = model, model.language_model
        self.layers = language.model.layers
        self.heads = language.config.num_attention_heads
        self.packed = [
            (
                torch.cat([getattr(layer.self_attn, f"{part}_proj").weight for part in "qkv"]),
                torch.cat([getattr(layer.self_attn, f"{part}_proj").bias for part in "qkv"]),
            )
            for layer in self.layers
        ]

    def rotate(self, states: Tensor, start: int) -> Tensor:
        """Rotary positions from `start` on for (B, L, heads, size)."""
        length, size = states.shape[1], states.shape[-1]
        frequencies = 10000.0 ** -(torch.arange(0, size, 2, device=states.device).float() / size)
        angles = torch.arange(start, start + length, device=states.device).float()[:, None] * frequencies
        angles = torch.cat([angles, angles], dim=-1)[None, :, None]
        first, second = states.chunk(2, dim=-1)
        return states * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()

    def step(self, states: Tensor, past: list[tuple[Tensor, Tensor]] | None) -> tuple[Tensor, list[Any]]:
        batch, length, width = states.shape
        new, start = [], 0 if past is None else past[0][0].shape[1]
        for index, (layer, (weight, bias)) in enumerate(zip(self.layers, self.packed, strict=True)):
            mixed = F.linear(layer.input_layernorm(states), weight, bias)
            query, key, value = (part.view(batch, length, self.heads, -1) for part in mixed.split(width, dim=2))
            query, key = self.rotate(query, start), self.rotate(key, start)
            if past is not None:
                key, value = torch.cat([past[index][0], key], dim=1), torch.cat([past[index][1], value], dim=1)
            new.append((key, value))
            scores = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) / query.shape[-1] ** 0.5
            total = key.shape[1]
            causal = torch.ones(total, total, dtype=torch.bool, device=states.device).tril()[total - length :]
            scores = scores.masked_fill(~causal, torch.finfo(scores.dtype).min).softmax(dim=-1)
            seen = (scores @ value.transpose(1, 2)).transpose(1, 2).reshape(batch, length, width)
            states = states + layer.self_attn.o_proj(seen)
            states = states + layer.mlp(layer.post_attention_layernorm(states))
        return self.model.language_model.model.norm(states), new

    def generate(self, input_ids: Tensor, pixel_values: Tensor, new_tokens: int) -> Tensor:
        head = self.model.get_output_embeddings()
        states, _ = self.model.embed(input_ids, pixel_values)
        past, ids = None, input_ids
        for _ in range(new_tokens):
            hidden, past = self.step(states, past)
            # All logits of the call, as the remote code makes them.
            following = head(hidden)[:, -1].argmax(dim=-1, keepdim=True)
            ids = torch.cat([ids, following], dim=1)
            states = self.model.get_input_embeddings()(following)
        return ids


def timed(function: Callable[[], Any], repeats: int, device: str) -> float:
    found = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


@torch.inference_mode()
def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vision-layers", type=int, default=4)
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs a side; the median is shown")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    args = parser.parse_args(argv)
    if args.small:
        args.hidden, args.layers, args.vision_layers, args.queries = 128, 2, 1, 16
        args.image_size, args.vocabulary, args.batch, args.new_tokens = 28, 200, 2, 6

    torch.manual_seed(0)
    model = make_model(args)
    model.generation_config.pad_token_id = PAD
    theirs = RemoteStyle(model)
    places = torch.tensor([START, *[PAD] * args.queries, END], device=args.device).repeat(args.batch, 1)
    words = torch.randint(20, args.vocabulary, (args.batch, 24), device=args.device)
    input_ids = torch.cat([places, words], dim=1)
    pixels = torch.randn(args.batch, 3, args.image_size, args.image_size, device=args.device)
    options = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens, "do_sample": False}

    def ours() -> Tensor:
        return model.generate(input_ids, pixel_values=pixels, eos_token_id=None, **options)

    def other() -> Tensor:
        return theirs.generate(input_ids, pixels, args.new_tokens)

    same = bool(torch.equal(ours(), other()))
    seconds = {"ours": timed(ours, args.repeats, args.device), "remote style": timed(other, args.repeats, args.device)}
    result = {
        "setting": {k: v for k, v in vars(args).items() if k not in ("repeats", "small")},
        "same_ids": same,
        "seconds": seconds,
        "ratio": seconds["remote style"] / seconds["ours"],
        "wanted_ratio": MIN_RATIO,
    }
    print(json.dumps(result, indent=2))
    if not same:
        raise SystemExit("the two sides write different ids: the figures mean nothing")
    return result


if __name__ == "__main__":
    main()
