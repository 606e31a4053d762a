"""`pipeline("image-to-text")`: every form of input gives the caption of `generate`, alone and in a batch."""

import base64
import io
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import Pipeline, pipeline
from transformers.pipelines.pt_utils import KeyDataset

import hf_vlp  # noqa: F401
from hf_vlp.pipelines import ImageToTextPipeline
from hf_vlp.pipelines.image_pipeline import open_image
from tests.hub import tiny
from tests.pipelines.architectures import OTHERS


@pytest.fixture(scope="module", params=["opt", "t5"])
def captioner(request: pytest.FixtureRequest) -> Pipeline:
    model, processor = tiny.blip2(request.param)
    return pipeline("image-to-text", model=model, processor=processor)


@pytest.fixture(scope="module")
def opt() -> Pipeline:
    model, processor = tiny.blip2("opt")
    return pipeline("image-to-text", model=model, processor=processor)


PICTURES = [tiny.image("red"), tiny.image("blue", (31, 17)), tiny.image("green"), tiny.image((250, 200, 10))]
PROMPTS = ["a red", "the big small circle on", "what is it ?", "square"]


def test_the_name_has_its_meaning_back(opt: Pipeline) -> None:
    assert type(opt) is ImageToTextPipeline
    assert opt.task == "image-to-text"


def test_an_image_alone_gives_what_generate_gives(captioner: Pipeline) -> None:
    model, processor = captioner.model, captioner.processor
    inputs = processor(images=PICTURES[0], text="", return_tensors="pt")
    new = model.generate(**inputs, max_new_tokens=6)
    if not model.language_model.config.is_encoder_decoder:
        new = new[:, inputs["input_ids"].shape[1] :]
    expected = processor.batch_decode(new, skip_special_tokens=True)[0].strip()
    assert captioner(PICTURES[0]) == [{"generated_text": expected}]
    assert expected


def test_captions_depend_on_the_image(opt: Pipeline) -> None:
    assert len({opt(picture)[0]["generated_text"] for picture in PICTURES}) > 1


def test_every_form_of_an_image_is_the_same_image(opt: Pipeline, tmp_path: Path) -> None:
    picture = PICTURES[0]
    path = tmp_path / "picture.png"
    picture.save(path)
    content = path.read_bytes()
    expected = opt(picture)
    forms: list[Any] = [
        str(path),
        path,
        content,
        bytearray(content),
        {"bytes": content, "path": None},
        {"bytes": None, "path": str(path)},
        {"image": picture},
        {"image": {"bytes": content, "path": "elsewhere.png"}},
        np.asarray(picture),
        base64.b64encode(content).decode(),
    ]
    for form in forms:
        assert opt(form) == expected, type(form)
    assert opt(images=picture) == opt(inputs=picture) == opt(image=picture) == expected


def test_a_url_is_read(opt: Pipeline, tmp_path: Path) -> None:
    PICTURES[1].save(tmp_path / "picture.png")
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: handler(*a, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_address[1]}"
            assert opt(f"{address}/picture.png", timeout=10) == opt(PICTURES[1])
            with pytest.raises(ValueError, match=r"can't read the image 'http.*missing\.png'"):
                opt(f"{address}/missing.png", timeout=10)
        finally:
            server.shutdown()
            thread.join(timeout=10)


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_of_pixels(opt: Pipeline, mode: str, tmp_path: Path) -> None:
    picture = Image.new("I;16", (9, 7), 4000) if mode == "I;16" else PICTURES[0].convert(mode)
    assert isinstance(opt(picture)[0]["generated_text"], str)
    assert open_image(picture).mode == "RGB"


def test_images_are_turned_upright() -> None:
    picture = Image.new("RGB", (4, 2), "red")
    exif = picture.getexif()
    exif[0x0112] = 6  # a quarter turn
    stream = io.BytesIO()
    picture.save(stream, "jpeg", exif=exif)
    assert open_image(stream.getvalue()).size == (2, 4)


def test_batches_give_what_images_give_alone(captioner: Pipeline) -> None:
    alone = [captioner(picture) for picture in PICTURES]
    for batch_size in (1, 3, 4, 7):
        assert captioner(PICTURES, batch_size=batch_size) == alone
    assert captioner(tuple(PICTURES), batch_size=2) == alone
    prompted = [
        captioner(picture, text=prompt, num_beams=2) for picture, prompt in zip(PICTURES, PROMPTS, strict=True)
    ]
    assert captioner(PICTURES, text=PROMPTS, num_beams=2, batch_size=4) == prompted


def test_workers_and_streams(opt: Pipeline) -> None:
    expected = opt(PICTURES)
    assert opt(PICTURES, num_workers=1, batch_size=2) == expected
    assert list(opt((picture for picture in PICTURES), batch_size=3)) == expected
    assert list(opt(iter(PICTURES), batch_size=3)) == expected
    assert opt([]) == []


def test_data_sets(opt: Pipeline) -> None:
    class Pictures(Dataset):
        def __len__(self) -> int:
            return len(PICTURES)

        def __getitem__(self, index: int) -> Image.Image:
            return PICTURES[index]

    expected = opt(PICTURES)
    results = opt(Pictures(), batch_size=3)
    assert len(results) == len(PICTURES)
    assert list(results) == expected
    rows = datasets.Dataset.from_dict({"image": PICTURES, "text": [["a caption"]] * 4}).cast_column(
        "image", datasets.Image()
    )
    assert list(opt(rows, batch_size=2)) == expected
    assert list(opt(KeyDataset(rows, "image"), batch_size=2)) == expected
    undecoded = rows.cast_column("image", datasets.Image(decode=False))
    assert list(opt(undecoded.to_iterable_dataset(), batch_size=2)) == expected


def test_a_prompt_is_continued(opt: Pipeline) -> None:
    new = opt(PICTURES[0], text="a red")[0]["generated_text"]
    assert opt(PICTURES[0], prompt="a red")[0]["generated_text"] == new
    assert opt({"image": PICTURES[0], "text": "a red"})[0]["generated_text"] == new
    assert opt(PICTURES[0], text="a red", return_full_text=True)[0]["generated_text"] == f"a red {new}"
    assert not new.startswith("a red")
    assert new != opt(PICTURES[0])[0]["generated_text"]


def test_generation_arguments(opt: Pipeline) -> None:
    def length(**arguments: Any) -> int:
        return len(opt(PICTURES[0], **arguments)[0]["generated_text"].split())

    assert length(max_new_tokens=3, min_new_tokens=3) == 3
    assert length(generate_kwargs={"max_new_tokens": 4, "min_new_tokens": 4}) == 4
    # What the folder's generation_config.json says.
    assert length(min_new_tokens=6) == 6
    several = opt(PICTURES[:2], num_beams=3, num_return_sequences=3, batch_size=2)
    assert [len(results) for results in several] == [3, 3]
    torch.manual_seed(0)
    first = opt(PICTURES[0], do_sample=True, top_p=0.9)
    torch.manual_seed(0)
    assert opt(PICTURES[0], do_sample=True, top_p=0.9) == first
    model, processor = opt.model, opt.processor
    fixed = pipeline("image-to-text", model=model, processor=processor, max_new_tokens=2, min_new_tokens=2)
    assert len(fixed(PICTURES[0])[0]["generated_text"].split()) == 2


def test_half_precision() -> None:
    model, processor = tiny.blip2("opt")
    captioner = pipeline("image-to-text", model=model.to(torch.bfloat16), processor=processor)
    assert captioner(PICTURES[:2], batch_size=2)[0][0]["generated_text"]


def test_a_processor_from_before_query_tokens_were_saved() -> None:
    model, processor = tiny.blip2("opt")
    expected = pipeline("image-to-text", model=model, processor=processor)(PICTURES[0])
    processor.num_query_tokens = None
    assert pipeline("image-to-text", model=model, processor=processor)(PICTURES[0]) == expected


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name: str) -> None:
    parts = OTHERS[name]()
    captioner = pipeline("image-to-text", **parts, max_new_tokens=5, min_new_tokens=5)
    alone = [captioner(picture) for picture in PICTURES]
    assert len({result[0]["generated_text"] for result in alone}) > 1, "the picture is ignored"
    assert captioner(PICTURES, batch_size=3) == alone
    if "processor" not in parts:
        with pytest.raises(ValueError, match="no processor that joins a prompt"):
            captioner(PICTURES[0], text="a red")
        return
    prompted = [captioner(picture, text=text) for picture, text in zip(PICTURES, PROMPTS, strict=True)]
    assert prompted != alone
    assert captioner(PICTURES, text=PROMPTS, batch_size=4) == prompted


def test_the_prompt_is_not_given_back() -> None:
    """BLIP returns it with its first token replaced and its last one cut, LLaVA as it was."""
    for name in ("blip", "git", "llava without a chat template"):
        captioner = pipeline("image-to-text", **OTHERS[name](), max_new_tokens=2, min_new_tokens=2)
        assert len(captioner(PICTURES[0], text="the big small circle")[0]["generated_text"].split()) <= 2, name


# Failures


def test_no_image(opt: Pipeline) -> None:
    with pytest.raises(ValueError, match="needs an image"):
        opt()
    with pytest.raises(ValueError, match="can't read images from a int"):
        opt(3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "cannot identify|empty"), (b"no image at all", "cannot identify"), (b"\x89PNG\r\n\x1a\n cut", "")],
)
def test_a_broken_file_is_named(opt: Pipeline, tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"can't read the image '.*broken\.png': .*({reason})"):
        opt([PICTURES[0], path])


def test_a_missing_file_is_named(opt: Pipeline) -> None:
    with pytest.raises(ValueError, match="can't read the image 'nowhere/picture.png'"):
        opt("nowhere/picture.png")
    with pytest.raises(ValueError, match="both 'bytes' and 'path' are empty"):
        opt({"bytes": None, "path": None})


def test_prompts_must_fit_the_images(opt: Pipeline) -> None:
    with pytest.raises(ValueError, match="2 image.* but 3 prompt"):
        opt(PICTURES[:2], text=["a", "b", "c"])
    with pytest.raises(ValueError, match="needs a list of as many images"):
        opt(PICTURES[0], text=["a", "b"])


def test_unknown_and_doubled_parameters(opt: Pipeline) -> None:
    with pytest.raises(TypeError, match=r"does not know the parameter\(s\) \['num_beems'\]"):
        opt(PICTURES[0], num_beems=2)
    with pytest.raises(ValueError, match="'max_new_tokens' is given twice"):
        opt(PICTURES[0], max_new_tokens=2, generate_kwargs={"max_new_tokens": 3})


def test_what_the_pipeline_needs() -> None:
    model, processor = tiny.clip()
    with pytest.raises(ValueError, match="needs a model with `generate`; CLIPModel has none"):
        pipeline("image-to-text", model=model, processor=processor)
    model, processor = tiny.blip2("opt")
    with pytest.raises(ValueError, match="found no tokenizer and no image_processor"):
        pipeline("image-to-text", model=model)
