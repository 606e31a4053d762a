"""ALBEF as one composes it from native transformers classes with the original's padding and passes."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, ViTModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer, BertLMPredictionHead

from hf_vlp.models.albef.configuration_albef import AlbefConfig
from hf_vlp.models.albef.modeling_albef import AlbefForImageTextRetrieval

SHORTEST, LONGEST, PADDED = 8, 20, 30


def base_config(image_size: int = 256, small: bool = False) -> AlbefConfig:
    """The released sizes without dropout, or a tiny model."""
    vision = {"model_type": "vit", "image_size": image_size, "layer_norm_eps": 1e-6}
    text = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "mask_token_id": 103}
    if small:
        tower = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2}
        vision |= tower | {"num_hidden_layers": 2, "image_size": 64}
        text |= tower | {"num_hidden_layers": 4, "fusion_layer": 2, "vocab_size": 1000}
    return AlbefConfig(vision_config=vision, text_config=text)


def captions(number: int, vocab_size: int, width: int = PADDED, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Captions of 8 to 20 tokens padded to `width`: ids and mask. The first is of 20."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (number,), generator=generator)
    lengths[0] = LONGEST
    mask = (torch.arange(width)[None] < lengths[:, None]).long()
    ids = torch.randint(200, vocab_size, (number, width), generator=generator)
    ids[:, 0] = 101
    return ids * mask, mask


class ComposedText(nn.Module):
    """BERT of transformers with cross-attention in its upper layers; every pass computes the padding."""

    def __init__(self, config: AlbefConfig) -> None:
        super().__init__()
        text = config.text_config
        fields = {k: v for k, v in text.to_dict().items() if k in BertConfig().to_dict() and k != "model_type"}
        lower, upper = BertConfig(**fields), BertConfig(**(fields | {"is_decoder": True, "add_cross_attention": True}))
        lower._attn_implementation = upper._attn_implementation = "sdpa"
        self.config, self.fusion_layer = lower, text.fusion_layer
        self.embeddings = BertEmbeddings(lower)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(
            BertLayer(upper if i >= text.fusion_layer else lower, layer_idx=i) for i in range(text.num_hidden_layers)
        )

    def forward(self, inputs: Tensor, mask: Tensor, images: Tensor | None = None, mode: str = "multi_modal") -> Tensor:
        hidden = inputs if mode == "fusion" else self.embeddings(inputs)
        first = self.fusion_layer if mode == "fusion" else 0
        last = self.fusion_layer if mode == "text" else len(self.encoder.layer)
        attend = create_bidirectional_mask(self.config, hidden, mask)
        for layer in self.encoder.layer[first:last]:
            hidden = layer(hidden, attend, images)
        return hidden


class Composed(nn.Module):
    """Towers and heads with the weights of one of our models."""

    def __init__(self, config: AlbefConfig, source: AlbefForImageTextRetrieval | None = None) -> None:
        super().__init__()
        self.vision = ViTModel(config.vision_config, add_pooling_layer=False)
        self.text = ComposedText(config)
        self.vision_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim)
        self.itm_head = nn.Linear(config.text_config.hidden_size, 2)
        self.mlm_head = BertLMPredictionHead(config.text_config)
        self.mlm_head.decoder.weight = self.text.embeddings.word_embeddings.weight
        self.mlm_head.decoder.bias = self.mlm_head.bias
        if source is not None:
            self.vision.load_state_dict(source.albef.vision_model.state_dict())
            self.text.load_state_dict(source.albef.text_model.state_dict())
            for name in ("vision_projection", "text_projection", "itm_head"):
                getattr(self, name).load_state_dict(getattr(source, name).state_dict())

    def features(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        return (
            F.normalize(self.vision_projection(images[:, 0]), dim=-1),
            F.normalize(self.text_projection(texts[:, 0]), dim=-1),
        )
