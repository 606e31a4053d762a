"""The demo from end to end at a hundredth of its length, and the page that it writes."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_vlp.cli.demo import MODEL_FOLDER, STEPS, command_of, main
from hf_vlp.cli.demo_report import loss_curves
from hf_vlp.cli.report import CaptionCard, Curve, Metric, RetrievalQuery, captions_picture, curve_svg, write_report


@pytest.mark.slow
def test_the_demo_runs_and_leaves_what_it_promises(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    out = tmp_path / "demo"
    assert main(["--output", str(out), "--scale", "0.005"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    promised = {"seconds", "object_accuracy_unseen", "object_accuracy_heldout", "t2i_r1_itc", "t2i_r1_itm"}
    assert promised <= set(metrics)
    assert all(0 <= value <= 1 for name, value in metrics.items() if name != "seconds")
    said = capfd.readouterr().out
    assert f'from_pretrained("{out / MODEL_FOLDER}")' in said
    assert all(f"{step.script}.py" in said for step in STEPS)

    card = (out / MODEL_FOLDER / "README.md").read_text()
    assert f'from_pretrained("{MODEL_FOLDER}"' in card and '"model"' not in card

    # Plain transformers classes load it; the picture alone gives a caption.
    processor = AutoProcessor.from_pretrained(out / MODEL_FOLDER)
    model = AutoModelForImageTextToText.from_pretrained(out / MODEL_FOLDER)
    inputs = processor(images=Image.new("RGB", (40, 40)), text="", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3).shape[0] == 1

    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") > 50 and page.count("<svg") == len(STEPS)
    assert not re.search(r'(src|href)="(?!data:)', page), "the page must hold everything itself"
    assert Image.open(out / "captions.png").width > 6 * 160


def test_a_failing_step_stops_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("hf_vlp.cli.demo.command_of", lambda *_: ["false", "false"])
    monkeypatch.setattr("hf_vlp.cli.demo.TEXTS", 10)
    assert main(["--output", str(tmp_path)]) == 1
    assert "ended with status 1" in capsys.readouterr().err


def test_every_step_names_arguments_that_its_script_has(tmp_path: Path) -> None:
    for step in STEPS:
        command = command_of(step, tmp_path, 1.0, 0)
        assert Path(command[1]).is_file() and Path(command[3]).is_file()
        assert command[command.index("--max_steps") + 1] == str(step.max_steps)
        assert not any("{" in part for part in command)


def test_scale_must_be_positive(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--scale", "0"])
    assert "--scale must be above 0" in capsys.readouterr().err


def test_curves_are_the_terms_by_name(tmp_path: Path) -> None:
    history = [{"step": 1, "loss": 3.0, "loss_itc": 2.0, "loss_itm": 1.0}, {"step": 5, "loss": 1.0, "loss_itc": 0.5}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [*history, {"step": 5, "runtime": 1}]}))
    itc, itm = loss_curves(tmp_path)
    assert (itc.name, list(itc.steps), list(itc.values)) == ("ITC", [1, 5], [2.0, 0.5])
    assert (itm.name, list(itm.steps)) == ("ITM", [1])


def test_curve_svg_draws_points_within_its_frame() -> None:
    svg = str(curve_svg("a < b", [Curve("ITC", [0, 10], [4.0, 1.0], chance=4.2)]))
    points = re.search(r'points="([^"]+)"', svg)[1]
    for point in points.split():
        x, y = map(float, point.split(","))
        assert 0 <= x <= 340 and 0 <= y <= 220
    assert "a &lt; b" in svg and 'class="chance"' in svg


def test_curve_svg_without_points_says_why() -> None:
    with pytest.raises(ValueError, match="logging_steps"):
        curve_svg("empty", [Curve("ITC", [], [])])


def test_picture_of_captions_shows_scenes_and_mistakes() -> None:
    right = CaptionCard(Image.new("RGB", (160, 160), "blue"), "a blue ring", "a blue ring", {"blue ring": True})
    wrong = CaptionCard(Image.new("RGB", (160, 160), "blue"), "a blue cross", "a blue ring", {"blue ring": False})
    sheet = captions_picture([right, wrong, right], columns=2)
    assert sheet.getpixel((20, 20)) == sheet.getpixel((200, 20)) == (0, 0, 255)
    # Three cards in two columns: the last place is empty.
    below = sheet.height // 2 + 40
    assert sheet.getpixel((20, below)) == (0, 0, 255) and sheet.getpixel((300, below)) == (255, 255, 255)
    # Only the caption that has a mistake is red.
    reddish = [colour for _, colour in sheet.crop((184, 176, 360, 200)).getcolors(1000) if colour[0] > 1.5 * colour[1]]
    others = [colour for _, colour in sheet.crop((0, 176, 180, 200)).getcolors(1000) if colour[0] > 1.5 * colour[1]]
    assert reddish and not others


def test_report_escapes_what_the_model_says(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 4), "red")
    write_report(
        tmp_path / "report.html",
        title="t",
        summary="s",
        metrics=[Metric("accuracy", "90%", "m")],
        captions={"h": ("text", [CaptionCard(image, "<script>alert(1)</script>", "true", {"red ring": False})])},
        retrieval={"r": ("text", [RetrievalQuery("q", [image], [True])])},
        matrix=([image], ["a"], [[0.5]]),
        curves={"stage": [Curve("ITC", [1, 2], [2.0, 1.0])]},
        usage="code",
        footer="f",
    )
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "✗ red ring" in page
