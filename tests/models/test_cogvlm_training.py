"""CogVLM's training: resuming with LoRA and packing, two ranks, the script's stages, conversations and boxes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hf_vlp.data.conversations import ConversationCollator
from hf_vlp.models.cogvlm.modeling_cogvlm import CogVLMForConditionalGeneration
from hf_vlp.models.cogvlm.processing_cogvlm import GROUNDING_PROMPTS, BoxError, CogVLMProcessor, format_boxes
from hf_vlp.training.grounding import CaptionConversations, GroundingConversations, MixedDataset
from hf_vlp.training.lora import lora_layers
from tests.distributed import run_ranks
from tests.scripts.running import COMMON, script
from tests.tiny import cogvlm as tiny
from tests.training import runs
from tests.training.cogvlm_runs import cogvlm_trainer, tiny_processor
from tests.training.test_two_ranks import as_rank


@pytest.mark.parametrize("part", ["visual_experts", "language_model"])
def test_resumed_with_adapters_and_packing_is_unbroken(tmp_path: Path, part: str) -> None:
    options = {"lora": part, "pack_to": 96, "dropout": 0.2, "max_steps": 4}
    saved = {"save_strategy": "steps", "save_steps": 2}
    whole = cogvlm_trainer(tmp_path / "whole", **options, **saved)
    frozen = {n: p.clone() for n, p in whole.model.named_parameters() if not p.requires_grad}
    whole.train()
    again = cogvlm_trainer(tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert runs.fingerprint(runs.weights(whole.model)) == runs.fingerprint(runs.weights(again.model))
    assert lora_layers(whole.model.get_submodule(part))
    for name, parameter in whole.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


def test_export_merges_adapters(tmp_path: Path) -> None:
    trainer = cogvlm_trainer(tmp_path, lora="visual_experts", max_steps=2, learning_rate=0.01)
    trainer.train()
    folder = trainer.export()
    merged = CogVLMForConditionalGeneration.from_pretrained(folder).eval()
    batch = {k: v for k, v in tiny.rows(merged, [[2, 0, 3]]).items() if k not in ("labels",)}
    batch["input_ids"][batch["input_ids"] == tiny.IMAGE] = merged.config.image_token_id
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, trainer.model.eval()(**batch).logits, atol=1e-4, rtol=1e-4)
    for name, value in tiny.model(2, seed=3).language_model.state_dict().items():
        assert torch.equal(merged.language_model.state_dict()[name], value), name


def one_of_two(folder: str, pack_to: int | None) -> Any:
    size = dist.get_world_size() if dist.is_initialized() else 1
    if dist.is_initialized():
        as_rank()
    options = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "max_steps": 3}
    trainer = cogvlm_trainer(folder, pack_to=pack_to, per_device_train_batch_size=6 // size, **options)
    trainer.train()
    return runs.losses(trainer), runs.weights(trainer.model)


@pytest.mark.slow
@pytest.mark.parametrize("pack_to", [None, 96])
def test_two_ranks_train_as_one(tmp_path: Path, pack_to: int | None) -> None:
    losses, weights = one_of_two(str(tmp_path / "one"), pack_to)
    for found, state in run_ranks(one_of_two, 2, str(tmp_path / "two"), pack_to):
        assert found == pytest.approx(losses, rel=1e-4)
        for name, value in weights.items():
            torch.testing.assert_close(state[name], value, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def grounding_rows(box: list[float]) -> list[dict[str, Any]]:
    return [
        {"image": row["image"], "text": f"thing {i}", "boxes": [box], "source": "refs", "key": str(i)}
        for i, row in enumerate(runs.rows(6))
    ]


def test_boxes_are_read_and_written() -> None:
    model = tiny.model(2)
    processor = tiny_processor(model)
    options = {"write": format_boxes, "locate": GROUNDING_PROMPTS["locate"], "describe": GROUNDING_PROMPTS["describe"]}
    data = GroundingConversations(grounding_rows([5, 0, 20, 10]), **options)
    said = [[entry["text"] for turn in record["messages"] for entry in turn["content"]] for record in data]
    located = [(None, GROUNDING_PROMPTS["locate"].format(f"thing {i}"), "[[250,000,999,500]]") for i in range(6)]
    described = [(None, "What is in the area [[250,000,999,500]]?", f"thing {i}") for i in range(6)]
    assert all(tuple(words) in (located[i], described[i]) for i, words in enumerate(said))
    epochs = set()
    for epoch in range(8):
        data.set_epoch(epoch)
        epochs.add(data[0]["messages"][1]["content"][0]["text"])
    assert epochs == {"thing 0", "[[250,000,999,500]]"}
    mixed = MixedDataset([CaptionConversations(runs.rows(4)), data])
    assert [mixed[i]["index"] for i in range(10)] == list(range(10))
    batch = ConversationCollator(processor, template="cogvlm_chat")([mixed[i] for i in range(10)])
    batch.pop("record_report")
    assert torch.isfinite(model(**batch).loss)
    outside = GroundingConversations(grounding_rows([5, 0, 21, 10]), **options)
    with pytest.raises(ValueError, match=r"refs \[0\]: box .* is not inside the image of 20 x 20 pixels"):
        outside[0]
    assert issubclass(BoxError, ValueError)


def language_folder(folder: Path) -> Path:
    tiny.language_model().save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    return folder


_VISION = (
    "--image_size 16 --patch_size 8 --vision_hidden_size 16 --vision_layers 1 --vision_heads 2 "
    "--vision_intermediate_size 16 --train_vision true"
)
VISION = _VISION.split()


@pytest.mark.slow
def test_the_stages_of_the_script(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    language = language_folder(tmp_path / "lm")
    main = script("cogvlm").main
    main([*COMMON, *VISION, "--language_model", str(language), "--output_dir", str(tmp_path / "one")])
    first = ["--model_name_or_path", str(tmp_path / "one" / "model")]
    grounded = ["--stage", "stage2", "--max_train_samples", "12", "--image_size", "32"]
    capsys.readouterr()
    main([*COMMON, *first, *grounded, "--downsample", "2", "--output_dir", str(tmp_path / "two")])
    assert "not used: --downsample (--model_name_or_path brings its own)" in capsys.readouterr().out
    second = CogVLMForConditionalGeneration.from_pretrained(tmp_path / "two" / "model")
    assert second.config.vision_config.image_size == 32
    conversations = [
        {
            "id": str(i),
            "conversations": [
                {"from": "human", "value": "what is it?"},
                {"from": "gpt", "value": "a thing"},
                {"from": "human", "value": "which?"},
                {"from": "gpt", "value": f"{i}"},
            ],
        }
        for i in range(12)
    ]
    (tmp_path / "sft.json").write_text(json.dumps(conversations))
    tuned = ["--stage", "sft", "--train_data", str(tmp_path / "sft.json"), "--eval_split", "none"]
    first = ["--model_name_or_path", str(tmp_path / "two" / "model"), "--lora_r", "2", "--pack_to", "200"]
    main([*COMMON, *first, *tuned, "--output_dir", str(tmp_path / "three")])
    third = CogVLMForConditionalGeneration.from_pretrained(tmp_path / "three" / "model")
    plain = tiny.language_model().state_dict()
    for name, value in third.language_model.state_dict().items():
        assert torch.equal(value, plain[name]), name


@pytest.mark.slow
def test_a_small_llama_from_the_script_gets_experts(tmp_path: Path) -> None:
    sizes = ["--hidden_size", "24", "--num_hidden_layers", "1", "--num_attention_heads", "2", "--vocab_size", "300"]
    script("language_model").main([*COMMON, "--model_type", "llama", *sizes, "--output_dir", str(tmp_path / "lm")])
    language = ["--language_model", str(tmp_path / "lm" / "model")]
    metrics = script("cogvlm").main([*COMMON, *VISION, *language, "--output_dir", str(tmp_path / "one")])
    assert 0 < metrics["eval_loss"] < 8
    model = CogVLMForConditionalGeneration.from_pretrained(tmp_path / "one" / "model")
    assert model.config.image_token_id == model.config.text_config.vocab_size
    # 0.02 would suit a width of 1,792.
    assert model.config.vision_config.initializer_range == pytest.approx(16**-0.5)
    # What parts answers from questions goes from stage to stage.
    first = ["--model_name_or_path", str(tmp_path / "one" / "model"), "--stage", "sft"]
    script("cogvlm").main([*COMMON, *first, "--eval_split", "none", "--output_dir", str(tmp_path / "two")])
    spaces = [CogVLMProcessor.from_pretrained(tmp_path / name / "model").answer_space for name in ("one", "two")]
    assert spaces == [" ", " "]


def test_the_script_says_what_it_lacks(tmp_path: Path) -> None:
    main = script("cogvlm").main
    with pytest.raises(SystemExit, match="--language_model is missing"):
        main(["--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"\['sft', 'stage1', 'stage2'\]"):
        main(["--output_dir", str(tmp_path), "--language_model", "x", "--stage", "stage9"])
    with pytest.raises(SystemExit, match="--group_by_length is for --stage sft"):
        main(["--output_dir", str(tmp_path), "--language_model", "x", "--group_by_length", "true"])
