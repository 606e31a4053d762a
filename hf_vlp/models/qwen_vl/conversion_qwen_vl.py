"""Original Qwen-VL checkpoints to ours and back: the visual part, the language model, the tokenizer.

The original names are those of the remote code of Qwen/Qwen-VL and Qwen/Qwen-VL-Chat. The language model (Qwen-7B)
has the architecture of transformers' Qwen2, whose names it gets.
"""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config

from .configuration_qwen_vl import QwenVLConfig, QwenVLVisionConfig
from .modeling_qwen_vl import QwenVLForConditionalGeneration
from .processing_qwen_vl import QwenVLProcessor

VISUAL = "transformer.visual."
# (original, ours), without the prefix of the visual part.
_VISUAL = (
    ("conv1.", "vision_model.patch_embedding."),
    ("positional_embedding", "vision_model.position_embedding"),
    ("ln_pre.", "vision_model.pre_layernorm."),
    ("attn_pool.query", "resampler.query"),
    ("attn_pool.pos_embed", "resampler.position_table"),
    ("attn_pool.kv_proj.", "resampler.kv_proj."),
    ("attn_pool.ln_q.", "resampler.ln_q."),
    ("attn_pool.ln_kv.", "resampler.ln_kv."),
    ("attn_pool.attn.out_proj.", "resampler.out_proj."),
    ("ln_post.", "resampler.post_layernorm."),
)
_BLOCK = (
    ("ln_1.", "layer_norm1."),
    ("ln_2.", "layer_norm2."),
    ("attn.out_proj.", "self_attn.out_proj."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
)
_OF_LANGUAGE = ("transformer.wte.", "transformer.h.", "transformer.ln_f.", "transformer.rotary_emb.", "lm_head.")
_LANGUAGE = (
    ("transformer.wte.", "language_model.model.embed_tokens."),
    ("transformer.ln_f.", "language_model.model.norm."),
    ("lm_head.", "language_model.lm_head."),
)
# In the feed-forward of Qwen the gate is w2.
_LANGUAGE_BLOCK = (
    ("ln_1.", "input_layernorm."),
    ("ln_2.", "post_attention_layernorm."),
    ("attn.c_proj.", "self_attn.o_proj."),
    ("mlp.w1.", "mlp.up_proj."),
    ("mlp.w2.", "mlp.gate_proj."),
    ("mlp.c_proj.", "mlp.down_proj."),
)
_QKV = ("q_proj", "k_proj", "v_proj")


def _swap(name: str, table: Sequence[tuple[str, str]], *, back: bool = False) -> str | None:
    for pair in table:
        old, new = reversed(pair) if back else pair
        if name == old or (old.endswith(".") and name.startswith(old)):
            return new + name[len(old) :]
    return None


def from_original(state: Mapping[str, Tensor], vision_heads: int) -> dict[str, Tensor]:
    """Original names to ours, also for gradients and for the visual part alone (names with or without its prefix).

    Args:
        state: original state dict, whole or part.
        vision_heads: heads of the tower, whose queries, keys and values the original keeps head by head.

    Raises:
        ValueError: tensors without a counterpart; the message names them.
    """
    ours: dict[str, Tensor] = {}
    left = []
    for name, value in state.items():
        if name.startswith(_OF_LANGUAGE):
            converted = _language_from_original(name, value)
        else:
            converted = _visual_from_original(name.removeprefix(VISUAL), value, vision_heads)
        if converted is None:
            left.append(name)
        else:
            ours |= converted
    if left:
        raise ValueError(f"tensors of the original without a counterpart in Qwen-VL: {left[:8]}")
    return ours


def _visual_from_original(name: str, value: Tensor, heads: int) -> dict[str, Tensor] | None:
    if name == "proj":
        return {"resampler.projection.weight": value.T.contiguous()}
    if name.startswith("attn_pool.attn.in_proj_"):
        kind = name.removeprefix("attn_pool.attn.in_proj_")
        parts = zip(_QKV, value.chunk(3), strict=True)
        return {f"resampler.{part}.{kind}": piece.contiguous() for part, piece in parts}
    block = re.match(r"transformer\.resblocks\.(\d+)\.(.+)", name)
    if block is None:
        renamed = _swap(name, _VISUAL)
        return None if renamed is None else {renamed: value}
    prefix, rest = f"vision_model.layers.{block[1]}.", block[2]
    if rest.startswith("attn.in_proj."):
        kind = rest.removeprefix("attn.in_proj.")
        by_head = value.unflatten(0, (heads, 3, -1))
        return {
            f"{prefix}self_attn.{part}.{kind}": by_head[:, i].flatten(0, 1).contiguous() for i, part in enumerate(_QKV)
        }
    renamed = _swap(rest, _BLOCK)
    return None if renamed is None else {prefix + renamed: value}


def _language_from_original(name: str, value: Tensor) -> dict[str, Tensor] | None:
    block = re.match(r"transformer\.h\.(\d+)\.(.+)", name)
    if block is None:
        if name.startswith("transformer.rotary_emb."):
            return {}
        renamed = _swap(name, _LANGUAGE)
        return None if renamed is None else {renamed: value}
    prefix, rest = f"language_model.model.layers.{block[1]}.", block[2]
    if rest.startswith("attn.c_attn."):
        kind = rest.removeprefix("attn.c_attn.")
        parts = zip(_QKV, value.chunk(3), strict=True)
        return {f"{prefix}self_attn.{part}.{kind}": piece.contiguous() for part, piece in parts}
    if rest.startswith("attn.") and "c_proj" not in rest:
        return {}  # buffers
    renamed = _swap(rest, _LANGUAGE_BLOCK)
    return None if renamed is None else {prefix + renamed: value}


def to_original(state: Mapping[str, Tensor], vision_heads: int, *, prefix: str = VISUAL) -> dict[str, Tensor]:
    """Inverse of `from_original`.

    Args:
        state: state dict of `QwenVLForConditionalGeneration` (or gradients by its names), whole or part; of the
            language models Qwen2 can be named.
        vision_heads: of the tower.
        prefix: in front of the visual part's names.

    Raises:
        ValueError: tensors that the original does not have.
    """
    original: dict[str, Tensor] = {}
    left = []
    for name, value in state.items():
        if name.startswith(("vision_model.", "resampler.")):
            renamed = _visual_to_original(name, value, state, vision_heads)
            if renamed is None:
                left.append(name)
            else:
                original |= {prefix + key: tensor for key, tensor in renamed.items()}
            continue
        block = re.match(r"language_model\.model\.layers\.(\d+)\.(.+)", name)
        packed = block and re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", block[2])
        if packed:
            if packed[1] == "q":
                parts = [state[name.replace(".q_proj.", f".{part}.")] for part in _QKV]
                original[f"transformer.h.{block[1]}.attn.c_attn.{packed[2]}"] = torch.cat(parts)
            continue
        key = _swap(block[2], _LANGUAGE_BLOCK, back=True) if block else _swap(name, _LANGUAGE, back=True)
        if key is None:
            left.append(name)
        else:
            original[f"transformer.h.{block[1]}.{key}" if block else key] = value
    if left:
        raise ValueError(f"tensors that the original does not have: {left[:8]}")
    return original


def _visual_to_original(name: str, value: Tensor, state: Mapping[str, Tensor], heads: int) -> dict[str, Tensor] | None:
    if name == "resampler.projection.weight":
        return {"proj": value.T.contiguous()}
    packed = re.fullmatch(r"(resampler|vision_model\.layers\.(\d+)\.self_attn)\.([qkv])_proj\.(weight|bias)", name)
    if packed:
        if packed[3] != "q":
            return {}
        parts = [state[name.replace(".q_proj.", f".{part}.")] for part in _QKV]
        if packed[1] == "resampler":
            return {f"attn_pool.attn.in_proj_{packed[4]}": torch.cat(parts)}
        by_head = torch.stack([part.unflatten(0, (heads, -1)) for part in parts], dim=1)
        return {f"transformer.resblocks.{packed[2]}.attn.in_proj.{packed[4]}": by_head.flatten(0, 2)}
    block = re.match(r"vision_model\.layers\.(\d+)\.(.+)", name)
    key = _swap(block[2], _BLOCK, back=True) if block else _swap(name, _VISUAL, back=True)
    if key is None:
        return None
    return {f"transformer.resblocks.{block[1]}.{key}" if block else key: value}


def config_from_original(config: Mapping[str, Any], **changes: Any) -> QwenVLConfig:
    """Our config from an original `config.json`.

    Args:
        config: its entries.
        changes: entries of the language model's config that win (`bos_token_id`, `eos_token_id`, ...).
    """
    visual = config["visual"]
    heads = config["num_attention_heads"]
    text = {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"] // 2,
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": config.get("kv_channels", config["hidden_size"] // heads),
        "rms_norm_eps": config.get("layer_norm_epsilon", 1e-6),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(config.get("rotary_emb_base", 10000))},
        "max_position_embeddings": config.get("max_position_embeddings", 8192),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "attention_dropout": 0.0,
    }
    start = visual.get("image_start_id", 151857)
    return QwenVLConfig(
        vision_config=vision_config_from_original(visual).to_dict(),
        text_config=Qwen2Config(**{**text, **changes}).to_dict(),
        image_start_token_id=start,
        image_end_token_id=start + 1,
        image_token_id=start + 2,
        seq_length=config.get("seq_length"),
        use_dynamic_ntk=config.get("use_dynamic_ntk", True),
        use_logn_attn=config.get("use_logn_attn", True),
    )


def vision_config_from_original(visual: Mapping[str, Any]) -> QwenVLVisionConfig:
    """Our vision config from the entry `visual` of an original `config.json`."""
    return QwenVLVisionConfig(
        hidden_size=visual["width"],
        intermediate_size=int(visual["width"] * visual["mlp_ratio"]),
        num_hidden_layers=visual["layers"],
        num_attention_heads=visual["heads"],
        image_size=visual["image_size"],
        patch_size=visual["patch_size"],
        num_query_tokens=visual.get("n_queries", 256),
        output_dim=visual["output_dim"],
    )


def model_from_original(
    state: Mapping[str, Tensor], config: Mapping[str, Any], **changes: Any
) -> QwenVLForConditionalGeneration:
    """The model that an original checkpoint holds, in float32 and eval mode.

    Args:
        state: original state dict.
        config: entries of its `config.json`.
        changes: as of `config_from_original`.

    Raises:
        ValueError: tensors without a counterpart; RuntimeError: tensors that are missing.
    """
    ours = config_from_original(config, **changes)
    model = QwenVLForConditionalGeneration(ours)
    weights = from_original(state, ours.vision_config.num_attention_heads)
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.eval()


def read_original(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and config of an original folder; pickles are read with `weights_only=True`."""
    folder = Path(folder)
    state: dict[str, Tensor] = {}
    files = sorted(folder.glob("*.safetensors"))
    for path in files or sorted(folder.glob("pytorch_model*.bin")):
        state |= load_file(path) if files else torch.load(path, map_location="cpu", weights_only=True)
    if not state:
        raise FileNotFoundError(f"{folder} has no *.safetensors and no pytorch_model*.bin")
    return state, json.loads((folder / "config.json").read_text(encoding="utf-8"))


def convert_checkpoint(folder: str | Path, out: str | Path) -> QwenVLForConditionalGeneration:
    """Writes an original folder (Qwen/Qwen-VL, Qwen/Qwen-VL-Chat) as ours, processor included, with its code."""
    state, config = read_original(folder)
    tokenizer = tokenizer_from_original(Path(folder) / "qwen.tiktoken")
    end, stop = (tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>"))
    # Rows are padded with the end token, but the config must not say so: its embedding would get no gradient.
    model = model_from_original(state, config, eos_token_id=end)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [end, stop], end
    visual = model.config.vision_config
    processor = QwenVLProcessor.for_image_size(tokenizer, visual.image_size, num_query_tokens=visual.num_query_tokens)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return model


def save_original(model: QwenVLForConditionalGeneration, path: str | Path) -> None:
    """Writes a model whose language model is a Qwen2 under the original names, as safetensors."""
    state = to_original(model.state_dict(), model.config.vision_config.num_attention_heads)
    save_file(
        {name: v.detach().cpu().clone().contiguous() for name, v in state.items()}, path, metadata={"format": "pt"}
    )


# How Qwen cuts a text into pieces before it merges bytes.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_EXTRAS = 205
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{i}|>" for i in range(_EXTRAS)),
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
    "<quad>",
    "</quad>",
    "<img>",
    "</img>",
    "<imgpad>",
)


def tokenizer_from_original(path: str | Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer that gives the ids of an original rank file (`qwen.tiktoken`).

    Args:
        path: lines of a base64-coded token and its rank; the special tokens follow the ranks.
    """
    ranks: dict[bytes, int] = {}
    for line in Path(path).read_bytes().splitlines():
        if line:
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
    letters = _byte_letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges: list[tuple[str, str]] = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(a, b) for a, b in halves if a in ranks and b in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spelled(a), spelled(b)) for a, b in known]
    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    first = max(ranks.values()) + 1
    for i, token in enumerate(SPECIAL_TOKENS):
        if fast.convert_tokens_to_ids(token) != first + i:
            raise ValueError(f"{path}: ranks are not 0, 1, 2, ..., so {token} would not get its id {first + i}")
    return fast


def _byte_letters() -> dict[int, str]:
    """The printable letter that byte-level tokenizers write for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in printable}
    hidden = (byte for byte in range(256) if byte not in letters)
    return letters | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


__all__ = [
    "config_from_original",
    "convert_checkpoint",
    "from_original",
    "model_from_original",
    "read_original",
    "save_original",
    "to_original",
    "tokenizer_from_original",
    "vision_config_from_original",
]
