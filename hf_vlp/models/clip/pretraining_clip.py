"""Contrastive pretraining of the CLIP family: CLIP (2103.00020), ALIGN (2102.05918), EVA-CLIP, LiT (2111.07991), and
the sigmoid loss of SigLIP (2303.15343) on any of them.
"""

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from hf_vlp.models.catalog import ARCHITECTURES, architecture_of
from hf_vlp.models.clip.modeling_clip import pooled_token_id
from hf_vlp.models.pretraining import PreTrainingMixin, hub_arguments, read_extras
from hf_vlp.objectives.contrastive import GatherKeys, contrastive_loss, sigmoid_loss
from hf_vlp.objectives.distributed import world

# Largest inverse temperature (2103.00020, section 2.5); the smallest is 1, as in the recipes.
MAX_LOGIT_SCALE = 100.0

# Types that this class can train.
MODEL_TYPES = tuple(a.model_type for a in ARCHITECTURES.values() if a.objectives == ("ITC",))


@dataclass
class ContrastiveSettings:
    """How the contrastive objective is computed; kept in the checkpoint's config under `pretraining`.

    Attributes:
        loss: `"softmax"` (CLIP, equation of figure 3) or `"sigmoid"` (SigLIP, equation 1).
        label_smoothing: of the softmax targets; by default the recipe's, which is 0.1 for ALIGN and 0 for the others.
        gather_keys: how the features of other ranks take part in the softmax, see
            `hf_vlp.objectives.contrastive.contrastive_loss`; `"exact"` is the gradient of one process.
        tile_size: rows computed at a time, for batches whose similarity matrix would not fit; None computes it whole.
        init_logit_scale: logarithm of the initial inverse temperature of a model from scratch; None keeps the model's.
        init_logit_bias: initial bias of the sigmoid loss.
    """

    loss: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: float | None = None
    gather_keys: GatherKeys = "exact"
    tile_size: int | None = None
    init_logit_scale: float | None = None
    init_logit_bias: float = -10.0

    def __post_init__(self) -> None:
        if self.loss not in ("softmax", "sigmoid"):
            raise ValueError(f"loss must be 'softmax' or 'sigmoid', not {self.loss!r}")
        if self.loss == "sigmoid" and self.label_smoothing:
            raise ValueError(
                "label_smoothing belongs to the softmax loss; the sigmoid loss has no distribution to smooth"
            )
        if self.loss == "sigmoid" and self.gather_keys != "exact":
            raise ValueError("gather_keys belongs to the softmax loss; the sigmoid loss compares all pairs exactly")


@dataclass
class CLIPForPreTrainingOutput(ModelOutput):
    """
    Args:
        loss (`Tensor`): total, a scalar; its mean over ranks is the loss of the joined batch.
        loss_itc (`Tensor`): image-text contrastive loss.
        logits_per_image (`Tensor` of shape `(B, G)`): this rank's images against all ranks' texts; None when tiled.
        logits_per_text (`Tensor` of shape `(B, G)`): this rank's texts against all ranks' images; None when tiled.
        image_embeds (`Tensor` of shape `(B, dim)`): unit vectors.
        text_embeds (`Tensor` of shape `(B, dim)`): unit vectors.
        logit_scale (`Tensor`): inverse temperature, detached.
    """

    loss: Tensor | None = None
    loss_itc: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    logit_scale: Tensor | None = None


class CLIPForPreTraining(PreTrainingMixin, PreTrainedModel):
    """A dual encoder with its contrastive loss.

    The inference model `model` is by the config: `CLIPModel`, `CLIPResNetModel`, `EvaCLIPModel` or `AlignModel`.
    The sigmoid loss adds `logit_bias`, which `export` keeps in the side file.

    The temperature follows the recipes: it learns in the logarithm and is clamped to [1, 100] after every step, in
    place and outside the graph. Here the clamp stands at the start of the next training step and before saving, which
    gives the same losses and the same checkpoints. `AlignModel` learns a divisor instead, which is kept above 1/100.

    Example:
        model = CLIPForPreTraining.from_pretrained("openai/clip-vit-base-patch32", loss="sigmoid")
        loss = model(**collator(rows)).loss
        model.export("my-clip")  # opens as transformers.CLIPModel
    """

    inference_attribute = "model"
    base_model_prefix = ""
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # "locked_image" is LiT: the image tower keeps what it knows, the text tower learns to read it out. The projection
    # on top of the image tower trains, as it is new wherever the tower was not contrastively trained before.
    stages: ClassVar[dict[str, dict[str, bool]]] = {
        "pretrain": {"": True},
        "locked_image": {"": True, "model.vision_model": False},
    }

    def __init__(self, config: PreTrainedConfig, model: PreTrainedModel | None = None, **settings: Any) -> None:
        """
        Args:
            config: of the inference model; a `pretraining` entry holds settings that `settings` overrides.
            model: an existing inference model; by default one is drawn from `config`.
            settings: fields of `ContrastiveSettings`; None leaves the stored or default value.

        Raises:
            ValueError: `config` is of no type of the CLIP family, or a setting has a value that it cannot have.
        """
        if config.model_type not in MODEL_TYPES:
            raise ValueError(
                f"CLIPForPreTraining trains {sorted(MODEL_TYPES)}, not a config of type {config.model_type!r}"
            )
        # A copy: the inference model's own config must stay free of settings that only training knows.
        own = copy.deepcopy(config)
        stored = getattr(own, "pretraining", None) or {}
        given = {name: value for name, value in settings.items() if value is not None}
        chosen = ContrastiveSettings(**{**stored, **given})
        if chosen.label_smoothing is None:
            chosen.label_smoothing = 0.1 if config.model_type == "align" and chosen.loss == "softmax" else 0.0
        own.pretraining = asdict(chosen)
        super().__init__(own)
        self.settings = chosen
        inner = copy.deepcopy(config)
        if hasattr(inner, "pretraining"):
            del inner.pretraining
        self.model = architecture_of(config).load("model")(inner) if model is None else model
        self.supports_gradient_checkpointing = self.model.supports_gradient_checkpointing
        if getattr(self.model.text_model, "pooler", None) is not None:
            # ALIGN's text pooler is part of the format but of no loss; a parameter without gradient stops DDP.
            self.stages = {name: table | {"model.text_model.pooler": False} for name, table in self.stages.items()}
        self.logit_bias = (
            nn.Parameter(torch.tensor(float(self.settings.init_logit_bias)))
            if self.settings.loss == "sigmoid"
            else None
        )
        if model is None and self.settings.init_logit_scale is not None:
            self._set_logit_scale(self.settings.init_logit_scale)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.logit_bias is not None:
            init.constant_(self.logit_bias, self.settings.init_logit_bias)

    @classmethod
    def from_inference_model(cls, model: PreTrainedModel, **settings: Any) -> "CLIPForPreTraining":
        """Wraps an inference model of the family, which keeps its weights and identity."""
        return cls(model.config, model=model, **settings)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> "CLIPForPreTraining":
        """Continues from a pretraining checkpoint, or starts from any inference checkpoint of the family.

        Args:
            pretrained_model_name_or_path: folder or Hub id: what a training run saved, what `export` wrote (its side
                file with the sigmoid's bias is read), or a public `clip`, `align`, ... checkpoint.
            kwargs: fields of `ContrastiveSettings`, and keyword arguments of `PreTrainedModel.from_pretrained`.
                `dtype` is float32 unless given, as optimisers need full-precision weights.

        Raises:
            ValueError: the checkpoint is of another type, or weights are missing from it.
        """
        fields = ContrastiveSettings.__dataclass_fields__
        settings = {key: kwargs.pop(key) for key in list(kwargs) if key in fields}
        kwargs.setdefault("dtype", torch.float32)
        where = hub_arguments(kwargs)
        architecture = architecture_of(pretrained_model_name_or_path, **where)
        if architecture.model_type not in MODEL_TYPES:
            raise ValueError(
                f"{pretrained_model_name_or_path} is of type {architecture.model_type!r}; "
                f"CLIPForPreTraining trains {sorted(MODEL_TYPES)}"
            )
        config = kwargs.pop("config", None)
        if config is None:
            config = architecture.load("config").from_pretrained(pretrained_model_name_or_path, **where)
        if cls.__name__ in (config.architectures or []):
            return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **settings, **kwargs)
        kwargs["output_loading_info"] = True
        model_class = architecture.load("model")
        model, info = model_class.from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        if info["missing_keys"] or info["mismatched_keys"]:
            raise ValueError(
                f"{pretrained_model_name_or_path} is no whole {model_class.__name__}: missing "
                f"{sorted(info['missing_keys'])[:5]}, of another shape {sorted(map(str, info['mismatched_keys']))[:5]}"
            )
        wrapped = cls.from_inference_model(model, **settings)
        wrapped.load_extras(read_extras(pretrained_model_name_or_path, **where))
        return wrapped

    def load_extras(self, extras: Mapping[str, Tensor]) -> None:
        """Takes over the state that `export` kept beside the inference model, as far as the loss uses it."""
        if self.logit_bias is not None and "logit_bias" in extras:
            self.logit_bias.data.copy_(extras["logit_bias"])

    def _set_logit_scale(self, log_scale: float) -> None:
        if hasattr(self.model, "temperature"):
            self.model.temperature.data.fill_(math.exp(-log_scale))
        else:
            self.model.logit_scale.data.fill_(log_scale)

    def inverse_temperature(self) -> Tensor:
        """Inverse temperature as the model stands, with its gradient: a scalar that multiplies cosines."""
        if hasattr(self.model, "temperature"):
            return 1 / self.model.temperature
        return self.model.logit_scale.exp()

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Brings the learned temperature back into its range, in place. Done by `forward` in training and by saving;
        a loop that shards parameters calls it after each optimiser step, where the whole parameter is at hand.
        """
        if hasattr(self.model, "temperature"):
            self.model.temperature.data.clamp_(min=1 / MAX_LOGIT_SCALE)
        else:
            self.model.logit_scale.data.clamp_(0, math.log(MAX_LOGIT_SCALE))

    def check_processor(self, processor: Any) -> None:
        """Compares a processor with the model, before anything is trained with it.

        Args:
            processor: has `tokenizer`, and `image_processor` with a crop size.

        Raises:
            ValueError: ids that the text tower does not have, another end token than it pools, no padding token, or
                images of another size. The message names both sides.
        """
        tokenizer, text = processor.tokenizer, self.model.config.text_config
        problems = []
        if len(tokenizer) > text.vocab_size:
            problems.append(f"the tokenizer has {len(tokenizer)} ids, text_config.vocab_size is {text.vocab_size}")
        if tokenizer.pad_token_id is None:
            problems.append("the tokenizer has no padding token; set tokenizer.pad_token")
        if isinstance(self.model.text_model, CLIPTextModel):
            pooled = pooled_token_id(self.model.text_model)
            highest = len(tokenizer) - 1
            if tokenizer.eos_token_id != (highest if pooled is None else pooled):
                wanted = f"the highest id ({highest})" if pooled is None else f"text_config.eos_token_id ({pooled})"
                problems.append(
                    f"the text tower pools {wanted}, but the tokenizer ends texts with id {tokenizer.eos_token_id}"
                )
        size = getattr(processor.image_processor, "crop_size", None)
        image_size = self.model.config.vision_config.image_size
        if self.model.config.model_type != "align" and size and (size["height"], size["width"]) != (image_size,) * 2:
            problems.append(
                f"the processor crops images to {size['height']} x {size['width']}, vision_config.image_size is "
                f"{image_size}"
            )
        if problems:
            raise ValueError(f"processor and model do not fit: {'; '.join(problems)}")

    def train(self, mode: bool = True) -> "CLIPForPreTraining":
        """Sets the mode; a tower of which nothing trains stays in eval mode, so that its output cannot drift."""
        super().train(mode)
        for tower in (self.model.vision_model, self.model.text_model):
            if mode and not any(parameter.requires_grad for parameter in tower.parameters()):
                tower.eval()
        return self

    def embed(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_embeds: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """First half of a step, row by row: unit vectors `(B, dim)` of images and of texts.

        Args:
            pixel_values: `(B, 3, height, width)`.
            input_ids: `(B, length)`; each text holds its end token.
            attention_mask: `(B, length)`.
            image_embeds: instead of pixels, cached outputs of a frozen image tower.
        """
        return self.model.embed_images(pixel_values, image_embeds).itc, self.model.embed_texts(
            input_ids, attention_mask
        )

    def objective(
        self, image_itc: Tensor, text_itc: Tensor, image_ids: Tensor | None = None, **_: Any
    ) -> CLIPForPreTrainingOutput:
        """Second half of a step, over the whole batch of all ranks.

        Args:
            image_itc: `(B, dim)`, unit vectors of this rank's images.
            text_itc: `(B, dim)`, of its texts.
            image_ids: `(B,)` int64. Pairs with one id are positives of each other.
        """
        if self.training:
            self.clamp_temperature()
        scale = self.inverse_temperature()
        options = {"image_ids": image_ids, "tile_size": self.settings.tile_size}
        if self.logit_bias is not None:
            output = sigmoid_loss(image_itc, text_itc, scale, self.logit_bias, **options)
        else:
            output = contrastive_loss(
                image_itc,
                text_itc,
                scale,
                label_smoothing=self.settings.label_smoothing,
                gather_keys=self.settings.gather_keys,
                **options,
            )
        if self.training and len(image_itc) * world()[1] == 1:
            warnings.warn(
                "a contrastive batch of one pair has no negatives: the softmax loss is always 0 and teaches nothing; "
                "raise per_device_train_batch_size (accumulation steps do not add negatives, gradient caching does)",
                stacklevel=2,
            )
        return CLIPForPreTrainingOutput(
            loss=output.loss,
            loss_itc=output.loss.detach(),
            logits_per_image=output.logits_per_image,
            logits_per_text=output.logits_per_text,
            image_embeds=image_itc,
            text_embeds=text_itc,
            logit_scale=scale.detach(),
        )

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_embeds: Tensor | None = None,
        image_ids: Tensor | None = None,
        return_loss: bool = True,
    ) -> CLIPForPreTrainingOutput:
        """One step: `objective(*embed(...))`. `return_loss` only tells `Trainer` that a loss comes without labels."""
        embeds = self.embed(pixel_values, input_ids, attention_mask, image_embeds)
        return self.objective(*embeds, image_ids=image_ids)

    def chance_levels(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """Loss of a model that knows nothing, in nats: ln G for the softmax over G pairs; for the sigmoid the entropy
        of G independent guesses of a one-in-G event.
        """
        pairs = len(batch["input_ids"]) * (1 if self.settings.gather_keys == "local" else world()[1])
        if self.logit_bias is None:
            return {"loss_itc": math.log(pairs)}
        rest = pairs - 1
        return {"loss_itc": math.log(pairs) + (rest * math.log(pairs / rest) if rest else 0.0)}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        self.clamp_temperature()
        super().save_pretrained(*args, **kwargs)

    def export(self, folder: str | Path, **save_kwargs: Any) -> None:
        self.clamp_temperature()
        super().export(folder, **save_kwargs)


__all__ = ["CLIPForPreTraining", "CLIPForPreTrainingOutput", "ContrastiveSettings"]
