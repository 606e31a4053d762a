"""From whatever a row calls an image to an RGB picture, or to the reason why not."""

import logging
import os
import stat
import warnings
from collections.abc import Mapping
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from .records import BadRecord, RecordLimits

logger = logging.getLogger(__name__)

# Formats whose readers need no outside program and identify themselves by their first bytes. EPS (runs Ghostscript),
# TGA (has no signature, so that noise passes for it) and the like are left out on purpose.
FORMATS: tuple[str, ...] = (
    "PNG",
    "JPEG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "JPEG2000",
    "AVIF",
    "ICO",
)
_ORIENTATION = 0x0112


def decode_image(
    value: Any, limits: RecordLimits | None = None, background: tuple[int, int, int] | None = None
) -> Image.Image:
    """The picture of a record: RGB, upright, first frame.

    - An animation gives its first frame.
    - EXIF orientation is applied.
    - Transparent pixels show the colour that the file holds under them, as with CLIP, LAVIS and the image loader of
      transformers, so that training sees what a pipeline will see. `background` shows through them instead.
    - # Differs from the original: 16-bit grey is scaled to 8 bits; Pillow's `convert("RGB")` clips it to white.
    - CMYK, palette, grey and two-colour pictures are converted.

    Args:
        value: `{"bytes": …, "path": …}`, bytes, a path, a PIL image, or an array (H, W), (H, W, 3) or (H, W, 4) uint8.
        limits: sizes that are accepted, checked on the file's header before anything is decoded.
        background: colour behind transparent pixels, RGB 0-255; None ignores transparency.

    Raises:
        BadRecord: reasons `image_…` of `REASONS`.
    """
    limits = limits or RecordLimits()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = _open(value, limits)
        _check_size(image, limits)
        try:
            _load(image)
            image = _upright(image)
            image = _to_rgb(image, background)
        except BadRecord:
            raise
        except Exception as error:  # Pillow's readers let almost any exception through on damaged files.
            raise BadRecord(_damage(error), f"{type(error).__name__}: {error}") from error
    for warning in caught:
        logger.debug("while decoding an image: %s", warning.message)
    return image


def stored_bytes(value: Any, limits: RecordLimits | None = None) -> bytes | None:
    """The image file of a record as it is stored, whether it lies in the row or at a path; None for a picture in
    memory (a PIL image or an array). Whether it is a whole image, `decode_image` finds out.

    Args:
        value, limits: as for `decode_image`.

    Raises:
        BadRecord: reasons `image_missing`, `image_wrong_type`, `image_too_large`.
    """
    if isinstance(value, Image.Image | np.ndarray):
        return None
    return _content(value, limits or RecordLimits())


def _open(value: Any, limits: RecordLimits) -> Image.Image:
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, np.ndarray):
        return _from_array(value)
    content = _content(value, limits)
    if not content:
        raise BadRecord("image_empty")
    if len(content) > limits.max_bytes:
        raise BadRecord("image_too_large", f"{len(content)} bytes, limit {limits.max_bytes}")
    try:
        return Image.open(BytesIO(content), formats=_formats())
    except UnidentifiedImageError:
        raise BadRecord("image_not_an_image", f"starts with {content[:12]!r}") from None
    except Image.DecompressionBombError as error:
        raise BadRecord("image_too_large", str(error)) from None
    except Exception as error:
        raise BadRecord(_damage(error), f"{type(error).__name__}: {error}") from error


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this build of Pillow has."""
    Image.init()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)


def _content(value: Any, limits: RecordLimits) -> bytes:
    if isinstance(value, Mapping):
        if "bytes" not in value and "path" not in value:
            raise BadRecord("image_wrong_type", f"a dict with keys {sorted(map(str, value))}")
        held = value.get("bytes")
        value = held if held is not None else value.get("path")
    if value is None:
        raise BadRecord("image_missing", "neither bytes nor a path")
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str | os.PathLike):
        return _read(os.fspath(value), limits)
    raise BadRecord("image_wrong_type", type(value).__name__)


def _read(path: str | bytes, limits: RecordLimits) -> bytes:
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    if not path:
        raise BadRecord("image_missing", "empty path")
    if "://" in path:
        return _read_remote(path)
    try:
        status = os.stat(path)
        # A pipe or a device would be waited for without end.
        if not stat.S_ISREG(status.st_mode):
            raise BadRecord("image_missing", f"{path} is not a regular file")
        if status.st_size > limits.max_bytes:
            raise BadRecord("image_too_large", f"{path} has {status.st_size} bytes, limit {limits.max_bytes}")
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise BadRecord("image_missing", f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _read_remote(path: str) -> bytes:
    """A file inside an archive or on the Hub, as streaming datasets name them (`zip://a.png::x.zip`, `hf://…`)."""
    if path.startswith(("http://", "https://", "ftp://")):
        raise BadRecord("image_missing", f"{path} is an address, not a file: download the images first")
    from datasets.utils.file_utils import xopen

    try:
        with xopen(path, "rb") as file:
            return file.read()
    except Exception as error:
        raise BadRecord("image_missing", f"{path}: {type(error).__name__}: {error}") from None


def _from_array(array: np.ndarray) -> Image.Image:
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not shaped or 0 in array.shape:
        raise BadRecord(
            "image_wrong_type", f"array {array.shape} {array.dtype}; give (H, W), (H, W, 3) or (H, W, 4) uint8"
        )
    return Image.fromarray(array)


def _check_size(image: Image.Image, limits: RecordLimits) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise BadRecord("image_corrupt", f"{width} x {height} pixels")
    if width * height > limits.max_pixels:
        raise BadRecord("image_too_large", f"{width} x {height} pixels, limit {limits.max_pixels}")
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        raise BadRecord("image_aspect", f"{width} x {height} pixels, limit {limits.max_aspect_ratio:g} to 1")


def _load(image: Image.Image) -> None:
    # Another library may have set this switch, which fills what is missing of a truncated file with grey.
    tolerant, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        image.load()
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception as error:  # Damaged EXIF beside a whole picture: the picture stands as stored.
        logger.debug("EXIF not read: %s", error)
        return image
    return image.transpose(turn) if turn is not None else image


def _to_rgb(image: Image.Image, background: tuple[int, int, int] | None) -> Image.Image:
    if image.mode == "RGB":
        return image if type(image) is Image.Image else image.copy()
    if image.mode.startswith("I") or image.mode == "F":
        return _wide_to_grey(image).convert("RGB")
    if background is not None and (image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info):
        image = image.convert("RGBA")
        flat = Image.new("RGB", image.size, background)
        flat.paste(image, mask=image.getchannel("A"))
        return flat
    return image.convert("RGB")


def _wide_to_grey(image: Image.Image) -> Image.Image:
    """16 and 32 bits a pixel to 8: integers above 255 are taken as 16-bit, reals up to 1 as a share of white."""
    values = np.asarray(image)
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise BadRecord("image_corrupt", "pixels that are not numbers")
        scaled = values * 255.0 if values.max() <= 1.0 else values
    else:
        values = values.astype(np.int64)
        scaled = values // 257 if image.mode.startswith("I;16") or values.max() > 255 else values
    return Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8))


def _damage(error: Exception) -> str:
    text = str(error).lower()
    if "truncated" in text or isinstance(error, EOFError):
        return "image_truncated"
    if isinstance(error, Image.DecompressionBombError | MemoryError) or "decompressed data too large" in text:
        return "image_too_large"
    return "image_corrupt"
