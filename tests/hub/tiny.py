"""Tiny native models with their processors, in memory: what pipelines, saving and the command line are tested on."""

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BlipImageProcessor,
    CLIPConfig,
    CLIPModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.blip_2.configuration_blip_2 import Blip2Config
from transformers.models.blip_2.modeling_blip_2 import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval
from transformers.models.blip_2.processing_blip_2 import Blip2Processor

WORDS = "a the red blue green circle square triangle on left of above big small question answer colour what is it : ?"
QUERIES = 4
IMAGE_SIZE = 16


def image(colour: str | tuple[int, int, int] = "red", size: tuple[int, int] = (20, 24)) -> Image.Image:
    """A picture with a gradient of one colour, so that no two positions are alike."""
    plain = Image.new("RGB", size, colour)
    return Image.composite(plain, Image.new("RGB", size, "black"), Image.linear_gradient("L").resize(size))


def tokenizer(kind: str = "opt") -> PreTrainedTokenizerFast:
    """Word-level tokenizer with the special tokens of `opt`, `t5`, `bert` or `clip`."""
    special = {
        "opt": {"pad_token": "<pad>", "bos_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"},
        "t5": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
        "bert": {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
            "bos_token": "[DEC]",
        },
        "clip": {"pad_token": "<|end|>", "bos_token": "<|start|>", "eos_token": "<|end|>", "unk_token": "<|end|>"},
    }[kind]
    tokens = list(dict.fromkeys([*special.values(), *WORDS.split()]))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    single = {
        "opt": "</s> $A",
        "t5": "$A </s>",
        "bert": "[CLS] $A [SEP]",
        "clip": "<|start|> $A <|end|>",
    }[kind]
    used = [(token, vocabulary[token]) for token in special.values() if token in single]
    fast.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(dict.fromkeys(used)))
    return PreTrainedTokenizerFast(tokenizer_object=fast, model_max_length=32, **special)


def _vision() -> dict[str, int | float]:
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "initializer_range": 0.2,
    }


def _qformer(vocab_size: int, use_text: bool = False) -> dict[str, int | float | bool]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "encoder_hidden_size": 32,
        "cross_attention_frequency": 1,
        "max_position_embeddings": 40,
        "use_qformer_text_input": use_text,
        "initializer_range": 0.2,
    }


def image_processor() -> BlipImageProcessor:
    return BlipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


def blip2(language_model: str = "opt") -> tuple[Blip2ForConditionalGeneration, Blip2Processor]:
    """The native stage-2 model on a random `"opt"` or `"t5"`, and its processor."""
    torch.manual_seed(0)
    words = tokenizer(language_model)
    processor = Blip2Processor(image_processor(), words, num_query_tokens=QUERIES)
    vocabulary = len(words)
    if language_model == "opt":
        text = {
            "model_type": "opt",
            "vocab_size": vocabulary,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "init_std": 0.3,
        }
    else:
        text = {
            "model_type": "t5",
            "vocab_size": vocabulary,
            "d_model": 32,
            "d_ff": 48,
            "d_kv": 8,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        }
    text |= {
        "pad_token_id": words.pad_token_id,
        "eos_token_id": words.eos_token_id,
        "bos_token_id": words.bos_token_id,
    }
    config = Blip2Config(
        vision_config=_vision(),
        qformer_config=_qformer(len(words)),
        text_config=text,
        num_query_tokens=QUERIES,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    model = Blip2ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.query_tokens)
    model.generation_config.max_new_tokens = 6
    model.generation_config.pad_token_id = words.pad_token_id
    return model, processor


def blip2_retrieval() -> tuple[Blip2ForImageTextRetrieval, Blip2Processor]:
    torch.manual_seed(0)
    words = tokenizer("bert")
    processor = Blip2Processor(image_processor(), words, num_query_tokens=QUERIES)
    config = Blip2Config(
        vision_config=_vision(),
        qformer_config=_qformer(len(words), use_text=True),
        text_config={"model_type": "opt", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
        num_query_tokens=QUERIES,
        image_text_hidden_size=16,
    )
    model = Blip2ForImageTextRetrieval(config).eval()
    torch.nn.init.normal_(model.query_tokens)
    return model, processor


def clip() -> tuple[CLIPModel, ProcessorMixin]:
    from transformers import CLIPImageProcessor, CLIPProcessor

    torch.manual_seed(0)
    words = tokenizer("clip")
    text = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "eos_token_id": words.eos_token_id,
        "bos_token_id": words.bos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    config = CLIPConfig(text_config=text, vision_config=_vision(), projection_dim=16)
    size = {"shortest_edge": IMAGE_SIZE}
    crop = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPModel(config).eval(), CLIPProcessor(CLIPImageProcessor(size=size, crop_size=crop), words)


def save(pair: tuple[PreTrainedModel, ProcessorMixin], folder: object) -> str:
    """Plain `save_pretrained` of both; gives the folder back as a string."""
    model, processor = pair
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
