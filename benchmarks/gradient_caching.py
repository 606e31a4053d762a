"""Gradient caching: a batch of 1,024 pairs in the activation memory of a batch of 64.

    python benchmarks/gradient_caching.py
    python benchmarks/gradient_caching.py --batch 256 --chunk 16

Three steps of one small CLIP on the same weights: the plain step of the small batch, the plain step of the large one,
and the large one with caching. Memory is counted three times: as the bytes that autograd keeps for the backward
(activations, without weights), as those of all tensors that live at a time beyond weights and inputs, and, in a
process of its own, as the growth of resident memory.
"""

import argparse
import gc
import json
import time

import torch
from _memory import PeakRss, SavedForBackward, TrackedAllocations, result_of_child, table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig

from hf_vlp.models.clip.pretraining_clip import CLIPForPreTraining
from hf_vlp.objectives.gradient_cache import cached_step

IMAGE_SIZE, LENGTH, VOCABULARY = 64, 20, 1000


def model_and_batch(rows: int) -> tuple[CLIPForPreTraining, dict[str, Tensor]]:
    """Image tower of 65 tokens, text tower of 20, both 128 wide and 4 layers deep; always the same weights."""
    torch.manual_seed(0)
    tower = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(
        text_config={**tower, **text, "pad_token_id": 0},
        vision_config={**tower, "image_size": IMAGE_SIZE, "patch_size": 8},
        projection_dim=64,
    )
    model = CLIPForPreTraining(config)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=generator)
    ids[:, 0], ids[:, -1] = 1, 2
    pixels = torch.randn(rows, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return model, {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def step(model: CLIPForPreTraining, batch: dict[str, Tensor], chunk: int | None) -> float:
    model.zero_grad()
    if chunk is not None:
        return cached_step(model, batch, chunk).loss.item()
    loss = model(**batch).loss
    loss.backward()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1, help="timed steps a side; the median is shown")
    parser.add_argument("--only", type=int, nargs=2, metavar=("ROWS", "CHUNK"), help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.only:
        rows, chunk = args.only[0], args.only[1] or None
        warm_model, warm_batch = model_and_batch(4)
        step(warm_model, warm_batch, chunk and 2)
        del warm_model, warm_batch
        model, batch = model_and_batch(rows)
        gc.collect()
        with PeakRss() as memory:
            step(model, batch, chunk)
        print(json.dumps({"growth": memory.growth}))
        return

    forms = {
        f"plain, batch {args.chunk}": (args.chunk, None),
        f"plain, batch {args.batch}": (args.batch, None),
        f"cached, batch {args.batch} by {args.chunk}": (args.batch, args.chunk),
    }
    results, losses, grads = {}, {}, {}
    for name, (rows, chunk) in forms.items():
        model, batch = model_and_batch(rows)
        results[name] = measure(model, batch, chunk, args.repeats)
        results[name]["MiB resident"] = result_of_child("--only", str(rows), str(chunk or 0))["growth"] / 2**20
        losses[name] = step(model, batch, chunk)
        grads[name] = {key: p.grad.clone() for key, p in model.named_parameters()}

    small, whole, cached = forms
    columns = list(results[small])
    rows = [[name, *(f"{row[column]:.4g}" for column in columns)] for name, row in results.items()]
    ratios = {
        f"cached / plain of {other}": {column: results[cached][column] / results[name][column] for column in columns}
        for other, name in ((args.chunk, small), (args.batch, whole))
    }
    rows += [[name, *(f"{row[column]:.3f}" for column in columns)] for name, row in ratios.items()]
    print(table("CLIP step, forward and backward", ["", *columns], rows))

    differences = {"loss": abs(losses[cached] - losses[whole]) / losses[whole]}
    for key, expected in grads[whole].items():
        scale = expected.abs().max().clamp(min=1e-8)
        differences[key] = ((grads[cached][key] - expected).abs().max() / scale).item()
    # Key biases cancel in the softmax of the attention: their gradients are rounding errors around zero.
    differences = {key: value for key, value in differences.items() if not key.endswith("k_proj.bias")}
    worst = max(differences, key=differences.__getitem__)
    print(
        f"cached against plain: loss {differences['loss']:.1e}, gradients at most {differences[worst]:.1e} ({worst})"
    )
    print(json.dumps({"results": results, "ratios": ratios, "worst": differences[worst]}))
    if differences[worst] > 1e-3 or differences["loss"] > 1e-5:
        raise SystemExit("the cached step is not the plain step")
    if ratios[f"cached / plain of {args.chunk}"]["MiB of activations"] > 1.1:
        raise SystemExit(f"the cached step keeps more activations than a batch of {args.chunk}")


def measure(model: CLIPForPreTraining, batch: dict[str, Tensor], chunk: int | None, repeats: int) -> dict[str, float]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step(model, batch, chunk)
        seconds.append(time.perf_counter() - start)
    with FlopCounterMode(display=False) as flops:
        step(model, batch, chunk)
    with SavedForBackward(*model.parameters(), *batch.values()) as saved:
        step(model, batch, chunk)
    model.zero_grad()
    gc.collect()
    with TrackedAllocations(*model.parameters(), *model.buffers(), *batch.values()) as tracked:
        step(model, batch, chunk)
    return {
        "GFLOP": flops.get_total_flops() / 1e9,
        "seconds": sorted(seconds)[len(seconds) // 2],
        "MiB of activations": saved.peak / 2**20,
        "MiB of tensors": tracked.peak / 2**20,
    }


if __name__ == "__main__":
    main()
