"""The architectures of the package, as data: the README's table, the command line and the loaders all read it.

`Auto*` of transformers stays the registry of networks; this table says which of *our* classes plays which role for a
`model_type`, without importing any of them.
"""

import json
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """One row of the catalogue.

    Attributes:
        model_type: as in `config.json`.
        title: name used in the literature.
        paper: arXiv identifier.
        native: plain transformers loads our folders with no code of ours.
        objectives: the papers' abbreviations, in the order of the total loss.
        script: stage -> file of `training_scripts/`.
        classes: role -> `"module:Class"`. Roles of inference: `config`, `model`, `retrieval`, `captioning`, `vqa`,
            `visual_reasoning`, `visual_entailment`, `dialog`, `zero_shot`, `chat`, `processor`; of training:
            `pretraining`, `pretraining_<role>` and `finetune_<role>`.
        reference: system of the reference cases, None where there is none.
    """

    model_type: str
    title: str
    paper: str
    native: bool
    objectives: tuple[str, ...]
    script: dict[str, str]
    classes: dict[str, str] = field(default_factory=dict)
    reference: str | None = None

    def load(self, role: str) -> type:
        """Imports the class that plays `role`.

        Raises:
            KeyError: this architecture has no such role; the message names the roles it has.
        """
        if role not in self.classes:
            raise KeyError(f"{self.title} ({self.model_type!r}) has no {role!r} class; it has: {sorted(self.classes)}")
        module, name = self.classes[role].split(":")
        return getattr(import_module(module), name)


def is_training_role(role: str) -> bool:
    """Whether a role's class is for training; what it exports is a class of another role."""
    return role.startswith(("pretraining", "finetune_"))


_CLIP = "hf_vlp.models.clip"
_BLIP2 = "hf_vlp.models.blip2"
_ALBEF = "hf_vlp.models.albef"
_BLIP = "hf_vlp.models.blip"
_LLAVA = "hf_vlp.models.llava"
_COGVLM = "hf_vlp.models.cogvlm"
_INSTRUCTBLIP = "hf_vlp.models.instructblip"
_QWEN_VL = "hf_vlp.models.qwen_vl"

ARCHITECTURES: dict[str, Architecture] = {
    a.model_type: a
    for a in (
        Architecture(
            model_type="clip",
            title="CLIP (ViT)",
            paper="2103.00020",
            native=True,
            objectives=("ITC",),
            script={"pretrain": "clip.py"},
            classes={
                "config": "transformers:CLIPConfig",
                "model": f"{_CLIP}.modeling_clip:CLIPModel",
                "retrieval": f"{_CLIP}.modeling_clip:CLIPModel",
                "zero_shot": f"{_CLIP}.modeling_clip:CLIPModel",
                "pretraining": f"{_CLIP}.pretraining_clip:CLIPForPreTraining",
                "finetune_retrieval": f"{_CLIP}.pretraining_clip:CLIPForPreTraining",
                "processor": f"{_CLIP}.processing_clip:CLIPProcessor",
            },
            reference="clip",
        ),
        Architecture(
            model_type="clip_resnet",
            title="CLIP (ResNet)",
            paper="2103.00020",
            native=False,
            objectives=("ITC",),
            script={"pretrain": "clip.py"},
            classes={
                "config": "hf_vlp.models.clip_resnet.configuration_clip_resnet:CLIPResNetConfig",
                "model": "hf_vlp.models.clip_resnet.modeling_clip_resnet:CLIPResNetModel",
                "retrieval": "hf_vlp.models.clip_resnet.modeling_clip_resnet:CLIPResNetModel",
                "zero_shot": "hf_vlp.models.clip_resnet.modeling_clip_resnet:CLIPResNetModel",
                "pretraining": f"{_CLIP}.pretraining_clip:CLIPForPreTraining",
                "finetune_retrieval": f"{_CLIP}.pretraining_clip:CLIPForPreTraining",
                "processor": f"{_CLIP}.processing_clip:CLIPProcessor",
            },
            reference="clip",
        ),
        Architecture(
            model_type="eva_clip",
            title="EVA-CLIP",
            paper="2303.15389",
            native=False,
            objectives=("ITC",),
            script={"pretrain": "clip.py"},
            classes={
                "config": "hf_vlp.models.eva_clip.configuration_eva_clip:EvaCLIPConfig",
                "model": "hf_vlp.models.eva_clip.modeling_eva_clip:EvaCLIPModel",
                "retrieval": "hf_vlp.models.eva_clip.modeling_eva_clip:EvaCLIPModel",
                "zero_shot": "hf_vlp.models.eva_clip.modeling_eva_clip:EvaCLIPModel",
                "pretraining": f"{_CLIP}.pretraining_clip:CLIPForPreTraining",
                "finetune_retrieval": f"{_CLIP}.pretraining_clip:CLIPForPreTraining",
                "processor": f"{_CLIP}.processing_clip:CLIPProcessor",
            },
        ),
        Architecture(
            model_type="align",
            title="ALIGN",
            paper="2102.05918",
            native=True,
            objectives=("ITC",),
            script={"pretrain": "clip.py"},
            classes={
                "config": "transformers:AlignConfig",
                "model": "hf_vlp.models.align.modeling_align:AlignModel",
                "retrieval": "hf_vlp.models.align.modeling_align:AlignModel",
                "zero_shot": "hf_vlp.models.align.modeling_align:AlignModel",
                "pretraining": f"{_CLIP}.pretraining_clip:CLIPForPreTraining",
                "finetune_retrieval": f"{_CLIP}.pretraining_clip:CLIPForPreTraining",
                "processor": "transformers:AlignProcessor",
            },
        ),
        Architecture(
            model_type="blip-2",
            title="BLIP-2",
            paper="2301.12597",
            native=True,
            objectives=("ITC", "ITM", "ITG", "LM"),
            script={"stage 1": "blip2_stage1.py", "stage 2": "blip2_stage2.py"},
            classes={
                "config": "transformers:Blip2Config",
                "model": f"{_BLIP2}.modeling_blip_2:Blip2ForConditionalGeneration",
                "captioning": f"{_BLIP2}.modeling_blip_2:Blip2ForConditionalGeneration",
                "vqa": f"{_BLIP2}.modeling_blip_2:Blip2ForConditionalGeneration",
                "retrieval": f"{_BLIP2}.modeling_blip_2:Blip2ForImageTextRetrieval",
                "pretraining": f"{_BLIP2}.pretraining_blip_2:Blip2ForPreTraining",
                "finetune_retrieval": f"{_BLIP2}.pretraining_blip_2:Blip2ForPreTraining",
                "finetune_captioning": f"{_BLIP2}.modeling_blip_2:Blip2ForConditionalGeneration",
                "processor": f"{_BLIP2}.processing_blip_2:Blip2Processor",
            },
            reference="blip2",
        ),
        Architecture(
            model_type="blip2_any_vision",
            title="BLIP-2 on any vision model",
            paper="2301.12597",
            native=False,
            objectives=("ITC", "ITM", "ITG", "LM"),
            script={"stage 1": "blip2_stage1.py", "stage 2": "blip2_stage2.py"},
            classes={
                "config": f"{_BLIP2}.configuration_blip2_any_vision:Blip2AnyVisionConfig",
                "model": f"{_BLIP2}.any_vision_blip_2:Blip2AnyVisionForConditionalGeneration",
                "captioning": f"{_BLIP2}.any_vision_blip_2:Blip2AnyVisionForConditionalGeneration",
                "vqa": f"{_BLIP2}.any_vision_blip_2:Blip2AnyVisionForConditionalGeneration",
                "retrieval": f"{_BLIP2}.any_vision_blip_2:Blip2AnyVisionForImageTextRetrieval",
                "pretraining": f"{_BLIP2}.pretraining_blip_2:Blip2ForPreTraining",
                "finetune_retrieval": f"{_BLIP2}.pretraining_blip_2:Blip2ForPreTraining",
                "finetune_captioning": f"{_BLIP2}.any_vision_blip_2:Blip2AnyVisionForConditionalGeneration",
                "processor": f"{_BLIP2}.processing_blip_2:Blip2Processor",
            },
            reference="blip2",
        ),
        Architecture(
            model_type="albef",
            title="ALBEF",
            paper="2107.07651",
            native=False,
            objectives=("ITC", "ITM", "MLM"),
            script={
                "pretrain": "albef.py",
                "retrieval": "finetune_retrieval.py",
                "VQA": "finetune_vqa.py",
                "NLVR2": "finetune_nlvr2.py",
                "entailment": "finetune_entailment.py",
            },
            classes={
                "config": f"{_ALBEF}.configuration_albef:AlbefConfig",
                "model": f"{_ALBEF}.modeling_albef:AlbefModel",
                "retrieval": f"{_ALBEF}.modeling_albef:AlbefForImageTextRetrieval",
                "zero_shot": f"{_ALBEF}.modeling_albef:AlbefForImageTextRetrieval",
                "vqa": f"{_ALBEF}.modeling_albef_tasks:AlbefForQuestionAnswering",
                "visual_reasoning": f"{_ALBEF}.modeling_albef_tasks:AlbefForVisualReasoning",
                "visual_entailment": f"{_ALBEF}.modeling_albef_tasks:AlbefForVisualEntailment",
                "pretraining": f"{_ALBEF}.pretraining_albef:AlbefForPreTraining",
                "pretraining_visual_reasoning": f"{_ALBEF}.finetuning_albef:AlbefForTextAssignment",
                "finetune_retrieval": f"{_ALBEF}.finetuning_albef:AlbefForRetrievalFineTuning",
                "finetune_vqa": f"{_ALBEF}.finetuning_albef:AlbefForQuestionAnsweringFineTuning",
                "finetune_visual_reasoning": f"{_ALBEF}.finetuning_albef:AlbefForVisualReasoningFineTuning",
                "finetune_visual_entailment": f"{_ALBEF}.finetuning_albef:AlbefForVisualEntailmentFineTuning",
                "processor": f"{_ALBEF}.processing_albef:AlbefProcessor",
            },
            reference="albef",
        ),
        Architecture(
            model_type="blip",
            title="BLIP",
            paper="2201.12086",
            native=True,
            objectives=("ITC", "ITM", "LM"),
            script={
                "pretrain": "blip.py",
                "retrieval": "finetune_retrieval.py",
                "captioning": "finetune_captioning.py",
                "VQA": "finetune_vqa.py",
                "NLVR2": "finetune_nlvr2.py",
                "dialog": "finetune_dialog.py",
            },
            classes={
                "config": "transformers:BlipConfig",
                "model": f"{_BLIP}.modeling_blip:BlipForImageTextRetrieval",
                "retrieval": f"{_BLIP}.modeling_blip:BlipForImageTextRetrieval",
                "zero_shot": f"{_BLIP}.modeling_blip:BlipForImageTextRetrieval",
                "captioning": f"{_BLIP}.modeling_blip:BlipForConditionalGeneration",
                "vqa": f"{_BLIP}.modeling_blip:BlipForQuestionAnswering",
                "dialog": f"{_BLIP}.tasks_blip:BlipForVisualDialog",
                "pretraining": f"{_BLIP}.pretraining_blip:BlipForPreTraining",
                "finetune_retrieval": f"{_BLIP}.retrieval_blip:BlipForRetrievalFineTuning",
                "finetune_captioning": f"{_BLIP}.modeling_blip:BlipForConditionalGeneration",
                "finetune_vqa": f"{_BLIP}.tasks_blip:BlipForQuestionAnsweringFineTuning",
                "finetune_visual_reasoning": f"{_BLIP}.tasks_blip:BlipTasksForVisualReasoning",
                "finetune_dialog": f"{_BLIP}.tasks_blip:BlipForVisualDialog",
                "processor": f"{_BLIP}.processing_blip:BlipProcessor",
            },
            reference="blip",
        ),
        Architecture(
            model_type="blip_tasks",
            title="BLIP for two images, or with towers of different widths",
            paper="2201.12086",
            native=False,
            objectives=("LM",),
            script={"VQA": "finetune_vqa.py", "NLVR2": "finetune_nlvr2.py"},
            classes={
                "config": f"{_BLIP}.configuration_blip_tasks:BlipTasksConfig",
                "model": f"{_BLIP}.tasks_blip:BlipTasksForVisualReasoning",
                "vqa": f"{_BLIP}.tasks_blip:BlipTasksForQuestionAnswering",
                "visual_reasoning": f"{_BLIP}.tasks_blip:BlipTasksForVisualReasoning",
                "finetune_vqa": f"{_BLIP}.tasks_blip:BlipForQuestionAnsweringFineTuning",
                "finetune_visual_reasoning": f"{_BLIP}.tasks_blip:BlipTasksForVisualReasoning",
                "processor": f"{_BLIP}.processing_blip:BlipProcessor",
            },
            reference="blip",
        ),
        Architecture(
            model_type="llava",
            title="LLaVA 1 and 1.5",
            paper="2310.03744",
            native=True,
            objectives=("LM",),
            script={"stage 1": "llava_stage1.py", "stage 2": "llava_stage2.py"},
            classes={
                "config": "transformers:LlavaConfig",
                "model": f"{_LLAVA}.modeling_llava:LlavaForConditionalGeneration",
                "captioning": f"{_LLAVA}.modeling_llava:LlavaForConditionalGeneration",
                "vqa": f"{_LLAVA}.modeling_llava:LlavaForConditionalGeneration",
                "chat": f"{_LLAVA}.modeling_llava:LlavaForConditionalGeneration",
                "processor": f"{_LLAVA}.processing_llava:LlavaProcessor",
            },
            reference="llava",
        ),
        Architecture(
            model_type="llava_next",
            title="LLaVA-NeXT",
            paper="2310.03744",
            native=True,
            objectives=("LM",),
            script={"stage 1": "llava_stage1.py", "stage 2": "llava_stage2.py"},
            classes={
                "config": "transformers:LlavaNextConfig",
                "model": f"{_LLAVA}.modeling_llava:LlavaNextForConditionalGeneration",
                "captioning": f"{_LLAVA}.modeling_llava:LlavaNextForConditionalGeneration",
                "vqa": f"{_LLAVA}.modeling_llava:LlavaNextForConditionalGeneration",
                "chat": f"{_LLAVA}.modeling_llava:LlavaNextForConditionalGeneration",
                "processor": f"{_LLAVA}.processing_llava:LlavaNextProcessor",
            },
            reference="llava",
        ),
        Architecture(
            model_type="cogvlm",
            title="CogVLM",
            paper="2311.03079",
            native=False,
            objectives=("LM",),
            script={"stages 1, 2, SFT": "cogvlm.py"},
            classes={
                "config": f"{_COGVLM}.configuration_cogvlm:CogVLMConfig",
                "model": f"{_COGVLM}.modeling_cogvlm:CogVLMForConditionalGeneration",
                "captioning": f"{_COGVLM}.modeling_cogvlm:CogVLMForConditionalGeneration",
                "vqa": f"{_COGVLM}.modeling_cogvlm:CogVLMForConditionalGeneration",
                "chat": f"{_COGVLM}.modeling_cogvlm:CogVLMForConditionalGeneration",
                "processor": f"{_COGVLM}.processing_cogvlm:CogVLMProcessor",
            },
            reference="cogvlm",
        ),
        Architecture(
            model_type="instructblip",
            title="InstructBLIP",
            paper="2305.06500",
            native=True,
            objectives=("LM",),
            script={"instruct": "instructblip.py"},
            classes={
                "config": "transformers:InstructBlipConfig",
                "model": f"{_INSTRUCTBLIP}.modeling_instructblip:InstructBlipForConditionalGeneration",
                "captioning": f"{_INSTRUCTBLIP}.modeling_instructblip:InstructBlipForConditionalGeneration",
                "vqa": f"{_INSTRUCTBLIP}.modeling_instructblip:InstructBlipForConditionalGeneration",
                "chat": f"{_INSTRUCTBLIP}.modeling_instructblip:InstructBlipForConditionalGeneration",
                "processor": f"{_INSTRUCTBLIP}.processing_instructblip:InstructBlipProcessor",
            },
            reference="instructblip",
        ),
        Architecture(
            model_type="qwen_vl",
            title="Qwen-VL",
            paper="2308.12966",
            native=False,
            objectives=("LM",),
            script={"pretrain, multitask, sft": "qwen_vl.py"},
            classes={
                "config": f"{_QWEN_VL}.configuration_qwen_vl:QwenVLConfig",
                "model": f"{_QWEN_VL}.modeling_qwen_vl:QwenVLForConditionalGeneration",
                "captioning": f"{_QWEN_VL}.modeling_qwen_vl:QwenVLForConditionalGeneration",
                "vqa": f"{_QWEN_VL}.modeling_qwen_vl:QwenVLForConditionalGeneration",
                "chat": f"{_QWEN_VL}.modeling_qwen_vl:QwenVLForConditionalGeneration",
                "processor": f"{_QWEN_VL}.processing_qwen_vl:QwenVLProcessor",
            },
            reference="qwen_vl",
        ),
    )
}


def saved_settings(model: str | Path, **where: Any) -> dict[str, Any]:
    """The `config.json` of a saved model.

    Args:
        model: folder or Hub id.
        where: where on the Hub (`revision`, `token`, …), as for `from_pretrained`.

    Raises:
        FileNotFoundError: a local folder that is not there, or without a `config.json`; the message names the folder
            below it that has one, as the output folder of a run has.
    """
    folder = Path(model, where.get("subfolder", ""))
    if (folder / "config.json").is_file():
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if folder.is_dir():
        inside = folder / "model"
        hint = f"; the model of this run is in {inside}" if (inside / "config.json").is_file() else ""
        raise FileNotFoundError(f"{folder} has no config.json, so it holds no saved model{hint}")
    if str(model).startswith((".", "/", "~")) or str(model).count("/") > 1:
        raise FileNotFoundError(f"there is no folder {model}")
    from transformers import PreTrainedConfig

    return PreTrainedConfig.get_config_dict(str(model), **where)[0]


def architecture_of(model: str | Path | Any, **where: Any) -> Architecture:
    """The catalogue row of a folder, a Hub id, a config or a model.

    Args:
        model: folder with a `config.json`, Hub id, `PreTrainedConfig`, or a model that has one.
        where: where on the Hub (`revision`, `token`, …), as for `from_pretrained`.

    Raises:
        FileNotFoundError: as of `saved_settings`.
        ValueError: the model type is not in the catalogue; the message lists those that are.
    """
    if isinstance(model, str | Path):
        model_type = saved_settings(model, **where).get("model_type")
    else:
        model_type = getattr(model, "config", model).model_type
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"{model!r} is of type {model_type!r}, which hf_vlp does not train; it has: {sorted(ARCHITECTURES)}"
        )
    return ARCHITECTURES[model_type]


def load_class(model: str | Path | Any, role: str) -> type:
    """Our class for `role` (`"retrieval"`, `"captioning"`, ...) of the given folder, Hub id, config or model."""
    return architecture_of(model).load(role)


def markdown_table() -> str:
    """The table of architectures as it stands in the README (a test compares the two)."""
    lines = [
        "| architecture | `model_type` | loads in plain transformers | objectives | training scripts | paper |",
        "|---|---|---|---|---|---|",
    ]
    for a in ARCHITECTURES.values():
        loads = "as it is" if a.native else "with `trust_remote_code=True`"
        scripts = ", ".join(f"{stage}: [`{file}`](training_scripts/{file})" for stage, file in a.script.items())
        paper = f"[arXiv {a.paper}](https://arxiv.org/abs/{a.paper})"
        lines.append(f"| {a.title} | `{a.model_type}` | {loads} | {', '.join(a.objectives)} | {scripts} | {paper} |")
    return "\n".join(lines)
