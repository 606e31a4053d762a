"""InstructBLIP in exactly the format of transformers' `instructblip` type.

`InstructBlipForConditionalGeneration` subclasses the class of the same name in transformers: parameters, config and
saved folder are the native ones. The Q-Former reads the instruction together with the queries (section 2.3 of the
paper, figure 3) by the joint pass of BLIP-2's `qformer.py`; what stands behind it is BLIP-2's stage 2.
"""

import copy
from collections.abc import Mapping
from os import PathLike
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import InstructBlipConfig, PreTrainedModel
from transformers import initialization as init
from transformers.models.instructblip.modeling_instructblip import InstructBlipForConditionalGenerationModelOutput

from hf_vlp.models.blip2.backbone_blip_2 import Blip2BackboneMixin
from hf_vlp.models.blip2.generation_blip_2 import SoftPromptMixin
from hf_vlp.models.blip2.language_blip_2 import (
    embedding_width,
    head_on_rows,
    load_language_model,
    prepare_language_model,
    shifted,
)
from hf_vlp.models.blip2.modeling_blip_2 import stage1_model
from hf_vlp.models.blip2.qformer import joint_pass, project_images
from hf_vlp.models.instructblip.conversion_instructblip import from_original, native_names, native_qformer_config
from hf_vlp.models.instructblip.processing_instructblip import InstructBlipProcessor
from hf_vlp.nn.packing import PackedTexts


class InstructBlipForConditionalGeneration(
    SoftPromptMixin, Blip2BackboneMixin, transformers.InstructBlipForConditionalGeneration
):
    """A language model that is shown what the Q-Former found in an image for this instruction (native format).

    Roles "captioning", "vqa" and "chat". `forward` with `labels` gives the language modelling loss over the answers;
    `generate` gives text. Images may be videos, (B, 3, T, H, W): frames are encoded one by one with the same
    instruction and their queries stand one behind another.
    """

    processor_name: ClassVar[str] = "InstructBlipProcessor"
    stages: ClassVar[dict[str, dict[str, bool]]] = {
        # As in the authors' code: the Q-Former with its queries, the projection, and the LayerNorm behind the tower.
        "instruct": {
            "": False,
            "query_tokens": True,
            "qformer": True,
            "language_projection": True,
            "vision_model.post_layernorm": True,
        },
        # As the paper words it (section 2.5): the Q-Former alone, with the projection that it speaks through.
        "qformer": {"": False, "query_tokens": True, "qformer": True, "language_projection": True},
    }
    # The loss is a mean over the supervised tokens of all ranks; `Trainer` divides it by the accumulation steps.
    accepts_loss_kwargs = False
    _master_weight_modules: ClassVar[tuple[str, ...]] = ("qformer", "language_projection")

    @classmethod
    def weights_from_original(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return from_original(state)

    @classmethod
    def from_stage1(
        cls,
        stage1: str | PathLike[str] | PreTrainedModel,
        language_model: str | PreTrainedModel,
        processor: InstructBlipProcessor,
        **language_model_kwargs: Any,
    ) -> "InstructBlipForConditionalGeneration":
        """Starts instruction tuning: tower, queries and Q-Former of BLIP-2's stage 1, text branch included.

        Args:
            stage1: folder or Hub id of a stage-1 checkpoint (of `Blip2ForPreTraining`, or the native
                `Blip2ForImageTextRetrieval`), or such a model, whose weights are then shared.
            language_model: folder or Hub id of any causal or encoder-decoder language model, or the model.
            processor: `InstructBlipProcessor.for_language_model`; tells the image token and the stop token, and is
                told the longest instruction that the Q-Former has positions for.
            language_model_kwargs: for `from_pretrained` of the language model (`dtype`, `quantization_config`, ...).

        Raises:
            ValueError: `stage1` is not of stage 1, or its tower or the language model does not fit the native format.
        """
        retrieval = stage1_model(stage1)
        source = retrieval.config
        if source.model_type != "blip-2":
            raise ValueError(
                f"the native instructblip format holds BLIP-2's own vision tower only, not that of a "
                f"{source.model_type!r} model; run stage 1 with an EVA-CLIP tower"
            )
        words = retrieval.embeddings.word_embeddings.num_embeddings
        if len(processor.qformer_tokenizer) > words:
            raise ValueError(
                f"the Q-Former's tokenizer has {len(processor.qformer_tokenizer)} tokens, its embeddings {words}: "
                "give the processor the tokenizer that was saved with stage 1"
            )
        positions = retrieval.embeddings.position_embeddings.num_embeddings
        asked = processor.qformer_tokenizer
        # The Q-Former has no position for more; longer instructions lose their beginning.
        asked.model_max_length = min(asked.model_max_length, positions)
        language_model = load_language_model(language_model, **language_model_kwargs)
        prepare_language_model(language_model, processor)
        vision = {k: v for k, v in source.vision_config.to_dict().items() if k != "model_type"}
        config = InstructBlipConfig(
            vision_config=vision,
            qformer_config=native_qformer_config(source.qformer_config.to_dict()),
            text_config=language_model.config.to_dict(),
            num_query_tokens=source.num_query_tokens,
            image_token_index=processor.image_token_id,
        )
        # Everything is replaced below, so nothing is allocated here.
        with torch.device("meta"), init.no_init_weights():
            model = cls(config)
        shared = ("vision_model.", "qformer.", "embeddings.", "query_tokens")
        weights = {k: v for k, v in retrieval.state_dict(keep_vars=True).items() if k.startswith(shared)}
        model.language_model = language_model
        model.language_projection = nn.Linear(config.qformer_config.hidden_size, embedding_width(language_model))
        kept = {k: v for k, v in model.state_dict(keep_vars=True).items() if k.startswith("language_")}
        model.load_state_dict({**native_names(weights), **kept}, assign=True)
        index = torch.arange(positions, device=model.query_tokens.device)
        model.qformer.embeddings.position_ids = index.expand(1, -1)
        model.generation_config = copy.deepcopy(language_model.generation_config)
        return model.train(retrieval.training)

    def soft_prompt_length(self, images: Mapping[str, Any]) -> int:
        pixels, embeds = images["pixel_values"], images["image_embeds"]
        frames = 1
        if pixels is not None and pixels.dim() == 5:
            frames = pixels.shape[2]
        elif embeds is not None and embeds.dim() == 4:
            frames = embeds.shape[1]
        return frames * self.config.num_query_tokens

    def instructed_queries(
        self,
        features: Tensor,
        qformer_input_ids: Tensor,
        qformer_attention_mask: Tensor | None = None,
        *,
        queries_only: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """The joint pass of queries and instruction over image features.

        Args:
            features: (B, image tokens, vision hidden), of `image_features`.
            qformer_input_ids: (B, Lq) instruction in the Q-Former's vocabulary; `qformer_attention_mask` likewise.
            queries_only: leave out the text's side of the last layer, which nothing reads.

        Returns:
            (B, Q, hidden) outputs of the queries, and (B, Lq', hidden) of the text, padded on the right, or `None`.
        """
        texts = PackedTexts.from_padded(qformer_input_ids, qformer_attention_mask)
        keys = project_images(self.qformer, features)
        queries, states = joint_pass(
            self.qformer, self.qformer.embeddings, self.query_tokens, texts, keys, queries_only=queries_only
        )
        return queries, None if states is None else texts.pad(states)

    def query_outputs(
        self,
        pixel_values: Tensor | None = None,
        image_embeds: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Image features (B, 1 + patches, vision hidden) and Q-Former outputs (B, Q, hidden).

        For T frames: features (B·T, …) and outputs (B, T·Q, hidden), frame after frame.

        Raises:
            ValueError: the instruction is missing, or there is not one an image.
        """
        if qformer_input_ids is None:
            raise ValueError(
                "qformer_input_ids are missing: the Q-Former reads the instruction too; make the inputs with "
                "InstructBlipProcessor"
            )
        batch = len(qformer_input_ids)
        if pixel_values is not None and pixel_values.dim() == 5:
            pixel_values = pixel_values.transpose(1, 2).flatten(0, 1)
        if image_embeds is not None and image_embeds.dim() == 4:
            image_embeds = image_embeds.flatten(0, 1)
        features = self.image_features(pixel_values, image_embeds, interpolate_pos_encoding)
        frames, rest = divmod(len(features), batch)
        if rest or not frames:
            raise ValueError(f"{len(features)} images for {batch} instructions; give one instruction an image")
        if frames > 1:
            qformer_input_ids = qformer_input_ids.repeat_interleave(frames, dim=0)
            if qformer_attention_mask is not None:
                qformer_attention_mask = qformer_attention_mask.repeat_interleave(frames, dim=0)
        queries, _ = self.instructed_queries(features, qformer_input_ids, qformer_attention_mask)
        return features, queries.reshape(batch, -1, queries.shape[-1])

    def forward(
        self,
        pixel_values: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        image_embeds: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> InstructBlipForConditionalGenerationModelOutput | tuple[Any, ...]:
        """Language modelling on an image, an instruction and an answer.

        Args:
            pixel_values: (B, 3, H, W), or (B, 3, T, H, W) for T frames; or `image_embeds` (B, 1 + patches, vision
                hidden) or (B, T, 1 + patches, vision hidden), their cached tower outputs.
            qformer_input_ids: (B, Lq) instruction for the Q-Former; `qformer_attention_mask` likewise.
            input_ids: (B, L) with `num_query_tokens` image tokens a row (and frame), as `InstructBlipProcessor`
                gives them.
            attention_mask: (B, L).
            labels: (B, L) for a causal language model, (B, target length) for an encoder-decoder; -100 is ignored.
            kwargs: for the language model.

        Returns:
            `loss` (mean over the supervised tokens of all ranks) and `logits`. In training the logits exist only at
            supervised positions and are not returned. `qformer_outputs` holds the queries' outputs.

        Raises:
            ImageTokenError, LabelError, AllLabelsIgnoredError, TypeError (float16 master weights), ValueError.
        """
        images = self._images(
            pixel_values, image_embeds, interpolate_pos_encoding, qformer_input_ids, qformer_attention_mask
        )
        return self.language_modeling(
            images,
            InstructBlipForConditionalGenerationModelOutput,
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            labels,
            return_dict,
            **kwargs,
        )

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_embeds: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        prompt_in_output: bool = True,
        **generate_kwargs: Any,
    ) -> Any:
        """Answers: greedy, beam search, sampling, as the generation arguments say.

        Args:
            pixel_values, qformer_input_ids, qformer_attention_mask, input_ids, attention_mask, image_embeds: as of
                `forward`, from `InstructBlipProcessor`.
            prompt_in_output: with a causal language model, whether the ids returned start with `input_ids`, as those
                of transformers do. With False they are the new ones alone, and a repetition penalty counts only
                these, as in the authors' code (which penalises by 1.5).
            generate_kwargs: as for `generate` of any language model.

        Raises:
            ImageTokenError, ValueError: as `forward`.
        """
        images = self._images(
            pixel_values, image_embeds, interpolate_pos_encoding, qformer_input_ids, qformer_attention_mask
        )
        return self.generate_text(
            images, input_ids, attention_mask, prompt_in_output=prompt_in_output, **generate_kwargs
        )

    @torch.no_grad()
    def candidate_losses(
        self,
        pixel_values: Tensor | None,
        qformer_input_ids: Tensor,
        qformer_attention_mask: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        candidate_ids: Tensor,
        candidate_attention_mask: Tensor,
        *,
        image_embeds: Tensor | None = None,
        chunk_size: int | None = None,
    ) -> Tensor:
        """Negative log-likelihood of each candidate answer for each image: (B, C), float32; the least is the answer.

        An image is encoded once for all of its candidates.

        Args:
            pixel_values: (B, 3, H, W), or `image_embeds`.
            qformer_input_ids: (B, Lq); `qformer_attention_mask` likewise.
            input_ids: (B, L) image tokens and instruction, padded on either side; `attention_mask` likewise.
            candidate_ids: (C, Lc) in the language model's vocabulary, padded on the right, for a causal one without
                the token that begins a text; `candidate_attention_mask` likewise.
            chunk_size: candidates an image at a time; by default all.
        """
        images = self._images(pixel_values, image_embeds, False, qformer_input_ids, qformer_attention_mask)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        image_mask = self.image_token_mask(input_ids, self.soft_prompt_length(images))
        _, queries = self.query_outputs(**images)
        embeds = self._embed(input_ids, image_mask, self.soft_prompt(queries))
        score = self._causal_losses if self.config.use_decoder_only_language_model else self._seq2seq_losses
        size = chunk_size or len(candidate_ids)
        parts = [
            score(embeds, attention_mask, candidate_ids[i : i + size], candidate_attention_mask[i : i + size])
            for i in range(0, len(candidate_ids), size)
        ]
        return torch.cat(parts, dim=1)

    def _causal_losses(self, embeds: Tensor, mask: Tensor, candidates: Tensor, candidate_mask: Tensor) -> Tensor:
        batch, count = len(embeds), len(candidates)
        words = self.get_input_embeddings()(candidates).to(embeds.dtype)
        rows = torch.cat([embeds.repeat_interleave(count, dim=0), words.repeat(batch, 1, 1)], dim=1)
        row_mask = torch.cat([mask.repeat_interleave(count, dim=0), candidate_mask.repeat(batch, 1)], dim=1)
        labels = candidates.masked_fill(candidate_mask == 0, -100).repeat(batch, 1)
        targets = torch.cat([labels.new_full((len(rows), embeds.shape[1]), -100), labels], dim=1)
        # A candidate follows the last token of its prompt: all padding goes to the end.
        order = (row_mask == 0).long().argsort(dim=1, stable=True)
        rows = rows.gather(1, order[..., None].expand_as(rows))
        row_mask, targets = row_mask.gather(1, order), shifted(targets.gather(1, order))
        wanted = targets != -100
        with head_on_rows(self.language_model, wanted):
            logits = self.language_model(inputs_embeds=rows, attention_mask=row_mask, use_cache=False).logits[0]
        losses = rows.new_zeros(row_mask.shape, dtype=torch.float32)
        losses[wanted] = nn.functional.cross_entropy(logits.float(), targets[wanted], reduction="none")
        return losses.view(batch, count, -1).sum(dim=-1)

    def _seq2seq_losses(self, embeds: Tensor, mask: Tensor, candidates: Tensor, candidate_mask: Tensor) -> Tensor:
        batch, count = len(embeds), len(candidates)
        encoded = self.language_model.get_encoder()(inputs_embeds=embeds, attention_mask=mask)
        encoded.last_hidden_state = encoded.last_hidden_state.repeat_interleave(count, dim=0)
        labels = candidates.masked_fill(candidate_mask == 0, -100).repeat(batch, 1)
        logits = self.language_model(
            encoder_outputs=encoded,
            attention_mask=mask.repeat_interleave(count, dim=0),
            decoder_input_ids=self.language_model.prepare_decoder_input_ids_from_labels(labels=labels),
            decoder_attention_mask=candidate_mask.repeat(batch, 1),
        ).logits
        losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
        return losses.view(batch, count, -1).sum(dim=-1)

    def _images(
        self,
        pixel_values: Tensor | None,
        image_embeds: Tensor | None,
        interpolate_pos_encoding: bool,
        qformer_input_ids: Tensor | None,
        qformer_attention_mask: Tensor | None,
    ) -> dict[str, Any]:
        return {
            "pixel_values": pixel_values,
            "image_embeds": image_embeds,
            "interpolate_pos_encoding": interpolate_pos_encoding,
            "qformer_input_ids": qformer_input_ids,
            "qformer_attention_mask": qformer_attention_mask,
        }


__all__ = ["InstructBlipForConditionalGeneration"]
