import json

import pytest

from hf_vlp.data import load_shapes
from hf_vlp.data.records import ErrorRateExceeded
from hf_vlp.evaluation import caption_metrics, evaluate_captioning, evaluate_shapes_captions, tokenize_captions
from hf_vlp.evaluation.captioning import score_captions
from tests.bootstrapping.blip import blip_model, blip_processor
from tests.evaluation.fakes import FakeWriter, FakeWriterProcessor, numbered_image
from tests.tiny import blip2

WRITTEN = ["A red circle!", "two dogs' toys", "", "a star."]
REFERENCES = [["a red circle", "One red circle."], ["two toys"], ["nothing"], ["the star", "a star"]]


def rows() -> list[dict]:
    return [{"image": numbered_image(i), "text": r, "image_id": 100 + i} for i, r in enumerate(REFERENCES)]


def test_captions_are_scored_and_written_in_the_format_of_coco(tmp_path):
    file = tmp_path / "results" / "captions.json"
    model = FakeWriter(WRITTEN)
    result = evaluate_captioning(
        model, FakeWriterProcessor(), rows(), batch_size=3, captions_file=file, details=True, show_progress=False
    )
    expected = caption_metrics(tokenize_captions(WRITTEN), [tokenize_captions(r) for r in REFERENCES])
    assert result["metrics"] == {name: score.corpus for name, score in expected.items()}
    assert result["samples"] == {
        "images": 4,
        "references": 6,
        "empty_captions": 1,
        "skipped_texts": 0,
        "skipped_images": 0,
    }
    assert json.loads(file.read_text()) == [{"image_id": 100 + i, "caption": w} for i, w in enumerate(WRITTEN)]
    assert [path.name for path in file.parent.iterdir()] == ["captions.json"]
    assert result["details"][1]["references"] == ["two toys"]
    assert result["details"][1]["rouge_l"] == expected["rouge_l"].per_image[1]
    assert [call["images"] for call in model.calls] == [3, 1]


def test_generation_arguments_reach_the_model():
    model, processor = FakeWriter(WRITTEN), FakeWriterProcessor()
    model.train()
    options = {"batch_size": 4, "show_progress": False}
    evaluate_captioning(model, processor, rows(), prompt="a photo of", generation={"top_p": 0.9}, **options)
    evaluate_captioning(model, processor, rows(), num_beams=1, min_new_tokens=2, **options)
    assert model.calls == [
        {"num_beams": 5, "max_new_tokens": 30, "length_penalty": 1.0, "top_p": 0.9, "images": 4, "training": False},
        {"num_beams": 1, "max_new_tokens": 30, "min_new_tokens": 2, "images": 4, "training": False},
    ]
    assert processor.prompts == ["a photo of"] * 4 + [""] * 4
    assert processor.sides == {"left"}
    assert processor.tokenizer.padding_side == "right"
    assert model.training
    with pytest.raises(ValueError, match="num_return_sequences"):
        evaluate_captioning(model, processor, rows(), generation={"num_return_sequences": 2}, **options)


def test_an_encoder_decoder_writes_no_prompt_and_pads_on_its_own_side():
    model, processor = FakeWriter(WRITTEN, repeat_prompt=False), FakeWriterProcessor()
    result = evaluate_captioning(model, processor, rows(), prompt="a photo of", details=True, show_progress=False)
    assert [one["caption"] for one in result["details"]] == WRITTEN
    assert processor.sides == {"right"}


def test_rows_of_one_image_are_captioned_once():
    separate = [{"image": numbered_image(i), "text": t, "image_id": i} for i, r in enumerate(REFERENCES) for t in r]
    results = [
        evaluate_captioning(FakeWriter(WRITTEN), FakeWriterProcessor(), data, show_progress=False)
        for data in (separate, rows())
    ]
    assert results[0] == results[1]


def test_unusable_rows_stop_the_evaluation_or_are_left_out_and_counted():
    data = rows()
    data[0]["image"] = {"bytes": None, "path": "/nowhere/a.png"}
    data[2]["text"] = None
    model = FakeWriter(WRITTEN)
    with pytest.raises(ErrorRateExceeded, match="texts cannot be used.*row 2"):
        evaluate_captioning(model, FakeWriterProcessor(), data, show_progress=False)
    data[2]["text"] = "nothing"
    with pytest.raises(ErrorRateExceeded, match=r"1 of 4 images.*row 0 \(/nowhere/a.png\): image_missing"):
        evaluate_captioning(model, FakeWriterProcessor(), data, show_progress=False)
    result = evaluate_captioning(model, FakeWriterProcessor(), data, max_bad_rate=0.3, show_progress=False)
    assert result["metrics"] == score_captions(WRITTEN[1:], REFERENCES[1:])["metrics"]
    assert result["samples"]["images"] == 3
    with pytest.raises(ValueError, match="no column 'text'"):
        evaluate_captioning(model, FakeWriterProcessor(), [{"image": numbered_image(0), "caption": "x"}])


@pytest.mark.parametrize("kind", sorted(blip2.LANGUAGE_MODELS))
@pytest.mark.parametrize("prompt", ["", "a photo of"])
def test_batches_do_not_change_the_captions_of_blip2(kind: str, prompt: str):
    model, processor = blip2.generation_model(kind), blip2.generation_processor(kind)
    data = [{"image": image, "text": text} for image, text in zip(blip2.images(4), blip2.TEXTS)]
    batched, single = (
        evaluate_captioning(
            model,
            processor,
            data,
            batch_size=size,
            prompt=prompt,
            num_beams=2,
            max_new_tokens=6,
            details=True,
            show_progress=False,
        )  # fmt: skip
        for size in (3, 1)
    )
    assert batched["details"] == single["details"]
    inputs = processor(images=blip2.images(1), return_tensors="pt", **({"text": [prompt]} if prompt else {}))
    written = model.generate(**inputs, num_beams=2, max_new_tokens=6, length_penalty=1.0)
    if kind != "t5":
        written = written[:, inputs["input_ids"].shape[1] :]
    assert batched["details"][0]["caption"] == processor.batch_decode(written, skip_special_tokens=True)[0].strip()


def test_blips_prompt_is_not_part_of_the_caption():
    """Its decoder reads the prompt with a start of its own and without the end."""
    model, processor = blip_model(), blip_processor()
    data = [{"image": image, "text": text} for image, text in zip(blip2.images(3), blip2.TEXTS)]
    options = {"prompt": "A photo of", "num_beams": 2, "max_new_tokens": 6, "details": True, "show_progress": False}
    found = [one["caption"] for one in evaluate_captioning(model, processor, data, **options)["details"]]
    inputs = processor(images=blip2.images(3), text=["a photo of"] * 3, padding=True, return_tensors="pt")
    written = model.generate(**inputs, num_beams=2, max_new_tokens=6, length_penalty=1.0)
    prompted = processor.batch_decode(written, skip_special_tokens=True)
    assert all(text.startswith("a photo of") for text in prompted)
    assert found == [text.removeprefix("a photo of").strip() for text in prompted]


def test_shapes_captions_are_compared_with_the_scene(tmp_path):
    scenes = [
        [{"color": "red", "shape": "circle"}, {"color": "blue", "shape": "star"}],
        [{"color": "green", "shape": "square"}],
        [{"color": "red", "shape": "circle"}],
    ]
    data = [{"image": numbered_image(i), "objects": objects, "key": str(i)} for i, objects in enumerate(scenes)]
    written = ["a red circle and a green star", "a green square", "a red circle and a blue star"]
    file = tmp_path / "captions.json"
    result = evaluate_shapes_captions(
        FakeWriter(written), FakeWriterProcessor(), data, details=True, captions_file=file, show_progress=False
    )
    # One of two, one of one, one of one objects; the first and the last scene have one thing that is not there.
    assert result["metrics"] == pytest.approx(
        {"object_accuracy": 3 / 4, "scene_accuracy": 1 / 3, "spurious_per_scene": 2 / 3}
    )
    assert result["object_accuracy_by_count"] == {"1": 1.0, "2": 0.5}
    assert result["details"][0] == {
        "key": "0",
        "caption": written[0],
        "objects": ["red circle", "blue star"],
        "correct": [True, False],
        "spurious": ["green star"],
    }
    assert len(json.loads(file.read_text())) == 3


def test_true_shapes_captions_score_one():
    data = load_shapes("test", size=20)
    truth = [row["text"][0] for row in data]
    numbered = [row | {"image": numbered_image(i)} for i, row in enumerate(data)]
    result = evaluate_shapes_captions(FakeWriter(truth), FakeWriterProcessor(), numbered, show_progress=False)
    assert result["metrics"] == {"object_accuracy": 1.0, "scene_accuracy": 1.0, "spurious_per_scene": 0.0}


def test_data_without_scenes_is_refused():
    with pytest.raises(ValueError, match="no column 'objects'; it has.*'text'"):
        evaluate_shapes_captions(FakeWriter(WRITTEN), FakeWriterProcessor(), rows())
