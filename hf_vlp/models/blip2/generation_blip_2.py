"""A frozen language model behind a Q-Former: the soft prompt, the loss at supervised positions, generation.

Shared by BLIP-2's stage 2 and InstructBLIP, which differ in what the Q-Former is given.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling, BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils import ModelOutput

from hf_vlp.models.blip2.backbone_blip_2 import ImageTokenError, trains
from hf_vlp.models.blip2.language_blip_2 import (
    LabelError,
    check_labels,
    copies_a_prompt,
    embedding_width,
    head_on_rows,
    pad_token_of,
    read_prompt_once,
    shifted,
)
from hf_vlp.objectives.language import language_modeling_loss


class SoftPromptMixin:
    """A model with `query_outputs`, `language_projection` and a `language_model`, mixed in before its native class."""

    processor_name: ClassVar[str] = "Blip2Processor"

    def frozen_parts(self) -> dict[str, nn.Module]:
        """As for the tower, and the language model while none of its weights (or adapters) train."""
        # Differs from the original: LAVIS leaves the frozen language model in training mode, so that its
        # dropout is on.
        parts = super().frozen_parts()
        if not trains(self.language_model):
            parts["language_model"] = self.language_model
        return parts

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def soft_prompt(self, queries: Tensor) -> Tensor:
        """Q-Former outputs (B, Q, hidden) projected into the language model's embedding space: (B, Q, LM width).

        Raises:
            ValueError: the projection was made for a language model of another width.
        """
        width = embedding_width(self.language_model)
        if self.language_projection.out_features != width:
            raise ValueError(
                f"language_projection gives {self.language_projection.out_features} numbers a query, but the "
                f"embeddings of {type(self.language_model).__name__} are {width} wide; start from stage 1 with "
                "this language model (Blip2ForConditionalGeneration.from_stage1), which makes a projection that fits"
            )
        weight = self.language_projection.weight
        return self.language_projection(queries.to(weight.dtype))

    def soft_prompt_length(self, images: Mapping[str, Any]) -> int:
        """How many image tokens a row has: one a query."""
        return self.config.num_query_tokens

    def image_token_mask(self, input_ids: Tensor, expected: int | None = None) -> Tensor:
        """(B, L) bool, True where image features go.

        Args:
            input_ids: (B, L).
            expected: image tokens a row; by default `num_query_tokens`.

        Raises:
            ImageTokenError: a row does not have exactly `num_query_tokens` image tokens, so that (part of) the image
                would not be seen.
        """
        token = self.config.image_token_id
        expected = expected or self.config.num_query_tokens
        if token is None:
            raise ImageTokenError(
                "config.image_token_index is not set, so there is no place for the image in the text; set it to "
                f"the id of the processor's <image> token and give {expected} of them in front of each text"
            )
        mask = input_ids == token
        found = mask.sum(dim=1)
        if bool((found != expected).any()):
            raise ImageTokenError(
                f"input_ids have {sorted(set(found.tolist()))} image tokens (id {token}) a row, but the model has "
                f"{expected} query tokens: the image would not be seen, or not whole. Make the inputs with "
                f"{self.processor_name}(num_query_tokens={self.config.num_query_tokens}), giving images and text "
                "together"
            )
        return mask

    def _embed(self, input_ids: Tensor, image_mask: Tensor, soft_prompt: Tensor) -> Tensor:
        """Token embeddings (B, L, width) with the soft prompt at the image tokens."""
        # The image token may lie outside of the language model's vocabulary; its embedding is not used.
        embeds = self.get_input_embeddings()(input_ids.masked_fill(image_mask, 0))
        return embeds.masked_scatter(image_mask[..., None], soft_prompt.to(embeds.dtype))

    def language_modeling(
        self,
        images: Mapping[str, Any],
        output_class: type[ModelOutput],
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        decoder_input_ids: Tensor | None,
        decoder_attention_mask: Tensor | None,
        labels: Tensor | None,
        return_dict: bool | None,
        **kwargs: Any,
    ) -> Any:
        """The forward pass of a soft-prompted language model.

        Args:
            images: arguments of `query_outputs`.
            output_class: of what is returned.
            input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, labels, return_dict: as of `forward`.
            kwargs: for the language model.
        """
        if input_ids is None:
            raise ValueError(f"input_ids are missing: {self.processor_name} gives them with the image tokens in place")
        if self.training:
            self.check_master_weights()
        image_mask = self.image_token_mask(input_ids, self.soft_prompt_length(images))
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        decoder_only = self.config.use_decoder_only_language_model
        if labels is not None:
            labels = self._checked_labels(labels, input_ids, image_mask, attention_mask, decoder_attention_mask)
        features, queries = self.query_outputs(**images)
        inputs_embeds = self._embed(input_ids, image_mask, self.soft_prompt(queries))

        inputs = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, **kwargs}
        targets = None
        if decoder_only:
            targets = None if labels is None else shifted(labels)
        else:
            if labels is not None:
                targets = labels
                if decoder_input_ids is None:
                    decoder_input_ids = self.language_model.prepare_decoder_input_ids_from_labels(labels=labels)
            inputs |= {"decoder_input_ids": decoder_input_ids, "decoder_attention_mask": decoder_attention_mask}
        supervised_only = self.training and targets is not None
        rows = None if targets is None else targets != -100
        if supervised_only:
            inputs["use_cache"] = False
        with head_on_rows(self.language_model, rows) if supervised_only else nullcontext():
            outputs = self.language_model(**inputs, return_dict=True)

        loss = None
        if targets is not None:
            logits = outputs.logits if supervised_only else outputs.logits[rows][None]
            loss = language_modeling_loss(logits, nn.Identity(), targets[rows][None], shift=False)
        output = output_class(
            loss=loss,
            logits=None if supervised_only else outputs.logits,
            vision_outputs=BaseModelOutputWithPooling(last_hidden_state=features),
            qformer_outputs=BaseModelOutputWithPoolingAndCrossAttentions(
                last_hidden_state=queries, pooler_output=queries[:, 0]
            ),
            language_model_outputs=None if supervised_only else outputs,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _checked_labels(
        self,
        labels: Tensor,
        input_ids: Tensor,
        image_mask: Tensor,
        attention_mask: Tensor,
        decoder_attention_mask: Tensor | None,
    ) -> Tensor:
        pad = pad_token_of(self.config.text_config)
        if not self.config.use_decoder_only_language_model:
            check_labels(labels, image_mask=None, attention_mask=decoder_attention_mask, pad_token_id=pad)
            return labels
        if labels.shape != input_ids.shape:
            raise LabelError(
                f"labels have shape {tuple(labels.shape)}, input_ids {tuple(input_ids.shape)}; labels must cover "
                f"the image tokens too (with -100), as those of {self.processor_name}.training_inputs do"
            )
        check_labels(labels, image_mask=image_mask, attention_mask=attention_mask, pad_token_id=pad)
        return labels

    def generate_text(
        self,
        images: Mapping[str, Any],
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        *,
        prompt_in_output: bool = True,
        **generate_kwargs: Any,
    ) -> Any:
        """What `generate` does.

        Args:
            images: arguments of `query_outputs`.
            input_ids, attention_mask, generate_kwargs: as of `generate`.
            prompt_in_output: whether a causal language model is told the ids of the prompt, so that they are returned
                too and count for a repetition penalty.
        """
        if hasattr(self, "hf_device_map"):
            self._preprocess_accelerate()
        _, queries = self.query_outputs(**images)
        soft_prompt = self.soft_prompt(queries)
        if input_ids is None:
            input_ids = self._unprompted(queries.shape[0], queries.device)
            attention_mask = None
        image_mask = self.image_token_mask(input_ids, queries.shape[1])
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        inputs = {"inputs_embeds": self._embed(input_ids, image_mask, soft_prompt), "attention_mask": attention_mask}
        if prompt_in_output and not self.language_model.config.is_encoder_decoder:
            inputs["input_ids"] = input_ids
        if generate_kwargs.get("generation_config") is None and self.generation_config.suppress_tokens:
            generate_kwargs.setdefault("suppress_tokens", self.generation_config.suppress_tokens)
        copies = copies_a_prompt(self.language_model, generate_kwargs) if prompt_in_output else 1
        if copies > 1:
            inputs["past_key_values"] = read_prompt_once(
                self.language_model, inputs["inputs_embeds"], attention_mask, copies
            )
        return self.language_model.generate(**inputs, **generate_kwargs)

    def _unprompted(self, batch: int, device: torch.device) -> Tensor:
        """Image tokens and what the tokenizer gives for an empty text: OPT's and Llama's first token, T5's last."""
        config = self.config.text_config.get_text_config()
        token = config.bos_token_id if self.config.use_decoder_only_language_model else config.eos_token_id
        image = [self.config.image_token_id] * self.config.num_query_tokens
        if self.config.image_token_id is None:
            raise ImageTokenError(
                "config.image_token_index is not set; set it to the id of the processor's <image> token"
            )
        ids = image + ([] if token is None else [token])
        return torch.tensor([ids], dtype=torch.long, device=device).repeat(batch, 1)


__all__ = ["SoftPromptMixin"]
