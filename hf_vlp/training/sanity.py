"""The sanity pass: each loss beside its value for a model that knows nothing, and beside its value on permuted images.

A loss that stays when every image is swapped for its neighbour's has learnt from the texts alone: the image is not
seen, whatever the loss curve looks like. The pass runs in eval mode without gradient, and puts the random generators
back, so the run is the same with and without it.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_vlp.training.checkpoints import random_state, set_random_state
from hf_vlp.training.terms import TermMeter, loss_terms

logger = logging.getLogger(__name__)

IMAGE_KEYS = ("pixel_values", "image_embeds")
# Most pairs a rank that the pass looks at; its two forwards need the memory of an evaluation step.
MAX_ROWS = 64
# Share of the chance level within which a loss counts as being there, or as not depending on the images.
TOLERANCE = 0.01
# Below this, two losses are the same but for rounding.
ROUNDING = 1e-6
FIRST_CHECK = 100


@dataclass(frozen=True)
class TermCheck:
    """What the pass found about one loss term.

    Attributes:
        name: `loss_itc`, ...
        value: on the batch as it is.
        permuted: with each image swapped for its neighbour's; None when a rank has only one pair.
        chance: for a model that knows nothing; None where the model does not say.
    """

    name: str
    value: float
    permuted: float | None
    chance: float | None

    @property
    def rise(self) -> float | None:
        """How much worse the loss is without the right images."""
        return None if self.permuted is None else self.permuted - self.value

    @property
    def ignores_images(self) -> bool:
        """Whether permuting the images changes nothing at all: the network does not get them."""
        return self.rise is not None and abs(self.rise) <= ROUNDING * max(1.0, abs(self.value))

    @property
    def hardly_uses_images(self) -> bool:
        """Whether the loss rises by less than `TOLERANCE` of its chance level."""
        scale = self.chance if self.chance else max(abs(self.value), 1e-3)
        return self.rise is not None and self.rise < TOLERANCE * scale

    @property
    def at_chance(self) -> bool:
        """Whether the loss is no better than that of a model that knows nothing."""
        return self.chance is not None and self.value > self.chance * (1 - TOLERANCE)


def permuted_images(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with each row's image swapped for the next row's; texts, labels and ids stay."""
    return {
        key: value.roll(1, dims=0) if key in IMAGE_KEYS and isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


@torch.no_grad()
def check_batch(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    chance_levels: Callable[[Mapping[str, Any]], Mapping[str, float]] | None = None,
    forward_arguments: Callable[[], Mapping[str, Any]] = dict,
    gather: Callable[[Tensor], Tensor] | None = None,
    max_rows: int = MAX_ROWS,
) -> list[TermCheck]:
    """Looks at one batch. Every rank calls it in the same step.

    Args:
        model: what the trainer calls, wrapped or not; left in eval mode.
        batch: the model's inputs, on its device.
        chance_levels: of the model; None where it has none.
        forward_arguments: makes what else `forward` takes (a generator), anew for each call.
        gather: as of `TermMeter.means`.
        max_rows: pairs a rank that are looked at; all, where a row has several answers, images or candidates.
    """
    lengths = [len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim]
    rows = max(lengths, default=0)
    kept = min(rows, max_rows) if len(set(lengths)) == 1 else rows
    batch = {key: value[:kept] if _is_column(value, rows) else value for key, value in batch.items()}
    state = random_state()
    model.eval()
    try:
        plain, permuted = TermMeter(), TermMeter()
        plain.add(_terms(model(**batch, **forward_arguments())))
        permuted.add(_terms(model(**permuted_images(batch), **forward_arguments())))
    finally:
        set_random_state(state)
    values, swapped = plain.means(gather), permuted.means(gather)
    levels = chance_levels(batch) if chance_levels is not None else {}
    return [
        TermCheck(name, values[name], swapped[name] if kept > 1 else None, levels.get(name)) for name in sorted(values)
    ]


def table(checks: list[TermCheck], step: int) -> str:
    """The findings as lines of text."""
    width = max(len(check.name) for check in checks)
    lines = [f"sanity pass before step {step + 1}", f"  {'term':<{width}}     loss   chance   images permuted"]
    for check in checks:
        chance = f"{check.chance:8.4f}" if check.chance is not None else "       ?"
        permuted = f"{check.permuted:8.4f} ({check.rise:+.4f})" if check.permuted is not None else "       ?"
        lines.append(f"  {check.name:<{width}} {check.value:8.4f} {chance}   {permuted}")
    return "\n".join(lines)


def warnings_of(checks: list[TermCheck], *, warmed_up: bool) -> list[str]:
    """What is suspicious: before the warm-up is over only what cannot be right, after it also what should not last."""
    found = []
    for check in checks:
        if check.ignores_images:
            found.append(
                f"{check.name} is the same ({check.value:.4f}) when the images of the batch are permuted: the model "
                "does not see them. Look for missing image tokens, zero image features, or images that are all alike"
            )
        elif warmed_up and check.hardly_uses_images:
            found.append(
                f"{check.name} rises only by {check.rise:+.4f} when the images of the batch are permuted: what it has "
                "learnt so far comes from the texts alone. Check that images and texts belong together"
            )
        if warmed_up and check.at_chance:
            found.append(
                f"{check.name} is {check.value:.4f} after the warm-up, no better than knowing nothing "
                f"({check.chance:.4f}). Check the pairs, the learning rate and what trains (--stage)"
            )
    return found


def chance_levels_of(model: nn.Module) -> Callable[[Mapping[str, Any]], Mapping[str, float]] | None:
    """The model's own `chance_levels`, or ln of the vocabulary where its only loss is a language model's."""
    if hasattr(model, "chance_levels"):
        return model.chance_levels
    embeddings = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if embeddings is None:
        return None
    level = math.log(embeddings.weight.shape[0])
    return lambda batch: {"loss": level} if "labels" in batch else {}


class SanityPass:
    """When a run looks at itself, and how it tells.

    Args:
        first_steps: steps at the start for which the table is printed.
        check_step: step at which a loss should have left its chance level; 0 for the end of the warm-up, at step
            `FIRST_CHECK` at the earliest.
        warmup_steps: of the run.
        quiet: print nothing (all ranks but the first).
    """

    def __init__(self, first_steps: int, check_step: int, warmup_steps: int, *, quiet: bool = False) -> None:
        self.first_steps = first_steps
        self.check_step = check_step or max(warmup_steps, FIRST_CHECK)
        self.quiet = quiet

    def is_due(self, step: int) -> bool:
        """Whether to look at the batch of optimizer step `step` (counted from 0)."""
        return step < self.first_steps or step == self.check_step

    def report(self, checks: list[TermCheck], step: int) -> None:
        """Prints the table and logs the warnings."""
        if self.quiet or not checks:
            return
        # Not `print`, which would tear the progress bar.
        tqdm.write(table(checks, step))
        for warning in warnings_of(checks, warmed_up=step >= self.check_step):
            logger.warning("%s", warning)


def _terms(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    terms = loss_terms(outputs)
    # A model with one term (a language model) has only its loss.
    return terms or {"loss": outputs["loss"].detach().float()}


def _is_column(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows
