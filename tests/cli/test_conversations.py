"""`hf-vlp conversations show`."""

import json

import pytest
from PIL import Image

from hf_vlp.cli.errors import EXIT_FAILED, EXIT_USAGE
from hf_vlp.cli.main import main
from tests.tiny import llava as tiny


@pytest.fixture
def data(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    said = [{"from": "human", "value": "<image>\nwhat is <this> ?"}, {"from": "gpt", "value": "a red square"}]
    path = tmp_path / "said.json"
    path.write_text(json.dumps([{"id": "x1", "image": "a.png", "conversations": said}]))
    return path


def test_every_template_is_shown(data, capsys):
    assert main(["conversations", "show", "--data", str(data)]) == 0
    shown = capsys.readouterr().out
    for name in ("plain", "v0", "vicuna_v1", "llama_2", "mpt", "cogvlm_chat", "qwen_vl"):
        assert f"== {name}\n" in shown
    assert "USER: [~<image>~]\nwhat is <this> ? ASSISTANT:[+ a red square</s>+]" in shown


def test_a_page_shows_tokens_with_their_masks(data, tmp_path, capsys):
    model, processor = tiny.llava()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    page = tmp_path / "page.html"
    options = ["--data", str(data), "--processor", str(tmp_path / "model"), "--template", "vicuna_v1"]
    assert main(["conversations", "show", *options, "--output", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    count = processor.prepare_images([Image.new("RGB", (8, 8))])[1][0]
    assert f"&lt;image&gt; x {count}" in text and "1 of 1 images" in text
    assert '<span class="learned token">square</span>' in text
    assert '<span class="read token">what</span>' in text
    assert "<this>" not in text


def test_what_is_wrong_is_one_line(data, capsys):
    assert main(["conversations", "show", "--template", "vicuna", "--data", str(data)]) == EXIT_USAGE
    assert "there is no 'vicuna'" in capsys.readouterr().err
    assert main(["conversations", "show", "--template", "chat", "--data", str(data)]) == EXIT_USAGE
    assert "--processor" in capsys.readouterr().err
    assert main(["conversations", "show", "--data", str(data.with_name("none.json"))]) == EXIT_FAILED
    assert "none.json" in capsys.readouterr().err
    said = json.loads(data.read_text())
    del said[0]["image"]
    data.write_text(json.dumps(said))
    assert main(["conversations", "show", "--template", "plain", "--data", str(data)]) == EXIT_FAILED
    assert "x1" in capsys.readouterr().err
