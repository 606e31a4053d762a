"""CLIP with the modified ResNet image tower (Radford et al., 2103.00020, section 2.4).

The tower departs from a plain ResNet in its stem of three convolutions, in average pooling before every strided
convolution, and in attention pooling at the end. Its parameters are named as in the original code. The text tower is
`CLIPTextModel` of transformers.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .configuration_clip_resnet import CLIPResNetConfig, CLIPResNetVisionConfig

EXPANSION = 4


@dataclass
class CLIPResNetOutput(ModelOutput):
    """
    Args:
        loss (`Tensor`, *optional*): symmetric cross-entropy of this batch alone, with `return_loss=True`.
        logits_per_image (`Tensor` of shape `(images, texts)`): cosines times the inverse temperature.
        logits_per_text (`Tensor` of shape `(texts, images)`): its transpose.
        text_embeds (`Tensor` of shape `(texts, projection_dim)`): unit vectors.
        image_embeds (`Tensor` of shape `(images, projection_dim)`): unit vectors.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None


@dataclass(frozen=True)
class ImageEmbeds:
    """Images ready for comparison.

    Attributes:
        itc: unit vectors `(images, dim)`.
        states: what matching needs of each image; a dual encoder has none.
    """

    itc: Tensor
    states: Tensor | None = None

    def __len__(self) -> int:
        return len(self.itc)

    def __getitem__(self, index: Tensor | slice) -> "ImageEmbeds":
        return ImageEmbeds(self.itc[index], None if self.states is None else self.states[index])


def trim_texts(input_ids: Tensor, attention_mask: Tensor | None, eos_token_id: int) -> tuple[Tensor, Tensor | None]:
    """Cuts the columns behind the last end token; exact, as attention is causal and the end token's state is pooled.

    Raises:
        ValueError: a text has no end token, or the mask hides it.
    """
    is_end = input_ids == eos_token_id
    position = is_end.int().argmax(dim=1)  # (texts,)
    bad = ~is_end.any(dim=1)
    hidden = torch.zeros_like(bad)
    if attention_mask is not None:
        up_to_end = torch.arange(input_ids.shape[1], device=input_ids.device) <= position[:, None]
        hidden = ((attention_mask == 0) & up_to_end).any(dim=1)
        bad |= attention_mask.gather(1, position[:, None])[:, 0] == 0
    # One transfer for the three numbers, as each would otherwise wait for the device.
    length, any_hidden, any_bad = torch.stack([position.max() + 1, hidden.any().long(), bad.any().long()]).tolist()
    if any_bad:
        raise ValueError(
            f"input_ids: texts {bad.nonzero()[:8, 0].tolist()} of this batch have no visible end token (id "
            f"{eos_token_id}), which is the one that the text tower pools. Tokenize with special tokens and "
            "truncation, and check that the tokenizer's eos_token_id is config.text_config.eos_token_id."
        )
    return input_ids[:, :length], attention_mask[:, :length] if any_hidden else None


def normalize(features: Tensor) -> Tensor:
    """Unit vectors along the last axis, computed in float32 at least, whatever the autocast dtype."""
    features = features if features.dtype == torch.float64 else features.float()
    return features / features.norm(dim=-1, keepdim=True)


class CLIPResNetLastNorm(nn.BatchNorm2d):
    """The norm that ends a block's branch. It starts at zero, so that every block starts as the identity."""


class CLIPResNetBottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution, all of stride 1; a stride is an average pooling in front of the last one."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, planes * EXPANSION, 1, bias=False)
        self.bn3 = CLIPResNetLastNorm(planes * EXPANSION)
        self.downsample = None
        if stride > 1 or inplanes != planes * EXPANSION:
            self.downsample = nn.Sequential()
            self.downsample.add_module("-1", nn.AvgPool2d(stride) if stride > 1 else nn.Identity())
            self.downsample.add_module("0", nn.Conv2d(inplanes, planes * EXPANSION, 1, bias=False))
            self.downsample.add_module("1", nn.BatchNorm2d(planes * EXPANSION))

    def forward(self, hidden_states: Tensor) -> Tensor:
        residual = hidden_states if self.downsample is None else self.downsample(hidden_states)
        hidden_states = self.bn1(self.conv1(hidden_states)).relu()
        hidden_states = self.bn2(self.conv2(hidden_states)).relu()
        hidden_states = self.bn3(self.conv3(self.avgpool(hidden_states)))
        return (hidden_states + residual).relu()


class CLIPResNetAttentionPool(nn.Module):
    """One attention over all positions and their mean, queried by the mean alone; ends in the joint space."""

    def __init__(self, config: CLIPResNetVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.positional_embedding = nn.Parameter(torch.randn((config.image_size // 32) ** 2 + 1, width) * width**-0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, config.projection_dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, projection_dim)`."""
        tokens = hidden_states.flatten(2).transpose(1, 2)  # (B, HW, C)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)  # (B, 1 + HW, C)
        tokens = tokens + self.positional_embedding.to(tokens.dtype)

        def heads(states: Tensor) -> Tensor:
            return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, length, head_dim)

        pooled = nn.functional.scaled_dot_product_attention(
            heads(self.q_proj(tokens[:, :1])), heads(self.k_proj(tokens)), heads(self.v_proj(tokens))
        )
        return self.c_proj(pooled.transpose(1, 2).flatten(1))


class CLIPResNetPreTrainedModel(PreTrainedModel):
    config_class = CLIPResNetConfig
    base_model_prefix = "clip_resnet"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    # Only the text tower is checkpointed: a second forward would update the running statistics of batch norms twice.
    supports_gradient_checkpointing = True
    _no_split_modules = ["CLIPResNetBottleneck", "CLIPEncoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        factor = self.config.initializer_factor
        if isinstance(module, nn.Conv2d):
            # What torch draws by default, as in the original.
            bound = module.weight[0].numel() ** -0.5
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, CLIPResNetLastNorm):
            init.zeros_(module.weight)
        elif isinstance(module, CLIPResNetAttentionPool):
            std = factor * module.c_proj.in_features**-0.5
            init.normal_(module.positional_embedding, std=std)
            for linear in (module.q_proj, module.k_proj, module.v_proj, module.c_proj):
                init.normal_(linear.weight, std=std)
        elif isinstance(module, CLIPResNetModel):
            text = module.text_model
            width, depth = text.config.hidden_size, text.config.num_hidden_layers
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            init.normal_(module.text_projection.weight, std=factor * width**-0.5)
            # Differs from transformers, which swaps the scales of attention's input and output projections.
            init.normal_(text.embeddings.position_embedding.weight, std=factor * 0.01)
            for layer in text.encoder.layers:
                for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                    init.normal_(projection.weight, std=factor * width**-0.5)
                for projection in (layer.self_attn.out_proj, layer.mlp.fc2):
                    init.normal_(projection.weight, std=factor * width**-0.5 * (2 * depth) ** -0.5)
                init.normal_(layer.mlp.fc1.weight, std=factor * (2 * width) ** -0.5)


class CLIPResNetVisionModel(CLIPResNetPreTrainedModel):
    """Image tower up to and including the attention pooling, whose output lies in the joint space."""

    config_class = CLIPResNetVisionConfig
    input_modalities = ("image",)
    _no_split_modules = ["CLIPResNetBottleneck"]

    def __init__(self, config: CLIPResNetVisionConfig) -> None:
        super().__init__(config)
        width = config.width
        self.conv1 = nn.Conv2d(config.num_channels, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        inplanes = width
        for index, blocks in enumerate(config.layers):
            planes = width * 2**index
            stage = nn.Sequential(CLIPResNetBottleneck(inplanes, planes, stride=1 if index == 0 else 2))
            inplanes = planes * EXPANSION
            stage.extend(CLIPResNetBottleneck(inplanes, planes) for _ in range(1, blocks))
            self.add_module(f"layer{index + 1}", stage)
        self.attnpool = CLIPResNetAttentionPool(config)
        self.post_init()

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False) -> BaseModelOutputWithPooling:
        """Encodes images.

        Args:
            pixel_values: `(B, channels, image_size, image_size)`.
            output_hidden_states: also return the maps after the stem and after each of the four stages.

        Returns:
            `last_hidden_state` `(B, 32 * width, image_size / 32, image_size / 32)` and `pooler_output`
            `(B, projection_dim)`.

        Raises:
            ValueError: images of another size than the positions of the attention pooling were made for.
        """
        size = self.config.image_size
        if pixel_values.shape[-2:] != (size, size):
            raise ValueError(
                f"pixel_values are {tuple(pixel_values.shape[-2:])}, but this tower takes {size} x {size}; "
                "set the image processor's size and crop_size to config.vision_config.image_size"
            )
        states = pixel_values.to(self.conv1.weight.dtype)
        for convolution, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            states = norm(convolution(states)).relu()
        states = self.avgpool(states)
        maps = [states]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            states = stage(states)
            maps.append(states)
        return BaseModelOutputWithPooling(
            last_hidden_state=states,
            pooler_output=self.attnpool(states),
            hidden_states=tuple(maps) if output_hidden_states else None,
        )


class CLIPResNetModel(CLIPResNetPreTrainedModel):
    """Dual encoder for retrieval and zero-shot classification.

    Submodules: `vision_model`, `text_model` (`CLIPTextModel`), `text_projection`, `logit_scale`. The image projection
    is the last layer of `vision_model.attnpool`.
    """

    supports_matching = False
    # A saved folder carries this file, for machines without hf_vlp.
    _auto_class = "AutoModel"

    def __init__(self, config: CLIPResNetConfig) -> None:
        super().__init__(config)
        self.vision_model = CLIPResNetVisionModel._from_config(config.vision_config)
        self.text_model = CLIPTextModel._from_config(config.text_config)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    @property
    def pooled_token_id(self) -> int:
        """Id of the token whose state embeds a text."""
        return self.text_model.eos_token_id

    def pooled_states(self, pixel_values: Tensor) -> Tensor:
        """The image tower's pooled output `(images, dim)`: what `image_embeds` stands for, and a cache keeps."""
        return self.vision_model(pixel_values).pooler_output

    def image_features(self, pixel_values: Tensor | None = None, image_embeds: Tensor | None = None) -> Tensor:
        """Image features `(images, dim)`, not normalised, from pixels or taken as they are from `image_embeds`.

        Raises:
            ValueError: not exactly one of the two is given.
        """
        if (pixel_values is None) == (image_embeds is None):
            raise ValueError("give either pixel_values or image_embeds (the vision tower's pooled output), not both")
        return self.pooled_states(pixel_values) if image_embeds is None else image_embeds

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Projected text features `(texts, dim)`, not normalised; columns of padding are cut.

        Raises:
            ValueError: a text has no end token.
        """
        input_ids, attention_mask = trim_texts(input_ids, attention_mask, self.pooled_token_id)
        return self.text_projection(self.text_model(input_ids, attention_mask=attention_mask).pooler_output)

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """Feature map, and in `pooler_output` the features in the joint space."""
        return self.vision_model(pixel_values)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutputWithPooling:
        """Tower states, and in `pooler_output` the projected features."""
        outputs = self.text_model(input_ids, attention_mask=attention_mask)
        outputs.pooler_output = self.text_projection(outputs.pooler_output)
        return outputs

    def embed_images(self, pixel_values: Tensor | None = None, image_embeds: Tensor | None = None) -> ImageEmbeds:
        """Embeds images given as pixels `(images, 3, size, size)` or as the tower's pooled output."""
        return ImageEmbeds(normalize(self.image_features(pixel_values, image_embeds)))

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Embeds texts: ids `(texts, length)` to unit vectors `(texts, dim)`."""
        return normalize(self.text_features(input_ids, attention_mask))

    def similarity(self, images: ImageEmbeds | Tensor, text_itc: Tensor) -> Tensor:
        """Cosines `(images, texts)` in float32."""
        itc = images if isinstance(images, Tensor) else images.itc
        return itc.float() @ text_itc.float().T

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_loss: bool | None = None,
        return_dict: bool | None = None,
    ) -> CLIPResNetOutput | tuple[Tensor, ...]:
        """Compares every image with every text of the batch."""
        image_embeds = self.embed_images(pixel_values).itc
        text_embeds = self.embed_texts(input_ids, attention_mask)
        logits_per_text = text_embeds @ image_embeds.T * self.logit_scale.exp()
        loss = None
        if return_loss:
            target = torch.arange(len(logits_per_text), device=logits_per_text.device)
            loss = (
                nn.functional.cross_entropy(logits_per_text, target)
                + nn.functional.cross_entropy(logits_per_text.T, target)
            ) / 2
        output = CLIPResNetOutput(loss, logits_per_text.T, logits_per_text, text_embeds, image_embeds)
        return output.to_tuple() if return_dict is False else output

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """As in transformers; the folder also opens as a zero-shot classifier."""
        reference = f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"
        auto_map = getattr(self.config, "auto_map", None) or {}
        self.config.auto_map = auto_map | {"AutoModelForZeroShotImageClassification": reference}
        super().save_pretrained(save_directory, **kwargs)


__all__ = ["CLIPResNetModel", "CLIPResNetPreTrainedModel", "CLIPResNetVisionModel"]
