"""A BLIP pretraining step, forward and backward: ours against native classes with the original's padding and passes.

    python benchmarks/blip_step.py                       # ViT-B/16 at 224 px, batch 8, float32 on the CPU
    python benchmarks/blip_step.py --device cuda --dtype bfloat16 --batch 64
    python benchmarks/blip_step.py --small --repeats 1   # a tiny model, in seconds
    python benchmarks/blip_step.py --repeats 0           # FLOPs and memory alone

The other side pads captions (8 to 20 tokens) to 30, projects an image's keys and values for each of the four texts
that look at it, and makes the decoder's logits at every position, as the original does. Both sides run in one process
on the same weights, batch and negatives, one after the other in every repeat; losses and gradients are compared before
anything is timed. "Text models" is what is left without the two image towers.
FLOPs are counted with the attention written out, since the counter does not know every fused kernel.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_vlp.models.blip.pretraining_blip import BlipForPreTraining
from hf_vlp.models.blip.vision_blip import encode_images

sys.path.insert(0, str(Path(__file__).parent))
from _blip import Composed, base_config, captions, spread  # noqa: E402
from _flops import counted_flops  # noqa: E402
from _memory import TrackedAllocations, table  # noqa: E402

ALPHA, MOMENTUM, PADDED = 0.4, 0.995, 30
# Counted of the original, a sample: in all, in the image towers.
EXPECTED_GFLOP, EXPECTED_VISION = 306.6, 140.0
MAX_REST_RATIO, MAX_FLOP_RATIO, MAX_TIME_RATIO = 0.40, 0.70, 0.75
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 5e-2}


class ComposedStep(nn.Module):
    """The other side: online model, momentum twin, queues."""

    def __init__(self, ours: BlipForPreTraining) -> None:
        super().__init__()
        state = ours.model.state_dict()
        self.online = Composed(ours.model.config, state, with_decoder=True)
        self.twin = Composed(ours.model.config, state).requires_grad_(False)
        self.temperature = nn.Parameter(ours.temperature.detach().clone())
        self.register_buffer("image_queue", ours.queue.images.clone())
        self.register_buffer("text_queue", ours.queue.texts.clone())
        self.position = 0

    def forward(
        self, pixel_values: Tensor, ids: Tensor, mask: Tensor, negatives: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        online, twin, number = self.online, self.twin, len(ids)
        with torch.no_grad():
            self.temperature.clamp_(0.001, 0.5)
        images = online.images(pixel_values)
        image, text = online.features(images, online.text(ids, mask))
        with torch.no_grad():
            for slow, fast in zip(twin.model.parameters(), online.model.parameters()):
                slow.data = slow.data * MOMENTUM + fast.data * (1 - MOMENTUM)
            image_m, text_m = twin.features(twin.images(pixel_values), twin.text(ids, mask))
            image_keys = torch.cat([image_m, self.image_queue])
            text_keys = torch.cat([text_m, self.text_queue])
            hard = F.one_hot(torch.arange(number, device=ids.device), len(text_keys)).float()
            i2t = ALPHA * (image_m @ text_keys.t() / self.temperature).softmax(1) + (1 - ALPHA) * hard
            t2i = ALPHA * (text_m @ image_keys.t() / self.temperature).softmax(1) + (1 - ALPHA) * hard
        loss_i2t = F.cross_entropy((image @ text_keys.t() / self.temperature).float(), i2t)
        loss_t2i = F.cross_entropy((text @ image_keys.t() / self.temperature).float(), t2i)
        with torch.no_grad():
            self.image_queue[self.position : self.position + number] = image_m
            self.text_queue[self.position : self.position + number] = text_m
            self.position = (self.position + number) % len(self.image_queue)
        image_index, text_index = negatives
        matched = online.text(ids, mask, images)
        wrong = online.text(
            torch.cat([ids, ids[text_index]]),
            torch.cat([mask, mask[text_index]]),
            torch.cat([images[image_index], images]),
        )
        logits = online.model.itm_head(torch.cat([matched[:, 0], wrong[:, 0]]))
        labels = torch.zeros(3 * number, dtype=torch.long, device=ids.device)
        labels[:number] = 1
        loss_itm = F.cross_entropy(logits.float(), labels)
        loss_lm = online.language_loss(ids, mask, images)
        return {"loss_itc": (loss_i2t + loss_t2i) / 2, "loss_itm": loss_itm, "loss_lm": loss_lm}


def pairs_of_gradients(ours: BlipForPreTraining, theirs: ComposedStep) -> dict[str, tuple[Tensor, Tensor]]:
    """Gradients of both sides by our names."""
    found = dict(ours.model.named_parameters(remove_duplicate=False)) | {"temperature": ours.temperature}
    expected = dict(theirs.online.model.named_parameters()) | {"temperature": theirs.temperature}
    expected |= {f"text_decoder.{name}": p for name, p in theirs.online.text_decoder.named_parameters()}
    return {name: (found[name].grad, parameter.grad) for name, parameter in expected.items()}


def peak_bytes(run: Callable[[], Any], device: str, model: nn.Module) -> int:
    """Most bytes that a step holds beyond weights, gradients included."""
    model.zero_grad(set_to_none=True)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with TrackedAllocations(*model.parameters(), *model.buffers()) as tracked:
        run()
    return tracked.peak


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="timed steps a side; the median is shown")
    parser.add_argument("--queue_size", type=int, default=57600)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of autocast")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.dtype)

    torch.manual_seed(0)
    config = base_config(small=args.small)
    size = 256 if args.small else args.queue_size
    ours = BlipForPreTraining(config, queue_size=size, momentum=MOMENTUM, alpha=ALPHA)
    spread(ours.model)
    ours.reset_momentum()
    ours = ours.to(args.device).train()
    theirs = ComposedStep(ours).to(args.device).train()
    ids, mask = (x.to(args.device) for x in captions(args.batch, config.text_config.vocab_size, PADDED))
    side = config.vision_config.image_size
    pixels = torch.randn(args.batch, 3, side, side, generator=torch.Generator().manual_seed(1)).to(args.device)
    # Some images are sought after as negatives, most are not, as the similarities of a trained model have it.
    shift = torch.randint(1, args.batch, (2, args.batch), generator=torch.Generator().manual_seed(3)).to(args.device)
    image_index, text_index = (torch.arange(args.batch, device=args.device) + shift) % args.batch

    def autocast() -> AbstractContextManager:
        return nullcontext() if dtype is torch.float32 else torch.autocast(args.device.split(":")[0], dtype=dtype)

    def our_step() -> dict[str, float]:
        ours.zero_grad(set_to_none=True)
        with autocast():
            output = ours(pixels, ids, mask, negatives=(image_index, text_index))
        output.loss.backward()
        return {name: output[name].item() for name in ("loss_itc", "loss_itm", "loss_lm")}

    def their_step() -> dict[str, float]:
        theirs.zero_grad(set_to_none=True)
        with autocast():
            losses = theirs(pixels, ids, mask, (image_index, text_index))
        sum(losses.values()).backward()
        return {name: loss.item() for name, loss in losses.items()}

    sides: dict[str, tuple[Callable[[], dict[str, float]], nn.Module]] = {
        "native classes": (their_step, theirs),
        "ours": (our_step, ours),
    }

    # Equal before fast.
    losses = {name: run() for name, (run, _) in sides.items()}
    differences = {
        name: abs(losses["ours"][name] - value) / abs(value) for name, value in losses["native classes"].items()
    }
    for name, (found, expected) in pairs_of_gradients(ours, theirs).items():
        # Softmax does not see a bias of keys: its gradient is rounding noise around zero on both sides.
        if not name.endswith("key.bias"):
            largest = expected.abs().max().clamp(min=1e-6)
            differences[name] = ((found - expected).abs().max() / largest).item()
    worst = max(differences, key=differences.get)
    print(f"largest relative difference of losses and gradients: {differences[worst]:.1e} ({worst})")
    if differences[worst] > TOLERANCE[dtype]:
        raise SystemExit(f"the two sides differ by more than {TOLERANCE[dtype]:.0e}")

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, (run, _) in sides.items():
            start = time.perf_counter()
            run()
            if args.device.startswith("cuda"):
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    with counted_flops() as flops:
        ours.model.encode_images(pixels).sum().backward()
        with torch.no_grad():
            encode_images(ours.momentum["vision_model"], pixels)
    vision = flops.get_total_flops() / args.batch / 1e9
    results: dict[str, dict[str, float]] = {}
    for name, (run, model) in sides.items():
        with counted_flops() as flops:
            run()
        total = flops.get_total_flops() / args.batch / 1e9
        results[name] = {
            "GFLOP a sample": total,
            "image towers": vision,
            "text models": total - vision,
            "MiB at peak": peak_bytes(run, args.device, model) / 2**20,
        }
        if seconds[name]:
            results[name]["seconds a step"] = statistics.median(seconds[name])

    columns = list(results["ours"])
    ratios = {column: results["ours"][column] / results["native classes"][column] for column in columns}
    rows = [[name, *(f"{row[column]:.4g}" for column in columns)] for name, row in results.items()]
    rows.append(["ratio", *(f"{ratios[column]:.3f}" for column in columns)])
    kind = "tiny BLIP" if args.small else "BLIP ViT-B/16, 224 px"
    lengths = f"captions of {mask.sum(1).float().mean():.1f} tokens on average"
    print(table(f"{kind}, batch {args.batch}, {args.dtype}, {args.device}, {lengths}", ["", *columns], rows))
    report = {"results": results, "ratios": ratios, "difference": differences[worst]}
    report["threads"] = torch.get_num_threads()
    print(json.dumps(report))
    if not args.small:
        theirs_gflop = results["native classes"]
        for column, expected in (("GFLOP a sample", EXPECTED_GFLOP), ("image towers", EXPECTED_VISION)):
            if abs(theirs_gflop[column] - expected) > 0.02 * expected:
                raise SystemExit(
                    f"{column} of the other side: {theirs_gflop[column]:.1f}, the original has {expected}"
                )
        if ratios["text models"] > MAX_REST_RATIO or ratios["GFLOP a sample"] > MAX_FLOP_RATIO:
            raise SystemExit(f"more than {MAX_REST_RATIO} of the text models' FLOPs or {MAX_FLOP_RATIO} of all")
        if args.device == "cpu" and args.repeats and ratios["seconds a step"] > MAX_TIME_RATIO:
            raise SystemExit(f"more than {MAX_TIME_RATIO} of the time")
    return report


if __name__ == "__main__":
    main()
