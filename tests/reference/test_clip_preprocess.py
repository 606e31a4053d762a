"""CLIP's image preprocessing against the original code."""

import numpy as np
from PIL import Image

from hf_vlp.models.clip.processing_clip import CLIPProcessor
from hf_vlp.models.clip.tokenization_clip import train_clip_tokenizer
from tests.reference.cases import Case, reference


@reference("clip/preprocess")
def test_preprocess(case: Case) -> None:
    processor = CLIPProcessor.for_image_size(train_clip_tokenizer([], 514), case.config["n_px"])
    images = []
    for index, spec in enumerate(case.config["images"]):
        pixels = case.inputs[f"image{index}"].numpy()
        palette = case.inputs.get(f"image{index}_palette")
        image = Image.fromarray(pixels)
        if palette is not None:
            image = Image.fromarray(pixels)
            image.putpalette(palette.numpy().astype(np.uint8).tobytes())
        assert (image.mode, list(image.size)) == (spec["mode"], spec["size"])
        images.append(image)
        case.compare(f"pixel_values{index}", processor(images=image, return_tensors="pt")["pixel_values"][0])
    together = processor(images=images, return_tensors="pt")["pixel_values"]
    for index, pixel_values in enumerate(together):
        case.compare(f"pixel_values{index}", pixel_values)
