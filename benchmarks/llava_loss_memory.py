"""Peak memory of a LLaVA step with a large vocabulary: ours against the native class with `labels`.

    python benchmarks/llava_loss_memory.py                     # 150k words, float32 on the CPU
    python benchmarks/llava_loss_memory.py --device cuda --batch 16 --text 400
    python benchmarks/llava_loss_memory.py --small             # a tiny model, in a second

Same weights, same batch: pictures of 576 tokens, a question, an answer that is learnt. The native class makes logits
at every position, and once more in float32; ours make them at supervised positions, a piece at a time. Loss and
gradients are compared before anything is measured. Counted are the bytes that live at a time during forward and
backward, weights and gradients included on both sides.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from hf_vlp.models.llava.modeling_llava import LlavaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent))
from _memory import TrackedAllocations, table  # noqa: E402

MAX_RATIO = 0.5


def make_config(args: argparse.Namespace) -> LlavaConfig:
    """A narrow model: what is measured is the vocabulary."""
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, projection_dim=64,
        image_size=48 if args.small else 336, patch_size=14 if not args.small else 8,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.width, intermediate_size=2 * args.width,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=args.vocabulary - 1)


def make_batch(config: LlavaConfig, args: argparse.Namespace) -> dict[str, Tensor]:
    """`batch` rows: one picture, then `text` tokens, of which the last `answer` are learnt."""
    generator = torch.Generator().manual_seed(0)
    side = config.vision_config.image_size // config.vision_config.patch_size
    text = torch.randint(0, args.vocabulary - 1, (args.batch, args.text), generator=generator)
    ids = torch.cat([torch.full((args.batch, side * side), config.image_token_id), text], dim=1)
    labels = ids.clone()
    labels[:, : -args.answer] = -100
    pixels = torch.randn(
        args.batch, 3, config.vision_config.image_size, config.vision_config.image_size, generator=generator
    )
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}


def step(model: Any, batch: dict[str, Tensor]) -> float:
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return float(loss.detach())


def peak_of(model: Any, batch: dict[str, Tensor], device: str) -> int:
    """Bytes at the peak of a step, with the weights."""
    model.zero_grad(set_to_none=True)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step(model, batch)
        return torch.cuda.max_memory_allocated()
    with TrackedAllocations(*model.parameters(), *batch.values()) as seen:
        step(model, batch)
    return weights + seen.peak


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--width", type=int, default=128, help="of the language model")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--text", type=int, default=128, help="tokens of question and answer")
    parser.add_argument("--answer", type=int, default=64, help="how many of them are learnt")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    args = parser.parse_args(argv)
    if args.small:
        args.vocabulary, args.width, args.text, args.answer = 4000, 32, 24, 8

    torch.manual_seed(0)
    config = make_config(args)
    native = transformers.LlavaForConditionalGeneration(config).to(args.device).train()
    ours = LlavaForConditionalGeneration(config).to(args.device).train()
    ours.load_state_dict(native.state_dict())
    for model in (native, ours):
        model.model.vision_tower.requires_grad_(False)
    batch = {name: value.to(args.device) for name, value in make_batch(config, args).items()}

    losses, difference = {}, 0.0
    for name, model in (("native", native), ("ours", ours)):
        losses[name] = step(model, batch)
    for mine, theirs in zip(ours.parameters(), native.parameters(), strict=True):
        if theirs.grad is not None:
            scale = theirs.grad.abs().max().clamp(min=1e-8)
            difference = max(difference, float((mine.grad - theirs.grad).abs().max() / scale))
    if abs(losses["ours"] - losses["native"]) > 1e-4 * losses["native"] or difference > 1e-3:
        raise SystemExit(f"the two steps differ: losses {losses}, gradients by {difference:.1e}")
    peaks = {name: peak_of(model, batch, args.device) for name, model in (("native", native), ("ours", ours))}
    ratio = peaks["ours"] / peaks["native"]
    rows = [[name, f"{peak / 2**20:,.0f}", f"{losses[name]:.5f}"] for name, peak in peaks.items()]
    print(table(f"{args.vocabulary:,} words, {batch['input_ids'].shape} tokens", ["", "MiB at peak", "loss"], rows))
    report = {"ratio": ratio, "peaks": peaks, "losses": losses, "gradient_difference": difference, "goal": MAX_RATIO}
    print(json.dumps(report))
    if not args.small and ratio > MAX_RATIO:
        raise SystemExit(f"{ratio:.3f} of the native class's memory, more than {MAX_RATIO}")
    return report


if __name__ == "__main__":
    main()
