"""Generation with BLIP's decoder: beams that share their image's keys and values, and the original's beam scores."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

from hf_vlp.models.blip.text_blip import ImageKeys, decoding_step


class BlipTextDecoder(BlipTextLMHeadModel):
    """The native text decoder, reading images through keys and values that are projected once.

    With `images` given, `forward` takes the way of `text_blip.py`; without, that of the native class.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        images: ImageKeys | None = None,
        count_prompt: bool = True,
        past_key_values: Cache | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithCrossAttentions:
        """Logits of the next tokens.

        Args:
            input_ids: (S, L) the tokens that follow those in the cache, the sequences of an image side by side.
            attention_mask: (S, past + L), non-zero at tokens.
            images: keys and values of I images; S is a multiple of I.
            count_prompt: read by `generate` alone.
            past_key_values: cache of self-attention.
            logits_to_keep: number of last positions to compute logits for; 0: all.
            kwargs: of the native class, where `images` is not given.
        """
        if images is None:
            return super().forward(
                input_ids, attention_mask, past_key_values=past_key_values, logits_to_keep=logits_to_keep, **kwargs
            )
        hidden = decoding_step(self, input_ids, images, attention_mask, past_key_values)
        logits = self.cls(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        return CausalLMOutputWithCrossAttentions(logits=logits, past_key_values=past_key_values)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        images: ImageKeys | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Cuts what the cache already holds."""
        if images is None:
            return super().prepare_inputs_for_generation(
                input_ids, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs
            )
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        return {
            "input_ids": input_ids[:, past:],
            "attention_mask": attention_mask,
            "images": images,
            "past_key_values": past_key_values,
            "logits_to_keep": 1,
        }

    def _beam_search(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        count_prompt: bool = False,
        **model_kwargs: Any,
    ) -> GenerateBeamDecoderOnlyOutput | Tensor:
        plain = generation_config.do_sample or generation_config.max_length is None or synced_gpus
        if not count_prompt or plain:
            return super()._beam_search(
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, **model_kwargs
            )
        return self._original_beam_search(
            input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs
        )

    def _original_beam_search(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> GenerateBeamDecoderOnlyOutput | Tensor:
        """Beam search whose hypotheses are scored by their whole length, the start included and the end token not.

        A hypothesis is complete when its end token is among the first `num_beams` continuations of a step; an image
        is done when none of its open beams can, at the present length, come above its complete ones.
        """
        beams, longest = generation_config.num_beams, generation_config.max_length
        ends, pad = generation_config._eos_token_tensor, generation_config._pad_token_tensor
        ends = set() if ends is None else set(ends.flatten().tolist())
        pad = 0 if pad is None else int(pad)
        number, device = len(input_ids) // beams, input_ids.device
        early = generation_config.early_stopping is True
        images = [_Beams(beams, generation_config.length_penalty, early, ends, pad) for _ in range(number)]
        # All beams start alike: only the first may be continued.
        scores = torch.zeros(number, beams, device=device)
        scores[:, 1:] = -1e9
        while not all(image.done for image in images):
            outputs = self(**self.prepare_inputs_for_generation(input_ids, **model_kwargs))
            log_probabilities = outputs.logits[:, -1].float().log_softmax(dim=-1)
            log_probabilities = logits_processor(input_ids, log_probabilities)
            vocabulary = log_probabilities.shape[-1]
            every = (log_probabilities + scores.view(-1, 1)).view(number, -1)
            best = every.topk(max(2, 1 + len(ends)) * beams, dim=1)
            chosen: list[tuple[float, int, int]] = []
            for at, (image, values, places) in enumerate(
                zip(images, best.values.tolist(), best.indices.tolist(), strict=True)
            ):
                candidates = [(value, *divmod(place, vocabulary)) for value, place in zip(values, places, strict=True)]
                kept = image.advance(candidates, input_ids[at * beams : (at + 1) * beams])
                chosen += [(value, at * beams + row, token) for value, row, token in kept]
            totals, rows, tokens = (torch.tensor(column, device=device) for column in zip(*chosen, strict=True))
            scores = totals.view(number, beams)
            input_ids = torch.cat([input_ids[rows], tokens[:, None]], dim=1)
            model_kwargs = self._update_model_kwargs_for_generation(outputs, model_kwargs)
            if (cache := model_kwargs.get("past_key_values")) is not None:
                cache.reorder_cache(rows)
            if bool(stopping_criteria(input_ids, None).all()) or input_ids.shape[1] >= longest:
                break
        for image, totals, sequences in zip(images, scores.tolist(), input_ids.split(beams), strict=True):
            image.close(totals, sequences)
        best_of = [one for image in images for one in image.best(generation_config.num_return_sequences)]
        sequences = _padded([tokens for _, tokens in best_of], longest, pad, min(ends, default=None))
        if not generation_config.return_dict_in_generate:
            return sequences
        return GenerateBeamDecoderOnlyOutput(
            sequences=sequences, sequences_scores=torch.tensor([score for score, _ in best_of], device=device)
        )


@dataclass
class _Beams:
    """The hypotheses of one image.

    Attributes:
        size: how many are open, and how many complete ones are kept.
        penalty: exponent of the length that a total is divided by.
        early: done as soon as `size` hypotheses are complete.
        ends: end tokens.
        pad: token that a finished image goes on with.
        complete: score and tokens, without the end token.
        done: no open hypothesis can come above the complete ones.
    """

    size: int
    penalty: float
    early: bool
    ends: set[int]
    pad: int
    complete: list[tuple[float, Tensor]] = field(default_factory=list)
    done: bool = False

    def advance(self, candidates: Sequence[tuple[float, int, int]], sequences: Tensor) -> list[tuple[float, int, int]]:
        """The open hypotheses of the next step, out of the likeliest continuations.

        Args:
            candidates: total, beam and next token, likeliest first; enough for `size` that do not end.
            sequences: (size, L) of the open hypotheses.
        """
        if self.done:
            return [(0.0, 0, self.pad)] * self.size
        kept: list[tuple[float, int, int]] = []
        for rank, (total, row, token) in enumerate(candidates):
            if token not in self.ends:
                kept.append((total, row, token))
            elif rank < self.size:
                self._complete(total, sequences[row])
            if len(kept) == self.size:
                break
        if len(self.complete) == self.size:
            reachable = candidates[0][0] / sequences.shape[1] ** self.penalty
            self.done = self.early or min(score for score, _ in self.complete) >= reachable
        return kept

    def close(self, totals: Sequence[float], sequences: Tensor) -> None:
        """Completes the open hypotheses where the longest length was reached."""
        if not self.done:
            for total, tokens in zip(totals, sequences, strict=True):
                self._complete(total, tokens)

    def best(self, number: int) -> list[tuple[float, Tensor]]:
        """The best complete hypotheses, best first."""
        return sorted(self.complete, key=lambda one: one[0], reverse=True)[:number]

    def _complete(self, total: float, tokens: Tensor) -> None:
        self.complete.append((total / len(tokens) ** self.penalty, tokens))
        if len(self.complete) > self.size:
            scores = [score for score, _ in self.complete]
            # Of equal ones the newcomer goes, else the oldest.
            worst = len(scores) - 1 if scores[-1] <= min(scores) else scores.index(min(scores))
            del self.complete[worst]


def _padded(sequences: Sequence[Tensor], longest: int, pad: int, end: int | None) -> Tensor:
    """(N, at most `longest`): the sequences, an end token where there is room for it, and padding."""
    width = min(max(map(len, sequences)) + 1, longest)
    padded = torch.full((len(sequences), width), pad, dtype=torch.long, device=sequences[0].device)
    for row, tokens in enumerate(sequences):
        padded[row, : len(tokens)] = tokens
        if len(tokens) < width and end is not None:
            padded[row, len(tokens)] = end
    return padded


__all__ = ["BlipTextDecoder"]
