"""Training steps of LLaVA on conversations of mixed length: padded, padded after grouping by length, and packed.

    python benchmarks/packing.py

All three read the same conversations with the same weights. The padded and the packed batches hold the same ones, and
their losses and gradients are compared; grouped batches are others, so only their speed is. Lengths follow the
composition of LLaVA 1.5's instruction mixture (158k made by a language model, 40k without pictures from ShareGPT, the
rest from question answering, captioning and referring expressions), drawn at random in that proportion; with
`--scale 0.25` everything, image tokens and the limit of 2048 included, is a quarter as long.
"""

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from _memory import table
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_vlp.data.conversations import ConversationCollator, ConversationDataset, pack_lengths, to_messages
from hf_vlp.models.llava.initialization_llava import new_processor
from hf_vlp.models.llava.modeling_llava import LlavaForConditionalGeneration
from hf_vlp.training.batching import GlobalBatchSampler

# Conversations in thousands, pictures, mean and spread (of the logarithm) of the text's tokens, turns.
MIXTURE = (
    (158, 1, 260, 0.5, 3),
    (40, 0, 900, 0.8, 4),
    (83, 1, 220, 0.5, 8),
    (72, 1, 260, 0.5, 8),
    (89, 1, 110, 0.6, 2),
    (80, 1, 170, 0.5, 5),
    (22, 1, 50, 0.4, 1),
    (48, 1, 420, 0.5, 8),
    (86, 1, 450, 0.5, 8),
)
LIMIT = 2048
WORDS = 2_000


def saved_positions(image_tokens: int, batch: int, rows: float, batches: int = 200) -> float:
    """Positions of padded batches of full length over those of packed ones, with rows of `rows` limits."""
    draws = np.random.default_rng(0)
    shares = np.array([kind[0] for kind in MIXTURE], dtype=float)
    padded = packed = 0
    for _ in range(batches):
        lengths = []
        for kind in draws.choice(len(MIXTURE), size=batch, p=shares / shares.sum()):
            _, images, mean, spread, turns = MIXTURE[kind]
            text = max(4 * turns, int(mean * np.exp(spread * draws.standard_normal() - spread**2 / 2)))
            lengths.append(min(LIMIT, images * image_tokens + text))
        held = [sum(lengths[number] for number in row) for row in pack_lengths(lengths, int(rows * LIMIT))]
        padded += batch * max(lengths)
        packed += len(held) * max(held)
    return padded / packed


def conversations(count: int, scale: float, seed: int) -> list[dict[str, Any]]:
    """Rows of made-up words with the lengths of the mixture."""
    draws = np.random.default_rng(seed)
    shares = np.array([kind[0] for kind in MIXTURE], dtype=float)
    picture = Image.new("RGB", (32, 32), (90, 120, 150))
    rows = []
    for number in range(count):
        _, images, mean, spread, turns = MIXTURE[draws.choice(len(MIXTURE), p=shares / shares.sum())]
        turns = max(1, round(turns * min(1.0, 2 * scale)))
        length = max(4 * turns, int(mean * scale * np.exp(spread * draws.standard_normal() - spread**2 / 2)))
        said = []
        for turn in range(turns):
            words = [f"w{word}" for word in draws.integers(0, WORDS, max(4, length // turns))]
            half = len(words) // 2
            said.append({"from": "human", "value": "<image>" * (images * (turn == 0)) + " ".join(words[:half])})
            said.append({"from": "gpt", "value": " ".join(words[half:])})
        messages = to_messages(said)[0]
        rows.append({"images": [picture] * images, "messages": messages, "source": "made up", "key": str(number)})
    return rows


def llava(grid: int, width: int, layers: int) -> tuple[LlavaForConditionalGeneration, Any]:
    """A LLaVA whose language model does nearly all the work, as in a LLaVA of 7 billion."""
    torch.manual_seed(0)
    words = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "USER:", "ASSISTANT:"])}
    words |= {f"w{number}": len(words) + number for number in range(WORDS)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=LIMIT, **special)
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = CLIPVisionModel(CLIPVisionConfig(**vision, image_size=4 * grid, patch_size=4))
    text = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_hidden_layers": layers}
    lm = LlamaForCausalLM(LlamaConfig(**text, num_attention_heads=4, num_key_value_heads=4, vocab_size=len(words)))
    processor = new_processor(tokenizer, tower, tiles=False)
    model = LlavaForConditionalGeneration.from_vision_language_pretrained(tower, lm, processor)
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    return model, processor


def step(model: nn.Module, batch: dict[str, Tensor]) -> tuple[float, Tensor]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    weight = model.get_input_embeddings().weight
    return loss.item(), weight.grad.detach().clone()


def timed(model: nn.Module, batches: Sequence[dict[str, Tensor]], repeats: int) -> float:
    """Seconds of all batches, the best of `repeats` rounds."""
    rounds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for batch in batches:
            step(model, batch)
        rounds.append(time.perf_counter() - start)
    return min(rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="conversations a step")
    parser.add_argument("--steps", type=int, default=6, help="batches that are timed")
    parser.add_argument("--repeats", type=int, default=2, help="rounds; the best one counts")
    parser.add_argument("--scale", type=float, default=0.25, help="length of everything, 1 being LLaVA's own")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--image_tokens", type=int, default=256, help="256 as LLaVA 1, 576 as LLaVA 1.5")
    parser.add_argument("--rows", type=float, default=1.0, help="tokens of a packed row, in limits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", action="store_true", help="count positions at full length instead of training")
    args = parser.parse_args()
    if args.count:
        sizes = (16, 32, 64)
        lines = [
            [f"{tokens} image tokens", *(f"{saved_positions(tokens, size, args.rows):.2f}" for size in sizes)]
            for tokens in (576, 256)
        ]
        title = f"Positions of padded over packed batches, limit {LIMIT}, rows of {int(args.rows * LIMIT)}"
        print(table(title, ["conversations", *map(str, sizes)], lines))
        return

    limit, grid = int(LIMIT * args.scale), round((args.image_tokens * args.scale) ** 0.5)
    model, processor = llava(grid, args.width, args.layers)
    rows = conversations(args.batch * args.steps, args.scale, args.seed)
    plain = ConversationDataset(rows, seed=args.seed)
    grouped = ConversationDataset(rows, seed=args.seed, group_by_length=True, image_tokens=grid**2)
    # The system's words do not shrink with the scale, so they are left out.
    options = {"max_length": limit, "template_options": {"system": ""}}
    padded = ConversationCollator(processor, **options)
    packed = ConversationCollator(processor, **options, pack_to=int(args.rows * limit))
    orders = {name: list(GlobalBatchSampler(len(rows), args.batch, dataset=data)) for name, data in
              (("plain", plain), ("grouped", grouped))}  # fmt: skip

    def batches(collator: ConversationCollator, order: str) -> list[dict[str, Tensor]]:
        made = [collator([plain[number] for number in numbers]) for numbers in orders[order]]
        return [{name: value for name, value in batch.items() if name != "record_report"} for batch in made]

    forms = {
        "padded": batches(padded, "plain"),
        "padded, grouped by length": batches(padded, "grouped"),
        "packed": batches(packed, "plain"),
    }
    worst_loss = worst_gradient = 0.0
    for one, other in zip(forms["padded"], forms["packed"], strict=True):
        (loss, gradient), (packed_loss, packed_gradient) = step(model, one), step(model, other)
        worst_loss = max(worst_loss, abs(packed_loss - loss) / loss)
        difference = (packed_gradient - gradient).abs().max() / gradient.abs().max()
        worst_gradient = max(worst_gradient, difference.item())
    results = {}
    for name, made in forms.items():
        with FlopCounterMode(display=False) as counter:
            for batch in made:
                step(model, batch)
        seconds = timed(model, made, args.repeats)
        tokens = sum(int(batch["attention_mask"].sum()) for batch in made)
        places = sum(batch["attention_mask"].numel() for batch in made)
        results[name] = {
            "samples/s": len(rows) / seconds,
            "padding": 1 - tokens / places,
            "GFLOP a sample": counter.get_total_flops() / 1e9 / len(rows),
        }
    base = results["padded"]["samples/s"]
    lines = [
        [name, f"{row['samples/s']:.2f}", f"{row['samples/s'] / base:.2f}x", f"{row['padding']:.0%}",
         f"{row['GFLOP a sample']:.3g}"]
        for name, row in results.items()
    ]  # fmt: skip
    title = f"Training steps of {args.batch} conversations of up to {limit} tokens, {grid**2} of an image"
    print(table(title, ["", "samples/s", "", "padding", "GFLOP a sample"], lines))
    print(
        f"packed and padded differ by at most {worst_loss:.1e} in the loss and {worst_gradient:.1e} in the gradient "
        "of the token embeddings, relative to the largest"
    )
    if worst_loss > 1e-5 or worst_gradient > 1e-4:
        raise SystemExit("packed batches give another loss or gradient than padded ones")
    print(json.dumps({"results": results, "loss": worst_loss, "gradient": worst_gradient}))


if __name__ == "__main__":
    main()
