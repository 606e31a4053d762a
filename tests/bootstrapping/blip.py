"""A tiny random BLIP whose tokenizer knows the words of the tests."""

import torch

from hf_vlp.models.blip.modeling_blip import BlipForConditionalGeneration, BlipForImageTextRetrieval
from hf_vlp.models.blip.processing_blip import BlipProcessor
from tests.tiny import blip, blip2


def blip_processor() -> BlipProcessor:
    tokenizer = blip2.bert_tokenizer()
    tokenizer.model_max_length = 24
    return BlipProcessor.for_image_size(tokenizer, blip.IMAGE_SIZE)


def blip_model(kind: type = BlipForConditionalGeneration) -> BlipForConditionalGeneration | BlipForImageTextRetrieval:
    tokenizer = blip_processor().tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in (("dec", "[DEC]"), ("enc", "[ENC]"))}
    config = blip.blip_config(
        vocab_size=len(tokenizer),
        bos_token_id=ids["dec"],
        enc_token_id=ids["enc"],
        pad_token_id=tokenizer.pad_token_id,
        sep_token_id=tokenizer.sep_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
    torch.manual_seed(0)
    return blip.spread_weights(kind(config)).eval()
