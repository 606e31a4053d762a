"""`hf-vlp new`: a vision tower, a new connector and a language model, in the matching architecture's format."""

from pathlib import Path
from typing import Any

from hf_vlp.cli.errors import UsageError
from hf_vlp.cli.main import parser

# Connector -> (model types of the catalogue, what its first training script is).
CONNECTORS: dict[str, tuple[tuple[str, ...], str]] = {
    "linear": (("llava", "llava_next"), "llava_stage1 --model_name_or_path {out}"),
    "mlp": (("llava", "llava_next"), "llava_stage1 --model_name_or_path {out}"),
    "qformer": (("blip-2", "blip2_any_vision"), "blip2_stage1 --model_name_or_path {out}"),
    "resampler": (("qwen_vl",), "qwen_vl --model_name_or_path {out}"),
    "visual-expert": (("cogvlm",), "cogvlm --model_name_or_path {out}"),
}

# Option -> connectors that heed it.
_HEEDED = {
    "tiles": ("linear", "mlp"),
    "max_tiles": ("linear", "mlp"),
    "aspect": ("linear", "mlp"),
    "vision_feature_layer": ("linear", "mlp"),
    "vision_features": ("linear", "mlp"),
    "num_query_tokens": ("qformer", "resampler"),
    "qformer": ("qformer",),
}

_EXAMPLES = """\
  hf-vlp new --vision openai/clip-vit-large-patch14-336 --connector mlp --language lmsys/vicuna-7b-v1.5 --out my-llava
  hf-vlp new --vision google/siglip-base-patch16-224 --connector mlp --tiles --language Qwen/Qwen2-0.5B --out my-next
  hf-vlp new --vision outputs/clip/model --connector qformer --language outputs/lm/model --out my-blip2
  hf-vlp new --vision openai/clip-vit-base-patch32 --connector resampler --language Qwen/Qwen2-0.5B --out my-qwen-vl
  hf-vlp new --vision THUDM/cogvlm-chat-hf --connector visual-expert --language lmsys/vicuna-7b-v1.5 --out my-cogvlm

linear, mlp    LLaVA 1, LLaVA 1.5 (with --tiles LLaVA-NeXT)
qformer        BLIP-2; its stage 1 takes tower and Q-Former from the folder, its stage 2 is given the language model
resampler      Qwen-VL
visual-expert  CogVLM

The connector's weights are new (--seed), those of tower and language model are kept. The folder is the start of the
architecture's first training stage, whose command is printed."""


def main(argv: list[str]) -> int:
    command = parser("new", "Puts a vision tower and a language model together with a new connector.", _EXAMPLES)
    command.add_argument("--vision", required=True, metavar="MODEL", help="folder or Hub id of the vision tower")
    command.add_argument("--connector", required=True, choices=CONNECTORS, help="what joins them, see below")
    command.add_argument("--language", required=True, metavar="MODEL", help="folder or Hub id of the language model")
    command.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")
    command.add_argument("--tiles", action="store_true", help="linear, mlp: cut pictures into tiles")
    command.add_argument("--max_tiles", type=int, help="with --tiles: most tiles of a picture (4)")
    command.add_argument(
        "--aspect", choices=("pad", "crop"), help="linear, mlp without --tiles: how pictures fit (pad)"
    )
    command.add_argument(
        "--vision_feature_layer", type=int, help="linear, mlp: hidden state of the tower that is shown (-2)"
    )
    command.add_argument(
        "--vision_features", choices=("patch", "cls_patch"), help="cls_patch: the class token's feature too (patch)"
    )
    command.add_argument("--num_query_tokens", type=int, help="qformer (32), resampler (256): tokens of a picture")
    command.add_argument("--qformer", help="qformer: a size (nano … large), or a BERT to start from (base)")
    command.add_argument("--seed", type=int, default=0, help="of the new weights")
    options = command.parse_args(argv)
    _check(options)
    out = Path(options.out)
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists; name a place where nothing is, so that nothing is lost")
    model_types, script = CONNECTORS[options.connector]
    from hf_vlp.models.catalog import ARCHITECTURES

    if not any(model_type in ARCHITECTURES for model_type in model_types):
        there = [name for name, (types, _) in CONNECTORS.items() if any(t in ARCHITECTURES for t in types)]
        raise UsageError(
            f"the connector {options.connector!r} belongs to {model_types[0]}, which this version does not have; "
            f"there are: {', '.join(there)}"
        )
    from transformers import set_seed

    from hf_vlp.hub import save_for_hub
    from hf_vlp.training.presets import SIZES

    set_seed(options.seed)
    build = {"qformer": new_qformer, "resampler": new_resampler, "visual-expert": new_visual_expert}
    model, processor = build.get(options.connector, new_projector)(options)
    save_for_hub(model.eval(), processor, out)
    print(out)
    # The weights of a BERT that only texts pass through are not in the folder.
    texts = f" --qformer {options.qformer}" if options.qformer not in (None, *SIZES) else ""
    print(f"next: hf-vlp train {script.format(out=out)}{texts} --train_data … --output_dir …")
    return 0


def _check(options: Any) -> None:
    """Refuses options that would have no effect.

    Raises:
        UsageError: the message names the option and what it is for.
    """
    for name, connectors in _HEEDED.items():
        if getattr(options, name) not in (None, False) and options.connector not in connectors:
            raise UsageError(f"--{name} is for --connector {' and '.join(connectors)}, not {options.connector}")
    if options.tiles and options.aspect:
        raise UsageError("--aspect: pictures cut into tiles keep their proportions; leave out it or --tiles")
    if options.max_tiles is not None and not options.tiles:
        raise UsageError("--max_tiles: pictures are cut into tiles with --tiles only")


def new_projector(options: Any) -> tuple[Any, Any]:
    """LLaVA or LLaVA-NeXT."""
    from transformers import AutoImageProcessor, AutoTokenizer

    from hf_vlp.models.catalog import ARCHITECTURES
    from hf_vlp.models.llava.anyres_llava import MAX_TILES
    from hf_vlp.models.llava.initialization_llava import load_vision_tower, new_processor

    tower = load_vision_tower(options.vision, dtype="float32")
    if options.tiles:
        settings = {"max_tiles": MAX_TILES if options.max_tiles is None else options.max_tiles}
    else:
        settings = {"aspect": options.aspect or "pad"}
    processor = new_processor(
        AutoTokenizer.from_pretrained(options.language),
        tower,
        tiles=options.tiles,
        image_processor=AutoImageProcessor.from_pretrained(options.vision),
        features=options.vision_features or "patch",
        **settings,
    )
    layer = -2 if options.vision_feature_layer is None else options.vision_feature_layer
    kind = ARCHITECTURES["llava_next" if options.tiles else "llava"].load("model")
    model = kind.from_vision_language_pretrained(
        tower,
        options.language,
        processor,
        connector=options.connector,
        vision_feature_layer=layer,
        dtype="float32",
    )
    return model, processor


def new_qformer(options: Any) -> tuple[Any, Any]:
    """BLIP-2 before stage 1: its Q-Former has seen nothing."""
    from transformers import AutoImageProcessor, AutoTokenizer

    from hf_vlp.models.blip2.modeling_blip_2 import Blip2ForConditionalGeneration
    from hf_vlp.models.blip2.processing_blip_2 import Blip2Processor
    from hf_vlp.training.presets import SIZES, qformer_config

    queries, qformer = options.num_query_tokens or 32, options.qformer or "base"
    processor = Blip2Processor.for_language_model(
        AutoTokenizer.from_pretrained(options.language),
        queries,
        image_processor=AutoImageProcessor.from_pretrained(options.vision),
    )
    model = Blip2ForConditionalGeneration.from_vision_qformer_language_pretrained(
        options.vision,
        qformer_config(qformer) if qformer in SIZES else qformer,
        options.language,
        processor,
        num_query_tokens=queries,
        dtype="float32",
    )
    return model, processor


def new_resampler(options: Any) -> tuple[Any, Any]:
    """Qwen-VL."""
    from transformers import AutoTokenizer

    from hf_vlp.models.llava.initialization_llava import load_vision_tower
    from hf_vlp.models.qwen_vl.initialization_qwen_vl import from_vision_language_pretrained

    return from_vision_language_pretrained(
        load_vision_tower(options.vision, dtype="float32"),
        options.language,
        AutoTokenizer.from_pretrained(options.language),
        num_query_tokens=options.num_query_tokens or 256,
        dtype="float32",
    )


def new_visual_expert(options: Any) -> tuple[Any, Any]:
    """CogVLM, whose tower and adapter come from another CogVLM."""
    from transformers import AutoTokenizer

    from hf_vlp.models.catalog import architecture_of
    from hf_vlp.models.cogvlm.modeling_cogvlm import CogVLMForConditionalGeneration
    from hf_vlp.models.cogvlm.processing_cogvlm import CogVLMProcessor
    from hf_vlp.models.loading import load_backbone

    try:
        found = architecture_of(options.vision).model_type
    except ValueError:
        found = None
    if found != "cogvlm":
        raise UsageError(
            f"--connector visual-expert takes the tower of a CogVLM folder, which {options.vision} is not; for a "
            "tower from scratch use `hf-vlp train cogvlm --language_model … --vision_hidden_size …`"
        )
    seen: Any = load_backbone(CogVLMForConditionalGeneration, options.vision, part="vision_model", dtype="float32")
    model = CogVLMForConditionalGeneration.from_language_pretrained(
        options.language,
        vision_config=seen.config.vision_config,
        downsample=seen.config.downsample,
        dtype="float32",
    )
    model.vision_model.load_state_dict(seen.vision_model.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(options.language)
    processor = CogVLMProcessor.for_model(tokenizer, model.config, answer_space=None)
    model.config.image_token_id = processor.image_token_id
    return model, processor
