"""LLaVA's two ways to bring a picture to the tower's size: filled up to a square, or cut."""

import torch
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from tests.reference.cases import Case, reference


@reference("llava/expand2square")
def test_expand2square(case: Case) -> None:
    crop = case.config["crop"]
    processors = {
        pad: LlavaImageProcessorPil(
            size={"shortest_edge": crop}, crop_size={"height": crop, "width": crop}, do_pad=pad
        )
        for pad in (True, False)
    }
    colour = tuple(int(255 * mean) for mean in processors[True].image_mean)
    for number in range(len(case.config["images"])):
        pixels = case.inputs[f"image{number}"]
        square = processors[True].pad_to_square(pixels.permute(2, 0, 1).numpy(), background_color=colour)
        case.compare(f"square/{number}", torch.from_numpy(square).permute(1, 2, 0))
        image = Image.fromarray(pixels.numpy())
        for pad, name in ((True, "pixel_values"), (False, "pixel_values_no_pad")):
            case.compare(f"{name}/{number}", processors[pad]([image], return_tensors="pt")["pixel_values"][0])
