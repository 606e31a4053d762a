"""`hf-vlp convert`: original checkpoints to folders for transformers, and back where that exists."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from hf_vlp.cli.errors import UsageError
from hf_vlp.cli.main import parser


@dataclass(frozen=True)
class Format:
    """A format of `convert`.

    Attributes:
        function: `"module:function"`; its first two parameters are the source and the target.
        summary: one line for `--help`.
    """

    function: str
    summary: str

    def load(self) -> Callable[..., Any]:
        """Imports the function."""
        module, name = self.function.split(":")
        return getattr(import_module(module), name)


FORMATS: dict[str, Format] = {
    "openai-clip": Format(
        "hf_vlp.cli.convert:convert_clip", "CLIP of OpenAI or OpenCLIP, ViT, ResNet or EVA (.pt, .bin, .safetensors)"
    ),
    "lavis-blip2": Format(
        "hf_vlp.cli.convert:convert_blip2", "BLIP-2 of LAVIS, stage 1 or stage 2 (.pth, .safetensors)"
    ),
    "albef": Format("hf_vlp.cli.convert_albef:convert_albef", "ALBEF of its authors, any task (.pth, .safetensors)"),
    "to-albef": Format(
        "hf_vlp.cli.convert_albef:export_albef", "the other way, with twin and queue where there are some"
    ),
    "blip": Format("hf_vlp.cli.convert_blip:convert_blip", "BLIP of its authors, any task (.pth, .safetensors)"),
    "to-blip": Format(
        "hf_vlp.cli.convert_blip:export_blip", "the other way, with twin and queues where there are some"
    ),
    "llava": Format(
        "hf_vlp.cli.convert_llava:convert_llava", "LLaVA 1, 1.5 or NeXT of its authors, a folder (.bin, .safetensors)"
    ),
    "to-llava": Format("hf_vlp.cli.convert_llava:export_llava", "the other way"),
    "lavis-instructblip": Format(
        "hf_vlp.cli.convert:convert_instructblip", "InstructBLIP of LAVIS, Vicuna or T5 (.pth, .safetensors)"
    ),
    "qwen-vl": Format("hf_vlp.cli.convert:convert_qwen_vl", "Qwen-VL or Qwen-VL-Chat as published (a folder)"),
    "to-openai-clip": Format(
        "hf_vlp.cli.convert:export_clip", "the other way: a folder of ours to a file under the original names"
    ),
    "to-lavis-blip2": Format("hf_vlp.cli.convert:export_blip2", "the other way, either stage"),
    "to-lavis-instructblip": Format("hf_vlp.cli.convert:export_instructblip", "the other way"),
    "to-qwen-vl": Format("hf_vlp.cli.convert:export_qwen_vl", "the other way: one file under the published names"),
    "cogvlm": Format("hf_vlp.cli.convert_cogvlm:convert_cogvlm", "CogVLM or CogVLM2 with its own code (a folder)"),
    "to-cogvlm": Format("hf_vlp.cli.convert_cogvlm:export_cogvlm", "the other way: weights and config of that code"),
}

_EXAMPLES = """\
  hf-vlp convert openai-clip RN50.pt outputs/clip-rn50 --vocabulary bpe_simple_vocab_16e6.txt.gz --allow_torchscript
  hf-vlp convert openai-clip open_clip_pytorch_model.bin outputs/clip-b32 --hidden_act gelu
  hf-vlp convert lavis-blip2 blip2_pretrained.pth outputs/stage1 --vision eva_vit_g.pth --tokenizer bert-base-uncased
  hf-vlp convert lavis-blip2 blip2_pretrained_opt2.7b.pth outputs/blip2 --language_model facebook/opt-2.7b \\
      --vision eva_vit_g.pth
  hf-vlp convert albef ALBEF.pth outputs/albef --tokenizer bert-base-uncased
  hf-vlp convert blip model_base_capfilt_large.pth outputs/blip --tokenizer bert-base-uncased
  hf-vlp convert llava llava-v1.5-7b outputs/llava --vision openai/clip-vit-large-patch14-336
  hf-vlp convert lavis-instructblip instruct_blip_vicuna7b_trimmed.pth outputs/instructblip --vision eva_vit_g.pth \\
      --language_model lmsys/vicuna-7b-v1.1 --tokenizer bert-base-uncased
  hf-vlp convert qwen-vl path/to/Qwen-VL-Chat outputs/qwen-vl
  hf-vlp convert to-openai-clip outputs/clip-rn50 clip.safetensors
  hf-vlp convert openai-clip --help     # with the options of that format

Checkpoints are read without running code from them."""


def main(argv: list[str]) -> int:
    name = argv[0] if argv and not argv[0].startswith("-") else None
    if name is not None and name not in FORMATS:
        raise UsageError(f"there is no format {name!r}; there are: {', '.join(FORMATS)}")
    lines = "\n".join(f"  {key:<18} {entry.summary}" for key, entry in FORMATS.items())
    command = parser("convert", f"Converts a checkpoint.\n\nformats:\n{lines}", _EXAMPLES)
    command.add_argument("format", choices=FORMATS, metavar="FORMAT", help="see above")
    command.add_argument("source", metavar="SOURCE", help="file or folder to read")
    command.add_argument("target", metavar="TARGET", help="folder or file to write")
    if name is not None:
        group = command.add_argument_group(f"options of {name}")
        for option, parameter in list(inspect.signature(FORMATS[name].load()).parameters.items())[2:]:
            kind = _KINDS.get(option, str)
            if kind is bool:
                group.add_argument(f"--{option}", action="store_true", help=_HELP.get(option))
            else:
                group.add_argument(
                    f"--{option}", type=kind, default=parameter.default, help=_HELP.get(option), metavar=kind.__name__
                )
    options = vars(command.parse_args(argv))
    source, target = Path(options.pop("source")), Path(options.pop("target"))
    if not source.exists():
        raise FileNotFoundError(f"there is no file or folder {source}")
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists; name a place where nothing is, so that nothing is lost")
    convert = FORMATS[options.pop("format")].load()
    convert(source, target, **options)
    print(target)
    return 0


_KINDS = {"allow_torchscript": bool, "vision_heads": int, "text_heads": int, "num_query_tokens": int}
_HELP = {
    "allow_torchscript": "also read OpenAI's scripted archives, which torch has to unpack",
    "vision_heads": "attention heads of the image tower, where they are not width / 64",
    "text_heads": "attention heads of the text tower, where they are not width / 64",
    "hidden_act": "activation: quick_gelu (OpenAI) or gelu (most of OpenCLIP)",
    "vocabulary": "CLIP's vocabulary file bpe_simple_vocab_16e6.txt.gz; without it no processor is written",
    "tokenizer": "folder or Hub id of a tokenizer; without one no processor is written",
    "vision": "file (LLaVA: folder or Hub id) of the image tower, where the checkpoint lacks it",
    "base": "folder of the language model that a projector alone belongs to",
    "language_model": "folder or Hub id of the language model, where the checkpoint lacks it",
}


def convert_clip(
    source: Path,
    target: Path,
    vocabulary: str | None = None,
    tokenizer: str | None = None,
    hidden_act: str | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    allow_torchscript: bool = False,
) -> None:
    """A CLIP checkpoint of OpenAI or OpenCLIP to a folder with card and, given a tokenizer, processor."""
    from hf_vlp.hub.saving import save_for_hub
    from hf_vlp.models.clip.conversion_clip import model_from_original, read_original
    from hf_vlp.models.clip.processing_clip import CLIPProcessor
    from hf_vlp.models.clip.tokenization_clip import clip_tokenizer_from_bpe_file

    settings = {"hidden_act": hidden_act, "vision_heads": vision_heads, "text_heads": text_heads}
    settings = {name: value for name, value in settings.items() if value is not None}
    model = model_from_original(read_original(source, allow_torchscript=allow_torchscript), **settings)
    words = None
    if vocabulary is not None:
        words = clip_tokenizer_from_bpe_file(vocabulary, model.config.text_config.max_position_embeddings)
    elif tokenizer is not None:
        from transformers import AutoTokenizer

        words = AutoTokenizer.from_pretrained(tokenizer)
    size = model.config.vision_config.image_size
    save_for_hub(model, None if words is None else CLIPProcessor.for_image_size(words, size), target)


def export_clip(source: Path, target: Path) -> None:
    """A folder of ours to one file under the names of the original code."""
    from hf_vlp.models.catalog import load_class
    from hf_vlp.models.clip.conversion_clip import save_original

    save_original(load_class(source, "model").from_pretrained(source), target)


def convert_blip2(
    source: Path,
    target: Path,
    vision: str | None = None,
    language_model: str | None = None,
    tokenizer: str | None = None,
    vision_heads: int | None = None,
) -> None:
    """A BLIP-2 checkpoint of LAVIS, of either stage, to a folder with card and, given a tokenizer, processor."""
    from transformers import AutoTokenizer

    from hf_vlp.hub.saving import save_for_hub
    from hf_vlp.models.blip2.conversion_blip_2 import model_from_original, read_original
    from hf_vlp.models.blip2.language_blip_2 import load_language_model, prepare_language_model
    from hf_vlp.models.blip2.processing_blip_2 import Blip2Processor, default_image_processor
    from hf_vlp.models.pretraining import PreTrainingMixin

    state = read_original(source)
    settings: dict[str, Any] = {} if vision_heads is None else {"vision_heads": vision_heads}
    words = AutoTokenizer.from_pretrained(tokenizer or language_model) if tokenizer or language_model else None
    processor = None
    if language_model is not None:
        processor = Blip2Processor.for_language_model(words, state["query_tokens"].shape[1])
        settings["language_model"] = load_language_model(language_model, dtype="float32")
        prepare_language_model(settings["language_model"], processor)
        settings["image_token_id"] = processor.image_token_id
    elif words is not None:
        processor = Blip2Processor.for_retrieval(words)
    model = model_from_original(state, vision=None if vision is None else read_original(vision), **settings)
    if processor is not None:
        processor.image_processor = default_image_processor(model.config.vision_config.image_size)
    save_for_hub(model, processor, target)
    if isinstance(model, PreTrainingMixin):
        model.save_extras(target)


def export_blip2(source: Path, target: Path) -> None:
    """A folder of ours, of either stage, to one file under the names of LAVIS."""
    from transformers import AutoConfig

    from hf_vlp.models.blip2.conversion_blip_2 import save_original
    from hf_vlp.models.catalog import architecture_of

    names = AutoConfig.from_pretrained(source).architectures or [""]
    role = "pretraining" if "Retrieval" in names[0] else "captioning"
    save_original(architecture_of(source).load(role).from_pretrained(source), target)


def convert_instructblip(
    source: Path,
    target: Path,
    language_model: str = "",
    tokenizer: str = "",
    vision: str | None = None,
    vision_heads: int | None = None,
) -> None:
    """An InstructBLIP checkpoint of LAVIS to a folder with card and processor."""
    from transformers import AutoTokenizer

    from hf_vlp.hub.saving import save_for_hub
    from hf_vlp.models.blip2.conversion_blip_2 import read_original
    from hf_vlp.models.blip2.language_blip_2 import load_language_model, prepare_language_model
    from hf_vlp.models.blip2.processing_blip_2 import default_image_processor
    from hf_vlp.models.instructblip.conversion_instructblip import model_from_original
    from hf_vlp.models.instructblip.processing_instructblip import InstructBlipProcessor

    if not language_model or not tokenizer:
        raise UsageError(
            "lavis-instructblip needs --language_model (LAVIS leaves the frozen one out of its files) and --tokenizer "
            "(the Q-Former's, bert-base-uncased)"
        )
    state = read_original(source)
    processor = InstructBlipProcessor.for_language_model(
        AutoTokenizer.from_pretrained(language_model),
        AutoTokenizer.from_pretrained(tokenizer),
        state["query_tokens"].shape[1],
    )
    language = load_language_model(language_model, dtype="float32")
    prepare_language_model(language, processor)
    model = model_from_original(
        state,
        vision=None if vision is None else read_original(vision),
        language_model=language,
        image_token_id=processor.image_token_id,
        vision_heads=vision_heads,
    )
    processor.image_processor = default_image_processor(model.config.vision_config.image_size)
    save_for_hub(model, processor, target)


def export_instructblip(source: Path, target: Path) -> None:
    """A folder of ours to one file under the names of LAVIS."""
    from hf_vlp.models.instructblip.conversion_instructblip import save_original
    from hf_vlp.models.instructblip.modeling_instructblip import InstructBlipForConditionalGeneration

    save_original(InstructBlipForConditionalGeneration.from_pretrained(source), target)


def convert_qwen_vl(source: Path, target: Path) -> None:
    """A published folder of Qwen-VL to a folder of ours, with its code, card and processor."""
    from hf_vlp.hub.card import write_card
    from hf_vlp.hub.saving import complete_folder
    from hf_vlp.models.qwen_vl.conversion_qwen_vl import convert_checkpoint

    convert_checkpoint(source, target)
    complete_folder(target)
    write_card(target)


def export_qwen_vl(source: Path, target: Path) -> None:
    """A folder of ours to one file under the published names."""
    from hf_vlp.models.qwen_vl.conversion_qwen_vl import save_original
    from hf_vlp.models.qwen_vl.modeling_qwen_vl import QwenVLForConditionalGeneration

    save_original(QwenVLForConditionalGeneration.from_pretrained(source), target)
