"""The contrastive loss in tiles against the dense form: memory, multiplications, time, and that both are equal.

    python benchmarks/itc_tiled.py                              # 16,384 x 16,384 x 512, about 7 GB
    python benchmarks/itc_tiled.py --batch 4096 --tile 512

The dense side is what one writes with plain torch: one similarity matrix and a cross-entropy over its rows and over
its columns. Both sides run in one process on the same features. Memory is counted twice: as the bytes of all tensors
that live at a time beyond the inputs, and, in a process of its own for each side, as the growth of resident memory.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _memory import PeakRss, TrackedAllocations, result_of_child, table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hf_vlp.objectives.contrastive import contrastive_loss


def features(batch: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors of matching images and texts that are somewhat alike, and a scale of 20."""
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(batch, width, generator=generator), dim=-1)
    texts = F.normalize(images + 0.1 * torch.randn(batch, width, generator=generator), dim=-1)
    return images.requires_grad_(), texts.requires_grad_(), torch.tensor(20.0, requires_grad=True)


def dense(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    logits = scale * images @ texts.t()
    pairs = torch.arange(len(images))
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.t(), pairs)) / 2


def sides(tile: int) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    return {"dense": dense, "tiled": lambda *x: contrastive_loss(*x, tile_size=tile).loss}


def step(side: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: tuple[Tensor, ...]) -> tuple[float, list[Tensor]]:
    """Loss, and gradients of images, texts and scale."""
    for tensor in inputs:
        tensor.grad = None
    loss = side(*inputs)
    loss.backward()
    return loss.item(), [tensor.grad for tensor in inputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16_384)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tile", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3, help="timed steps a side; the median is shown")
    parser.add_argument("--only", choices=("dense", "tiled"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    forms = sides(args.tile)

    if args.only:
        step(forms[args.only], features(8, args.width))
        inputs = features(args.batch, args.width)
        gc.collect()
        with PeakRss() as memory:
            step(forms[args.only], inputs)
        print(json.dumps({"growth": memory.growth}))
        return

    inputs = features(args.batch, args.width)
    results, found = {}, {}
    for name, form in forms.items():
        seconds = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            step(form, inputs)
            seconds.append(time.perf_counter() - start)
        with FlopCounterMode(display=False) as flops:
            found[name] = step(form, inputs)
        for tensor in inputs:
            tensor.grad = None
        gc.collect()
        with TrackedAllocations(*inputs) as tracked:
            step(form, inputs)
        arguments = ["--batch", args.batch, "--width", args.width, "--tile", args.tile, "--only", name]
        resident = result_of_child(*map(str, arguments))["growth"]
        results[name] = {
            "GFLOP": flops.get_total_flops() / 1e9,
            "seconds": sorted(seconds)[len(seconds) // 2],
            "MiB of tensors": tracked.peak / 2**20,
            "MiB resident": resident / 2**20,
        }

    columns = list(results["dense"])
    rows = [[name, *(f"{row[column]:.4g}" for column in columns)] for name, row in results.items()]
    ratios = {column: results["tiled"][column] / results["dense"][column] for column in columns}
    rows.append(["ratio", *(f"{ratios[column]:.4f}" for column in columns)])
    title = f"ITC {args.batch} x {args.batch} x {args.width}, forward and backward, tiles of {args.tile}"
    print(table(title, ["", *columns], rows))

    (loss, grads), (tiled_loss, tiled_grads) = found["dense"], found["tiled"]
    differences = {"loss": abs(loss - tiled_loss) / abs(loss)}
    for name, ours, expected in zip(("images", "texts", "scale"), tiled_grads, grads):
        differences[f"gradient of {name}"] = ((ours - expected).abs().max() / expected.abs().max()).item()
    print("largest difference, relative:", ", ".join(f"{name} {value:.1e}" for name, value in differences.items()))
    print(json.dumps({"results": results, "ratios": ratios, "differences": differences}))
    if max(differences.values()) > 1e-4:
        raise SystemExit("the two forms differ")
    if args.batch >= 16_384 and max(ratios["MiB of tensors"], ratios["MiB resident"]) > 1 / 8:
        raise SystemExit("the tiled form takes more than 1/8 of the memory of the dense form")


if __name__ == "__main__":
    main()
