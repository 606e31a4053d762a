"""The trainable form of `blip_tasks`, and visual dialog.

Question answering of any width and reasoning over two images are the shipping classes with our ways through their
modules; a saved folder carries the shipping files, not this one. Visual dialog needs no module that transformers'
`BlipForImageTextRetrieval` lacks and is stored as one.
"""

import copy
import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BlipConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import ModelOutput

from hf_vlp.models.albef.modeling_albef_packing import PackedTexts
from hf_vlp.models.blip import modeling_blip_tasks as shipping
from hf_vlp.models.blip.backbone_blip import LABEL_SMOOTHING, BlipBackboneMixin
from hf_vlp.models.blip.configuration_blip_tasks import BlipTasksConfig
from hf_vlp.models.blip.modeling_blip import (
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    QuestionAnsweringMixin,
    adopt_decoder,
    check_pairs,
)
from hf_vlp.models.blip.text_blip import fuse, text_pass, with_first
from hf_vlp.objectives.distributed import global_mean
from hf_vlp.objectives.precision import full_precision


class ShippingMixin:
    """How a folder is saved: with the shipping files beside the weights."""

    shipping_class: ClassVar[type[PreTrainedModel]]
    stages: ClassVar[dict[str, dict[str, bool]]] = {"finetune": {"": True}}
    accepts_loss_kwargs = False

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in transformers; the folder opens with `trust_remote_code=True` where hf_vlp is not installed."""
        if kwargs.get("is_main_process", True):
            os.makedirs(save_directory, exist_ok=True)
            # Only the class and its file are looked at.
            custom_object_save(object.__new__(self.shipping_class), save_directory, config=self.config)
        super().save_pretrained(save_directory, *args, **kwargs)

    def export(self, folder: Any, **save_kwargs: Any) -> None:
        """Writes the inference folder; see `PreTrainingMixin.export`."""
        self.save_pretrained(folder, **save_kwargs)


class BlipTasksForVisualReasoning(ShippingMixin, BlipBackboneMixin, shipping.BlipTasksForVisualReasoning):
    """Reasoning over two images (roles "visual_reasoning" and "finetune_visual_reasoning")."""

    shipping_class = shipping.BlipTasksForVisualReasoning
    _auto_class = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Opens a two-image folder, or starts from any BLIP folder that has a text encoder.

        As in the original, both cross-attentions of a layer start as the one of the checkpoint; merge layers and
        classifier are new.
        """
        given = kwargs.get("config")
        fields = BlipConfig.get_config_dict(pretrained_model_name_or_path)[0] if given is None else given.to_dict()
        if fields.get("model_type") == "blip_tasks" and cls.__name__ in (fields.get("architectures") or []):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        kwargs.setdefault("dtype", torch.float32)
        with_information = kwargs.pop("output_loading_info", False)
        single = BlipForImageTextRetrieval.from_pretrained(
            pretrained_model_name_or_path, *args, allow_missing=True, output_loading_info=True, **kwargs
        )
        single, information = single
        lacking = [n for n in information["missing_keys"] if n.startswith(("text_encoder.", "vision_model."))]
        if lacking:
            raise ValueError(
                f"{pretrained_model_name_or_path} has no text encoder to start from: it lacks {lacking[0]}"
            )
        model = cls.from_single(single)
        return (model, information) if with_information else model

    @classmethod
    def from_single(cls, single: BlipForImageTextRetrieval, **config_kwargs: Any) -> "BlipTasksForVisualReasoning":
        """Starts from a one-image model; `config_kwargs` are fields of `BlipTasksConfig`."""
        model = cls(tasks_config(single.config, num_labels=2, **config_kwargs))
        model.vision_model.load_state_dict(single.vision_model.state_dict())
        state = {}
        for name, value in single.text_encoder.state_dict().items():
            if ".crossattention.self." in name:
                for twin in ("self0", "self1"):
                    state[name.replace(".crossattention.self.", f".crossattention.{twin}.")] = value
            elif ".crossattention.output.dense." in name:
                for twin in ("dense0", "dense1"):
                    state[name.replace(".output.dense.", f".output.{twin}.")] = value
            else:
                state[name] = value
        missing, unexpected = model.text_encoder.load_state_dict(state, strict=False)
        missing = [name for name in missing if "merge_layer" not in name]
        if missing or unexpected:
            raise ValueError(f"the text encoder does not fit: it lacks {missing[:3]} and has {unexpected[:3]}")
        return model

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As the shipping class; the loss is the mean over the statements of all ranks."""
        output = super().forward(pixel_values, input_ids, attention_mask)
        if labels is not None:
            shipping.check_labels(labels, *output.logits.shape)
            total = F.cross_entropy(full_precision(output.logits), labels, reduction="sum")
            output.loss = global_mean(total, len(labels))
        return output if return_dict else output.to_tuple()

    def chance_levels(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """ln of the number of classes."""
        return {"loss": math.log(self.config.num_labels)}


class BlipTasksForQuestionAnswering(
    ShippingMixin, QuestionAnsweringMixin, BlipBackboneMixin, shipping.BlipTasksForQuestionAnswering
):
    """`BlipForQuestionAnswering` whose answer decoder has the text's width, for towers of different widths."""

    shipping_class = shipping.BlipTasksForQuestionAnswering
    _auto_class = None

    def __init__(self, config: BlipTasksConfig) -> None:
        super().__init__(config)
        self.label_smoothing = config.text_config.label_smoothing or LABEL_SMOOTHING
        adopt_decoder(self.text_decoder)


def tasks_config(config: BlipConfig, **changes: Any) -> BlipTasksConfig:
    """The same towers as a `BlipTasksConfig`."""
    text = config.text_config.to_dict()
    made = BlipTasksConfig(
        vision_config=config.vision_config.to_dict(),
        text_config=text,
        image_text_hidden_size=config.image_text_hidden_size,
        **changes,
    )
    implementation = getattr(config, "_attn_implementation_internal", None)
    if implementation:
        made._attn_implementation_internal = implementation
    return made


def from_converted(kind: str, config: BlipConfig, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """An empty model of the right class for a converted original state dict, `kind` `"nlvr"` or `"vqa"`."""
    if kind == "vqa":
        return BlipTasksForQuestionAnswering(tasks_config(config))
    layers = config.text_config.num_hidden_layers
    merging = [i for i in range(layers) if any(f"layer.{i}.crossattention.output.merge_layer." in n for n in state)]
    labels = state["classifier.2.weight"].shape[0]
    return BlipTasksForVisualReasoning(
        tasks_config(config, merge_from=min(merging, default=layers), num_labels=labels)
    )


class BlipForQuestionAnsweringFineTuning(BlipForQuestionAnswering):
    """Starts question answering from any BLIP folder.

    `from_pretrained` gives the inference class, which is trained as it is: the native `BlipForQuestionAnswering`, or
    `BlipTasksForQuestionAnswering` where image and text widths differ.
    """

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, image_size: int | None = None, **kwargs: Any
    ) -> BlipForQuestionAnswering | BlipTasksForQuestionAnswering:
        """Opens a folder of question answering, or starts from a pretrained one.

        The decoder's projections of question states start from those of image tokens where the widths are equal, and
        anew where they are not, as in the original.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            image_size: interpolate the position embedding to it.
            kwargs: of `PreTrainedModel.from_pretrained`. `dtype` is float32 unless given.
        """
        from hf_vlp.models.blip.med_blip import BlipMED

        kwargs.setdefault("dtype", torch.float32)
        source = pretrained_model_name_or_path
        found = BlipConfig.get_config_dict(source)[0]
        if "QuestionAnswering" in (found.get("architectures") or [""])[0]:
            kind = BlipTasksForQuestionAnswering if found["model_type"] == "blip_tasks" else BlipForQuestionAnswering
            return kind.from_pretrained(source, *args, image_size=image_size, **kwargs)
        med = BlipMED.from_pretrained(source, *args, image_size=image_size, **kwargs)
        return cls.from_med(med)

    @staticmethod
    def from_med(med: Any) -> BlipForQuestionAnswering | BlipTasksForQuestionAnswering:
        """Question answering from a pretrained model; encoder and decoder part."""
        wide = med.config.vision_config.hidden_size != med.config.text_config.hidden_size
        if wide:
            model = BlipTasksForQuestionAnswering(tasks_config(med.config))
            warnings.warn(
                "image and text widths differ: keys and values of the decoder's cross-attention start at random",
                stacklevel=3,
            )
        else:
            model = BlipForQuestionAnswering(copy.deepcopy(med.config))
        parts = ("vision_model.", "text_encoder.", "text_decoder.")
        state = {name: value for name, value in med.state_dict().items() if name.startswith(parts)}
        if wide:
            unfit = re.compile(r"text_decoder\..*\.crossattention\.self\.(key|value)\.")
            state = {name: value for name, value in state.items() if not unfit.match(name)}
        missing, unexpected = model.load_state_dict(state, strict=False)
        missing = [name for name in missing if not (wide and "text_decoder" in name and "crossattention" in name)]
        if missing or unexpected:
            raise ValueError(f"the pretrained model does not fit: it lacks {missing[:3]} and has {unexpected[:3]}")
        return model


@dataclass
class BlipDialogOutput(ModelOutput):
    """
    Args:
        loss: mean cross-entropy of right and wrong candidates over all ranks.
        loss_dialog: the same, under the name that is logged.
        logits: (C, 2), class 1 = the right answer.
    """

    loss: Tensor | None = None
    loss_dialog: Tensor | None = None
    logits: Tensor | None = None


class BlipForVisualDialog(BlipForImageTextRetrieval):
    """Which of the candidates answers the question in a dialog about an image (VisDial, figure 5c of the paper)?

    The dialog encoder reads [ENC], the dialog so far and a candidate answer, and looks at the image's tokens and,
    behind them, at the states of the dialog's text from the unimodal encoder, as the paper concatenates image and
    caption embeddings; the matching head tells whether the answer is the right one. The authors have not published
    code for this task. Stored as a native `BlipForImageTextRetrieval`, which has the same parameters. Where image and
    text widths differ the text states are not looked at: they do not fit the keys' projection.
    """

    stages: ClassVar[dict[str, dict[str, bool]]] = {"finetune": {"": True}}
    accepts_loss_kwargs = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Opens any BLIP folder with a text encoder and a matching head; `dtype` is float32 unless given."""
        kwargs.setdefault("dtype", torch.float32)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def context(
        self, image_states: Tensor, input_ids: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What candidates look at: (N, K + L, width), and where (N, K + L) bool."""
        texts = PackedTexts.from_padded(input_ids, attention_mask)
        check_pairs(len(image_states), len(texts))
        if image_states.shape[-1] != self.config.text_config.hidden_size:
            return image_states, None
        states = texts.rows.pad(text_pass(self.text_encoder, texts))
        mask = texts.rows.mask
        if mask is not None:
            seen = mask.new_ones(image_states.shape[:2])
            mask = torch.cat([seen, mask], dim=1)
        return torch.cat([image_states, states.to(image_states.dtype)], dim=1), mask

    def candidate_logits(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        candidate_ids: Tensor | None,
        candidate_attention_mask: Tensor | None,
        candidates_per_dialog: Tensor | None,
    ) -> Tensor:
        """(C, 2) logits of candidates, class 1 = the right answer; arguments as of `candidate_scores`."""
        if candidate_ids is None or candidates_per_dialog is None:
            raise ValueError(
                "candidates are missing: visual dialog ranks candidate answers, so every turn must list them "
                "(`candidates` of the data)"
            )
        per_dialog = candidates_per_dialog.cpu()
        if per_dialog.shape != (len(input_ids),) or int(per_dialog.sum()) != len(candidate_ids):
            raise ValueError(
                f"there are {len(candidate_ids)} candidates, but candidates_per_dialog {per_dialog.tolist()} for "
                f"{len(input_ids)} dialogs: it must have one entry a dialog and sum to the number of candidates"
            )
        states, mask = self.context(self.encode_images(pixel_values), input_ids, attention_mask)
        dialog = torch.repeat_interleave(torch.arange(len(input_ids)), per_dialog)
        texts = joined_dialogs(input_ids, attention_mask, candidate_ids, candidate_attention_mask, dialog)
        texts = with_first(texts, self.enc_token_id)
        first = fuse(self.text_encoder, texts, dialog, states, keep=texts.first, image_mask=mask)
        return self.itm_head(first)

    def candidate_scores(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        candidate_ids: Tensor | None = None,
        candidate_attention_mask: Tensor | None = None,
        candidates_per_dialog: Tensor | None = None,
    ) -> Tensor:
        """Probability (C,) of each candidate to be the answer.

        Args:
            pixel_values: (N, 3, H, W).
            input_ids: (N, L) caption, history and question.
            attention_mask: (N, L).
            candidate_ids: (C, Lc) candidates of all dialogs, one after another, each starting with [CLS].
            candidate_attention_mask: (C, Lc).
            candidates_per_dialog: (N,) how many belong to each dialog.

        Raises:
            ValueError: candidates are missing, or their numbers do not fit.
        """
        logits = self.candidate_logits(
            pixel_values, input_ids, attention_mask, candidate_ids, candidate_attention_mask, candidates_per_dialog
        )
        return full_precision(logits).softmax(dim=-1)[:, 1]

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        candidate_ids: Tensor | None = None,
        candidate_attention_mask: Tensor | None = None,
        candidates_per_dialog: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> BlipDialogOutput | tuple[Any, ...]:
        """Matching logits of candidates and, with `labels` (C,) 1 = the right answer, their loss."""
        logits = self.candidate_logits(
            pixel_values, input_ids, attention_mask, candidate_ids, candidate_attention_mask, candidates_per_dialog
        )
        output = BlipDialogOutput(logits=logits)
        if labels is not None:
            shipping.check_labels(labels, *logits.shape)
            total = F.cross_entropy(full_precision(logits), labels, reduction="sum")
            output.loss = output.loss_dialog = global_mean(total, len(labels))
        return output if return_dict else output.to_tuple()

    def chance_levels(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """Entropy of the share of right answers among the candidates."""
        share = float(batch["labels"].float().mean())
        share = min(max(share, 1e-6), 1 - 1e-6)
        return {"loss_dialog": -share * math.log(share) - (1 - share) * math.log(1 - share)}

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Writes a native `BlipForImageTextRetrieval`."""
        import json
        from pathlib import Path

        super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            path = Path(save_directory) / "config.json"
            config = json.loads(path.read_text())
            config["architectures"] = ["BlipForImageTextRetrieval"]
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    def export(self, folder: Any, **save_kwargs: Any) -> None:
        """Writes the native folder; see `PreTrainingMixin.export`."""
        self.save_pretrained(folder, **save_kwargs)


def joined_dialogs(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    candidate_ids: Tensor,
    candidate_attention_mask: Tensor | None,
    dialog: Tensor,
) -> PackedTexts:
    """Each candidate behind its dialog; the candidate's own first token ([CLS]) is left out.

    Args:
        dialog: (C,) CPU, the dialog of each candidate.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if candidate_attention_mask is None:
        candidate_attention_mask = torch.ones_like(candidate_ids)
    device = input_ids.device
    index = dialog.to(device)
    ids = torch.cat([input_ids[index], candidate_ids[:, 1:]], dim=1)
    mask = torch.cat([attention_mask[index], candidate_attention_mask[:, 1:]], dim=1).bool()
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
    return PackedTexts.from_padded(ids.gather(1, order), mask.gather(1, order))


__all__ = [
    "BlipForQuestionAnsweringFineTuning",
    "BlipForVisualDialog",
    "BlipTasksForQuestionAnswering",
    "BlipTasksForVisualReasoning",
]
