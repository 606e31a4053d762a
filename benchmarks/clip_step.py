"""A CLIP training step, forward and backward: ours against the native class at the original's fixed 77 tokens.

    python benchmarks/clip_step.py                       # ViT-B/32, batch 32, float32 on the CPU
    python benchmarks/clip_step.py --device cuda --dtype bfloat16
    python benchmarks/clip_step.py --small --repeats 1   # a tiny model, in a second

The other side is what one composes from `transformers.CLIPModel`: texts padded to 77 tokens under causal attention,
as the original code and OpenCLIP have them, and the class's own loss. Both sides run in one process on the same
weights and batch, one after the other in every repeat; losses and gradients are compared before anything is timed.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig

from hf_vlp.models.clip.pretraining_clip import CLIPForPreTraining

sys.path.insert(0, str(Path(__file__).parent))
from _measure import in_turns, peak_bytes, print_sides  # noqa: E402

CONTEXT_LENGTH = 77
SHORTEST, LONGEST = 8, 25
# What OpenCLIP's ViT-B/32 step takes a sample at 77 tokens, and what trimming may take of its FLOPs and time.
EXPECTED_GFLOP = 43.4
MAX_FLOP_RATIO, MAX_TIME_RATIO = 0.75, 0.82
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


def models(config: CLIPConfig, device: str) -> tuple[CLIPForPreTraining, transformers.CLIPModel]:
    """Ours and the native one, on the same weights."""
    torch.manual_seed(0)
    ours = CLIPForPreTraining(config).to(device).train()
    native = transformers.CLIPModel(config).to(device).train()
    native.load_state_dict(ours.model.state_dict())
    return ours, native


def make_batch(config: CLIPConfig, size: int, device: str) -> dict[str, Tensor]:
    """Random pixels, and captions of 8 to 25 tokens, start and end included, one of them of 25, padded to 77."""
    generator = torch.Generator().manual_seed(0)
    end = config.text_config.eos_token_id
    length = config.text_config.max_position_embeddings
    lengths = torch.randint(SHORTEST, LONGEST + 1, (size,), generator=generator)
    lengths[0] = LONGEST
    input_ids = torch.randint(1, end - 1, (size, length), generator=generator)
    position = torch.arange(length)
    input_ids[:, 0] = end - 1
    input_ids[position >= lengths[:, None] - 1] = end
    side = config.vision_config.image_size
    pixel_values = torch.randn(size, 3, side, side, generator=generator)
    return {"pixel_values": pixel_values.to(device), "input_ids": input_ids.to(device)}


def step(forward: Callable[[], Any], model: nn.Module, autocast: AbstractContextManager) -> float:
    """Loss of one step; gradients are left in the model."""
    model.zero_grad(set_to_none=True)
    with autocast:
        loss = forward().loss
    loss.backward()
    return loss.item()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps a side; the median is shown")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of autocast")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.dtype)

    config = CLIPConfig()
    if args.small:
        tower = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
        text = tower | {"vocab_size": 1000, "bos_token_id": 998, "eos_token_id": 999, "pad_token_id": 999}
        config = CLIPConfig(text_config=text, vision_config=tower | {"image_size": 64}, projection_dim=32)
    ours, native = models(config, args.device)
    batch = make_batch(config, args.batch, args.device)

    def autocast() -> AbstractContextManager:
        return nullcontext() if dtype is torch.float32 else torch.autocast(args.device.split(":")[0], dtype=dtype)

    sides: dict[str, tuple[Callable[[], float], nn.Module]] = {
        "native": (lambda: step(lambda: native(**batch, return_loss=True), native, autocast()), native),
        "ours": (lambda: step(lambda: ours(**batch), ours.model, autocast()), ours.model),
    }

    # Equal before fast.
    losses = {name: run() for name, (run, _) in sides.items()}
    differences = {"loss": abs(losses["ours"] - losses["native"]) / abs(losses["native"])}
    gradients = {name: p.grad for name, p in native.named_parameters()}
    for name, parameter in ours.model.named_parameters():
        expected = gradients[name]
        largest = expected.abs().max().clamp(min=1e-8)
        differences[name] = ((parameter.grad - expected).abs().max() / largest).item()
    # Softmax does not see a bias of keys: its gradient is rounding noise around zero on both sides.
    compared = {name: value for name, value in differences.items() if not name.endswith("k_proj.bias")}
    worst = max(compared, key=compared.get)
    print(f"largest relative difference of loss and {len(compared) - 1} gradients: {compared[worst]:.1e} ({worst})")
    if compared[worst] > TOLERANCE[dtype]:
        raise SystemExit(f"the two sides differ by more than {TOLERANCE[dtype]:.0e}")

    seconds = in_turns({name: run for name, (run, _) in sides.items()}, args.repeats, args.device)
    results = {}
    for name, (run, model) in sides.items():
        with FlopCounterMode(display=False) as flops:
            run()
        results[name] = {
            "GFLOP a sample": flops.get_total_flops() / args.batch / 1e9,
            "MiB at peak": peak_bytes(run, args.device, model, *batch.values()) / 2**20,
        }
        if name in seconds:
            results[name]["seconds a step"] = seconds[name]

    kind = "tiny CLIP" if args.small else "CLIP ViT-B/32"
    title = f"{kind}, batch {args.batch}, {args.dtype}, {args.device}, {LONGEST} of 77 tokens"
    report = print_sides(title, results, "native", difference=compared[worst])
    ratios = report["ratios"]
    if not args.small:
        native_gflop = results["native"]["GFLOP a sample"]
        if abs(native_gflop - EXPECTED_GFLOP) > 0.02 * EXPECTED_GFLOP:
            raise SystemExit(f"the native side takes {native_gflop:.1f} GFLOP a sample, not {EXPECTED_GFLOP}")
        if ratios["GFLOP a sample"] > MAX_FLOP_RATIO:
            raise SystemExit(f"more than {MAX_FLOP_RATIO} of the FLOPs")
        if (
            args.device == "cpu"
            and args.dtype == "float32"
            and args.repeats
            and ratios["seconds a step"] > MAX_TIME_RATIO
        ):
            raise SystemExit(f"more than {MAX_TIME_RATIO} of the time")
    return report


if __name__ == "__main__":
    main()
