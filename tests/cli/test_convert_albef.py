"""`hf-vlp convert` of ALBEF, both ways."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, BertTokenizer

from hf_vlp.cli.errors import EXIT_USAGE
from hf_vlp.cli.main import main
from hf_vlp.models.albef.conversion_albef import load_folder, save_original
from hf_vlp.models.albef.finetuning_albef import (
    AlbefForQuestionAnsweringFineTuning,
    AlbefForTextAssignment,
    AlbefForVisualReasoningFineTuning,
)
from hf_vlp.models.albef.modeling_albef import AlbefForImageTextRetrieval, AlbefPreTrainedModel
from hf_vlp.models.albef.modeling_albef_tasks import (
    AlbefForQuestionAnswering,
    AlbefForVisualEntailment,
    AlbefForVisualReasoning,
)
from hf_vlp.models.albef.pretraining_albef import AlbefForPreTraining
from tests.tiny import albef as tiny

HEADS = ["--vision_heads", "2", "--text_heads", "2"]
MODELS = {
    "retrieval": (AlbefForImageTextRetrieval, {}),
    "vqa": (AlbefForQuestionAnswering, {}),
    "nlvr": (AlbefForVisualReasoning, {"images_per_text": 2}),
    "ve": (AlbefForVisualEntailment, {"num_labels": 3}),
}


def made(cls: type, **changes: int) -> AlbefPreTrainedModel:
    torch.manual_seed(0)
    model = tiny.spread_weights(cls(tiny.albef_config(**changes)))
    model.tie_weights()
    return model.eval()


def pretraining() -> AlbefForPreTraining:
    torch.manual_seed(0)
    model = tiny.spread_weights(AlbefForPreTraining(tiny.albef_config(), queue_size=8))
    model.tie_weights()
    with torch.no_grad():
        for value in model.momentum.parameters():
            value.mul_(0.5)
        model.retrieval.temperature.fill_(0.05)
    model.queue.position.fill_(4)
    return model


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A tokenizer of BERT's kind as large as the models' vocabulary."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = special + [f"w{i}" for i in range(tiny.VOCAB_SIZE - len(special))]
    BertTokenizer(vocab={token: i for i, token in enumerate(vocab)}).save_pretrained(tmp_path / "words")
    return tmp_path / "words"


@pytest.mark.parametrize("kind", MODELS)
def test_there_and_back(kind: str, tmp_path: Path, words: Path) -> None:
    cls, changes = MODELS[kind]
    model = made(cls, **changes)
    model.save_pretrained(tmp_path / "ours")
    original, back = tmp_path / "original.safetensors", tmp_path / "back"
    assert main(["convert", "to-albef", str(tmp_path / "ours"), str(original)]) == 0
    assert "visual_encoder.blocks.0.attn.qkv.weight" in load_file(original)
    assert main(["convert", "albef", str(original), str(back), "--tokenizer", str(words), *HEADS]) == 0
    loaded = load_folder(back)
    assert type(loaded) is cls
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert "2107.07651" in (back / "README.md").read_text()
    assert (back / "modeling_albef.py").is_file(), "the code travels with the folder"
    text = loaded.config.text_config
    assert (text.pad_token_id, text.bos_token_id, text.eos_token_id, text.mask_token_id) == (0, 2, 3, 4)
    processor = AutoProcessor.from_pretrained(back)
    assert processor.image_processor.size["height"] == tiny.IMAGE_SIZE
    assert processor.max_words == (50 if kind == "vqa" else 30)


def test_a_pretraining_keeps_its_head_twin_and_queue(tmp_path: Path, words: Path) -> None:
    model = pretraining()
    model.export(tmp_path / "ours")
    original, back = tmp_path / "original.safetensors", tmp_path / "back"
    assert main(["convert", "to-albef", str(tmp_path / "ours"), str(original)]) == 0
    assert {"visual_encoder_m.cls_token", "image_queue", "text_encoder.cls.predictions.bias"} <= set(
        load_file(original)
    )
    assert main(["convert", "albef", str(original), str(back), "--tokenizer", str(words), *HEADS]) == 0
    loaded = AlbefForPreTraining.from_pretrained(back)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    # What question answering starts its decoder from.
    vqa = AlbefForQuestionAnsweringFineTuning.from_pretrained(back).model
    assert torch.equal(vqa.decoder.lm_head.transform.dense.weight, model.mlm_head.transform.dense.weight)


def test_text_assignment_starts_reasoning_over_two_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AlbefForTextAssignment(tiny.albef_config(images_per_text=2))
    save_original(model, tmp_path / "ta.safetensors")
    assert main(["convert", "albef", str(tmp_path / "ta.safetensors"), str(tmp_path / "back"), *HEADS]) == 0
    started = AlbefForVisualReasoningFineTuning.from_pretrained(tmp_path / "back").model
    for name, value in model.albef_model.state_dict().items():
        assert torch.equal(started.albef.state_dict()[name], value), name


def test_failures(tmp_path: Path, words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(AlbefForImageTextRetrieval).save_pretrained(tmp_path / "ours")
    original = tmp_path / "original.safetensors"
    assert main(["convert", "to-albef", str(tmp_path / "ours"), str(original)]) == 0
    tokenizer = BertTokenizer.from_pretrained(words)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(tmp_path / "more")
    line = ["convert", "albef", str(original), str(tmp_path / "back"), *HEADS]
    assert main([*line, "--tokenizer", str(tmp_path / "more")]) == EXIT_USAGE
    assert f"has {tiny.VOCAB_SIZE + 1} tokens, the checkpoint {tiny.VOCAB_SIZE}" in capsys.readouterr().err
    config = json.loads((tmp_path / "ours" / "config.json").read_text()) | {"architectures": ["AlbefModel"]}
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    assert main(["convert", "to-albef", str(tmp_path / "ours"), str(tmp_path / "again.safetensors")]) != 0
    assert "names the class 'AlbefModel'" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()
