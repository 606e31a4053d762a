"""Stage 1 of BLIP-2 (arXiv 2301.12597, section 3.1): a Q-Former learns from ITC, ITM and ITG before a frozen tower."""

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, logging
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.utils import ModelOutput

from hf_vlp.models.blip2.backbone_blip_2 import drop_walked_modules
from hf_vlp.models.blip2.captioning_blip_2 import Blip2QFormerCaptioner
from hf_vlp.models.blip2.conversion_blip_2 import from_original, original_weights
from hf_vlp.models.blip2.initialization_blip_2 import (
    Start,
    start_from_generation,
    start_from_vision_and_qformer,
)
from hf_vlp.models.blip2.processing_blip_2 import add_decoder_token
from hf_vlp.models.blip2.qformer import (
    ImageKeys,
    KeyValue,
    generation_pass,
    project_images,
    query_pass,
    text_pass,
)
from hf_vlp.models.catalog import architecture_of
from hf_vlp.models.pretraining import EXTRAS_FILE, PreTrainingMixin, hub_arguments, read_extras
from hf_vlp.nn.packing import PackedTexts
from hf_vlp.objectives.contrastive import query_contrastive_loss
from hf_vlp.objectives.distributed import batch_sizes, exchange_integers, gather, offset_of, world
from hf_vlp.objectives.language import language_modeling_loss
from hf_vlp.objectives.matching import hard_negatives, matching_loss

logger = logging.get_logger(__name__)


@dataclass
class Blip2PreTrainingSettings:
    """How stage 1 is computed; kept in the checkpoint's config under `pretraining`.

    Attributes:
        objectives: which of the three terms make up the loss.
        gather_keys: gradient of ITC through the features that an anchor is compared with: `"exact"`, or `"detached"`
            as in LAVIS, where image-to-text trains the images only and text-to-image the texts only.
        itc_label_smoothing: of the contrastive targets.
        itg_label_smoothing: of the next-token targets.
        temperature: initial value of the learnt divisor of the cosines.
        decoder_start_token_id: the token that starts text generation, [DEC]; by default the last of the vocabulary.
        eos_token_id: the token that ends a text, [SEP] for BERT; needed only to generate.
    """

    objectives: tuple[str, ...] = ("itc", "itm", "itg")
    gather_keys: Literal["exact", "detached"] = "exact"
    itc_label_smoothing: float = 0.1
    itg_label_smoothing: float = 0.1
    temperature: float = 0.07
    decoder_start_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        self.objectives = tuple(self.objectives)
        unknown = set(self.objectives) - {"itc", "itm", "itg"}
        if unknown or not self.objectives:
            raise ValueError(f"objectives must be some of 'itc', 'itm', 'itg', not {self.objectives}")
        if self.gather_keys not in ("exact", "detached"):
            raise ValueError(f"gather_keys must be 'exact' or 'detached', not {self.gather_keys!r}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")


@dataclass
class Blip2ForPreTrainingOutput(ModelOutput):
    """
    Args:
        loss (`Tensor`): sum of the terms; its mean over ranks is the loss of the joined batch.
        loss_itc (`Tensor`): image-text contrastive loss.
        loss_itm (`Tensor`): image-text matching loss.
        loss_itg (`Tensor`): image-grounded text generation loss.
        logits_per_image (`Tensor` of shape `(B, G)`): ITC logits, this rank's images against all ranks' texts.
        logits_per_text (`Tensor` of shape `(B, G)`): ITC logits, this rank's texts against all ranks' images.
        itm_logits (`Tensor` of shape `(3B, 2)`): of the matched pairs, then of the texts with their negative images,
            then of the images with their negative texts.
        itm_labels (`Tensor` of shape `(3B,)`): 1 for the first B.
        negative_image_index (`Tensor` of shape `(B,)`): drawn image of each text, in the joined batch.
        negative_text_index (`Tensor` of shape `(B,)`): drawn text of each image, in the joined batch.
        temperature (`Tensor`): divisor of the cosines, detached.
    """

    loss: Tensor | None = None
    loss_itc: Tensor | None = None
    loss_itm: Tensor | None = None
    loss_itg: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    itm_logits: Tensor | None = None
    itm_labels: Tensor | None = None
    negative_image_index: Tensor | None = None
    negative_text_index: Tensor | None = None
    temperature: Tensor | None = None


class ImageGroundedTextHead(nn.Module):
    """BERT's prediction head over the Q-Former's vocabulary; the output matrix is the word embedding itself.

    Args:
        config: of the Q-Former.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        """(..., hidden) to (..., vocabulary) logits, with `word_embeddings` (vocabulary, hidden)."""
        hidden = self.LayerNorm(self.activation(self.dense(hidden)))
        return nn.functional.linear(hidden, word_embeddings, self.bias)


def _words(tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """How many words a BERT tokenizer has once [DEC] is added, and `settings` with the tokens around a text."""
    add_decoder_token(tokenizer)
    ends = {"decoder_start_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.sep_token_id}
    return len(tokenizer), ends | settings


class Blip2ForPreTraining(PreTrainingMixin, PreTrainedModel):
    """The Q-Former with its three stage-1 objectives.

    `retrieval` is the inference model, the native `Blip2ForImageTextRetrieval`, which `export` writes. `itg_head` and
    `temperature` are what only training (and captioning by the Q-Former itself) needs; `export` keeps them in the side
    file.

    Example:
        model = Blip2ForPreTraining.from_vision_qformer_pretrained("…eva-clip…", "bert-base-uncased")
        output = model(pixel_values, input_ids, attention_mask)
        output.loss.backward()
        model.export("my-blip2-stage1")  # opens as transformers.Blip2ForImageTextRetrieval
    """

    inference_attribute = "retrieval"
    base_model_prefix = ""
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    stages: ClassVar[dict[str, dict[str, bool]]] = {
        "stage1": {"": True, "retrieval.vision_model": False, "retrieval.vision_model.post_layernorm": True}
    }

    def __init__(self, config: PreTrainedConfig, retrieval: PreTrainedModel | None = None, **settings: Any) -> None:
        """
        Args:
            config: of the inference model; a `pretraining` entry holds settings that `settings` overrides.
            retrieval: an existing inference model; by default one is drawn from `config`.
            settings: fields of `Blip2PreTrainingSettings`.
        """
        # A copy: the inference model's own config must stay free of settings that only training knows.
        own = copy.deepcopy(config)
        resolved = Blip2PreTrainingSettings(**{**(getattr(own, "pretraining", None) or {}), **settings})
        if resolved.decoder_start_token_id is None:
            resolved.decoder_start_token_id = own.qformer_config.vocab_size - 1
        own.pretraining = asdict(resolved)
        super().__init__(own)
        self.settings = resolved
        if retrieval is None:
            inner = copy.deepcopy(config)
            if hasattr(inner, "pretraining"):
                del inner.pretraining
            retrieval = architecture_of(config).load("retrieval")(inner)
        self.retrieval = retrieval
        self.itg_head = ImageGroundedTextHead(config.qformer_config)
        self.temperature = nn.Parameter(torch.tensor(float(resolved.temperature)))
        self.post_init()

    def post_init(self) -> None:
        super().post_init()
        drop_walked_modules(self)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ImageGroundedTextHead):
            init.zeros_(module.bias)
        elif module is self:
            init.constant_(self.temperature, self.settings.temperature)

    def get_input_embeddings(self) -> nn.Module:
        return self.retrieval.get_input_embeddings()

    def train(self, mode: bool = True) -> "Blip2ForPreTraining":
        super().train(mode)
        self.retrieval.train(mode)
        return self

    @classmethod
    def from_inference_model(cls, retrieval: PreTrainedModel, **settings: Any) -> "Blip2ForPreTraining":
        """Wraps a retrieval model, which keeps its weights and identity; the ITG head is new."""
        return cls(retrieval.config, retrieval=retrieval, **settings)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> "Blip2ForPreTraining":
        """Continues from a pretraining checkpoint, or starts from any stage-1 inference checkpoint.

        Args:
            pretrained_model_name_or_path: folder or Hub id: what a training run saved, what `export` wrote (its side
                file with the ITG head and the temperature is read), or any native `Blip2ForImageTextRetrieval` folder.
            kwargs: fields of `Blip2PreTrainingSettings`, and keyword arguments of `PreTrainedModel.from_pretrained`.
                `dtype` is float32 unless given, as the Q-Former's master weights must be.

        Raises:
            MissingWeightsError: the checkpoint lacks weights.
        """
        fields = Blip2PreTrainingSettings.__dataclass_fields__
        settings = {key: kwargs.pop(key) for key in list(kwargs) if key in fields}
        kwargs.setdefault("dtype", torch.float32)
        where = hub_arguments(kwargs)
        architecture = architecture_of(pretrained_model_name_or_path, **where)
        config = kwargs.pop("config", None)
        if config is None:
            config = architecture.load("config").from_pretrained(pretrained_model_name_or_path, **where)
        if cls.__name__ in (config.architectures or []):
            return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **settings, **kwargs)
        retrieval = architecture.load("retrieval").from_pretrained(
            pretrained_model_name_or_path, *args, config=config, **kwargs
        )
        model = cls.from_inference_model(retrieval, **settings)
        extras = read_extras(pretrained_model_name_or_path, **where)
        original = original_weights(pretrained_model_name_or_path)
        if extras:
            model.load_extras(extras)
        elif original is not None:
            model.load_extras(from_original(original)[1])
        else:
            logger.warning(
                f"{pretrained_model_name_or_path} has no {EXTRAS_FILE}: the image-grounded text head starts at "
                f"random and the temperature at {model.settings.temperature}"
            )
        return model

    @classmethod
    def from_vision_qformer_pretrained(
        cls,
        vision: str | PreTrainedModel | PreTrainedConfig,
        qformer: str | PreTrainedModel | PreTrainedConfig,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        num_query_tokens: int = 32,
        cross_attention_frequency: int = 2,
        image_text_hidden_size: int = 256,
        image_size: int | None = None,
        drop_last_layers: int | None = None,
        **settings: Any,
    ) -> "Blip2ForPreTraining":
        """The model before its first step: a trained vision tower, a Q-Former from BERT, cross-attention new.

        Args:
            vision: folder or Hub id of a BLIP-2 or EVA-CLIP, such a model, or a vision config for a tower from
                scratch.
            qformer: folder or Hub id of a BERT, such a model, or its config for a Q-Former from scratch.
            tokenizer: BERT's, with [DEC] (`Blip2Processor.for_retrieval` adds it); sets the size of the vocabulary
                and the token that ends a text. By default the one of `qformer`, if that is a folder or Hub id.
            num_query_tokens: Q.
            cross_attention_frequency: every how many layers the queries look at the image.
            image_text_hidden_size: width of the contrastive features.
            image_size: pixels a side, if not the tower's own; its position embeddings are resized.
            drop_last_layers: blocks of the tower to leave out; by default 1 for EVA-CLIP and CLIP.
            settings: fields of `Blip2PreTrainingSettings`.
        """
        if tokenizer is None and isinstance(qformer, str):
            tokenizer = AutoTokenizer.from_pretrained(qformer)
        vocab_size = None
        if tokenizer is not None:
            vocab_size, settings = _words(tokenizer, settings)
        start = start_from_vision_and_qformer(
            vision,
            qformer,
            vocab_size=vocab_size,
            num_query_tokens=num_query_tokens,
            cross_attention_frequency=cross_attention_frequency,
            image_text_hidden_size=image_text_hidden_size,
            image_size=image_size,
            drop_last_layers=drop_last_layers,
        )
        return cls._from_start(start, settings)

    @classmethod
    def from_generation_pretrained(
        cls, source: str, bert: str | None = None, *, tokenizer: PreTrainedTokenizerBase, **settings: Any
    ) -> "Blip2ForPreTraining":
        """The model before its first step, from a BLIP-2 that has a language model already, as `hf-vlp new` makes one.

        Tower, queries and the queries' side of the Q-Former are that model's; its language model is left behind.

        Args:
            source: folder or Hub id of a `Blip2ForConditionalGeneration`.
            bert: folder or Hub id of the BERT that the Q-Former's text side starts from; by default it is new.
            tokenizer: BERT's, as of `from_vision_qformer_pretrained`.
            settings: fields of `Blip2PreTrainingSettings`.

        Raises:
            MissingWeightsError: a checkpoint lacks weights.
            ValueError: the BERT is not of the Q-Former's sizes.
        """
        vocab_size, settings = _words(tokenizer, settings)
        return cls._from_start(start_from_generation(source, bert, vocab_size=vocab_size), settings)

    @classmethod
    def _from_start(cls, start: Start, settings: dict[str, Any]) -> "Blip2ForPreTraining":
        model = cls(start.config, **settings)
        start.load_into(model.retrieval)
        with torch.no_grad():
            for name, parameter in model.itg_head.named_parameters():
                if name in start.head:
                    parameter[: len(start.head[name])].copy_(start.head[name])
        return model

    def load_extras(self, extras: Mapping[str, Tensor]) -> None:
        """Takes over the state that `export` kept beside the inference model.

        Raises:
            ValueError: `extras` are not those of this model; the message names what differs.
        """
        own = self.pretraining_extras()
        if set(own) != set(extras) or any(own[name].shape != extras[name].shape for name in own):
            raise ValueError(
                f"{EXTRAS_FILE} does not fit the model: it has "
                f"{ {name: tuple(value.shape) for name, value in extras.items()} }, the model "
                f"{ {name: tuple(value.shape) for name, value in own.items()} }"
            )
        self.load_state_dict(dict(extras), strict=False)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_embeds: Tensor | None = None,
        image_ids: Tensor | None = None,
        negative_image_index: Tensor | None = None,
        negative_text_index: Tensor | None = None,
        generator: torch.Generator | None = None,
        interpolate_pos_encoding: bool = False,
        return_loss: bool = True,
    ) -> Blip2ForPreTrainingOutput:
        """One step on B images and their texts.

        Args:
            pixel_values: (B, 3, H, W), or `image_embeds` (B, 1 + patches, vision hidden), cached tower outputs.
            input_ids: (B, L) texts as the BERT tokenizer gives them, [CLS] … [SEP].
            attention_mask: (B, L).
            image_ids: (B,) int64. Pairs with one id are positives of each other and never negatives.
            negative_image_index: (B,) a wrong image for each text, as an index into the joined batch of all ranks;
            negative_text_index: (B,) a wrong text for each image. Drawn by similarity if not given.
            generator: draws the negatives; the default one of the device if not given.
            return_loss: only tells `Trainer` that a loss comes without labels.

        Raises:
            TypeError: the Q-Former has float16 master weights.
        """
        model = self.retrieval
        if self.training:
            model.check_master_weights()
        wants = self.settings.objectives
        features = model.image_features(pixel_values, image_embeds, interpolate_pos_encoding)
        images = project_images(model.qformer, features)
        texts = model.texts(input_ids, attention_mask)
        queries = query_pass(model.qformer, model.query_tokens, images, with_cache="itg" in wants)
        found: dict[str, Tensor] = {"temperature": self.temperature.detach()}

        if "itc" in wants or "itm" in wants:
            first = text_pass(model.qformer, model.embeddings, texts, first_only=True)
            itc = query_contrastive_loss(
                model.project_queries(queries.states),
                model.project_text(first),
                1 / self.temperature,
                image_ids=image_ids,
                label_smoothing=self.settings.itc_label_smoothing,
                gather_keys=self.settings.gather_keys,
            )
            found |= {"logits_per_image": itc.logits_per_image, "logits_per_text": itc.logits_per_text}
            if "itc" in wants:
                found["loss_itc"] = itc.loss
        if "itm" in wants:
            if negative_image_index is None or negative_text_index is None:
                drawn = hard_negatives(
                    itc.logits_per_image.detach(),
                    itc.logits_per_text.detach(),
                    offset=itc.offset,
                    image_ids=image_ids,
                    generator=generator,
                )
                negative_image_index, negative_text_index = drawn.image_index, drawn.text_index
            logits, labels = self.matching(features, images, texts, negative_image_index, negative_text_index)
            found |= {"itm_logits": logits, "itm_labels": labels, "loss_itm": matching_loss(logits, labels)}
            found |= {"negative_image_index": negative_image_index, "negative_text_index": negative_text_index}
        if "itg" in wants:
            found["loss_itg"] = self.generation_loss(texts, queries.cache)
        loss = torch.stack([found[f"loss_{term}"] for term in wants]).sum()
        return Blip2ForPreTrainingOutput(loss=loss, **found)

    def matching(
        self, features: Tensor, images: ImageKeys, texts: PackedTexts, image_index: Tensor, text_index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Matching logits of the true pairs, of the texts with wrong images, of the images with wrong texts.

        Args:
            features: (B, 1 + patches, vision hidden) this rank's image features, and `images`, their keys and values.
            texts: this rank's texts.
            image_index: (B,) wrong image of each text; `text_index` (B,) wrong text of each image. Both into the
                joined batch of all ranks.

        Returns:
            (3B, 2) logits and (3B,) labels.
        """
        own = torch.arange(len(texts), device=features.device)
        images, image_index = self._with_remote_images(features, images, image_index)
        everyone, offset = self._texts_of_all_ranks(texts)
        pairs = everyone.select(torch.cat([own + offset, own + offset, text_index]))
        logits = self.retrieval.matching_logits(pairs, images, torch.cat([own, image_index, own]))
        return logits, torch.cat([torch.ones_like(own), torch.zeros_like(own), torch.zeros_like(own)])

    def _with_remote_images(self, features: Tensor, images: ImageKeys, index: Tensor) -> tuple[ImageKeys, Tensor]:
        """Own keys followed by those of the wanted images of other ranks, and `index` in terms of them."""
        if world()[1] == 1:
            return images, index
        offset = offset_of(batch_sizes(images.count, features.device))
        everyone = gather(features)
        local = (index >= offset) & (index < offset + images.count)
        # Possibly none; projected all the same, as the backward of `gather` waits for every rank.
        remote = index[~local].unique()
        images = images.expand(project_images(self.retrieval.qformer, everyone[remote]))
        return images, torch.where(
            local, index - offset, images.count - len(remote) + torch.searchsorted(remote, index)
        )

    def _texts_of_all_ranks(self, texts: PackedTexts) -> tuple[PackedTexts, int]:
        """The texts of the joined batch, and the index of this rank's first."""
        if world()[1] == 1:
            return texts, 0
        device = texts.input_ids.device
        everyone = exchange_integers([len(texts), texts.longest], device)
        longest = max(length for _, length in everyone)
        grids = [
            gather(nn.functional.pad(grid, (0, longest - texts.longest)))
            for grid in (texts.pad(texts.input_ids), texts.mask.long())
        ]
        return PackedTexts.from_padded(*grids), offset_of([size for size, _ in everyone])

    def generation_loss(self, texts: PackedTexts, query_cache: tuple[KeyValue, ...]) -> Tensor:
        """ITG: next-token loss of each text given its image's queries, [DEC] standing where [CLS] stood."""
        model = self.retrieval
        inputs = texts.with_first(self.settings.decoder_start_token_id).without_last()
        states = generation_pass(model.qformer, model.embeddings, inputs, query_cache)
        return language_modeling_loss(
            states[None],
            self.token_logits,
            texts.next_tokens()[None],
            shift=False,
            label_smoothing=self.settings.itg_label_smoothing,
        )

    def token_logits(self, states: Tensor) -> Tensor:
        """(..., hidden) Q-Former text outputs to (..., vocabulary) logits."""
        return self.itg_head(states, self.retrieval.embeddings.word_embeddings.weight)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        image_embeds: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **generate_kwargs: Any,
    ) -> Any:
        """Captions by the Q-Former itself: greedy, beam search, sampling, as the generation arguments say.

        Args:
            pixel_values: (B, 3, H, W), or `image_embeds`, their cached tower outputs.
            input_ids: (B, L) how the captions shall begin, as the stage-1 processor gives it ([CLS] … [SEP]); [DEC]
                takes
                the place of [CLS], and [SEP] is left out. By default they begin with [DEC] alone.
            attention_mask: (B, L).
            generate_kwargs: as for `generate` of any language model.

        Returns:
            (B, length) ids, [DEC] first, or what `return_dict_in_generate` asks for.

        Raises:
            ValueError: no end token is known.
        """
        model = self.retrieval
        captioner = Blip2QFormerCaptioner(self)
        if captioner.generation_config.eos_token_id is None and generate_kwargs.get("eos_token_id") is None:
            raise ValueError("no token ends a caption: pass eos_token_id=tokenizer.sep_token_id")
        images = project_images(
            model.qformer, model.image_features(pixel_values, image_embeds, interpolate_pos_encoding)
        )
        cache = query_pass(model.qformer, model.query_tokens, images, with_cache=True).cache
        if input_ids is None:
            input_ids = torch.full((images.count, 1), self.settings.decoder_start_token_id, device=self.device)
            attention_mask = torch.ones_like(input_ids)
        else:
            start = model.texts(input_ids, attention_mask).with_first(self.settings.decoder_start_token_id)
            # Left padding: what is written comes right behind the prompt.
            input_ids, attention_mask = start.without_last().pad_left(self.config.qformer_config.pad_token_id)
        return captioner.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            query_keys=torch.stack([key for key, _ in cache], dim=1),
            query_values=torch.stack([value for _, value in cache], dim=1),
            **generate_kwargs,
        )

    def chance_levels(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """ITC ln G over G pairs, ITM the entropy of one match in three, ITG ln V; in nats."""
        rows = len(batch["input_ids"]) * world()[1]
        levels = {
            "loss_itc": math.log(rows),
            "loss_itm": math.log(3) - 2 / 3 * math.log(2),
            "loss_itg": math.log(self.config.qformer_config.vocab_size),
        }
        return {
            name: value for name, value in levels.items() if name.removeprefix("loss_") in self.settings.objectives
        }


__all__ = [
    "Blip2ForPreTraining",
    "Blip2ForPreTrainingOutput",
    "Blip2PreTrainingSettings",
    "ImageGroundedTextHead",
]
