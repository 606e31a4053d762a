"""BLIP as one composes it from native transformers classes with the original's padding and passes."""

import copy

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BlipConfig
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

from hf_vlp.models.blip.med_blip import tied_names

SHORTEST, LONGEST = 8, 20


def base_config(image_size: int = 224, small: bool = False) -> BlipConfig:
    """The released ViT-B sizes without dropout, or a tiny model."""
    vision = {"image_size": image_size, "layer_norm_eps": 1e-6}
    text = {
        "num_attention_heads": 12,
        "bos_token_id": 30522,
        "enc_token_id": 30523,
        "sep_token_id": 102,
        "label_smoothing": 0.1,
    }
    if small:
        tower = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2}
        vision |= tower | {"num_hidden_layers": 2, "image_size": 64}
        text |= tower | {"num_hidden_layers": 3, "vocab_size": 1000, "bos_token_id": 998, "enc_token_id": 999}
    return BlipConfig(vision_config=vision, text_config=text)


def captions(number: int, vocab_size: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Captions of 8 to 20 tokens padded to `width`: ids and mask. The first is of 20."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (number,), generator=generator)
    lengths[0] = LONGEST
    mask = (torch.arange(width)[None] < lengths[:, None]).long()
    ids = torch.randint(200, vocab_size - 2, (number, width), generator=generator)
    ids[:, 0] = 101
    return ids * mask, mask


def native_config(config: BlipConfig) -> BlipConfig:
    """The same sizes for native classes, which have one kernel."""
    config = copy.deepcopy(config)
    for part in (config, config.vision_config, config.text_config):
        part._attn_implementation_internal = None
    if hasattr(config, "pretraining"):
        del config.pretraining
    return config


def spread(model: nn.Module) -> None:
    """Draws weights that keep the scale of what goes through them, so that outputs differ between inputs, which the
    native initialisation (1e-10) does not give, and attention doesn't saturate, which would leave rounding noise as
    the gradient of queries and keys."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel() if parameter.ndim == 4 else parameter.shape[-1]
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5 * fan_in**-0.5)


class Composed(nn.Module):
    """Native towers and heads with the weights of one of our models, and a decoder tied as in the original."""

    def __init__(self, config: BlipConfig, state: dict[str, Tensor], with_decoder: bool = False) -> None:
        super().__init__()
        config = native_config(config)
        self.encoder_id, self.decoder_id = config.text_config.enc_token_id, config.text_config.bos_token_id
        self.model = transformers.BlipForImageTextRetrieval(config)
        own = self.model.state_dict()
        self.model.load_state_dict({name: value for name, value in state.items() if name in own})
        self.text_decoder = None
        if with_decoder:
            self.text_decoder = BlipTextLMHeadModel(config.text_config)
            prefix = "text_decoder."
            mine = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
            self.text_decoder.load_state_dict(mine)
            everything = {"text_encoder": self.model.text_encoder, "text_decoder": self.text_decoder}
            for decoder, encoder in tied_names(config).items():
                holder, name = _holder(everything, decoder)
                owner, source = _holder(everything, encoder)
                setattr(holder, name, getattr(owner, source))

    def images(self, pixel_values: Tensor) -> Tensor:
        return self.model.vision_model(pixel_values).last_hidden_state

    def text(self, ids: Tensor, mask: Tensor, images: Tensor | None = None) -> Tensor:
        """Text alone, or with [ENC] first and its image."""
        if images is not None:
            ids = torch.cat([torch.full_like(ids[:, :1], self.encoder_id), ids[:, 1:]], dim=1)
        return self.model.text_encoder(ids, mask, encoder_hidden_states=images).last_hidden_state

    def features(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        image, text = self.model.vision_proj(images[:, 0]), self.model.text_proj(texts[:, 0])
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1)

    def language_loss(self, ids: Tensor, mask: Tensor, images: Tensor) -> Tensor:
        ids = torch.cat([torch.full_like(ids[:, :1], self.decoder_id), ids[:, 1:]], dim=1)
        labels = ids.masked_fill(mask == 0, -100)
        return self.text_decoder(ids, mask, encoder_hidden_states=images, labels=labels).loss


def _holder(modules: dict[str, nn.Module], name: str) -> tuple[nn.Module, str]:
    part, _, rest = name.partition(".")
    path, _, last = rest.rpartition(".")
    return modules[part].get_submodule(path), last
