"""Every odd file gives its picture or its reason, and nothing else."""

import io
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from transformers.image_utils import load_image

from hf_vlp.data import BadRecord, RecordLimits, decode_image
from tests.data.hostile import (
    SIDE,
    encoded,
    picture,
    png_with_header,
    rotated_jpeg,
    unusable_images,
    usable_images,
)


@pytest.mark.parametrize("name", usable_images())
def test_odd_but_whole_images_are_read(name: str) -> None:
    image = decode_image(usable_images()[name])
    assert image.mode == "RGB"
    assert type(image) is Image.Image
    assert min(image.size) >= 1


@pytest.mark.parametrize("name", unusable_images())
def test_unusable_images_give_their_reason(name: str) -> None:
    value, reason = unusable_images()[name]
    with pytest.raises(BadRecord) as caught:
        decode_image(value)
    assert caught.value.reason == reason, caught.value


def test_a_plain_image_keeps_its_pixels() -> None:
    assert decode_image(encoded(picture(), "PNG")).tobytes() == picture().tobytes()
    assert decode_image(picture()).tobytes() == picture().tobytes()
    assert decode_image(np.asarray(picture())).tobytes() == picture().tobytes()


def test_an_animation_gives_its_first_frame() -> None:
    for name in ("animated_png", "animated_gif"):
        first = Image.open(io.BytesIO(usable_images()[name])).convert("RGB")
        assert decode_image(usable_images()[name]).tobytes() == first.tobytes()


def test_orientation_is_applied() -> None:
    stored = Image.open(io.BytesIO(rotated_jpeg()))
    image = decode_image(rotated_jpeg())
    assert stored.size == (SIDE, 2 * SIDE) and image.size == (2 * SIDE, SIDE)
    assert image.tobytes() == stored.convert("RGB").transpose(Image.Transpose.ROTATE_270).tobytes()


@pytest.mark.parametrize("tag", range(1, 9))
def test_every_orientation_undoes_itself(tag: int) -> None:
    turned = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright = picture(size=(20, 12))
    exif = Image.Exif()
    exif[0x0112] = tag
    stored = upright.transpose(turned[tag]) if tag in turned else upright
    assert decode_image(encoded(stored, "PNG", exif=exif)).tobytes() == upright.tobytes()


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        image = decode_image(encoded(Image.fromarray(values), kind))
        assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_reals_are_shares_of_white() -> None:
    values = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    image = decode_image(encoded(Image.fromarray(values), "TIFF"))
    assert np.asarray(image)[0, :, 1].tolist() == [0, 127, 255]


def test_transparency_is_what_the_loader_of_transformers_makes_of_it() -> None:
    for name in ("alpha_png", "grey_alpha_png", "palette_transparent_png"):
        content = usable_images()[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = load_image(Image.open(io.BytesIO(content)))
        assert decode_image(content).tobytes() == loaded.tobytes()


def test_transparency_can_show_a_background() -> None:
    content = encoded(Image.new("RGBA", (4, 4), (1, 2, 3, 0)), "PNG")
    assert decode_image(content).getpixel((0, 0)) == (1, 2, 3)
    assert decode_image(content, background=(9, 8, 7)).getpixel((0, 0)) == (9, 8, 7)
    half = encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "PNG")
    assert decode_image(half, background=(255, 255, 255)).getpixel((0, 0)) == (127, 127, 127)
    for name in ("grey_alpha_png", "palette_transparent_png"):
        assert decode_image(usable_images()[name], background=(0, 0, 0)).mode == "RGB"


def test_limits_are_checked_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(self: Image.Image) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    limits = RecordLimits(max_pixels=1000, max_aspect_ratio=10)
    for size, reason in (((100, 11), "image_too_large"), ((110, 9), "image_aspect")):
        with pytest.raises(BadRecord) as caught:
            decode_image(png_with_header(*size), limits)
        assert caught.value.reason == reason
    with pytest.raises(BadRecord, match="image_too_large"):
        decode_image(bytes(2000), RecordLimits(max_bytes=1000))


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BadRecord, match="image_too_large"):
        decode_image(str(path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadRecord, match="image_missing"):
        decode_image(tmp_path / "pipe.png")


def test_the_switch_that_fills_truncated_files_with_grey_has_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(BadRecord, match="image_truncated"):
        decode_image(unusable_images()["half_jpeg"][0])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_no_warning_gets_out() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in usable_images().values():
            decode_image(value)
        for value, _ in unusable_images().values():
            with pytest.raises(BadRecord):
                decode_image(value)


def test_no_outside_program_is_started(tmp_path: Path) -> None:
    """Pillow hands PostScript to Ghostscript; a data set must not be able to start it."""
    script = tmp_path / "gs"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path / 'started'}\n")
    script.chmod(0o755)
    code = (
        "from hf_vlp.data import decode_image, BadRecord\n"
        "try:\n    decode_image(b'%!PS-Adobe-3.0 EPSF-3.0\\n%%BoundingBox: 0 0 9 9\\n%%EndComments\\nshowpage\\n')\n"
        "except BadRecord as error:\n    print(error.reason)\n"
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.strip() == "image_not_an_image", done.stderr
    assert not (tmp_path / "started").exists()


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]),
    cut=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=4),
)
def test_any_damage_gives_a_picture_or_a_reason(kind: str, cut: float, flips: list[tuple[float, int]]) -> None:
    content = bytearray(encoded(picture("RGB", (17, 13)), kind))
    for place, bits in flips:
        content[int(place * (len(content) - 1))] ^= bits
    content = bytes(content[: int(cut * len(content))] if cut < 0.9 else content)
    try:
        image = decode_image(content, RecordLimits(max_pixels=10_000))
    except BadRecord:
        return
    assert image.mode == "RGB" and image.width * image.height <= 10_000


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_noise_gives_a_reason(content: bytes) -> None:
    with pytest.raises(BadRecord):
        decode_image(content)
