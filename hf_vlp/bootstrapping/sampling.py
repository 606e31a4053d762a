"""Nucleus sampling whose draws belong to a record, not to a batch: the same seed gives the same text anywhere."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from hf_vlp.data.hashing import stable_hash

_BLOCK = 64


def sampling_seed(seed: int, name: Sequence[int | str], sample: int = 0) -> int:
    """Seed of one caption of one record, 63 bits.

    Args:
        seed: of the job.
        name: what names the record: origin, source, shard and place in it.
        sample: number of the caption, where a record gets several.
    """
    return stable_hash("capfilt", seed, *name, sample)


class SeededNucleus(LogitsProcessor):
    """Draws the next token of every row by nucleus (top-p) sampling, each row from numbers of its own.

    `generate` draws for the whole batch from one stream of random numbers, so that a record's text depends on the
    records beside it. This processor draws instead: it leaves the drawn token as the only one with a score, and
    whatever search runs behind it (greedy, or sampling from that one token) takes it. Row r draws its t-th token by
    the t-th number of a Philox stream with key `seeds[r]`, so a text depends on the model, the image and the seed.

    The logits themselves depend on the batch in their last bits (other shapes, other kernels), which changes a text
    only if a draw falls within those bits of the border between two tokens: in float32 about once in a million
    tokens, in bfloat16 often. The job's batches do not depend on processes or restarts, so there it never happens.

    A fresh one is needed for every call of `generate`: it counts the steps.

    Args:
        seeds: one for each row.
        top_p: the smallest set of most probable tokens whose probabilities add up to this is drawn from; 1 for all.
        temperature: divisor of the logits.
        top_k: only so many of the most probable tokens are drawn from, before `top_p`; 0 for all.

    Raises:
        ValueError: `top_p` outside of (0, 1], `temperature` not positive, `top_k` negative.
    """

    # Rows must stay in place from step to step, which continuous batching does not promise.
    supports_continuous_batching = False

    def __init__(self, seeds: Sequence[int], *, top_p: float = 0.9, temperature: float = 1.0, top_k: int = 0) -> None:
        if not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p={top_p}: give a share above 0 and at most 1")
        if temperature <= 0.0:
            raise ValueError(f"temperature={temperature}: it must be positive (for the most probable text use beam)")
        if top_k < 0:
            raise ValueError(f"top_k={top_k}: give a number of tokens, or 0 for all")
        self.seeds, self.top_p, self.temperature, self.top_k = list(seeds), top_p, temperature, top_k
        self._streams = [np.random.Generator(np.random.Philox(key=seed)) for seed in self.seeds]
        self._drawn = np.empty((len(self.seeds), 0))
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (rows, vocabulary) with 0 at the drawn token of each row and -inf elsewhere.

        Raises:
            ValueError: there are not as many rows as seeds.
        """
        if scores.shape[0] != len(self.seeds):
            raise ValueError(
                f"{scores.shape[0]} rows but {len(self.seeds)} seeds: sampling needs one seed a row and no beams"
            )
        drawn = self._next_numbers().to(scores.device)
        precise = torch.float64 if scores.device.type != "mps" else torch.float32
        probabilities = (scores.to(precise) / self.temperature).softmax(dim=-1)
        # Stable: tokens of the same probability stand in the order of their ids, in every batch.
        ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
        if self.top_k:
            ordered = ordered.clone()
            ordered[:, self.top_k :] = 0.0
            ordered /= ordered.sum(dim=-1, keepdim=True)
        before = ordered.cumsum(dim=-1) - ordered
        inside = (before < self.top_p) & (ordered > 0)
        inside[:, 0] = True
        mass = ordered.masked_fill(~inside, 0.0)
        reached = mass.cumsum(dim=-1)
        target = drawn.to(precise)[:, None] * reached[:, -1:]
        place = (reached <= target).sum(dim=-1, keepdim=True)
        # Rounding may put the target at the very end; the last token inside is meant then.
        place = torch.minimum(place, inside.sum(dim=-1, keepdim=True) - 1)
        chosen = tokens.gather(-1, place)
        return torch.full_like(scores, float("-inf")).scatter_(-1, chosen, 0.0)

    def _next_numbers(self) -> Tensor:
        """(rows,) numbers in [0, 1) of this step."""
        if self._step == self._drawn.shape[1]:
            block = np.stack([stream.random(_BLOCK) for stream in self._streams])
            self._drawn = np.concatenate([self._drawn, block], axis=1)
        numbers = torch.from_numpy(self._drawn[:, self._step].copy())
        self._step += 1
        return numbers
