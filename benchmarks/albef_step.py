"""An ALBEF pretraining step, forward and backward: ours against native classes with the original's padding and passes.

    python benchmarks/albef_step.py                       # ViT-B/16 at 256 px, batch 8, float32 on the CPU
    python benchmarks/albef_step.py --device cuda --dtype bfloat16 --batch 64
    python benchmarks/albef_step.py --small --repeats 1   # a tiny model, in seconds
    python benchmarks/albef_step.py --repeats 0           # FLOPs and memory alone

The other side pads captions (8 to 20 tokens) to 30, encodes texts and masked texts in passes of their own, projects an
image's keys and values for each of the four texts that look at it, and makes MLM logits at every position, as the
original does. Both sides run in one process on the same weights, batch, masks and negatives, one after the other in
every repeat; losses and gradients are compared before anything is timed. "Everything else" is what is left without
the two image towers. FLOPs are counted with the attention written out, since the counter does not know every fused
kernel.
"""

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_vlp.models.albef.pretraining_albef import AlbefForPreTraining
from hf_vlp.objectives.language import MaskedTokens

sys.path.insert(0, str(Path(__file__).parent))
from _albef import Composed, base_config, captions  # noqa: E402
from _fusion import StepLimits, compare_steps, step_arguments, step_negatives, step_pixels  # noqa: E402

ALPHA, MOMENTUM = 0.4, 0.995
# Counted of the original, a sample: in all, in the image towers.
LIMITS = StepLimits(299.8, 185.6, "everything else", rest_ratio=0.40, flop_ratio=0.78, time_ratio=0.80)


class ComposedStep(nn.Module):
    """The other side: online model, momentum twin, queues."""

    def __init__(self, ours: AlbefForPreTraining) -> None:
        super().__init__()
        self.online = Composed(ours.config, ours.retrieval)
        self.online.mlm_head.load_state_dict(ours.mlm_head.state_dict())
        self.temperature = nn.Parameter(ours.retrieval.temperature.detach().clone())
        self.twin = copy.deepcopy(self.online).requires_grad_(False)
        self.register_buffer("image_queue", ours.queue.images.clone())
        self.register_buffer("text_queue", ours.queue.texts.clone())
        self.position = 0

    def forward(
        self, pixel_values: Tensor, ids: Tensor, mask: Tensor, masked: MaskedTokens, negatives: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        online, twin, number = self.online, self.twin, len(ids)
        with torch.no_grad():
            self.temperature.clamp_(0.001, 0.5)
        images = online.vision(pixel_values).last_hidden_state
        texts = online.text(ids, mask, mode="text")
        image, text = online.features(images, texts)
        with torch.no_grad():
            for slow, fast in zip(twin.parameters(), online.parameters()):
                slow.data = slow.data * MOMENTUM + fast.data * (1 - MOMENTUM)
            images_m = twin.vision(pixel_values).last_hidden_state
            image_m, text_m = twin.features(images_m, twin.text(ids, mask, mode="text"))
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
        matched = online.text(texts, mask, images, mode="fusion")
        wrong = online.text(
            torch.cat([texts, texts[text_index]]),
            torch.cat([mask, mask[text_index]]),
            torch.cat([images[image_index], images]),
            mode="fusion",
        )
        logits = online.itm_head(torch.cat([matched[:, 0], wrong[:, 0]]))
        labels = torch.zeros(3 * number, dtype=torch.long, device=ids.device)
        labels[:number] = 1
        loss_itm = F.cross_entropy(logits.float(), labels)
        predicted = online.mlm_head(online.text(masked.input_ids, mask, images)).float()
        with torch.no_grad():
            opinion = twin.mlm_head(twin.text(masked.input_ids, mask, images_m)).float().softmax(-1)
        at = masked.labels != -100
        soft = -(predicted.log_softmax(-1) * opinion).sum(-1)[at].mean()
        loss_mlm = (1 - ALPHA) * F.cross_entropy(predicted[at], masked.labels[at]) + ALPHA * soft
        return {"loss_itc": (loss_i2t + loss_t2i) / 2, "loss_itm": loss_itm, "loss_mlm": loss_mlm}


def pairs_of_gradients(ours: AlbefForPreTraining, theirs: ComposedStep) -> dict[str, tuple[Tensor, Tensor]]:
    """Gradients of both sides by our names."""
    composed = {
        "albef.vision_model": theirs.online.vision,
        "albef.text_model": theirs.online.text,
        "vision_projection": theirs.online.vision_projection,
        "text_projection": theirs.online.text_projection,
        "itm_head": theirs.online.itm_head,
    }
    expected = {f"{part}.{name}": p for part, module in composed.items() for name, p in module.named_parameters()}
    expected |= {"temperature": theirs.temperature}
    found = dict(ours.retrieval.named_parameters())
    pairs = {name: (found[name].grad, parameter.grad) for name, parameter in expected.items()}
    head = dict(ours.mlm_head.named_parameters())
    for name, parameter in theirs.online.mlm_head.named_parameters():
        if not name.startswith("decoder"):
            pairs[f"mlm_head.{name}"] = (head[name].grad, parameter.grad)
    return pairs


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = step_arguments(__doc__, argv, queue_size=65536)
    torch.manual_seed(0)
    config = base_config(small=args.small)
    ours = AlbefForPreTraining(config, queue_size=args.queue_size, momentum=MOMENTUM, alpha=ALPHA)
    ours = ours.to(args.device).train()
    theirs = ComposedStep(ours).to(args.device).train()
    ids, mask = (x.to(args.device) for x in captions(args.batch, config.text_config.vocab_size))
    masked = ours.mask(ids, mask, torch.Generator().manual_seed(2))
    pixels, negatives = step_pixels(args, config.vision_config.image_size), step_negatives(args)

    def our_losses() -> tuple[Tensor, dict[str, Tensor]]:
        output = ours(pixels, ids, mask, masked_tokens=masked, negatives=negatives)
        return output.loss, {name: output[name] for name in ("loss_itc", "loss_itm", "loss_mlm")}

    def their_losses() -> tuple[Tensor, dict[str, Tensor]]:
        losses = theirs(pixels, ids, mask, masked, negatives)
        return sum(losses.values()), losses

    def image_towers() -> None:
        ours.retrieval.albef.encode_images(pixels).sum().backward()
        with torch.no_grad():
            ours.momentum["albef"].encode_images(pixels)

    return compare_steps(
        args,
        "tiny ALBEF" if args.small else "ALBEF ViT-B/16, 256 px",
        mask,
        (our_losses, ours),
        (their_losses, theirs),
        lambda: pairs_of_gradients(ours, theirs),
        image_towers,
        LIMITS,
    )


if __name__ == "__main__":
    main()
