"""`pipeline("image-text-matching")`: the same scores by our classes, by native ones and by hand."""

import pytest
import torch
from transformers import Pipeline, pipeline
from transformers.models.blip_2.modeling_blip_2 import Blip2ForImageTextRetrieval

import hf_vlp  # noqa: F401
from hf_vlp.models.catalog import load_class
from tests.hub import tiny

PICTURES = [tiny.image("red"), tiny.image("blue", (40, 18)), tiny.image("green")]
TEXTS = ["a red circle", "the big small square above it", "blue"]


@pytest.fixture(scope="module", params=["native", "ours"])
def matcher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    model, processor = tiny.blip2_retrieval()
    if request.param == "ours":
        folder = tiny.save((model, processor), tmp_path_factory.mktemp("retrieval"))
        matcher = pipeline("image-text-matching", model=folder)
        assert type(matcher.model) is load_class(folder, "retrieval")
        return matcher
    return pipeline("image-text-matching", model=model, processor=processor)


def by_hand(model: Blip2ForImageTextRetrieval, processor: object, picture: object, text: str) -> tuple[float, float]:
    inputs = dict(processor(images=picture, return_tensors="pt")) | dict(processor(text=text, return_tensors="pt"))
    with torch.no_grad():
        score = model(**inputs, use_image_text_matching_head=True).logits_per_image.softmax(dim=-1)[0, 1].item()
        similarity = model(**inputs, use_image_text_matching_head=False).logits_per_image.item()
    return score, similarity


def test_scores_are_those_of_the_native_model(matcher: Pipeline) -> None:
    model, processor = tiny.blip2_retrieval()
    results = matcher(PICTURES[0], text=TEXTS)
    assert [result["text"] for result in results] == TEXTS
    for result in results:
        score, similarity = by_hand(model, processor, PICTURES[0], result["text"])
        assert result["score"] == pytest.approx(score, abs=1e-5)
        assert result["similarity"] == pytest.approx(similarity, abs=1e-5)
    assert len({round(result["score"], 5) for result in results}) == 3


def test_batches_and_forms(matcher: Pipeline) -> None:
    grid = [[matcher(picture, text=text) for text in TEXTS] for picture in PICTURES]
    for picture, row in zip(PICTURES, grid, strict=True):
        assert_equal(matcher(picture, text=TEXTS), row)
    pairs = matcher(PICTURES, text=TEXTS, batch_size=3)
    assert_equal(pairs, [grid[i][i] for i in range(3)])
    assert_equal(matcher(PICTURES, text="blue", batch_size=2), [row[2] for row in grid])
    uneven = [{"image": PICTURES[0], "text": TEXTS}, {"image": PICTURES[1], "text": "blue"}]
    first, second = matcher(uneven, batch_size=2)
    assert_equal(first, grid[0])
    assert_equal([second], [grid[1][2]])


def assert_equal(left: list[dict], right: list[dict]) -> None:
    assert [entry["text"] for entry in left] == [entry["text"] for entry in right]
    for name in ("score", "similarity"):
        assert [entry[name] for entry in left] == pytest.approx([entry[name] for entry in right], abs=1e-5)


def test_two_towers_give_the_cosine() -> None:
    model, processor = tiny.clip()
    matcher = pipeline("image-text-matching", model=model, processor=processor)
    results = matcher(PICTURES[0], text=TEXTS)
    inputs = processor(images=PICTURES[0], text=TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = (model(**inputs).logits_per_image[0] / model.logit_scale.exp()).tolist()
    assert [result["similarity"] for result in results] == pytest.approx(expected, abs=1e-5)
    assert [result["score"] for result in results] == [result["similarity"] for result in results]


def test_an_image_is_encoded_once_for_all_its_texts(tmp_path: object) -> None:
    folder = tiny.save(tiny.blip2_retrieval(), tmp_path)
    matcher = pipeline("image-text-matching", model=folder)
    seen: list[int] = []
    layer = matcher.model.vision_model.encoder.layers[0]
    layer.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    matcher(PICTURES[0], text=TEXTS * 4)
    assert seen == [1]


def test_failures(matcher: Pipeline) -> None:
    with pytest.raises(ValueError, match="needs an image"):
        matcher(text="a")
    for nothing in (None, "", [], ["a", ""]):
        with pytest.raises(ValueError, match="needs a text for each image"):
            matcher(PICTURES[0], text=nothing)
    with pytest.raises(ValueError, match="need a list of as many images"):
        matcher(PICTURES, text=["a", "b"])
    with pytest.raises(TypeError, match=r"does not know the parameter\(s\) \['labels'\]"):
        matcher(PICTURES[0], text="a", labels=["b"])
