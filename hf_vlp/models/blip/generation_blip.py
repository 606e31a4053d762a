"""Generation with BLIP's decoder: beams that share their image's keys and values, and the original's beam scores."""

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
        beams, penalty = generation_config.num_beams, generation_config.length_penalty
        early = generation_config.early_stopping is True
        ends = generation_config._eos_token_tensor
        ends = set() if ends is None else set(ends.flatten().tolist())
        pad = generation_config._pad_token_tensor
        pad = 0 if pad is None else int(pad)
        number = len(input_ids) // beams
        device = input_ids.device
        longest = generation_config.max_length
        scores = torch.zeros(number, beams, device=device)
        # All beams start alike: only the first may be continued.
        scores[:, 1:] = -1e9
        finished: list[list[tuple[float, Tensor]]] = [[] for _ in range(number)]
        done = [False] * number
        model_kwargs = (
            self._get_initial_cache_position(input_ids.shape[1], device, model_kwargs)
            if hasattr(self, "_get_initial_cache_position")
            else model_kwargs
        )

        def complete(image: int, total: float, tokens: Tensor) -> None:
            held = finished[image]
            score = total / len(tokens) ** penalty
            if len(held) < beams or score > min(held, key=lambda one: one[0])[0]:
                held.append((score, tokens))
                if len(held) > beams:
                    held.remove(min(held, key=lambda one: one[0]))

        while not all(done):
            inputs = self.prepare_inputs_for_generation(input_ids, **model_kwargs)
            outputs = self(**inputs)
            log_probabilities = outputs.logits[:, -1].float().log_softmax(dim=-1)
            log_probabilities = logits_processor(input_ids, log_probabilities)
            vocabulary = log_probabilities.shape[-1]
            every = (log_probabilities + scores.view(-1, 1)).view(number, -1)
            best, index = every.topk(max(2, 1 + len(ends)) * beams, dim=1)
            values, places = best.tolist(), index.tolist()
            length = input_ids.shape[1]
            chosen_scores, chosen_tokens, chosen_rows = [], [], []
            for image in range(number):
                kept: list[tuple[float, int, int]] = []
                if done[image]:
                    kept = [(0.0, pad, image * beams)] * beams
                else:
                    for rank, (value, place) in enumerate(zip(values[image], places[image], strict=True)):
                        row, token = image * beams + place // vocabulary, place % vocabulary
                        if token in ends:
                            if rank < beams:
                                complete(image, value, input_ids[row])
                        else:
                            kept.append((value, token, row))
                        if len(kept) == beams:
                            break
                    if len(finished[image]) == beams:
                        worst = min(score for score, _ in finished[image])
                        done[image] = early or worst >= values[image][0] / length**penalty
                chosen_scores.append([value for value, _, _ in kept])
                chosen_tokens += [token for _, token, _ in kept]
                chosen_rows += [row for _, _, row in kept]
            scores = torch.tensor(chosen_scores, device=device)
            rows = torch.tensor(chosen_rows, device=device)
            tokens = torch.tensor(chosen_tokens, device=device)
            input_ids = torch.cat([input_ids[rows], tokens[:, None]], dim=1)
            model_kwargs = self._update_model_kwargs_for_generation(outputs, model_kwargs)
            cache = model_kwargs.get("past_key_values")
            if cache is not None:
                cache.reorder_cache(rows)
            if all(done) or bool(stopping_criteria(input_ids, None).all()) or input_ids.shape[1] >= longest:
                break
        for image in range(number):
            if not done[image]:
                for beam in range(beams):
                    complete(image, float(scores[image, beam]), input_ids[image * beams + beam])

        returned = generation_config.num_return_sequences
        best_of = [one for held in finished for one in sorted(held, key=lambda one: one[0], reverse=True)[:returned]]
        width = min(max(len(tokens) for _, tokens in best_of) + 1, longest)
        sequences = torch.full((len(best_of), width), pad, dtype=torch.long, device=device)
        end = min(ends) if ends else None
        for row, (_, tokens) in enumerate(best_of):
            sequences[row, : len(tokens)] = tokens
            if len(tokens) < width and end is not None:
                sequences[row, len(tokens)] = end
        if not generation_config.return_dict_in_generate:
            return sequences
        return GenerateBeamDecoderOnlyOutput(
            sequences=sequences, sequences_scores=torch.tensor([score for score, _ in best_of], device=device)
        )


__all__ = ["BlipTextDecoder"]
