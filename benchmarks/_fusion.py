"""Both benchmarks of the models that fuse image and text in cross-attention (ALBEF, BLIP): a step, and re-ranking.

The scripts say how the two sides are made and which limits hold; here they are compared, measured and printed.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from _flops import counted_flops  # noqa: E402
from _measure import in_turns, peak_bytes, print_sides, synchronize  # noqa: E402
from _memory import TrackedAllocations  # noqa: E402

STEP_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 5e-2}
SCORE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}
MIN_SPEEDUP = 5.0

Forward = Callable[[], tuple[Tensor, Mapping[str, Tensor]]]


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of autocast")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    return parser


def autocast(args: argparse.Namespace) -> AbstractContextManager:
    """The arithmetic that `--dtype` asks for."""
    dtype = getattr(torch, args.dtype)
    return nullcontext() if dtype is torch.float32 else torch.autocast(args.device.split(":")[0], dtype=dtype)


# A step


@dataclass(frozen=True)
class StepLimits:
    """What the other side must come to, and what ours may take of it.

    Attributes:
        gflop: of the original's step, a sample.
        vision_gflop: of its image towers.
        rest: name of what is left without the image towers.
        rest_ratio, flop_ratio, time_ratio: most that ours may take.
    """

    gflop: float
    vision_gflop: float
    rest: str
    rest_ratio: float
    flop_ratio: float
    time_ratio: float


def step_arguments(description: str, argv: list[str] | None, queue_size: int) -> argparse.Namespace:
    """The command line of a step's benchmark; `queue_size` is that of the original."""
    parser = _parser(description)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="timed steps a side; the median is shown")
    parser.add_argument("--queue_size", type=int, default=queue_size)
    args = parser.parse_args(argv)
    if args.small:
        args.queue_size = 256
    return args


def step_pixels(args: argparse.Namespace, side: int) -> Tensor:
    """(B, 3, side, side)."""
    return torch.randn(args.batch, 3, side, side, generator=torch.Generator().manual_seed(1)).to(args.device)


def step_negatives(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """A wrong image for each text and a wrong text for each image. Some are sought after, most are not, as the
    similarities of a trained model have it."""
    shift = torch.randint(1, args.batch, (2, args.batch), generator=torch.Generator().manual_seed(3)).to(args.device)
    image_index, text_index = (torch.arange(args.batch, device=args.device) + shift) % args.batch
    return image_index, text_index


def compare_steps(
    args: argparse.Namespace,
    kind: str,
    mask: Tensor,
    ours: tuple[Forward, nn.Module],
    theirs: tuple[Forward, nn.Module],
    gradients: Callable[[], Mapping[str, tuple[Tensor, Tensor]]],
    image_towers: Callable[[], Any],
    limits: StepLimits,
) -> dict[str, Any]:
    """Compares losses and gradients of the two sides, then measures and prints both.

    Args:
        kind: what it is a step of, for the title.
        mask: (B, L) of the captions.
        ours, theirs: forward pass, which gives the loss and its terms, and the model.
        gradients: (ours, theirs) of every parameter after a step of both.
        image_towers: the image towers' part of a step of ours, backward included.

    Raises:
        SystemExit: the sides differ, the other one does not come to the original's figures, or ours takes more
            than the limits.
    """

    def step(forward: Forward, model: nn.Module) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            model.zero_grad(set_to_none=True)
            with autocast(args):
                loss, terms = forward()
            loss.backward()
            return {name: term.item() for name, term in terms.items()}

        return run

    models = {"native classes": theirs[1], "ours": ours[1]}
    sides = {"native classes": step(*theirs), "ours": step(*ours)}

    # Equal before fast.
    losses = {name: run() for name, run in sides.items()}
    differences = {
        name: abs(losses["ours"][name] - value) / abs(value) for name, value in losses["native classes"].items()
    }
    for name, (found, expected) in gradients().items():
        # Softmax does not see a bias of keys: its gradient is rounding noise around zero on both sides.
        if not name.endswith(("key.bias", "k_proj.bias")):
            largest = expected.abs().max().clamp(min=1e-6)
            differences[name] = ((found - expected).abs().max() / largest).item()
    worst = max(differences, key=differences.__getitem__)
    print(f"largest relative difference of losses and gradients: {differences[worst]:.1e} ({worst})")
    tolerance = STEP_TOLERANCE[getattr(torch, args.dtype)]
    if differences[worst] > tolerance:
        raise SystemExit(f"the two sides differ by more than {tolerance:.0e}")

    seconds = in_turns(sides, args.repeats, args.device)
    with counted_flops() as flops:
        image_towers()
    vision = flops.get_total_flops() / args.batch / 1e9
    results: dict[str, dict[str, float]] = {}
    for name, run in sides.items():
        with counted_flops() as flops:
            run()
        total = flops.get_total_flops() / args.batch / 1e9
        results[name] = {
            "GFLOP a sample": total,
            "image towers": vision,
            limits.rest: total - vision,
            "MiB at peak": peak_bytes(run, args.device, models[name]) / 2**20,
        }
        if name in seconds:
            results[name]["seconds a step"] = seconds[name]

    lengths = f"captions of {mask.sum(1).float().mean():.1f} tokens on average"
    title = f"{kind}, batch {args.batch}, {args.dtype}, {args.device}, {lengths}"
    report = print_sides(title, results, "native classes", difference=differences[worst])
    if not args.small:
        _hold(limits, args, report)
    return report


def _hold(limits: StepLimits, args: argparse.Namespace, report: Mapping[str, Any]) -> None:
    theirs, ratios = report["results"]["native classes"], report["ratios"]
    for column, expected in (("GFLOP a sample", limits.gflop), ("image towers", limits.vision_gflop)):
        if abs(theirs[column] - expected) > 0.02 * expected:
            raise SystemExit(f"{column} of the other side: {theirs[column]:.1f}, the original has {expected}")
    for column, most in ((limits.rest, limits.rest_ratio), ("GFLOP a sample", limits.flop_ratio)):
        if ratios[column] > most:
            raise SystemExit(f"{column}: {ratios[column]:.3f} of the original's, more than {most}")
    if args.device == "cpu" and args.repeats and ratios["seconds a step"] > limits.time_ratio:
        raise SystemExit(f"more than {limits.time_ratio} of the time")


# Re-ranking


def rerank(
    description: str,
    argv: list[str] | None,
    name: str,
    build: Callable[[argparse.Namespace], tuple[nn.Module, nn.Module, Tensor, Tensor]],
    original_scores: Callable[..., Tensor],
) -> dict[str, Any]:
    """Scores the top texts of many images by ours and by the original's evaluation, compares, measures and prints.

    Args:
        name: of the model, for the title.
        build: arguments -> ours, theirs, ids and mask (texts, L) of the captions, padded as the original does.
        original_scores: (theirs, image states (I, tokens, hidden), top (I, k), ids, mask) -> (I, k) logits.

    Raises:
        SystemExit: the scores differ, or ours is not fast enough.
    """
    parser = _parser(description)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--texts", type=int, default=320)
    parser.add_argument("--top", type=int, default=128)
    parser.add_argument("--their_images", type=int, default=2, help="images that the slow side scores")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    ours, theirs, ids, mask = build(args)
    ours, theirs = ours.to(args.device).eval(), theirs.to(args.device).eval()
    ids, mask = ids.to(args.device), mask.to(args.device)
    vision = ours.config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(args.images, tokens, vision.hidden_size, generator=generator).to(args.device)
    top = torch.rand(args.images, args.texts, generator=generator).topk(min(args.top, args.texts)).indices
    top = top.to(args.device)

    results: dict[str, dict[str, float]] = {}
    scores: dict[str, Tensor] = {}
    slow = min(args.their_images, args.images)
    for side, function, model, number in (
        ("original's evaluation", original_scores, theirs, slow),
        ("ours", _our_scores, ours, args.images),
    ):

        @torch.no_grad()
        def run(number: int = number, function: Any = function, model: Any = model) -> Tensor:
            with autocast(args):
                result = function(model, images[:number], top[:number], ids, mask)
            synchronize(args.device)
            return result

        run(1)
        start = time.perf_counter()
        scores[side] = run().float()
        seconds = time.perf_counter() - start
        with counted_flops() as flops:
            run(1)
        with TrackedAllocations(*model.parameters(), *model.buffers(), images, ids, mask, top) as tracked:
            run(1)
        results[side] = {
            "pairs/s": number * top.shape[1] / seconds,
            "GFLOP a pair": flops.get_total_flops() / top.shape[1] / 1e9,
            "MiB at peak": tracked.peak / 2**20,
        }
    wanted, found = scores["original's evaluation"], scores["ours"][:slow]
    difference = ((found - wanted).abs().max() / wanted.abs().max()).item()
    print(f"largest relative difference of {wanted.numel()} scores: {difference:.1e}")
    kind = f"tiny {name}" if args.small else f"{name} ViT-B/16, 384 px"
    title = f"{kind}, the top {top.shape[1]} texts of {args.images} images, {args.dtype}, {args.device}"
    report = print_sides(title, results, "original's evaluation", difference=difference)
    tolerance = SCORE_TOLERANCE[getattr(torch, args.dtype)]
    if difference > tolerance:
        raise SystemExit(f"the scores differ by more than {tolerance:.0e}")
    if not args.small and args.dtype == "float32" and report["ratios"]["pairs/s"] < MIN_SPEEDUP:
        raise SystemExit(f"less than {MIN_SPEEDUP} times the pairs a second")
    return report


def _our_scores(model: nn.Module, images: Tensor, top: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    index = torch.arange(len(images), device=images.device).repeat_interleave(top.shape[1])
    return model.matching_scores(images, index, ids[top.flatten()], mask[top.flatten()]).view_as(top)
