"""Files and texts that a web-scale set of pairs holds, each with what is to become of it."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

SIDE = 48


def picture(mode: str = "RGB", size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """Noise, which compresses badly: cutting the file off cuts pixels off."""
    values = np.random.Generator(np.random.Philox(key=3)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_with_header(width: int, height: int) -> bytes:
    """A PNG that claims a size in its header and holds next to nothing."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + content


def rotated_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(size=(SIDE, 2 * SIDE)), "JPEG", exif=exif)


def usable_images() -> dict[str, Any]:
    """Odd but whole images: none of them may be left out."""
    frames = [picture().rotate(90 * turn) for turn in range(3)]
    wide = Image.fromarray(np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE) * 28)
    palette = picture("P")
    clear = picture("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    broken_exif = encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\x7f" * 40)
    return {
        "rgb_png": encoded(picture(), "PNG"),
        "rgb_jpeg": encoded(picture(), "JPEG"),
        "rgb_webp": encoded(picture(), "WEBP"),
        "cmyk_jpeg": encoded(picture("CMYK"), "JPEG"),
        "grey_jpeg": encoded(picture("L"), "JPEG"),
        "progressive_jpeg": encoded(picture(), "JPEG", progressive=True),
        "rotated_jpeg": rotated_jpeg(),
        "broken_exif_jpeg": broken_exif,
        "palette_png": encoded(palette, "PNG"),
        "palette_transparent_png": encoded(palette, "PNG", transparency=b"\x00" * 100 + b"\xff" * 156),
        "two_colours_png": encoded(picture("1"), "PNG"),
        "alpha_png": encoded(clear, "PNG"),
        "grey_alpha_png": encoded(picture("LA"), "PNG"),
        "sixteen_bit_png": encoded(wide, "PNG"),
        "sixteen_bit_tiff": encoded(wide, "TIFF"),
        "float_tiff": encoded(Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "TIFF"),
        "cmyk_tiff": encoded(picture("CMYK"), "TIFF"),
        "one_pixel_png": encoded(picture(size=(1, 1)), "PNG"),
        "one_pixel_gif": encoded(picture("P", (1, 1)), "GIF"),
        "thin_png": encoded(picture(size=(40, 1)), "PNG"),
        "animated_gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated_webp": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "animated_png": encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "bmp": encoded(picture(), "BMP"),
        "trailing_garbage_png": encoded(picture(), "PNG") + b"\xff" * 1000,
        "jpeg_called_png": {"bytes": encoded(picture(), "JPEG"), "path": "picture.png"},
        "pil": picture(),
        "array": np.asarray(picture()),
        "grey_array": np.asarray(picture("L")),
    }


def unusable_images() -> dict[str, tuple[Any, str]]:
    """Images that cannot be used, each with its reason."""
    png, jpeg = encoded(picture(), "PNG"), encoded(picture(), "JPEG")
    damaged = bytearray(png)
    damaged[len(png) // 2] ^= 0xFF
    lzw = encoded(picture(), "TIFF", compression="tiff_lzw")
    return {
        "none": (None, "image_missing"),
        "no_bytes_no_path": ({"bytes": None, "path": None}, "image_missing"),
        "empty_path": ("", "image_missing"),
        "no_file": ({"bytes": None, "path": "/no/such/file.png"}, "image_missing"),
        "nul_path": ("a\0b.png", "image_missing"),
        "folder": ("/", "image_missing"),
        "device": ("/dev/zero", "image_missing"),
        "address": ("https://example.org/a.png", "image_missing"),
        "zero_bytes": (b"", "image_empty"),
        "zero_bytes_in_row": ({"bytes": b"", "path": "a.png"}, "image_empty"),
        "number": (7, "image_wrong_type"),
        "real_array": (np.zeros((4, 4, 3)), "image_wrong_type"),
        "deep_array": (np.zeros((4, 4, 3, 2), np.uint8), "image_wrong_type"),
        "empty_array": (np.zeros((0, 4, 3), np.uint8), "image_wrong_type"),
        "odd_dict": ({"url": "x"}, "image_wrong_type"),
        "text_called_png": (
            {"bytes": b"<html><body>Not Found</body></html>", "path": "a.png"},
            "image_not_an_image",
        ),
        "utf16_text": ("this is text".encode("utf-16"), "image_not_an_image"),
        "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "image_not_an_image"),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image_not_an_image"),
        "zeros": (bytes(4096), "image_not_an_image"),
        "one_byte": (b"\x89", "image_not_an_image"),
        "png_signature_only": (png[:8], "image_not_an_image"),
        "half_png": (png[: len(png) // 2], "image_truncated"),
        "half_jpeg": (jpeg[: len(jpeg) // 2], "image_truncated"),
        "png_without_last_bytes": (png[:-40], "image_truncated"),
        "half_gif": (encoded(picture("P"), "GIF")[:900], "image_truncated"),
        "half_webp": (encoded(picture(), "WEBP", lossless=True)[:900], "image_corrupt"),
        "half_bmp": (encoded(picture(), "BMP")[:900], "image_truncated"),
        "half_tiff": (lzw[: len(lzw) // 2], "image_not_an_image"),
        "damaged_png": (bytes(damaged), "image_corrupt"),
        "huge_png": (png_with_header(60_000, 60_000), "image_too_large"),
        "larger_than_huge_png": (png_with_header(2**31 - 1, 2**31 - 1), "image_too_large"),
        "above_the_limit": (png_with_header(8_000, 7_000), "image_too_large"),
        "no_area": (png_with_header(0, 10), "image_not_an_image"),
        "line": (png_with_header(60_000, 1), "image_aspect"),
        "nan_tiff": (encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "image_corrupt"),
    }


def unusable_texts() -> dict[str, tuple[Any, str]]:
    """Texts that cannot be used, each with its reason."""
    return {
        "none": (None, "text_missing"),
        "no_texts": ([], "text_missing"),
        "only_none": ([None], "text_missing"),
        "empty": ("", "text_empty"),
        "blank": (" \t\n\u3000", "text_empty"),
        "number": (5, "text_not_string"),
        "real": (float("nan"), "text_not_string"),
        "bytes": (b"a red circle", "text_not_string"),
        "dict": ({"raw": "a red circle"}, "text_not_string"),
        "half_a_pair": ("\ud83d", "text_not_unicode"),
    }
