"""The objectives alone on the recorded features of BLIP-2's first stage, without a network around them."""

import pytest
import torch

from hf_vlp.objectives.contrastive import query_contrastive_loss
from hf_vlp.objectives.language import language_modeling_loss
from hf_vlp.objectives.matching import hard_negatives, matching_loss
from tests.reference.cases import Case, reference


@pytest.mark.parametrize("tile_size", [None, 3])
@reference("blip2/stage1", complete=False)
def test_blip2_stage1_terms(case: Case, tile_size: int | None) -> None:
    features = case.outputs["image_feats"].clone(), case.outputs["text_feat"].clone()
    options = {
        "label_smoothing": case.config["label_smoothing_itc"],
        "gather_keys": "detached",
        "tile_size": tile_size,
    }
    inverse_temperature = 1 / case.weights["temp"]
    case.compare("loss_itc", query_contrastive_loss(*features, inverse_temperature, **options).loss)
    ids = case.inputs["image_id"]
    by_id = query_contrastive_loss(*features, inverse_temperature, image_ids=ids, **options)
    case.compare("imgid/loss_itc", by_id.loss)
    if tile_size is None:
        case.compare("sim_i2t", by_id.logits_per_image)
        case.compare("sim_t2i", by_id.logits_per_text)
        similarities = by_id.logits_per_image, by_id.logits_per_text
        for prefix, image_ids in (("", None), ("imgid/", ids)):
            negatives = hard_negatives(
                *similarities,
                image_ids=image_ids,
                image_index=case.inputs[f"{prefix}neg_image_idx"],
                text_index=case.inputs[f"{prefix}neg_text_idx"],
            )
            case.compare(f"{prefix}weights_i2t", negatives.weights_i2t)
            case.compare(f"{prefix}weights_t2i", negatives.weights_t2i)

    case.compare("loss_itm", matching_loss(case.outputs["itm_logits"], case.outputs["itm_labels"]))

    targets = case.outputs["lm_labels_shifted"]
    labels = torch.cat([torch.full_like(targets[:, :1], -100), targets], dim=1)
    loss = language_modeling_loss(
        case.outputs["lm_logits"],
        lambda logits: logits,
        labels,
        label_smoothing=case.config["label_smoothing_lm"],
        chunk_size=tile_size,
    )
    case.compare("loss_lm", loss)
