"""BLIP-2's two inference models, in exactly the format of transformers' `blip-2` type.

`Blip2ForImageTextRetrieval` is what stage 1 leaves, `Blip2ForConditionalGeneration` what stage 2 leaves. Both
subclass the class of the same name in transformers: parameters, config and saved folder are the native ones. They add
the passes of `qformer.py`, cached tower outputs (`image_embeds`), supervised-only logits, frozen parts that stay
frozen, and errors where the native classes go on silently with a wrong result.
"""

import copy
from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.blip_2.modeling_blip_2 import (
    Blip2ForConditionalGenerationModelOutput,
    Blip2ImageTextMatchingModelOutput,
)
from transformers.utils import ModelOutput

from hf_vlp.models.blip2.backbone_blip_2 import (
    Blip2BackboneMixin,
    ImageTokenError,
    MissingWeightsError,
    reject_unknown,
)
from hf_vlp.models.blip2.generation_blip_2 import SoftPromptMixin
from hf_vlp.models.blip2.initialization_blip_2 import start_from_vision_and_qformer, text_free_config
from hf_vlp.models.blip2.language_blip_2 import (
    embedding_width,
    load_language_model,
    prepare_language_model,
)
from hf_vlp.models.blip2.processing_blip_2 import Blip2Processor
from hf_vlp.models.blip2.qformer import (
    ImageKeys,
    joint_pass,
    project_images,
    qformer_text_layers,
    query_pass,
    text_pass,
)
from hf_vlp.models.catalog import load_class, saved_settings
from hf_vlp.models.pretraining import hub_arguments
from hf_vlp.models.retrieval import ImageEmbeds
from hf_vlp.nn.packing import PackedTexts

# What the class of a stage-1 checkpoint is called.
STAGE1_ENDINGS = ("ForImageTextRetrieval", "Blip2ForPreTraining")


@dataclass
class Blip2FeatureOutput(ModelOutput):
    """Features of `Blip2ForImageTextRetrieval.extract_features`; fields are `None` where their input was not given.

    Attributes:
        image_embeds: (B, Q, hidden) query outputs.
        image_embeds_proj: (B, Q, D) their projections, normalised.
        text_embeds: (B, L, hidden) output of every token, zero at padding.
        text_embeds_proj: (B, L, D) the projection of every token, normalised; token 0 is the retrieval feature.
        multimodal_embeds: (B, Q, hidden) query outputs of the joint pass over image and text.
    """

    image_embeds: Tensor | None = None
    image_embeds_proj: Tensor | None = None
    text_embeds: Tensor | None = None
    text_embeds_proj: Tensor | None = None
    multimodal_embeds: Tensor | None = None


class Blip2ForImageTextRetrieval(Blip2BackboneMixin, transformers.Blip2ForImageTextRetrieval):
    """Retrieval and matching with the Q-Former of stage 1 (native format; role "retrieval").

    `forward` gives what the native class gives. `embed_images`, `embed_texts`, `similarity` and `matching_scores`
    encode an image once for any number of texts.
    """

    supports_matching: ClassVar[bool] = True
    _master_weight_modules: ClassVar[tuple[str, ...]] = ("qformer", "embeddings")

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        qformer_text_layers(self.qformer)

    def texts(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> PackedTexts:
        """Packs a batch of texts, dropping the image tokens that some native processors put in front of them.

        Args:
            input_ids: (B, L); `attention_mask` (B, L) likewise.

        Raises:
            ImageTokenError: the texts begin with some image tokens, but not with `num_query_tokens` of them.
        """
        image_token = self.config.image_token_id
        if image_token is not None:
            found = (input_ids == image_token).sum(dim=1)
            expected = self.config.num_query_tokens
            if bool((found != 0).any()):
                if bool((found != expected).any()):
                    raise ImageTokenError(
                        f"input_ids have {sorted(set(found.tolist()))} image tokens (id {image_token}) a row, the "
                        f"model has {expected} query tokens; use the processor saved with this model "
                        f"(num_query_tokens={expected}), or give the text alone"
                    )
                if attention_mask is None:
                    attention_mask = torch.ones_like(input_ids)
                attention_mask = attention_mask.masked_fill(input_ids == image_token, 0)
        return PackedTexts.from_padded(input_ids, attention_mask)

    def embed_images(
        self,
        pixel_values: Tensor | None = None,
        image_embeds: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> ImageEmbeds:
        """Encodes images once for any number of comparisons.

        Returns:
            `ImageEmbeds` with `itc` (I, Q, D), normalised, and `states` (I, 1 + patches, vision hidden).
        """
        features = self.image_features(pixel_values, image_embeds, interpolate_pos_encoding)
        queries = query_pass(self.qformer, self.query_tokens, project_images(self.qformer, features)).states
        return ImageEmbeds(self.project_queries(queries), features)

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Feature of each text, (T, D), normalised: the projected output at its first token."""
        first = text_pass(self.qformer, self.embeddings, self.texts(input_ids, attention_mask), first_only=True)
        return self.project_text(first)

    def project_queries(self, states: Tensor) -> Tensor:
        """(..., hidden) query outputs to (..., D) normalised features."""
        return nn.functional.normalize(self.vision_projection(states.to(self.vision_projection.weight.dtype)), dim=-1)

    def project_text(self, states: Tensor) -> Tensor:
        """(..., hidden) text outputs to (..., D) normalised features."""
        return nn.functional.normalize(self.text_projection(states.to(self.text_projection.weight.dtype)), dim=-1)

    def similarity(self, images: ImageEmbeds | Tensor, text_itc: Tensor) -> Tensor:
        """Cosine of each text with the query of each image that fits it best: (I, T). Not divided by a temperature."""
        itc = images if isinstance(images, Tensor) else images.itc
        return torch.einsum("iqd,td->iqt", itc, text_itc).amax(dim=1)

    def matching_logits(self, texts: PackedTexts, images: ImageKeys, image_index: Tensor | None = None) -> Tensor:
        """(P, 2) logits of "no match" and "match", the mean over the queries' logits."""
        queries, _ = joint_pass(
            self.qformer, self.embeddings, self.query_tokens, texts, images, image_index=image_index
        )
        return self.itm_head(queries.to(self.itm_head.weight.dtype)).mean(dim=1)

    def matching_scores(
        self, images: ImageEmbeds, image_index: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Logit of "match" for P pairs, each image's keys and values being projected once.

        Args:
            images: from `embed_images`.
            image_index: (P,) which of them text p is compared with.
            input_ids: (P, L); `attention_mask` (P, L) likewise.

        Returns:
            (P,) float.

        Raises:
            ValueError: `images` carry no states, or the lengths differ.
        """
        return self._pair_logits(images, image_index, input_ids, attention_mask)[:, 1]

    def matching_probabilities(
        self, images: ImageEmbeds, image_index: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Probability of "match" for P pairs, (P,); arguments as of `matching_scores`."""
        return self._pair_logits(images, image_index, input_ids, attention_mask).softmax(dim=-1)[:, 1]

    def _pair_logits(
        self, images: ImageEmbeds, image_index: Tensor, input_ids: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        """(P, 2) logits of "no match" and "match"."""
        if images.states is None:
            raise ValueError("images have no states; make them with embed_images of this model")
        if image_index.shape != input_ids.shape[:1]:
            raise ValueError(
                f"image_index has shape {tuple(image_index.shape)} for {input_ids.shape[0]} texts; give one image "
                "a text"
            )
        wanted, index = image_index.unique(return_inverse=True)
        keys = project_images(self.qformer, images.states[wanted.to(images.states.device)])
        return self.matching_logits(self.texts(input_ids, attention_mask), keys, index)

    def extract_features(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_embeds: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> Blip2FeatureOutput:
        """Image, text and, where both are given, multimodal features of stage 1.

        Args:
            pixel_values: (B, 3, H, W), or `image_embeds`, their cached tower outputs.
            input_ids: (B, L); text i goes with image i in the multimodal features.
        """
        output = Blip2FeatureOutput()
        keys = None
        if pixel_values is not None or image_embeds is not None:
            keys = project_images(
                self.qformer, self.image_features(pixel_values, image_embeds, interpolate_pos_encoding)
            )
            output.image_embeds = query_pass(self.qformer, self.query_tokens, keys).states
            output.image_embeds_proj = self.project_queries(output.image_embeds)
        if input_ids is not None:
            texts = self.texts(input_ids, attention_mask)
            states = text_pass(self.qformer, self.embeddings, texts)
            output.text_embeds = texts.pad(states)
            output.text_embeds_proj = texts.pad(self.project_text(states))
            if keys is not None:
                output.multimodal_embeds, _ = joint_pass(self.qformer, self.embeddings, self.query_tokens, texts, keys)
        return output

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        use_image_text_matching_head: bool | None = False,
        image_embeds: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Blip2ImageTextMatchingModelOutput | tuple[Any, ...]:
        """Scores images against texts.

        Args:
            pixel_values: (I, 3, H, W), or `image_embeds`, their cached tower outputs.
            input_ids: (T, L); `attention_mask` (T, L).
            use_image_text_matching_head: False: cosines of every image with every text, `logits_per_image` (I, T).
                True: text i against image i by the matching head, `logits_per_image` (I, 2).

        Raises:
            ValueError: `labels` were given; this class computes no loss.
        """
        if labels is not None:
            raise ValueError(
                "Blip2ForImageTextRetrieval computes no loss and would ignore `labels`; train with Blip2ForPreTraining"
            )
        reject_unknown(type(self), kwargs)
        if input_ids is None:
            raise ValueError("input_ids are missing: pass the texts to compare the images with")
        features = self.image_features(pixel_values, image_embeds, interpolate_pos_encoding)
        keys = project_images(self.qformer, features)
        texts = self.texts(input_ids, attention_mask)
        vision = BaseModelOutputWithPooling(
            last_hidden_state=features, pooler_output=self.vision_model.post_layernorm(features[:, 0])
        )
        if use_image_text_matching_head:
            queries, text_states = joint_pass(
                self.qformer, self.embeddings, self.query_tokens, texts, keys, queries_only=False
            )
            states = torch.cat([queries, texts.pad(text_states)], dim=1)
            logits = self.itm_head(queries.to(self.itm_head.weight.dtype)).mean(dim=1)
            output = Blip2ImageTextMatchingModelOutput(
                logits_per_image=logits,
                logits_per_text=logits.t(),
                text_embeds=states,
                image_embeds=features,
                text_model_output=BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=states[:, 0]),
                vision_model_output=vision,
            )
        else:
            itc = self.project_queries(query_pass(self.qformer, self.query_tokens, keys).states)
            states = texts.pad(text_pass(self.qformer, self.embeddings, texts))
            text_embeds = self.project_text(states[:, 0])
            logits = self.similarity(itc, text_embeds)
            output = Blip2ImageTextMatchingModelOutput(
                logits_per_image=logits,
                logits_per_text=logits.t(),
                text_embeds=text_embeds,
                image_embeds=itc,
                text_model_output=BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=states[:, 0]),
                vision_model_output=vision,
            )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


class Blip2ForConditionalGeneration(SoftPromptMixin, Blip2BackboneMixin, transformers.Blip2ForConditionalGeneration):
    """A language model that reads images through the Q-Former (stage 2, section 3.2; native format).

    Role "captioning" and "vqa". `forward` with `labels` gives the language modelling loss; `generate` gives text.
    """

    stages: ClassVar[dict[str, dict[str, bool]]] = {
        "stage2": {
            "": True,
            "vision_model": False,
            "vision_model.post_layernorm": True,
            "language_model": False,
        }
    }
    # The loss is a mean over the supervised tokens of all ranks; `Trainer` divides it by the accumulation steps.
    accepts_loss_kwargs = False
    _master_weight_modules: ClassVar[tuple[str, ...]] = ("qformer", "language_projection")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As `Blip2BackboneMixin.from_pretrained`; a stage-1 checkpoint is refused before anything is built."""
        source = pretrained_model_name_or_path
        if source is not None and kwargs.get("config") is None and not kwargs.get("allow_missing"):
            settings = saved_settings(source, **hub_arguments(kwargs))
            found = (settings.get("architectures") or [""])[0]
            if found.endswith(STAGE1_ENDINGS):
                raise MissingWeightsError(
                    f"{source} is a stage-1 checkpoint ({found}) and has no language_model; start stage 2 with "
                    "Blip2ForConditionalGeneration.from_stage1",
                    ("language_model", "language_projection"),
                )
        return super().from_pretrained(source, *model_args, **kwargs)

    @classmethod
    def from_stage1(
        cls,
        stage1: str | PathLike[str] | PreTrainedModel,
        language_model: str | PreTrainedModel,
        processor: Blip2Processor | None = None,
        **language_model_kwargs: Any,
    ) -> "Blip2ForConditionalGeneration":
        """Starts stage 2: the tower, queries and Q-Former of stage 1 in front of a language model.

        The Q-Former leaves its text branch behind; `language_projection` is new.

        Args:
            stage1: folder or Hub id of a stage-1 checkpoint (of `Blip2ForPreTraining`, or the native
                `Blip2ForImageTextRetrieval`), or such a model, whose modules are then shared.
            language_model: folder or Hub id of any causal or encoder-decoder language model, or the model.
            processor: of stage 2 (`Blip2Processor.for_language_model`); tells the image token and the stop token. By
                default made from the tokenizer of `language_model`, if that is a folder or Hub id.
            language_model_kwargs: for `from_pretrained` of the language model (`dtype`, `quantization_config`, ...).

        Raises:
            ValueError: `stage1` is not of stage 1, or the language model does not fit the native format.
        """
        retrieval = stage1_model(stage1)
        if processor is None:
            if not isinstance(language_model, str):
                raise ValueError(
                    "give `processor` (Blip2Processor.for_language_model with the language model's tokenizer): it "
                    "tells the image token and the stop token"
                )
            processor = Blip2Processor.for_language_model(
                AutoTokenizer.from_pretrained(language_model), retrieval.config.num_query_tokens
            )
        language_model = load_language_model(language_model, **language_model_kwargs)
        prepare_language_model(language_model, processor)
        config = type(retrieval.config)(
            vision_config=retrieval.config.vision_config.to_dict(),
            qformer_config=text_free_config(retrieval.config.qformer_config),
            text_config=language_model.config.to_dict(),
            num_query_tokens=retrieval.config.num_query_tokens,
            image_text_hidden_size=retrieval.config.image_text_hidden_size,
            image_token_index=processor.image_token_id,
        )
        owner = load_class(config, "captioning")
        if not issubclass(cls, owner):
            cls = owner
        # Everything is replaced below, so nothing is allocated here.
        with torch.device("meta"), init.no_init_weights():
            model = cls(config)
        model.vision_model = retrieval.vision_model
        model.query_tokens = retrieval.query_tokens
        wanted = model.qformer.state_dict()
        model.qformer.load_state_dict(
            {name: value for name, value in retrieval.qformer.state_dict(keep_vars=True).items() if name in wanted},
            assign=True,
        )
        model.language_projection = nn.Linear(config.qformer_config.hidden_size, embedding_width(language_model))
        model.language_model = language_model
        model.generation_config = copy.deepcopy(language_model.generation_config)
        return model.train(retrieval.training)

    @classmethod
    def from_vision_qformer_language_pretrained(
        cls,
        vision: str | PreTrainedModel | PreTrainedConfig,
        qformer: str | PreTrainedModel | PreTrainedConfig,
        language_model: str | PreTrainedModel,
        processor: Blip2Processor | None = None,
        *,
        num_query_tokens: int = 32,
        cross_attention_frequency: int = 2,
        image_size: int | None = None,
        drop_last_layers: int | None = None,
        **language_model_kwargs: Any,
    ) -> "Blip2ForConditionalGeneration":
        """Starts without stage 1: a vision tower, a Q-Former from BERT, a language model (the paper's ablation,
        figure 5).

        Args:
            vision, qformer, num_query_tokens, cross_attention_frequency, image_size, drop_last_layers: as for
                `Blip2ForPreTraining.from_vision_qformer_pretrained`.
            language_model, processor, language_model_kwargs: as for `from_stage1`.
        """
        start = start_from_vision_and_qformer(
            vision,
            qformer,
            num_query_tokens=num_query_tokens,
            cross_attention_frequency=cross_attention_frequency,
            image_size=image_size,
            drop_last_layers=drop_last_layers,
        )
        retrieval = load_class(start.config, "retrieval")(start.config)
        start.load_into(retrieval)
        return cls.from_stage1(retrieval, language_model, processor, **language_model_kwargs)

    def query_outputs(
        self,
        pixel_values: Tensor | None = None,
        image_embeds: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Image features (B, 1 + patches, vision hidden) and Q-Former outputs (B, Q, hidden)."""
        features = self.image_features(pixel_values, image_embeds, interpolate_pos_encoding)
        return features, query_pass(self.qformer, self.query_tokens, project_images(self.qformer, features)).states

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        image_embeds: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Blip2ForConditionalGenerationModelOutput | tuple[Any, ...]:
        """Language modelling on an image and a text.

        Args:
            pixel_values: (B, 3, H, W), or `image_embeds` (B, 1 + patches, vision hidden), their cached tower outputs.
            input_ids: (B, L) with `num_query_tokens` image tokens a row, as `Blip2Processor` gives them.
            attention_mask: (B, L).
            labels: (B, L) for a causal language model, (B, target length) for an encoder-decoder; -100 is ignored.
            kwargs: for the language model.

        Returns:
            `loss` (mean over the supervised tokens of all ranks) and `logits`. In training the logits exist only at
            supervised positions and are not returned.

        Raises:
            ImageTokenError, LabelError, AllLabelsIgnoredError, TypeError (float16 master weights).
        """
        return self.language_modeling(
            {
                "pixel_values": pixel_values,
                "image_embeds": image_embeds,
                "interpolate_pos_encoding": interpolate_pos_encoding,
            },
            Blip2ForConditionalGenerationModelOutput,
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
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_embeds: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **generate_kwargs: Any,
    ) -> Any:
        """Text for images: greedy, beam search, sampling, as the generation arguments say.

        Args:
            pixel_values: (B, 3, H, W), or `image_embeds`, their cached tower outputs.
            input_ids: (B, L) image tokens and prompt, from `Blip2Processor`; without them the unprompted caption.
            attention_mask: (B, L).
            generate_kwargs: as for `generate` of any language model.

        Returns:
            What the language model's `generate` returns: for a causal one the ids start with `input_ids`.

        Raises:
            ImageTokenError: as `forward`.
        """
        images = {
            "pixel_values": pixel_values,
            "image_embeds": image_embeds,
            "interpolate_pos_encoding": interpolate_pos_encoding,
        }
        return self.generate_text(images, input_ids, attention_mask, **generate_kwargs)


def is_generation(source: str) -> bool:
    """Whether a folder or Hub id holds a BLIP-2 with a language model."""
    settings = saved_settings(source)
    named = (settings.get("architectures") or [""])[0]
    return settings.get("model_type") in ("blip-2", "blip2_any_vision") and named.endswith("ForConditionalGeneration")


def stage1_model(stage1: str | PathLike[str] | PreTrainedModel) -> PreTrainedModel:
    """The retrieval model of a stage-1 checkpoint.

    Raises:
        ValueError: it is something else; the message says what.
    """
    if isinstance(stage1, PreTrainedModel):
        model = getattr(stage1, "retrieval", stage1)
        if not isinstance(model, transformers.Blip2ForImageTextRetrieval):
            raise ValueError(f"{type(model).__name__} is not a stage-1 model (Blip2ForImageTextRetrieval)")
        return model
    settings = saved_settings(stage1)
    found = (settings.get("architectures") or ["no architecture"])[0]
    if settings.get("model_type") not in ("blip-2", "blip2_any_vision") or not found.endswith(STAGE1_ENDINGS):
        raise ValueError(
            f"{stage1} holds {found} of type {settings.get('model_type')!r}, but stage 2 starts from a stage-1 "
            "checkpoint (Blip2ForImageTextRetrieval, or a checkpoint of Blip2ForPreTraining); train stage 1 first, "
            "or continue a stage-2 checkpoint with from_pretrained"
        )
    if found.endswith("ForPreTraining"):
        return load_class(stage1, "pretraining").from_pretrained(stage1).retrieval
    return load_class(stage1, "retrieval").from_pretrained(stage1, dtype=torch.float32)
