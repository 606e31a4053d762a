import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image

from hf_vlp.evaluation import evaluate_zero_shot
from hf_vlp.evaluation.zero_shot import class_embeddings
from hf_vlp.models.clip.prompts_clip import PHOTO_TEMPLATES
from tests.evaluation.fakes import FakeProcessor, FakeRetrievalModel, numbered_image
from tests.tiny import blip2

# Similarities of four images with three classes.
SCORES = torch.tensor([[0.9, 0.1, 0.2], [0.3, 0.3, 0.1], [0.1, 0.2, 0.8], [0.4, 0.5, 0.6]])
NAMES = ["t0", "t1", "t2"]


def rows(labels: list) -> list[dict]:
    return [{"image": numbered_image(i), "label": label} for i, label in enumerate(labels)]


def evaluate(labels: list, **options) -> dict:
    options = {"templates": ("{}",), "show_progress": False} | options
    return evaluate_zero_shot(FakeRetrievalModel(SCORES), FakeProcessor(), rows(labels), **options)


def test_accuracy_by_hand_and_ties_count_against():
    # Image 1 ties between t0 and t1: wrong for both. Image 3 has its class second.
    result = evaluate(["t0", "t0", "t2", "t1"], ks=(2,), details=True)
    assert result["metrics"] == pytest.approx(
        {"accuracy": 2 / 4, "top_2_accuracy": 1.0, "mean_class_accuracy": (1 / 2 + 0 + 1) / 3}
    )
    assert result["per_class"] == {"t0": 0.5, "t1": 0.0, "t2": 1.0}
    assert [one["rank"] for one in result["details"]] == [0, 1, 0, 1]
    assert result["details"][3]["prediction"] == "t2"


def test_top_5_is_left_out_where_it_would_mean_nothing():
    assert set(evaluate(["t0", "t1", "t2", "t1"])["metrics"]) == {"accuracy", "mean_class_accuracy"}


def test_numbers_need_names_and_names_decide():
    assert evaluate([0, 0, 2, 1], class_names=NAMES) == evaluate(["t0", "t0", "t2", "t1"])
    with pytest.raises(ValueError, match="numbers without names: give class_names"):
        evaluate([0, 0, 2, 1])
    with pytest.raises(ValueError, match="row 2: label 3 is none of the 3 classes"):
        evaluate([0, 0, 3, 1], class_names=NAMES)
    with pytest.raises(ValueError, match="row 1: label 'x' is none"):
        evaluate(["t0", "x", "t1", "t1"], class_names=NAMES)
    with pytest.raises(ValueError, match="1 class: classification needs at least two"):
        evaluate(["t0"] * 4)
    with pytest.raises(ValueError, match="must be different"):
        evaluate(["t0"] * 4, class_names=["t0", "t0"])
    with pytest.raises(ValueError, match="no column 'kind'.*'label'"):
        evaluate(["t0"] * 4, label_column="kind")


def test_class_labels_of_a_dataset():
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=NAMES)})
    dataset = Dataset.from_list([row | {"image": row["image"]} for row in rows([0, 0, 2, 1])], features=features)
    result = evaluate_zero_shot(
        FakeRetrievalModel(SCORES), FakeProcessor(), dataset, templates=("{}",), show_progress=False
    )
    assert result == evaluate([0, 0, 2, 1], class_names=NAMES)


def test_templates_are_averaged_as_unit_vectors():
    model, processor = blip2.retrieval_model(), blip2.retrieval_processor()
    templates = ("a {}", "two {} dots", "nothing but {}")
    found = class_embeddings(model, processor, ["red", "yellow star"], templates)
    inputs = processor(
        text=[t.replace("{}", n) for n in ["red", "yellow star"] for t in templates], return_tensors="pt"
    )
    with torch.no_grad():
        each = model.embed_texts(inputs["input_ids"], inputs["attention_mask"]).view(2, 3, -1)
    expected = each.mean(dim=1)
    expected = expected / expected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(found, expected)
    photo = class_embeddings(model, processor, ["red", "yellow star"], ["photo"])
    torch.testing.assert_close(photo, class_embeddings(model, processor, ["red", "yellow star"], PHOTO_TEMPLATES))
    assert not torch.allclose(photo, found)
    with pytest.raises(ValueError, match=r"templates need '\{\}'.*plain, photo, icon.*a photo"):
        class_embeddings(model, processor, ["red", "blue"], ["a photo"])
    with pytest.raises(ValueError, match="given: none"):
        class_embeddings(model, processor, ["red", "blue"], [])


def test_a_model_with_several_queries_classifies():
    model, processor = blip2.retrieval_model(), blip2.retrieval_processor()
    images = [{"image": image, "label": name} for image, name in zip(blip2.images(4), ["red", "blue", "red", "dot"])]
    result = evaluate_zero_shot(model, processor, images, templates=("a {}",), batch_size=3, details=True,
                                show_progress=False)  # fmt: skip
    pixels = processor(images=blip2.images(4), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        similarity = model.similarity(
            model.embed_images(pixels), class_embeddings(model, processor, ["blue", "dot", "red"], ["a {}"])
        )
    expected = [["blue", "dot", "red"][i] for i in similarity.argmax(dim=1).tolist()]
    assert [one["prediction"] for one in result["details"]] == expected
