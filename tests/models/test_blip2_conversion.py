"""Checkpoints with LAVIS' names: there and back for both towers and all stages, and folders in that format."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_vlp.models.blip2.any_vision_blip_2 import (
    Blip2AnyVisionForConditionalGeneration,
    Blip2AnyVisionForImageTextRetrieval,
)
from hf_vlp.models.blip2.backbone_blip_2 import MissingWeightsError
from hf_vlp.models.blip2.configuration_blip2_any_vision import Blip2AnyVisionConfig
from hf_vlp.models.blip2.conversion_blip_2 import (
    config_from_original,
    convert_checkpoint,
    exact_gelu,
    from_original,
    is_original,
    model_from_original,
    read_original,
    save_original,
    to_original,
)
from hf_vlp.models.blip2.modeling_blip_2 import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval
from hf_vlp.models.blip2.pretraining_blip_2 import Blip2ForPreTraining
from tests.tiny.blip2 import (
    QUERIES,
    blip2_config,
    generation_model,
    opt_config,
    pretraining_batch,
    pretraining_model,
    qformer_config,
    wake,
)

CLIP_TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "hidden_act": "quick_gelu",
}
HEADS = {"vision_heads": 2, "qformer_heads": 4}


def clip_pretraining() -> Blip2ForPreTraining:
    torch.manual_seed(0)
    config = Blip2AnyVisionConfig(
        vision_config=CLIP_TOWER,
        qformer_config=qformer_config(),
        num_query_tokens=QUERIES,
        image_text_hidden_size=12,
    )
    model = Blip2ForPreTraining(config)
    with torch.no_grad():
        # Published checkpoints have no such norm; it is not read.
        state = {n: p.clone() for n, p in model.named_parameters() if "tower.post_layernorm" in n}
        wake(model)
        for name, value in state.items():
            model.get_parameter(name).copy_(value)
    return model


def original_of(model: transformers.PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    save_original(model, folder / "original.safetensors")
    return load_file(folder / "original.safetensors")


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def without_key_bias(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Zero where the original has nothing: the bias of EVA's keys."""
    state = {name: value.clone() for name, value in state.items()}
    for name, value in state.items():
        if name.endswith("self_attn.qkv.bias"):
            value.view(3, -1)[1] = 0
    return state


@pytest.mark.parametrize("tower", ["eva", "clip"])
def test_stage_1_there_and_back(tower: str, tmp_path: Path) -> None:
    model = pretraining_model() if tower == "eva" else clip_pretraining()
    original = original_of(model, tmp_path)
    assert is_original(original)
    assert "temp" in original
    assert "Qformer.cls.predictions.decoder.weight" in original
    assert ("visual_encoder.blocks.0.attn.q_bias" in original) == (tower == "eva")
    assert ("visual_encoder.transformer.resblocks.0.attn.in_proj_weight" in original) == (tower == "clip")
    again = model_from_original(original, **HEADS)
    assert type(again) is Blip2ForPreTraining
    same(without_key_bias(model.state_dict()), again.state_dict())
    same(original, original_of(again, tmp_path))
    ring = {"negative_image_index": torch.tensor([1, 2, 3, 0]), "negative_text_index": torch.tensor([3, 0, 1, 2])}
    torch.testing.assert_close(
        again(**pretraining_batch(), **ring).loss, model.eval()(**pretraining_batch(), **ring).loss
    )


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_stage_2_there_and_back(kind: str, tmp_path: Path) -> None:
    model = generation_model(kind)
    original = original_of(model, tmp_path)
    assert f"{kind}_proj.weight" in original
    again = model_from_original(
        original,
        text_config=model.config.text_config,
        image_token_id=model.config.image_token_index,
        **HEADS,
    )
    same(without_key_bias(model.state_dict()), again.state_dict())
    with pytest.raises(ValueError, match="language_model='opt' or 't5'"):
        to_original(model.state_dict())
    with pytest.raises(ValueError, match="pass the config of its language model"):
        config_from_original(original)


@pytest.mark.parametrize(
    "changes", [{}, {"num_hidden_layers": 5, "cross_attention_frequency": 3}, {"num_hidden_layers": 1}]
)
def test_config_is_read_off_the_shapes(changes: dict[str, Any], tmp_path: Path) -> None:
    model = pretraining_model(qformer=changes)
    config = config_from_original(original_of(model, tmp_path), **HEADS)
    for part, ignored in (("vision_config", {"initializer_range"}), ("qformer_config", {"initializer_range"})):
        ours, found = getattr(model.config, part).to_dict(), getattr(config, part).to_dict()
        different = {name for name in ours if ours[name] != found.get(name)} - ignored
        assert different <= {"hidden_dropout_prob", "attention_probs_dropout_prob", "cross_attention_frequency"}
    assert (config.num_query_tokens, config.image_text_hidden_size) == (QUERIES, 12)
    same_layers = [layer.has_cross_attention for layer in model.retrieval.qformer.encoder.layer]
    again = model_from_original(original_of(model, tmp_path), **HEADS)
    assert [layer.has_cross_attention for layer in again.retrieval.qformer.encoder.layer] == same_layers


def test_parts_that_lavis_leaves_out_come_from_their_own_files(tmp_path: Path) -> None:
    stage1 = pretraining_model()
    original = original_of(stage1, tmp_path)
    tower = {n.removeprefix("visual_encoder."): v for n, v in original.items() if n.startswith("visual_encoder.")}
    # The tower's own file has one block more, which is not read, and heads.
    last = {n.replace("blocks.1.", "blocks.2."): v + 1 for n, v in tower.items() if n.startswith("blocks.1.")}
    file = {**tower, **last, "head.weight": torch.zeros(3, 24), "fc_norm.weight": torch.ones(24)}
    trained = {name: value for name, value in original.items() if not name.startswith("visual_encoder.")}
    with pytest.raises(ValueError, match="no vision tower.*pass the tower's own file"):
        model_from_original(trained, **HEADS)
    again = model_from_original(trained, vision=file, **HEADS)
    same(without_key_bias(stage1.state_dict()), again.state_dict())

    stage2 = generation_model("opt")
    original = original_of(stage2, tmp_path)
    trained = {name: value for name, value in original.items() if not name.startswith("opt_model.")}
    options = {**HEADS, "image_token_id": stage2.config.image_token_index}
    again = model_from_original(trained, language_model=stage2.language_model, **options)
    same(without_key_bias(stage2.state_dict()), again.state_dict())
    with pytest.raises(MissingWeightsError, match="language_model"):
        model_from_original(trained, text_config=opt_config(), **options)


def test_names_without_a_counterpart(tmp_path: Path) -> None:
    original = original_of(pretraining_model(), tmp_path)
    for name in ("momentum.weight", "visual_encoder.blocks.0.gamma", "visual_encoder.rel_pos_bias"):
        with pytest.raises(ValueError, match=name.removeprefix("visual_encoder.")):
            from_original({**original, name: torch.zeros(1)})
    with pytest.raises(ValueError, match="does not have.*stranger"):
        to_original({"stranger.weight": torch.zeros(1)})


def test_reading_checks_weights_only(tmp_path: Path) -> None:
    original = original_of(pretraining_model(), tmp_path)
    torch.save({"model": {f"module.{n}": v for n, v in original.items()}, "epoch": 3}, tmp_path / "wrapped.pth")
    same(read_original(tmp_path / "wrapped.pth"), original)

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(Exception, match="Weights only load failed"):
        read_original(tmp_path / "evil.pth")
    assert not (tmp_path / "touched").exists()


def test_converted_folders_are_native(tmp_path: Path) -> None:
    model = pretraining_model()
    save_original(model, tmp_path / "stage1.safetensors")
    convert_checkpoint(tmp_path / "stage1.safetensors", tmp_path / "stage1", **HEADS)
    native = transformers.Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "stage1")
    same(without_key_bias(model.retrieval.state_dict()), native.state_dict())
    again = Blip2ForPreTraining.from_pretrained(tmp_path / "stage1")
    same(without_key_bias(model.state_dict()), again.state_dict())


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "checkpoint_best.pth"])
def test_folders_with_original_names_load(file: str, tmp_path: Path) -> None:
    model = pretraining_model()
    original = original_of(model, tmp_path)
    folder = tmp_path / "folder"
    model.retrieval.config.architectures = ["Blip2ForImageTextRetrieval"]
    model.retrieval.config.save_pretrained(folder)
    if file.endswith(".safetensors"):
        save_file(original, folder / file, metadata={"format": "pt"})
    else:
        torch.save({"model": original}, folder / file)
    expected = without_key_bias(model.state_dict())
    same(expected, Blip2ForPreTraining.from_pretrained(folder).state_dict())
    retrieval = Blip2ForImageTextRetrieval.from_pretrained(folder)
    same(
        {n.removeprefix("retrieval."): v for n, v in expected.items() if n.startswith("retrieval.")},
        retrieval.state_dict(),
    )
    # What is saved from it is native, and nothing of LAVIS stays behind.
    retrieval.save_pretrained(tmp_path / "saved")
    assert not is_original(load_file(tmp_path / "saved" / "model.safetensors"))
    transformers.Blip2ForImageTextRetrieval(blip2_config()).save_pretrained(tmp_path / "other")
    assert not is_original(load_file(tmp_path / "other" / "model.safetensors"))


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_stage_2_folders_with_original_names_load(kind: str, tmp_path: Path) -> None:
    model = generation_model(kind)
    if kind == "t5":
        # LAVIS' T5 has an output head of its own.
        head = model.language_model.lm_head
        head.weight = torch.nn.Parameter(head.weight.detach().clone() + 0.1)
    original = original_of(model, tmp_path)
    model.config.architectures = ["Blip2ForConditionalGeneration"]
    model.config.save_pretrained(tmp_path / "folder")
    save_file(original, tmp_path / "folder" / "model.safetensors", metadata={"format": "pt"})
    again = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "folder")
    same(without_key_bias(model.state_dict()), again.state_dict())


def test_exact_gelu_survives_saving(tmp_path: Path) -> None:
    config = exact_gelu(
        transformers.T5Config(feed_forward_proj="gated-gelu", d_model=8, d_kv=4, num_heads=2, d_ff=8, num_layers=1)
    )
    config.save_pretrained(tmp_path)
    again = transformers.T5Config.from_pretrained(tmp_path)
    assert again.dense_act_fn == "gelu_python"
    model = transformers.T5ForConditionalGeneration(again)
    act = model.encoder.block[0].layer[1].DenseReluDense.act
    x = torch.linspace(-3, 3, 20)
    torch.testing.assert_close(act(x), torch.nn.functional.gelu(x))
    assert exact_gelu(opt_config()).to_dict() == opt_config().to_dict()


def test_any_vision_folders_name_their_code(tmp_path: Path) -> None:
    model = clip_pretraining()
    model.export(tmp_path)
    assert type(model.retrieval) is Blip2AnyVisionForImageTextRetrieval
    assert issubclass(Blip2AnyVisionForConditionalGeneration, Blip2ForConditionalGeneration)
    assert {"configuration_blip2_any_vision.py", "modeling_blip2_any_vision.py"} <= {
        f.name for f in tmp_path.iterdir()
    }
