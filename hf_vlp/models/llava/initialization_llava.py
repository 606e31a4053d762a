"""A new LLaVA from a vision tower and a language model of transformers, with the connector's weights drawn anew."""

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init

from hf_vlp.models.generation_settings import drop_idle_settings
from hf_vlp.models.llava.anyres_llava import check_grids
from hf_vlp.models.llava.processing_llava import (
    LlavaNextProcessor,
    LlavaProcessor,
    LlavaProcessorMixin,
    square_size,
)
from hf_vlp.models.loading import MissingWeightsError, load_backbone

Connector = Literal["linear", "mlp"]
Features = Literal["patch", "cls_patch"]
# Largest relative difference between the text-only logits of the language model alone and inside LLaVA.
SAME_LOGITS = 1e-4


def load_vision_tower(vision: str | PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
    """The vision model of a folder or Hub id: of a dual encoder its image side, else the model itself.

    Raises:
        MissingWeightsError: the checkpoint lacks weights of the tower.
        ValueError: transformers has no vision model for it, or its output is no sequence of patches.
    """
    if isinstance(vision, PreTrainedModel):
        tower = getattr(vision, "vision_model", vision)
        if type(tower) is not type(AutoModel.from_config(_small(tower.config))):
            raise ValueError(
                f"{type(tower).__name__} is not a vision model that AutoModel makes from its config; give the folder "
                "of a CLIP, SigLIP, DINOv2 or ViT"
            )
        return tower
    config = AutoConfig.from_pretrained(vision)
    config = getattr(config, "vision_config", config)
    if not hasattr(config, "patch_size") or not hasattr(config, "image_size"):
        raise ValueError(
            f"{vision} is of type {config.model_type!r}, which has no patches that LLaVA could take for tokens; give "
            "a vision transformer (CLIP, SigLIP, DINOv2, ViT)"
        )
    try:
        # Hidden states are read, behind which a ViT's pooler stands.
        return load_backbone(AutoModel, vision, optional=("pooler.",), config=config, **kwargs)
    except MissingWeightsError:
        raise
    except ValueError as error:
        raise ValueError(
            f"transformers has no vision model of type {config.model_type!r}, so {vision} cannot be a tower of the "
            "native LLaVA format; give a CLIP, SigLIP, DINOv2 or ViT"
        ) from error


def _small(config: PreTrainedConfig) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    config.num_hidden_layers = 1
    return config


def feature_layout(tower: PreTrainedModel, layer: int | list[int] = -2) -> tuple[int, int]:
    """How many tokens beside the patches a tower gives, and how wide a token is.

    Raises:
        ValueError: its hidden states are no sequences of tokens.
    """
    size, patch = square_size(tower.config), tower.config.patch_size
    tower_mode = tower.training
    tower.eval()
    with torch.no_grad():
        pixels = torch.zeros(1, getattr(tower.config, "num_channels", 3), size, size, dtype=tower.dtype)
        states = tower(pixels.to(tower.device), output_hidden_states=True, return_dict=True).hidden_states
    tower.train(tower_mode)
    one = layer if isinstance(layer, int) else layer[0]
    if not -len(states) <= one < len(states):
        raise ValueError(f"vision_feature_layer {one} is not among the {len(states)} hidden states of the tower")
    state = states[one]
    extra = state.shape[1] - (size // patch) ** 2 if state.dim() == 3 else -1
    if extra < 0:
        raise ValueError(
            f"{type(tower).__name__} gives hidden states of shape {tuple(state.shape)}, not one token a patch of "
            f"{patch} pixels; LLaVA needs a vision transformer"
        )
    return extra, state.shape[-1]


def new_processor(
    tokenizer: Any,
    tower: PreTrainedModel,
    *,
    tiles: bool,
    image_processor: Any = None,
    features: Features = "patch",
    **options: Any,
) -> LlavaProcessor | LlavaNextProcessor:
    """The processor of a tower and a language model's tokenizer.

    Args:
        tiles: for LLaVA-NeXT.
        features: "patch", the features of the patches, or "cls_patch", the class token's in front of them.
        options: of `for_language_model`.

    Raises:
        ValueError: the class token's feature is asked for, but the tower has none, or more beside it, or pictures are
            cut into tiles, whose features stand in a grid.
    """
    if features not in ("patch", "cls_patch"):
        raise ValueError(f"features may be 'patch' or 'cls_patch', not {features!r}")
    extra, _ = feature_layout(tower)
    if features == "cls_patch" and (tiles or extra != 1):
        found = f"{type(tower).__name__} has {extra} tokens beside the patches, not a class token alone"
        why = "features of tiles stand in a grid" if tiles else found
        raise ValueError(f"features 'cls_patch': {why}; use 'patch'")
    return (LlavaNextProcessor if tiles else LlavaProcessor).for_language_model(
        tokenizer,
        tower.config,
        image_processor=image_processor,
        num_additional_image_tokens=extra,
        vision_feature_select_strategy="default" if extra and features == "patch" else "full",
        **options,
    )


def model_from_parts(
    cls: type[PreTrainedModel],
    vision: str | PreTrainedModel,
    language_model: str | PreTrainedModel,
    processor: LlavaProcessorMixin | None = None,
    *,
    connector: Connector = "mlp",
    vision_feature_layer: int | list[int] = -2,
    vision_options: dict[str, Any] | None = None,
    **language_model_options: Any,
) -> PreTrainedModel:
    """A LLaVA of class `cls` with a tower's and a language model's weights and a new connector.

    Text alone is read exactly as by the language model: this is checked, since the native format keeps the language
    model's body and one output matrix, and some (those that scale or cap their logits) do more.

    Args:
        vision: folder or Hub id of a vision transformer or of a dual encoder, or the model.
        language_model: folder or Hub id of a causal language model, or the model, whose modules are then shared.
        processor: tells the image token, and for NeXT the grids. By default made from the tokenizer and image
            processor of the two folders.
        connector: "mlp", two layers with GELU (v1.5, NeXT), or "linear", one (v1).
        vision_feature_layer: which hidden state of the tower is used.
        vision_options, language_model_options: for the two `from_pretrained` (`dtype`, ...).

    Raises:
        ValueError: parts that the native format cannot hold; the message says which and why.
    """
    if connector not in ("linear", "mlp"):
        raise ValueError(f"connector may be 'linear' or 'mlp', not {connector!r}")
    tower = load_vision_tower(vision, **(vision_options or {}))
    tiles = cls.config_class.model_type == "llava_next"
    if processor is None:
        if not (isinstance(vision, str) and isinstance(language_model, str)):
            raise ValueError("give `processor` (LlavaProcessor.for_language_model): it tells the image token")
        processor = new_processor(
            AutoTokenizer.from_pretrained(language_model),
            tower,
            tiles=tiles,
            image_processor=AutoImageProcessor.from_pretrained(vision),
        )
    if isinstance(language_model, str):
        language_model = load_backbone(AutoModelForCausalLM, language_model, **language_model_options)
    head = _plain_head(language_model)
    probe = torch.arange(min(8, head.out_features))[None].to(language_model.device)
    before = _logits(language_model, probe)
    words = head.out_features

    extra, width = feature_layout(tower, vision_feature_layer)
    if tiles and extra > 1:
        raise ValueError(
            f"{type(tower).__name__} has {extra} tokens beside the patches, which `llava_next` cannot tell from them; "
            "use LLaVA 1.5, or a tower with at most a class token"
        )
    if width != tower.config.hidden_size:
        raise ValueError(
            f"hidden states of {type(tower).__name__} are {width} wide, its config says {tower.config.hidden_size}"
        )
    image_token = processor.image_token_id
    added = image_token >= language_model.get_input_embeddings().weight.shape[0]
    if added:
        _add_rows(language_model, image_token + 1)
        head = language_model.get_output_embeddings()
    settings: dict[str, Any] = {}
    if tiles:
        settings["image_grid_pinpoints"] = [list(p) for p in processor.image_processor.image_grid_pinpoints]
        check_grids(settings["image_grid_pinpoints"], square_size(tower.config))
    body = language_model.base_model
    text_config = language_model.config.get_text_config()
    if text_config.tie_word_embeddings and not hasattr(body, "embed_tokens"):
        # The native format ties the head to `embed_tokens`; where the embeddings are called otherwise (OPT, GPT-2) a
        # tied folder cannot be opened, so the head becomes a matrix of its own, with the same numbers.
        head = _untied(head)
        text_config = copy.deepcopy(text_config)
        text_config.tie_word_embeddings = False
        body.config.tie_word_embeddings = False
    strategy = processor.vision_feature_select_strategy
    config = cls.config_class(
        vision_config=tower.config.to_dict(),
        text_config=text_config.to_dict(),
        image_token_index=image_token,
        image_seq_length=(square_size(tower.config) // tower.config.patch_size) ** 2 + extra - (strategy == "default"),
        projector_hidden_act="linear" if connector == "linear" else "gelu",
        vision_feature_select_strategy=strategy,
        vision_feature_layer=vision_feature_layer,
        tie_word_embeddings=bool(text_config.tie_word_embeddings),
        **settings,
    )
    with torch.device("meta"), init.no_init_weights():
        model = cls(config)
    if type(model.model.language_model) is not type(body):
        raise ValueError(
            f"AutoModel makes a {type(model.model.language_model).__name__} of the config of "
            f"{type(language_model).__name__}, whose body is a {type(body).__name__}; the native format cannot hold it"
        )
    dtype = language_model.get_input_embeddings().weight.dtype
    model.model.vision_tower = tower
    model.model.language_model = body
    model.lm_head = head
    fresh = type(model.model.multi_modal_projector)(config)
    initialise_connector(fresh, linear=connector == "linear")
    model.model.multi_modal_projector = fresh.to(dtype)
    if tiles:
        newline = torch.randn(text_config.hidden_size) / text_config.hidden_size**0.5
        model.model.image_newline = nn.Parameter(newline.to(dtype))
    model.generation_config = copy.deepcopy(language_model.generation_config)
    drop_idle_settings(model.generation_config)
    if added:
        suppressed = model.generation_config.suppress_tokens or []
        model.generation_config.suppress_tokens = sorted({*suppressed, *range(words, image_token + 1)})
    model.train(language_model.training)

    with torch.no_grad():
        was_training = model.training
        after = model.eval()(input_ids=probe).logits[..., :words]
        model.train(was_training)
    if (after - before).abs().max() > SAME_LOGITS * before.abs().max():
        raise ValueError(
            f"{type(language_model).__name__} does more to its output than one matrix (it scales or caps the logits, "
            "or has a layer in front), which the native LLaVA format cannot hold: its answers would change. Use a "
            "language model with a plain output layer (Llama, Mistral, Qwen, Phi-3, OPT, …)"
        )
    return model


def initialise_connector(projector: nn.Module, *, linear: bool) -> None:
    """Draws the connector's weights as the original does (PyTorch's default for a linear layer).

    Args:
        linear: v1's single layer; the second layer of the native format becomes the identity.
    """
    projector.linear_1.reset_parameters()
    projector.linear_2.reset_parameters()
    if linear:
        with torch.no_grad():
            projector.linear_2.weight.copy_(torch.eye(projector.linear_2.out_features))
            if projector.linear_2.bias is not None:
                projector.linear_2.bias.zero_()


def _plain_head(language_model: PreTrainedModel) -> nn.Linear:
    head = language_model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(
            f"the output layer of {type(language_model).__name__} is {head}; the native LLaVA format holds one matrix "
            "without bias"
        )
    return head


def _untied(head: nn.Linear) -> nn.Linear:
    own = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
    own.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    return own


def _logits(language_model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    was_training = language_model.training
    language_model.eval()
    with torch.no_grad():
        logits = language_model(input_ids=input_ids).logits
    language_model.train(was_training)
    return logits


def _add_rows(language_model: PreTrainedModel, rows: int) -> None:
    """Makes room for tokens up to `rows` in both embeddings: their mean, nothing drawn at random."""
    old = language_model.get_input_embeddings().weight.shape[0]
    means = [
        layer.weight.detach().float().mean(dim=0)
        for layer in (language_model.get_input_embeddings(), language_model.get_output_embeddings())
    ]
    state = torch.random.get_rng_state()
    language_model.resize_token_embeddings(rows, mean_resizing=False)
    torch.random.set_rng_state(state)
    with torch.no_grad():
        for layer, mean in zip(
            (language_model.get_input_embeddings(), language_model.get_output_embeddings()), means, strict=True
        ):
            layer.weight[old:] = mean.to(layer.weight.dtype)


__all__ = ["feature_layout", "initialise_connector", "load_vision_tower", "model_from_parts", "new_processor"]
