"""LLaVA-NeXT against the original: grids, tiles, unpadding, the three ways to join tiles, loss and gradients."""

import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from hf_vlp.models.llava.anyres_llava import grid_shape, merge_tiles
from hf_vlp.models.llava.conversion_llava import to_original
from hf_vlp.models.llava.modeling_llava import LlavaNextForConditionalGeneration
from tests.reference.cases import Case, reference
from tests.reference.test_llava_splice import compare_where_real, expand, padded, recorded_model

MERGED = ("spatial_unpad", "spatial", "flat")


def swapped(pairs: list[list[int]]) -> list[list[int]]:
    """(width, height) of the original to (height, width), and back."""
    return [[second, first] for first, second in pairs]


def unpadded(tensor: Tensor, size: tuple[int, int]) -> Tensor:
    """A (C, H, W) map cut by what the package does between two tiles: as one tile of a map of any shape."""
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    return unpad_image(tensor, list(size))


def stacked(tiles: list[Tensor]) -> Tensor:
    """Tiles of pictures of several grids in one tensor, zeros behind those of the smaller ones."""
    most = max(len(one) for one in tiles)
    return torch.stack([torch.cat([one, one.new_zeros(most - len(one), *one.shape[1:])]) for one in tiles])


@reference("llava/anyres")
def test_anyres(case: Case) -> None:
    config, inputs = case.config, case.inputs
    for number, (pinpoints, tile) in enumerate(zip(config["pinpoint_sets"], config["patch_sizes"], strict=True)):
        best, shapes = [], []
        for width, height in inputs["sizes"].tolist():
            best.append(select_best_resolution((height, width), swapped(pinpoints))[::-1])
            shapes.append(grid_shape((height, width), swapped(pinpoints), tile)[::-1])
        case.compare(f"best_resolution/set{number}", torch.tensor(best))
        case.compare(f"grid_shape/set{number}", torch.tensor(shapes))

    crop = config["crop"]
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": crop},
        crop_size={"height": crop, "width": crop},
        image_grid_pinpoints=swapped(config["image_grid_pinpoints"]),
    )
    for number in range(len(config["images"])):
        image = Image.fromarray(inputs[f"image{number}"].numpy())
        case.compare(f"pixel_values/{number}", processor([image], return_tensors="pt")["pixel_values"][0])

    for number, ((height, width), size) in enumerate(
        zip(inputs["unpad_hw"].tolist(), inputs["unpad_sizes"].tolist(), strict=True)
    ):
        case.compare(f"unpad/{number}", unpadded(inputs["unpad_tensor"][:, :height, :width], (size[1], size[0])))

    sizes = torch.tensor(swapped(config["merge_sizes"]))
    tiles = [inputs[f"merge_tiles{number}"] for number in range(len(sizes))]
    for merge_type in MERGED:
        model = recorded_model(case, settings={"mm_patch_merge_type": merge_type}, tiles=True)
        assert isinstance(model, LlavaNextForConditionalGeneration)
        compare_merged(case, model, merge_type, stacked(tiles), sizes)
        if merge_type == "spatial_unpad":
            compare_single(case, model)


def compare_merged(
    case: Case, model: LlavaNextForConditionalGeneration, name: str, pixels: Tensor, sizes: Tensor
) -> None:
    with torch.no_grad():
        lengths = [len(one) for one in model.image_features(pixels, sizes)]
    rows, targets, used = expand(case, model, lengths)
    pad, words = case.config["pad_token_id"], case.config["vocab_size"]
    ids = padded(rows, pad, "right")
    labels = padded(targets, case.config["ignore_index"], "right")
    mask = padded([torch.ones_like(row) for row in rows], 0, "right")
    embeds = model.embed(ids, pixels[used], sizes[used])
    case.compare(f"{name}/inputs_embeds", embeds * mask[..., None])
    case.compare(f"{name}/labels", labels)
    case.compare(f"{name}/attention_mask", mask)
    model.train()
    model.model.vision_tower.requires_grad_(False)
    inputs = {"input_ids": ids, "pixel_values": pixels[used], "image_sizes": sizes[used], "attention_mask": mask}
    loss = model(**inputs, labels=labels).loss
    case.compare(f"{name}/loss", loss)
    if f"{name}/logits" in case.output_names:
        model.eval()
        with torch.no_grad():
            compare_where_real(case, f"{name}/logits", model(**inputs).logits[..., :words], mask)
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        original = to_original(gradients, linear=model.linear_projector, words=words)
        for key in case.output_names:
            if key.startswith("grad/"):
                case.compare(key, original[key.removeprefix("grad/")])


def compare_single(case: Case, model: LlavaNextForConditionalGeneration) -> None:
    """The first row with its base picture alone, which ends with one newline."""
    name = "spatial_unpad_single_tile"
    with torch.no_grad():
        states = model.project(model.tower_states(case.inputs["merge_tiles0"][:1]))
        feature = merge_tiles(states, (1, 1), (1, 1), model.model.image_newline)
        rows, targets, _ = expand(case, model, [len(feature)] * 99)
        case.compare(f"{name}/inputs_embeds", model.embed(rows[0][None], image_features=[feature]))
        case.compare(f"{name}/labels", targets[0][None])
