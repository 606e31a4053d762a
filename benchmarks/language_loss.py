"""The language-modelling loss with a large vocabulary: logits at all positions, at the supervised ones, and in chunks.

    python benchmarks/language_loss.py

Memory is counted as the bytes of all tensors that live at a time beyond weights and inputs.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from _memory import TrackedAllocations, table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hf_vlp.objectives.language import language_modeling_loss


def _in_place(_: object, a: Sequence[int], b: Sequence[int], **__: object) -> int:
    return 2 * a[0] * a[1] * b[1]


# The counter of torch knows the product that adds to a new tensor only, not the one that adds in place.
COUNTED = {torch.ops.aten.addmm_: _in_place}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="positions a row; half of them are supervised")
    parser.add_argument("--chunk", type=int, default=32)
    args = parser.parse_args()

    torch.manual_seed(0)
    head = nn.Linear(args.width, args.vocabulary, bias=False)
    hidden = torch.randn(args.batch, args.length, args.width, requires_grad=True)
    labels = torch.randint(args.vocabulary, (args.batch, args.length))
    labels[:, : args.length // 2] = -100

    def everywhere() -> Tensor:
        logits = head(hidden)[:, :-1]
        return F.cross_entropy(logits.reshape(-1, args.vocabulary), labels[:, 1:].reshape(-1))

    forms: dict[str, Callable[[], Tensor]] = {
        "all positions": everywhere,
        "supervised": lambda: language_modeling_loss(hidden, head, labels),
        f"in chunks of {args.chunk}": lambda: language_modeling_loss(hidden, head, labels, chunk_size=args.chunk),
    }
    results, found = {}, {}
    for name, form in forms.items():
        hidden.grad = head.weight.grad = None
        start = time.perf_counter()
        counter = FlopCounterMode(display=False, custom_mapping=COUNTED)
        with TrackedAllocations(hidden, labels, head.weight) as tracked, counter:
            loss = form()
            loss.backward()
        results[name] = {
            "GFLOP": counter.get_total_flops() / 1e9,
            "seconds": time.perf_counter() - start,
            "MiB of tensors": tracked.peak / 2**20,
        }
        found[name] = loss.item(), hidden.grad, head.weight.grad
    columns = ["GFLOP", "seconds", "MiB of tensors"]
    rows = [[name, *(f"{row[column]:.4g}" for column in columns)] for name, row in results.items()]
    weight = head.weight.numel() * 4 / 2**20
    print(table(f"Language loss over {args.vocabulary} tokens, forward and backward", ["", *columns], rows))
    print(f"(the gradient of the head's weight alone is {weight:.0f} MiB)")
    expected = found["all positions"]
    for name, values in found.items():
        worst = max(
            abs(values[0] - expected[0]) / expected[0],
            *(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(values[1:], expected[1:])),
        )
        print(f"{name}: differs by at most {worst:.1e}, relative")
        if worst > 1e-4:
            raise SystemExit("the forms differ")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
