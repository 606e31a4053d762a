"""The trained part of a BLIP-2 stage-1 step, forward and backward: ours against the original's passes.

    python benchmarks/blip2_stage1.py                       # base size, batch 8, float32 on the CPU
    python benchmarks/blip2_stage1.py --device cuda --dtype bfloat16 --batch 64
    python benchmarks/blip2_stage1.py --small --repeats 1   # a tiny model, in a second

Image features (257 x 1408) are given to both sides. The other side is what one composes from the native classes of
transformers with the passes of the original authors' step: texts padded to 32 tokens; the Q-Former run on the images,
on the texts, and on three times as many pairs of both, each projecting the image features anew; then on the texts
that are to be generated, over the keys and values that the first run left; logits at every position. Both sides run
in one process on the same weights, batch and negatives, one after the other in every repeat, without dropout; losses
and gradients are compared before anything is timed.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hf_vlp.models.blip2.pretraining_blip_2 import Blip2ForPreTraining, ImageGroundedTextHead

sys.path.insert(0, str(Path(__file__).parent))
from _blip2 import CLS, IMAGE_TOKENS, PAD, TEXT_LENGTH, captions, set_attention, stage1_config  # noqa: E402
from _measure import in_turns, peak_bytes, print_sides  # noqa: E402

# GFLOP a sample that the original authors' step takes at base size, and what ours may take of its FLOPs and time.
EXPECTED_FORWARD, EXPECTED_BOTH = 80.2, 213.8
MAX_FLOP_RATIO, MAX_TIME_RATIO = 0.62, 0.70
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


class ComposedStage1(nn.Module):
    """The original's step on the native classes."""

    def __init__(self, config: transformers.Blip2Config, decoder_start: int) -> None:
        super().__init__()
        self.retrieval = transformers.Blip2ForImageTextRetrieval(config)
        self.itg_head = ImageGroundedTextHead(config.qformer_config)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.decoder_start = decoder_start

    def forward(
        self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor, negatives: tuple[Tensor, Tensor]
    ) -> Tensor:
        model, batch = self.retrieval, len(input_ids)
        queries = model.query_tokens.expand(batch, -1, -1)
        with self._keys_and_values() as cache:
            query_states = model.qformer(query_embeds=queries, encoder_hidden_states=image_embeds).last_hidden_state
        text_states = model.qformer(
            query_embeds=model.embeddings(input_ids), query_length=0, attention_mask=attention_mask
        ).last_hidden_state
        image_feats = F.normalize(model.vision_projection(query_states), dim=-1)
        text_feat = F.normalize(model.text_projection(text_states[:, 0]), dim=-1)
        cosines = torch.einsum("iqd,td->iqt", image_feats, text_feat).amax(dim=1) / self.temperature
        targets = torch.arange(batch, device=input_ids.device)
        loss_itc = F.cross_entropy(cosines, targets, label_smoothing=0.1)
        loss_itc = (loss_itc + F.cross_entropy(cosines.t(), targets, label_smoothing=0.1)) / 2

        image_index, text_index = negatives
        pairs = torch.cat([input_ids, input_ids, input_ids[text_index]])
        pair_mask = torch.cat([attention_mask, attention_mask, attention_mask[text_index]])
        query_mask = pair_mask.new_ones(3 * batch, queries.shape[1])
        joint = model.qformer(
            query_embeds=model.embeddings(pairs, query_embeds=model.query_tokens.expand(3 * batch, -1, -1)),
            query_length=queries.shape[1],
            attention_mask=torch.cat([query_mask, pair_mask], dim=1),
            encoder_hidden_states=torch.cat([image_embeds, image_embeds[image_index], image_embeds]),
        ).last_hidden_state
        logits = model.itm_head(joint[:, : queries.shape[1]]).mean(dim=1)
        labels = torch.cat([torch.ones_like(targets), torch.zeros_like(targets), torch.zeros_like(targets)])
        loss_itm = F.cross_entropy(logits, labels)
        return loss_itc + loss_itm + self._generation_loss(input_ids, attention_mask, cache)

    def _keys_and_values(self) -> AbstractContextManager[dict[nn.Module, Tensor]]:
        return _Captured(
            [part for layer in self.retrieval.qformer.encoder.layer for part in _key_value(layer.attention.attention)]
        )

    def _generation_loss(self, input_ids: Tensor, attention_mask: Tensor, cache: dict[nn.Module, Tensor]) -> Tensor:
        model = self.retrieval
        ids = input_ids.masked_fill(input_ids == CLS, self.decoder_start)
        hidden = model.qformer.dropout(model.qformer.layernorm(model.embeddings(ids)))
        length = ids.shape[1]
        seen = attention_mask.bool()[:, None] & torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        seen = torch.cat([seen.new_ones(len(ids), length, model.query_tokens.shape[1]), seen], dim=-1)[:, None]
        for layer in model.qformer.encoder.layer:
            attention = layer.attention.attention
            heads = (attention.num_attention_heads, attention.attention_head_size)
            query = attention.query(hidden).unflatten(-1, heads).transpose(1, 2)
            key, value = (
                torch.cat([cache[part], part(hidden)], dim=1).unflatten(-1, heads).transpose(1, 2)
                for part in _key_value(attention)
            )
            if model.config._attn_implementation == "eager":
                scores = query @ key.transpose(-1, -2) * attention.scaling
                mixed = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(dim=-1) @ value
            else:
                mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
            hidden = layer.feed_forward_chunk(layer.attention.output(mixed.transpose(1, 2).flatten(2), hidden))
        logits = self.itg_head(hidden, model.embeddings.word_embeddings.weight)
        targets = input_ids.masked_fill(input_ids == PAD, -100)[:, 1:]
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), label_smoothing=0.1)


def _key_value(attention: nn.Module) -> tuple[nn.Module, nn.Module]:
    return attention.key, attention.value


class _Captured(AbstractContextManager):
    """Outputs of modules, as a dictionary."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules

    def __enter__(self) -> dict[nn.Module, Tensor]:
        outputs: dict[nn.Module, Tensor] = {}
        self.handles = [
            module.register_forward_hook(lambda module, inputs, output: outputs.__setitem__(module, output))
            for module in self.modules
        ]
        return outputs

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def without_dropout(config: transformers.Blip2Config) -> transformers.Blip2Config:
    config.qformer_config.hidden_dropout_prob = config.qformer_config.attention_probs_dropout_prob = 0.0
    return config


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps a side; the median is shown")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of autocast")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.dtype)

    torch.manual_seed(0)
    config = without_dropout(stage1_config(args.small))
    ours = Blip2ForPreTraining(config, gather_keys="exact").to(args.device).train()
    native = ComposedStage1(config, ours.settings.decoder_start_token_id).to(args.device).train()
    native.load_state_dict(ours.state_dict())
    # The image features are given as the Q-Former sees them, so the LayerNorm before it belongs to neither side.
    for model in (ours, native):
        model.retrieval.vision_model.requires_grad_(False)
        if args.small:
            # Random features of a tiny model are nearly alike, and float32 would round their differences away.
            model.double()
    texts = captions(args.batch, TEXT_LENGTH, config.qformer_config.vocab_size)
    texts = {name: value.to(args.device) for name, value in texts.items()}
    states = torch.randn(args.batch, IMAGE_TOKENS, config.vision_config.hidden_size, device=args.device)
    states = states.to(ours.dtype)
    features = ours.retrieval.image_features(image_embeds=states).detach()
    ring = torch.arange(args.batch, device=args.device)
    negatives = (ring.roll(1), ring.roll(-1))

    def autocast() -> AbstractContextManager:
        return nullcontext() if dtype is torch.float32 else torch.autocast(args.device.split(":")[0], dtype=dtype)

    def run_ours(backward: bool = True) -> float:
        ours.zero_grad(set_to_none=True)
        with autocast():
            loss = ours(
                image_embeds=states, negative_image_index=negatives[0], negative_text_index=negatives[1], **texts
            ).loss
        if backward:
            loss.backward()
        return loss.item()

    def run_native(backward: bool = True) -> float:
        native.zero_grad(set_to_none=True)
        with autocast():
            loss = native(features, negatives=negatives, **texts)
        if backward:
            loss.backward()
        return loss.item()

    sides: dict[str, tuple[Callable[..., float], nn.Module]] = {
        "native": (run_native, native),
        "ours": (run_ours, ours),
    }

    # Equal before fast.
    losses = {name: run() for name, (run, _) in sides.items()}
    differences = {"loss": abs(losses["ours"] - losses["native"]) / abs(losses["native"])}
    expected = dict(native.named_parameters())
    largest = max(p.grad.abs().max() for p in expected.values() if p.grad is not None)
    for name, parameter in ours.named_parameters():
        wanted = expected[name].grad
        if parameter.requires_grad:
            # Softmax does not see a bias of keys: what stands there is rounding noise.
            scale = wanted.abs().max().clamp(min=1e-4 * largest)
            differences[name] = ((parameter.grad - wanted).abs().max() / scale).item()
    worst = max(differences, key=differences.get)
    print(
        f"largest relative difference of loss and {len(differences) - 1} gradients: {differences[worst]:.1e} ({worst})"
    )
    if differences[worst] > TOLERANCE[dtype]:
        raise SystemExit(f"the two sides differ by more than {TOLERANCE[dtype]:.0e}")

    seconds = in_turns({name: run for name, (run, _) in sides.items()}, args.repeats, args.device)
    results = {}
    for name, (run, model) in sides.items():
        peak = peak_bytes(run, args.device, model, states, features, *texts.values())
        set_attention(model, "eager")
        counted = {}
        for what, backward in (("forward", False), ("both", True)):
            with FlopCounterMode(display=False) as flops:
                run(backward)
            counted[what] = flops.get_total_flops() / args.batch / 1e9
        set_attention(model, "sdpa")
        results[name] = {
            "GFLOP a sample, forward": counted["forward"],
            "forward + backward": counted["both"],
            "MiB at peak": peak / 2**20,
        }
        if name in seconds:
            results[name]["seconds a step"] = seconds[name]

    length = texts["attention_mask"].sum().item() / args.batch
    kind = "tiny Q-Former" if args.small else "BLIP-2 stage 1, base"
    tokens = f"{length:.1f} tokens a caption of {TEXT_LENGTH}"
    title = f"{kind}, batch {args.batch}, {args.dtype}, {args.device}, {tokens}"
    report = print_sides(title, results, "native", difference=differences[worst])
    ratios = report["ratios"]
    if not args.small:
        forward, both = results["native"]["GFLOP a sample, forward"], results["native"]["forward + backward"]
        for found, wanted in ((forward, EXPECTED_FORWARD), (both, EXPECTED_BOTH)):
            if abs(found - wanted) > 0.005 * wanted:
                raise SystemExit(f"the native side takes {found:.1f} GFLOP a sample, not {wanted}")
        if ratios["forward + backward"] > MAX_FLOP_RATIO:
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
