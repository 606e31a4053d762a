"""Attention of packed sequences: equal to each sequence alone, in values and gradients."""

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from hf_vlp.data.conversations import ConversationCollator
from hf_vlp.nn.sequences import attention_arguments, block_causal_mask, sequence_bounds, sequence_positions
from tests.data.conversations import TinyProcessor, record

IDS = torch.tensor([[1, 1, 1, 2, 2, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2]])


def tiny_llama(vocabulary: int, implementation: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=implementation,
    )
    return LlamaForCausalLM(config).double()


def test_mask_positions_and_bounds():
    seen = block_causal_mask(IDS)
    for row in range(2):
        for query in range(8):
            for key in range(8):
                expected = key <= query and IDS[row, key] == IDS[row, query]
                assert bool(seen[row, 0, query, key]) == bool(expected)
    assert sequence_positions(IDS).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6]]
    bounds, longest = sequence_bounds(IDS)
    assert bounds.tolist() == [0, 3, 5, 6, 8, 9, 16] and bounds.dtype == torch.int32 and longest == 7


def test_arguments_of_each_attention():
    sdpa = attention_arguments(IDS, "sdpa", torch.float32)
    assert sdpa["attention_mask"].dtype == torch.bool
    eager = attention_arguments(IDS, "eager", torch.bfloat16)["attention_mask"]
    assert eager.dtype == torch.bfloat16 and bool(((eager == 0) == sdpa["attention_mask"]).all())
    flash = attention_arguments(IDS, "flash_attention_2", torch.bfloat16)
    assert flash["attention_mask"] is None and flash["max_length_q"] == 7
    assert torch.equal(flash["cu_seq_lens_q"], flash["cu_seq_lens_k"])
    with pytest.raises(ValueError, match="'paged' .*|attention 'paged'"):
        attention_arguments(IDS, "paged", torch.float32)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_loss_and_gradient_equal_padded(implementation):
    rows = []
    for number in range(9):
        turns = ["Q" * (1 + number % 4), "word " * (1 + (3 * number) % 5), "and?", "so"][: 2 + 2 * (number % 2)]
        rows.append(record(*turns, key=str(number)))
    processor = TinyProcessor()
    options = {"template_options": {"system": "sys"}}
    padded = ConversationCollator(processor, **options)(rows)
    packed = ConversationCollator(processor, pack_to=128, **options)(rows)
    assert packed["input_ids"].shape[0] < len(rows)
    model = tiny_llama(len(processor.tokenizer), implementation)

    def step(batch, **attention):
        model.zero_grad()
        logits = model(input_ids=batch["input_ids"], use_cache=False, **attention).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        return loss, {name: value.grad.clone() for name, value in model.named_parameters()}

    loss, gradients = step(padded, attention_mask=padded["attention_mask"])
    arguments = attention_arguments(packed["sequence_ids"], implementation, torch.float64)
    packed_loss, packed_gradients = step(packed, **arguments)
    torch.testing.assert_close(packed_loss, loss, rtol=1e-10, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-8, atol=1e-12, msg=name)
    # Without the borders it is another number: the test can tell.
    leaking, _ = step(packed, attention_mask=packed["attention_mask"])
    assert abs(leaking.item() - loss.item()) > 1e-6
