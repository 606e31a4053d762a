import importlib.util

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, T5ForConditionalGeneration

from hf_vlp.training import apply_stage
from hf_vlp.training.lora import (
    LoraArguments,
    add_lora,
    language_model_options,
    load_adapter,
    lora_layers,
    merge,
    merged_state_dict,
    resolve_targets,
    save_adapter,
)
from tests.tiny import blip2 as tiny
from tests.training import runs


def language_model(kind="opt"):
    return tiny.generation_model(kind).language_model


def adapted(kind="opt", **changes):
    """A model whose adapters do something."""
    model = tiny.generation_model(kind)
    apply_stage(model, "stage2")
    add_lora(model, LoraArguments(**({"lora_r": 2, "lora_dropout": 0.0} | changes)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def outputs(model, kind="opt"):
    batch = tiny.generation_processor(kind).training_inputs(tiny.images(2), list(tiny.TEXTS[:2]))
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize(
    ("kind", "names"), [("opt", {"q_proj", "v_proj"}), ("llama", {"q_proj", "v_proj"}), ("t5", {"q", "v"})]
)
def test_each_family_has_its_targets(kind, names):
    found = resolve_targets(language_model(kind))
    assert {name.rpartition(".")[2] for name in found} == names
    assert len(found) > 1


def test_families_that_only_peft_knows():
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11))
    assert resolve_targets(model) == ["transformer.h.0.attn.c_attn"]


def test_targets_by_name_and_by_expression():
    model = language_model()
    assert {n.rpartition(".")[2] for n in resolve_targets(model, ["k_proj", "fc1"])} == {"k_proj", "fc1"}
    assert resolve_targets(model, [r"model\.decoder\.layers\.1\..*fc[12]"]) == [
        "model.decoder.layers.1.fc1", "model.decoder.layers.1.fc2",
    ]  # fmt: skip


@pytest.mark.parametrize("targets", [["query"], ["q_proj", "query"], [r"encoder\..*"]])
def test_targets_that_match_nothing_name_the_candidates(targets):
    with pytest.raises(ValueError, match="match no layer of OPTForCausalLM.*q_proj"):
        resolve_targets(language_model(), targets)


def test_unknown_family_asks_for_targets():
    model = language_model()
    model.config.model_type = "brand_new"
    with pytest.raises(ValueError, match="no LoRA targets are known.*'brand_new'.*--lora_targets"):
        resolve_targets(model)


def test_only_the_language_model_is_adapted_and_only_adapters_train_there():
    model = tiny.generation_model()
    before = outputs(model)
    apply_stage(model, "stage2")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = add_lora(model, LoraArguments(lora_r=2))
    now = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(found) == 4
    assert trained <= now
    assert all(name.startswith("language_model.") and ".lora_" in name for name in now - trained)
    assert set(lora_layers(model)) == {f"language_model.{name}" for name in found}
    assert torch.equal(outputs(model.eval()), before), "a fresh adapter changes nothing"


def test_adapters_are_float32_on_a_16_bit_language_model():
    model = tiny.generation_model()
    model.language_model.to(torch.bfloat16)
    apply_stage(model, "stage2")
    add_lora(model, LoraArguments(lora_r=2))
    assert {p.dtype for n, p in model.named_parameters() if ".lora_" in n} == {torch.float32}


def test_rank_zero_is_none_and_twice_is_an_error():
    model = tiny.generation_model()
    assert add_lora(model, LoraArguments()) == []
    assert not lora_layers(model)
    with pytest.raises(ValueError, match="must not be negative"):
        add_lora(model, LoraArguments(lora_r=-1))
    add_lora(model, LoraArguments(lora_r=1))
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(model, LoraArguments(lora_r=1))


@pytest.mark.parametrize("kind", ["opt", "llama", "t5"])
def test_merged_weights_give_the_adapted_outputs(kind):
    model = adapted(kind)
    expected = outputs(model, kind)
    plain = tiny.generation_model(kind)
    assert (outputs(plain, kind) - expected).abs().max() > 1e-3
    before = runs.fingerprint(model.state_dict())
    merged = merged_state_dict(model)
    assert runs.fingerprint(model.state_dict()) == before, "merging a copy leaves the model as it is"
    assert set(merged) == set(plain.state_dict())
    plain.load_state_dict(merged)
    torch.testing.assert_close(outputs(plain, kind), expected, atol=2e-5, rtol=1e-5)


def test_merging_in_place():
    model = adapted()
    expected = outputs(model)
    merge(model)
    assert not lora_layers(model)
    assert set(model.state_dict()) == set(tiny.generation_model().state_dict())
    torch.testing.assert_close(outputs(model), expected, atol=2e-5, rtol=1e-5)
    add_lora(model, LoraArguments(lora_r=1))


def test_a_saved_adapter_loads_here_and_in_peft(tmp_path):
    from peft import PeftModel

    model = adapted()
    expected = outputs(model)
    save_adapter(model, tmp_path)
    other = tiny.generation_model()
    load_adapter(other, tmp_path)
    assert torch.equal(outputs(other.eval()), expected)

    theirs = tiny.generation_model()
    theirs.language_model = PeftModel.from_pretrained(theirs.language_model, tmp_path).base_model.model
    assert torch.equal(outputs(theirs.eval()), expected)


def test_an_adapter_that_does_not_fit(tmp_path):
    save_adapter(adapted(), tmp_path / "opt")
    with pytest.raises(FileNotFoundError, match="no adapter_model.safetensors"):
        load_adapter(tiny.generation_model(), tmp_path)
    with pytest.raises((ValueError, RuntimeError)):
        load_adapter(tiny.generation_model("t5"), tmp_path / "opt")


def test_lora_dropout_is_on_and_the_frozen_model_in_eval(tmp_path):
    trainer = runs.stage2_trainer(tmp_path, lora_r=2, max_steps=1)
    trainer.train()
    model = trainer.model.train()
    from hf_vlp.training.freezing import keep_frozen_in_eval

    keep_frozen_in_eval(model)
    on = {n for n, m in model.language_model.named_modules() if isinstance(m, nn.Dropout) and m.training}
    assert on
    assert all("lora_dropout" in name for name in on)
    assert not model.language_model.model.decoder.layers[0].training


def test_export_is_native_and_holds_the_adapter_beside_it(tmp_path):
    from transformers import Blip2ForConditionalGeneration

    trainer = runs.stage2_trainer(tmp_path, lora_r=2, max_steps=2)
    trainer.train()
    expected = outputs(trainer.model.eval())
    folder = trainer.export()
    native = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    torch.testing.assert_close(outputs(native), expected, atol=1e-4, rtol=1e-4)
    other = tiny.generation_model(seed=3)
    load_adapter(other, folder / "language_model_adapter")


@pytest.mark.parametrize(("bits", "options"), [(16, {}), (32, {"dtype": torch.float32})])
def test_precision_of_the_language_model(bits, options):
    assert language_model_options(LoraArguments(language_model_bits=bits)) == options


def test_other_numbers_of_bits():
    with pytest.raises(ValueError, match="4, 8, 16 or 32"):
        language_model_options(LoraArguments(language_model_bits=3))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_quantization_needs_bitsandbytes():
    with pytest.raises(ImportError, match=r"pip install 'hf-vlp\[quantization\]'"):
        language_model_options(LoraArguments(language_model_bits=4))


def test_t5_is_an_encoder_decoder():
    assert isinstance(language_model("t5"), T5ForConditionalGeneration)
