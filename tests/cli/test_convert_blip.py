"""`hf-vlp convert` of BLIP, both ways."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, BertTokenizer, PreTrainedModel

from hf_vlp.cli.errors import EXIT_USAGE
from hf_vlp.cli.main import main
from hf_vlp.models.blip.conversion_blip import load_folder
from hf_vlp.models.blip.med_blip import BlipMED
from hf_vlp.models.blip.modeling_blip import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
)
from hf_vlp.models.blip.pretraining_blip import BlipForPreTraining
from hf_vlp.models.blip.tasks_blip import BlipTasksForQuestionAnswering, BlipTasksForVisualReasoning, tasks_config
from tests.tiny.blip import DEC, ENC, VOCAB_SIZE, blip_config, spread_weights

HEADS = ["--vision_heads", "2", "--text_heads", "2"]


def made(name: str) -> PreTrainedModel:
    wide = blip_config(vision_width=48)
    models = {
        "captioning": lambda: BlipForConditionalGeneration(blip_config()),
        "retrieval": lambda: BlipForImageTextRetrieval(blip_config()),
        "vqa": lambda: BlipForQuestionAnswering(blip_config()),
        "vqa_of_different_widths": lambda: BlipTasksForQuestionAnswering(tasks_config(wide)),
        "nlvr": lambda: BlipTasksForVisualReasoning(tasks_config(blip_config(), merge_from=1, num_labels=2)),
        "both_stacks": lambda: BlipMED(wide),
    }
    torch.manual_seed(0)
    model = spread_weights(models[name]())
    model.tie_weights()
    return model.eval()


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A tokenizer of BERT's kind behind whose words there is room for [DEC] and [ENC]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = special + [f"w{i}" for i in range(VOCAB_SIZE - 2 - len(special))]
    BertTokenizer(vocab={token: i for i, token in enumerate(vocab)}).save_pretrained(tmp_path / "words")
    return tmp_path / "words"


@pytest.mark.parametrize("name", ["captioning", "retrieval", "vqa", "vqa_of_different_widths", "nlvr", "both_stacks"])
def test_there_and_back(name: str, tmp_path: Path, words: Path) -> None:
    model = made(name)
    model.save_pretrained(tmp_path / "ours")
    original, back = tmp_path / "original.safetensors", tmp_path / "back"
    assert main(["convert", "to-blip", str(tmp_path / "ours"), str(original)]) == 0
    assert "visual_encoder.blocks.0.attn.qkv.weight" in load_file(original)
    assert main(["convert", "blip", str(original), str(back), "--tokenizer", str(words), *HEADS]) == 0
    loaded = load_folder(back)
    assert type(loaded) is type(model)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for parameter, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[parameter], value), parameter
    assert "2201.12086" in (back / "README.md").read_text()
    text = loaded.config.text_config
    assert (text.bos_token_id, text.enc_token_id, text.sep_token_id) == (DEC, ENC, 3)
    processor = AutoProcessor.from_pretrained(back)
    assert processor.tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [DEC, ENC]
    assert processor.image_processor.size["height"] == model.config.vision_config.image_size


def test_a_pretraining_keeps_its_twin_and_queues(tmp_path: Path) -> None:
    model = BlipForPreTraining(blip_config(vision_width=48), queue_size=12)
    spread_weights(model.model)
    model.model.tie_weights()
    model.reset_momentum()
    with torch.no_grad():
        for value in model.momentum.parameters():
            value.mul_(0.5)
        model.temperature.fill_(0.05)
    model.queue.position.fill_(4)
    model.export(tmp_path / "ours")
    original, back = tmp_path / "original.safetensors", tmp_path / "back"
    assert main(["convert", "to-blip", str(tmp_path / "ours"), str(original)]) == 0
    assert {"visual_encoder_m.cls_token", "image_queue", "temp"} <= set(load_file(original))
    assert main(["convert", "blip", str(original), str(back), *HEADS]) == 0
    loaded = BlipForPreTraining.from_pretrained(back)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_failures(tmp_path: Path, words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = made("captioning")
    model.save_pretrained(tmp_path / "ours")
    original = tmp_path / "original.safetensors"
    assert main(["convert", "to-blip", str(tmp_path / "ours"), str(original)]) == 0
    tokenizer = BertTokenizer.from_pretrained(words)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(tmp_path / "more")
    line = ["convert", "blip", str(original), str(tmp_path / "back"), *HEADS]
    assert main([*line, "--tokenizer", str(tmp_path / "more")]) == EXIT_USAGE
    assert f"has {VOCAB_SIZE + 1} tokens with [DEC] and [ENC], the checkpoint {VOCAB_SIZE}" in capsys.readouterr().err
    state = load_file(original)
    towers = {n.replace("text_decoder.bert", "text_encoder"): v for n, v in state.items() if ".cls." not in n}
    save_file(towers, tmp_path / "towers.safetensors")
    line[2] = str(tmp_path / "towers.safetensors")
    assert main(line) == EXIT_USAGE
    assert "towers without a head" in capsys.readouterr().err
    config = json.loads((tmp_path / "ours" / "config.json").read_text()) | {"architectures": ["BlipModel"]}
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    assert main(["convert", "to-blip", str(tmp_path / "ours"), str(tmp_path / "again.safetensors")]) != 0
    assert "names the class 'BlipModel'" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()
