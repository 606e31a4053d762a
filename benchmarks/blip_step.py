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

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_vlp.models.blip.pretraining_blip import BlipForPreTraining
from hf_vlp.models.blip.vision_blip import encode_images

sys.path.insert(0, str(Path(__file__).parent))
from _blip import Composed, base_config, captions, spread  # noqa: E402
from _fusion import StepLimits, compare_steps, step_arguments, step_negatives, step_pixels  # noqa: E402

ALPHA, MOMENTUM, PADDED = 0.4, 0.995, 30
# Counted of the original, a sample: in all, in the image towers.
LIMITS = StepLimits(306.6, 140.0, "text models", rest_ratio=0.40, flop_ratio=0.70, time_ratio=0.75)


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


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = step_arguments(__doc__, argv, queue_size=57600)
    torch.manual_seed(0)
    config = base_config(small=args.small)
    ours = BlipForPreTraining(config, queue_size=args.queue_size, momentum=MOMENTUM, alpha=ALPHA)
    spread(ours.model)
    ours.reset_momentum()
    ours = ours.to(args.device).train()
    theirs = ComposedStep(ours).to(args.device).train()
    ids, mask = (x.to(args.device) for x in captions(args.batch, config.text_config.vocab_size, PADDED))
    pixels, negatives = step_pixels(args, config.vision_config.image_size), step_negatives(args)

    def our_losses() -> tuple[Tensor, dict[str, Tensor]]:
        output = ours(pixels, ids, mask, negatives=negatives)
        return output.loss, {name: output[name] for name in ("loss_itc", "loss_itm", "loss_lm")}

    def their_losses() -> tuple[Tensor, dict[str, Tensor]]:
        losses = theirs(pixels, ids, mask, negatives)
        return sum(losses.values()), losses

    def image_towers() -> None:
        ours.model.encode_images(pixels).sum().backward()
        with torch.no_grad():
            encode_images(ours.momentum["vision_model"], pixels)

    return compare_steps(
        args,
        "tiny BLIP" if args.small else "BLIP ViT-B/16, 224 px",
        mask,
        (our_losses, ours),
        (their_losses, theirs),
        lambda: pairs_of_gradients(ours, theirs),
        image_towers,
        LIMITS,
    )


if __name__ == "__main__":
    main()
