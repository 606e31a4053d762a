"""Tiny random BLIP-2 models, tokenizers and batches, made in memory."""

from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    Blip2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
)

from hf_vlp.models.blip2.modeling_blip_2 import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval
from hf_vlp.models.blip2.pretraining_blip_2 import Blip2ForPreTraining
from hf_vlp.models.blip2.processing_blip_2 import Blip2Processor

IMAGE_SIZE = 16
QUERIES = 5
TEXTS = (
    "a red circle above a blue square",
    "two green triangles",
    "a large yellow star to the left of a small red cross",
    "nothing but a black dot",
)
_CORPUS = (*TEXTS, "Question: what color is the dot? Answer: black", "a photo of the circle", "\n")


def bert_tokenizer() -> BertTokenizer:
    """A lower-case word tokenizer of BERT's kind, without [DEC]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = sorted({word for text in _CORPUS for word in text.lower().replace("?", " ?").replace(":", " :").split()})
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocab = [*special, *letters, *(f"##{c}" for c in letters), *(w for w in words if len(w) > 1)]
    return BertTokenizer(vocab={token: i for i, token in enumerate(dict.fromkeys(vocab))})


def opt_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts </s> in front of every text and nothing behind it, as OPT's does."""
    return _byte_level("</s>", ["<s>", "<pad>", "</s>", "<unk>"], template="</s> $A")


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts <s> in front of every text; no padding token, as Llama's has none."""
    return _byte_level("<s>", ["<unk>", "<s>", "</s>"], template="<s> $A", pad=None)


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts </s> behind every text and nothing in front of it, as T5's does."""
    return _byte_level(None, ["<pad>", "</s>", "<unk>"], template="$A </s>")


def _byte_level(bos: str | None, special: list[str], *, template: str, pad: str | None = "<pad>") -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in special]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token="</s>", unk_token="<unk>", pad_token=pad
    )


def vision_config(**changes: Any) -> dict[str, Any]:
    config = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "initializer_range": 0.2,
    }
    return config | changes


def qformer_config(**changes: Any) -> dict[str, Any]:
    config = {
        "vocab_size": len(bert_tokenizer()) + 1,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
        "cross_attention_frequency": 2,
        "use_qformer_text_input": True,
        "initializer_range": 0.2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return config | changes


def blip2_config(text_config: PreTrainedConfig | None = None, **changes: Any) -> Blip2Config:
    """A config of stage 1, or of stage 2 if a language model's is given. `changes` go to the Q-Former's."""
    qformer = qformer_config(**changes)
    extra: dict[str, Any] = {}
    if text_config is not None:
        qformer["use_qformer_text_input"] = False
        extra = {"text_config": text_config.to_dict(), "image_token_index": text_config.vocab_size - 1}
    return Blip2Config(
        vision_config=vision_config(),
        qformer_config=qformer,
        num_query_tokens=QUERIES,
        image_text_hidden_size=12,
        **extra,
    )


def opt_config(**changes: Any) -> OPTConfig:
    config = {
        "vocab_size": 330,
        "hidden_size": 28,
        "word_embed_proj_dim": 28,
        "ffn_dim": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "dropout": 0.1,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "init_std": 0.2,
    }
    return OPTConfig(**(config | changes))


def llama_config(**changes: Any) -> LlamaConfig:
    config = {
        "vocab_size": 330,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    return LlamaConfig(**(config | changes))


def t5_config(**changes: Any) -> T5Config:
    config = {
        "vocab_size": 330,
        "d_model": 28,
        "d_kv": 7,
        "d_ff": 40,
        "num_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "feed_forward_proj": "gated-gelu",
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
        "initializer_factor": 1.0,
    }
    return T5Config(**(config | changes))


LANGUAGE_MODELS = {
    "opt": (opt_config, opt_tokenizer),
    "llama": (llama_config, llama_tokenizer),
    "t5": (t5_config, t5_tokenizer),
}


def wake(module: nn.Module, seed: int = 0) -> nn.Module:
    """Gives biases, norms and embeddings values of their own, so that no mistake hides behind a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return module


def retrieval_model(seed: int = 0, **changes: Any) -> Blip2ForImageTextRetrieval:
    torch.manual_seed(seed)
    return wake(Blip2ForImageTextRetrieval(blip2_config(**changes))).eval()


def pretraining_model(seed: int = 0, qformer: dict[str, Any] | None = None, **settings: Any) -> Blip2ForPreTraining:
    torch.manual_seed(seed)
    model = Blip2ForPreTraining(blip2_config(**(qformer or {})), **settings)
    wake(model.retrieval)
    wake(model.itg_head)
    return model


def generation_model(kind: str = "opt", seed: int = 0, **changes: Any) -> Blip2ForConditionalGeneration:
    torch.manual_seed(seed)
    model = Blip2ForConditionalGeneration(blip2_config(LANGUAGE_MODELS[kind][0](), **changes))
    processor = generation_processor(kind)
    model.config.image_token_index = processor.image_token_id
    return wake(model).eval()


def retrieval_processor() -> Blip2Processor:
    return Blip2Processor.for_retrieval(bert_tokenizer(), image_size=IMAGE_SIZE)


def generation_processor(kind: str = "opt") -> Blip2Processor:
    tokenizer: PreTrainedTokenizerBase = LANGUAGE_MODELS[kind][1]()
    return Blip2Processor.for_language_model(tokenizer, QUERIES, image_size=IMAGE_SIZE)


def images(count: int = 4) -> list[Image.Image]:
    return [Image.new("RGB", (20 + i, 16), (60 * i % 256, 90, 250 - 50 * i)) for i in range(count)]


def pixels(count: int = 4, seed: int = 1, size: int = IMAGE_SIZE) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def text_batch(texts: tuple[str, ...] = TEXTS) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of stage 1."""
    return dict(retrieval_processor()(text=list(texts), return_tensors="pt"))


def pretraining_batch(count: int = 4, seed: int = 1) -> dict[str, Tensor]:
    return {"pixel_values": pixels(count, seed), **text_batch(TEXTS[:count])}
