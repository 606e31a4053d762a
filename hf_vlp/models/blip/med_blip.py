"""BLIP's multimodal mixture of encoder and decoder (MED): one text model with three functions (section 3.1)."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BlipConfig
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

from hf_vlp.models.blip.backbone_blip import (
    MissingWeightsError,
    load_rows,
    load_text_source,
    load_vision,
    text_fields,
    use_tokenizer,
    vision_fields,
    vision_state,
)
from hf_vlp.models.blip.modeling_blip import BlipForImageTextRetrieval, adopt_decoder


def tied_names(config: BlipConfig) -> dict[str, str]:
    """Decoder parameter -> encoder parameter, for all but self-attention and the prediction head's transform."""
    shared = ["embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"]
    shared += [f"embeddings.LayerNorm.{part}" for part in ("weight", "bias")]
    modules = [f"crossattention.{name}" for name in ("self.query", "self.key", "self.value")]
    modules += ["crossattention.output.dense", "crossattention.output.LayerNorm"]
    modules += ["intermediate.dense", "output.dense", "output.LayerNorm"]
    for layer in range(config.text_config.num_hidden_layers):
        shared += [f"encoder.layer.{layer}.{name}.{part}" for name in modules for part in ("weight", "bias")]
    ties = {f"text_decoder.bert.{name}": f"text_encoder.{name}" for name in shared}
    ties["text_decoder.cls.predictions.decoder.weight"] = "text_encoder.embeddings.word_embeddings.weight"
    ties["text_decoder.cls.predictions.decoder.bias"] = "text_decoder.cls.predictions.bias"
    return ties


class BlipMED(BlipForImageTextRetrieval):
    """Image encoder, text encoder and text decoder that share all but self-attention, and the two heads.

    What pretraining trains. In memory and in training checkpoints the shared tensors exist once; `save_pretrained`
    writes them under both names, so that the folder opens as the native `BlipForImageTextRetrieval`,
    `BlipForConditionalGeneration` and `BlipForQuestionAnswering`, which know of no sharing.
    """

    def __init__(self, config: BlipConfig) -> None:
        super().__init__(config)
        text = copy.deepcopy(self.config.text_config)
        implementation, text._attn_implementation_internal = text._attn_implementation, "eager"
        self.text_decoder = BlipTextLMHeadModel(text)
        # The ties of this class name the encoder's tensors as owners.
        self.text_decoder._tied_weights_keys = {}
        for module in self.text_decoder.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation_internal = implementation
        adopt_decoder(self.text_decoder)
        self._tied_weights_keys = tied_names(self.config)
        self.post_init()
        self.tie_weights()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Opens a pretrained folder, or starts from any native BLIP folder.

        Where a folder has only one of the two text stacks, the other starts with the same self-attention; heads that
        it lacks are new, which a warning names.

        Raises:
            MissingWeightsError: the folder has neither stack, or no image encoder.
        """
        with_information = kwargs.pop("output_loading_info", False)
        kwargs["allow_missing"] = True
        model, information = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        missing = set(information["missing_keys"]) - set(tied_names(model.config))
        lacking = {name for name in missing if name.startswith("vision_model.")}
        stacks = {
            part: any(name.startswith(prefix) and ".attention." in name for name in missing)
            for part, prefix in (("encoder", "text_encoder."), ("decoder", "text_decoder."))
        }
        if lacking or all(stacks.values()):
            raise MissingWeightsError(
                f"{pretrained_model_name_or_path} is no BLIP checkpoint that training can start from: it lacks "
                f"{sorted(missing)[:3]}",
                sorted(missing),
            )
        if any(stacks.values()):
            model.copy_self_attention(to_decoder=stacks["decoder"])
        new = sorted({name.split(".")[0] for name in missing if ".bert." not in name and "text_encoder" not in name})
        if new:
            warnings.warn(f"{pretrained_model_name_or_path} lacks {new}: they start anew", stacklevel=2)
        return (model, information) if with_information else model

    @torch.no_grad()
    def copy_self_attention(self, *, to_decoder: bool) -> None:
        """Gives one stack the other's self-attention."""
        stacks = [self.text_encoder, self.text_decoder.bert]
        source, target = stacks if to_decoder else reversed(stacks)
        for ours, theirs in zip(target.encoder.layer, source.encoder.layer, strict=True):
            ours.attention.load_state_dict(theirs.attention.state_dict())

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str,
        text_model_name_or_path: str,
        *,
        tokenizer: Any = None,
        image_size: int | None = None,
        image_text_hidden_size: int = 256,
    ) -> "BlipMED":
        """Starts from a ViT and a BERT; cross-attention, projections, matching head and two token rows are new.

        Args:
            vision_model_name_or_path: folder or Hub id of a ViT (or of a model that has one), or of a BLIP.
            text_model_name_or_path: folder or Hub id of a BERT; both stacks start as its layers, the prediction head
                as its own.
            tokenizer: of this BERT, prepared by `add_blip_tokens`; tells the ids of the special tokens. Default: the
                two rows behind BERT's vocabulary are [DEC] and [ENC].
            image_size: pixels; default: the vision model's.
            image_text_hidden_size: width of the contrastive features.
        """
        vision = load_vision(vision_model_name_or_path)
        text, text_config = load_text_source(text_model_name_or_path)
        vocabulary = text_config.vocab_size + 2 if tokenizer is None else max(text_config.vocab_size, len(tokenizer))
        fields = text_fields(text_config, vocabulary)
        fields |= {"bos_token_id": vocabulary - 2, "enc_token_id": vocabulary - 1, "label_smoothing": 0.1}
        config = BlipConfig(
            vision_config=vision_fields(vision.config),
            text_config=fields,
            image_text_hidden_size=image_text_hidden_size,
        )
        if tokenizer is not None:
            use_tokenizer(config, tokenizer)
        model = cls(config)
        model.vision_model.load_state_dict(vision_state(vision))
        load_rows(model.text_decoder, text)
        load_rows(model.text_encoder, {n.removeprefix("bert."): v for n, v in text.items() if n.startswith("bert.")})
        if image_size is not None:
            model.set_image_size(image_size)
        return model

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Writes a folder for the native classes; shared tensors stand under all their names."""
        given = kwargs.pop("state_dict", None)
        state: dict[str, Tensor] = dict(self.state_dict() if given is None else given)
        for name, owner in tied_names(self.config).items():
            state[name] = state[owner].detach().clone()
        ties, self._tied_weights_keys = self._tied_weights_keys, {}
        every, self.all_tied_weights_keys = self.all_tied_weights_keys, {}
        try:
            super().save_pretrained(save_directory, state_dict=state, **kwargs)
        finally:
            self._tied_weights_keys, self.all_tied_weights_keys = ties, every
        if kwargs.get("is_main_process", True):
            path = Path(save_directory) / "config.json"
            config = json.loads(path.read_text())
            config["architectures"] = ["BlipForImageTextRetrieval"]
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    def get_output_embeddings(self) -> nn.Module:
        return self.text_decoder.cls.predictions.decoder


__all__ = ["BlipMED", "tied_names"]
