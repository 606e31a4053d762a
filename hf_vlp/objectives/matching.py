"""Image-text matching (ITM): hard negatives drawn by similarity (ALBEF, arXiv 2107.07651, section 3.3; BLIP-2,
2301.12597, section 3.1) and the loss of the two-way classification.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .distributed import exchange_integers, gather, global_mean, offset_of, world
from .precision import full_precision, without_autocast


class NoNegativesError(ValueError):
    """No row has anything to be mismatched with: one pair in all, or all pairs of one image."""


class HardNegatives(NamedTuple):
    """Drawn negatives, as indices into the joined batch of all ranks.

    Attributes:
        image_index: `(B,)` for each own text a mismatched image.
        text_index: `(B,)` for each own image a mismatched text.
        weights_t2i: `(B, G)` weights that the images were drawn with; 0 at true pairs.
        weights_i2t: `(B, G)` the same for texts.
    """

    image_index: Tensor
    text_index: Tensor
    weights_t2i: Tensor
    weights_i2t: Tensor


def hard_negatives(
    sim_i2t: Tensor,
    sim_t2i: Tensor,
    *,
    offset: int | None = None,
    image_ids: Tensor | None = None,
    gathered_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    epsilon: float = 0.0,
    softmax_over_positives: bool = False,
    image_index: Tensor | None = None,
    text_index: Tensor | None = None,
) -> HardNegatives:
    """Draws for each own text an image, and for each own image a text, that do not belong to it, the more similar the
    more likely.

    The random numbers are drawn for the whole joined batch, the images' first, and each rank uses those of its own
    rows: generators in the same state on N ranks give the draws of one process. They come from the generator's
    device and are used by inversion of the cumulative weights, so a weight of 0 is never drawn.

    Args:
        sim_i2t: `(B, G)` similarities (divided by the temperature) of own images and the texts of all ranks. No
            gradient is taken.
        sim_t2i: `(B, G)` similarities of own texts and the images of all ranks.
        offset: column of the first own pair. None: found by asking the other ranks.
        image_ids: `(B,)` ids of the own images; all pairs of one id are true.
        gathered_ids: `(G,)` ids of all ranks; gathered if None.
        generator: source of randomness. None: the default generator of the CPU.
        epsilon: added to the probabilities, as ALBEF and BLIP do (1e-4), so that no negative is out of reach.
        softmax_over_positives: whether true pairs take part in the softmax and get weight 0 only afterwards (ALBEF);
            this matters only beside an `epsilon`. By default they are masked before it (BLIP-2).
        image_index: `(B,)` negatives to use instead of drawn ones; checked.
        text_index: `(B,)` the same for texts.

    Raises:
        NoNegativesError: no row can have a negative. All ranks raise, as this depends on the joined batch alone; a
            training step that may meet such a batch leaves the ITM term out.
        ValueError: shapes that don't fit, or given indices that are out of range or true pairs.
    """
    if sim_i2t.dim() != 2 or sim_i2t.shape != sim_t2i.shape:
        raise ValueError(
            f"`sim_i2t` and `sim_t2i` must have one shape (own rows, all columns), got {tuple(sim_i2t.shape)} and "
            f"{tuple(sim_t2i.shape)}"
        )
    rows, columns = sim_i2t.shape
    device = sim_i2t.device
    if offset is None:
        offset = _find_offset(rows, columns, device)
    if not 0 <= offset <= columns - rows:
        raise ValueError(f"`offset` {offset} leaves no room for {rows} own pairs in {columns} columns")
    if image_ids is None:
        if gathered_ids is not None:
            image_ids = gathered_ids[offset : offset + rows]
        else:
            gathered_ids = torch.arange(columns, device=device)
            image_ids = gathered_ids[offset : offset + rows]
    elif gathered_ids is None:
        gathered_ids = image_ids if columns == rows and world()[1] == 1 else gather(image_ids)
    if image_ids.shape != (rows,) or gathered_ids.shape != (columns,):
        raise ValueError(
            f"`image_ids` must be ({rows},) and `gathered_ids` ({columns},), got {tuple(image_ids.shape)} and "
            f"{tuple(gathered_ids.shape)}"
        )
    if columns == 0 or bool((gathered_ids == gathered_ids[0]).all()):
        raise NoNegativesError(
            f"no hard negatives: the {columns} pairs of the joined batch are all of one image, so nothing can be "
            "mismatched; use larger batches, or leave the matching loss out of this step"
        )
    true = image_ids[:, None] == gathered_ids[None, :]
    weights_t2i = _weights(sim_t2i, true, epsilon, softmax_over_positives)
    weights_i2t = _weights(sim_i2t, true, epsilon, softmax_over_positives)

    source = torch.device("cpu") if generator is None else generator.device
    uniform = torch.rand(2, columns, dtype=torch.float64, generator=generator, device=source)
    uniform = uniform[:, offset : offset + rows].to(device)
    image_index = _draw(weights_t2i, uniform[0]) if image_index is None else _given("image_index", image_index, true)
    text_index = _draw(weights_i2t, uniform[1]) if text_index is None else _given("text_index", text_index, true)
    return HardNegatives(image_index, text_index, weights_t2i, weights_i2t)


def matching_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of matched (1) against mismatched (0), mean over the pairs of all ranks.

    Args:
        logits: `(M, 2)`; M may differ between ranks.
        labels: `(M,)` of 0, 1, or -100 for a pair that does not count.

    Returns:
        Scalar; see `distributed.global_mean` for several ranks.
    """
    if logits.dim() != 2 or logits.shape[1] != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"`logits` must be (pairs, 2) and `labels` (pairs,), got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    with without_autocast(logits.device):
        total = F.cross_entropy(full_precision(logits), labels, reduction="sum", ignore_index=-100)
        return global_mean(total, (labels != -100).sum())


def _find_offset(rows: int, columns: int, device: torch.device) -> int:
    _, size = world()
    if size == 1:
        if rows != columns:
            raise ValueError(f"`offset` must be given for {rows} rows of {columns} columns on one process")
        return 0
    everyone = exchange_integers([rows, columns], device)
    sizes = [own for own, _ in everyone]
    if all(width == sum(sizes) for _, width in everyone):
        return offset_of(sizes)
    if all(own == width for own, width in everyone):
        return 0
    raise ValueError(
        f"similarities of {sizes} rows on the ranks have {[width for _, width in everyone]} columns: they must cover "
        "the pairs of all ranks, or only the own ones"
    )


def _weights(similarities: Tensor, true: Tensor, epsilon: float, softmax_over_positives: bool) -> Tensor:
    similarities = full_precision(similarities.detach())
    others = similarities.masked_fill(true, -torch.inf).softmax(dim=1)
    if not softmax_over_positives:
        return (others + epsilon).masked_fill(true, 0.0)
    weights = (similarities.softmax(dim=1) + epsilon).masked_fill(true, 0.0)
    # A true pair that wins by far, as at the end of a training, leaves the others less than a float can hold. Their
    # odds are the same without it.
    return torch.where(weights.sum(dim=1, keepdim=True) == 0, others, weights)


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """One column for each row, by inversion: the first column where the cumulative weight passes the random number."""
    cumulative = weights.double().cumsum(dim=1)
    total = cumulative[:, -1:]
    if not bool((total > 0).all()):
        raise ValueError("a row has no weight to draw a negative from: the similarities are not finite")
    below = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(uniform[:, None] * total, below)
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)


def _given(name: str, index: Tensor, true: Tensor) -> Tensor:
    if index.shape != true.shape[:1]:
        raise ValueError(f"`{name}` must be ({true.shape[0]},), one for each own row, got {tuple(index.shape)}")
    index = index.to(true.device)
    if bool(((index < 0) | (index >= true.shape[1])).any()):
        raise ValueError(
            f"`{name}` must point into the {true.shape[1]} pairs of the joined batch, got {index.tolist()}"
        )
    if bool(true.gather(1, index[:, None]).any()):
        raise ValueError(f"`{name}` names true pairs, which are no negatives: {index.tolist()}")
    return index
