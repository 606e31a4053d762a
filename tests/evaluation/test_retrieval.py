import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPConfig

from hf_vlp.data.records import ErrorRateExceeded
from hf_vlp.evaluation import evaluate_retrieval, ranking
from hf_vlp.evaluation.gallery import Gallery
from hf_vlp.models.clip.modeling_clip import CLIPModel
from tests.evaluation.fakes import FakeProcessor, FakeRetrievalModel, numbered_image, rows_for
from tests.tiny import blip2, clip

OUTSIDE = -100.0


def recall(ranks: list[int], k: int) -> float:
    return sum(rank < k for rank in ranks) / len(ranks)


def protocol_by_hand(
    similarity: torch.Tensor, owners: list[int], matching: torch.Tensor | None = None, k: int = 0, add: bool = True
) -> dict[str, list[int]]:
    """The evaluation of LAVIS, written with loops: a full score matrix where what is not re-ranked scores -100.

    Columns are captions. Ties count against. Among scores of -100 the similarity decides, which changes nothing at
    depths up to k.
    """
    images, captions = similarity.shape
    ranks: dict[str, list[int]] = {"i2t": [], "t2i": []}
    for direction, scores in (("i2t", similarity), ("t2i", similarity.T)):
        pair_scores = matching if matching is None or direction == "i2t" else matching.T
        for query in range(len(scores)):
            if direction == "i2t":
                right = [caption for caption, owner in enumerate(owners) if owner == query]
            else:
                right = [owners[query]]
            row = [(0.0, s) for s in scores[query].tolist()]
            if pair_scores is not None:
                best = scores[query].argsort(descending=True, stable=True)[:k].tolist()
                row = [(OUTSIDE, s) for _, s in row]
                for c in best:
                    combined = pair_scores[query, c] + (scores[query, c] if add else 0.0)
                    row[c] = (float(combined), 0.0)
            top = max(row[c] for c in right)
            ranks[direction].append(sum(row[c] >= top for c in range(len(row)) if c not in right))
    return ranks


@st.composite
def worlds(draw: st.DrawFn) -> dict:
    """A random world with ties, several captions an image, and all options."""
    images = draw(st.integers(2, 7))
    owners = sorted([*range(images), *draw(st.lists(st.integers(0, images - 1), max_size=8))])
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    levels = draw(st.sampled_from([3, 1000]))
    similarity = torch.randint(0, levels, (images, len(owners)), generator=generator) / levels
    matching = torch.randint(0, levels, (images, len(owners)), generator=generator) / levels * 4
    return {
        "owners": owners,
        "similarity": similarity,
        "matching": matching,
        "rerank": draw(st.sampled_from([None, 1, 2, 4, 50])),
        "combine": draw(st.sampled_from(["itc+itm", "itm"])),
        "keep_states": draw(st.booleans()),
        "batch_size": draw(st.integers(1, 4)),
        "pair_batch_size": draw(st.sampled_from([1, 3, 100])),
        "text_batch_size": draw(st.sampled_from([1, 5])),
        "block": draw(st.sampled_from([1, 40, 2**24])),
    }


@settings(deadline=None, max_examples=60)
@given(worlds())
def test_ranks_equal_the_protocol_by_hand(world: dict):
    owners, k = world["owners"], world["rerank"]
    model = FakeRetrievalModel(world["similarity"], world["matching"])
    options = {n: world[n] for n in ("combine", "keep_states", "batch_size", "pair_batch_size", "text_batch_size")}
    before = ranking.BLOCK_ELEMENTS, ranking.KEPT_ELEMENTS
    ranking.BLOCK_ELEMENTS, ranking.KEPT_ELEMENTS = world["block"], world["block"]
    try:
        result = evaluate_retrieval(
            model, FakeProcessor(), rows_for(owners), rerank=k, details=True, show_progress=False, **options
        )
    finally:
        ranking.BLOCK_ELEMENTS, ranking.KEPT_ELEMENTS = before
    found = result["details"]["ranks"]
    plain = protocol_by_hand(world["similarity"], owners)
    for direction in ("i2t", "t2i"):
        assert found[f"{direction}_itc"] == plain[direction]
        assert result["metrics"][f"{direction}_r1_itc"] == recall(plain[direction], 1)
    if k is None:
        assert not any("itm" in name for name in result["metrics"])
        return
    expected = protocol_by_hand(world["similarity"], owners, world["matching"], k, world["combine"] == "itc+itm")
    for direction in ("i2t", "t2i"):
        # Beyond depth k the order is that of the similarity; by hand it is too, but from a shorter list.
        for ours, theirs in zip(found[f"{direction}_itm"], expected[direction]):
            assert min(ours, k) == min(theirs, k)


def test_metrics_by_hand():
    # Image 0 finds caption 1 first, its own captions 0 and 2 after it; image 1 finds its caption 1 first.
    similarity = torch.tensor([[0.1, 0.9, 0.5], [0.2, 0.8, 0.3]])
    result = evaluate_retrieval(
        FakeRetrievalModel(similarity), FakeProcessor(), rows_for([0, 1, 0]), ks=(1, 2), show_progress=False
    )
    # Captions sorted by image: t0, t2 | t1. Text queries: t0 prefers image 1, t2 image 0, t1 image 0.
    assert result["metrics"] == pytest.approx(
        {
            "i2t_r1_itc": 1 / 2,
            "i2t_r2_itc": 1.0,
            "i2t_mean_itc": 3 / 4,
            "t2i_r1_itc": 1 / 3,
            "t2i_r2_itc": 1.0,
            "t2i_mean_itc": 2 / 3,
            "mean_itc": 17 / 24,
        }
    )
    assert result["samples"]["images"] == 2
    assert result["samples"]["texts"] == 3


def test_the_model_says_how_its_authors_rerank():
    torch.manual_seed(0)
    similarity, matching = torch.rand(6, 6), torch.rand(6, 6) / 10
    model, rows = FakeRetrievalModel(similarity, matching), rows_for(range(6))

    def ranks(**options):
        result = evaluate_retrieval(
            model, FakeProcessor(), rows, rerank=6, details=True, show_progress=False, **options
        )
        return result["metrics"], result["details"]

    assert ranks() == ranks(combine="itc+itm")
    model.rerank_by = "itm"
    assert ranks() == ranks(combine="itm") != ranks(combine="itc+itm")


def test_work_is_done_once():
    torch.manual_seed(0)
    similarity, matching = torch.rand(9, 27), torch.rand(9, 27)
    owners = sorted(list(range(9)) * 3)
    model = FakeRetrievalModel(similarity, matching)
    evaluate_retrieval(model, FakeProcessor(), rows_for(owners), rerank=5, batch_size=4, show_progress=False)
    assert sorted(model.images_encoded) == list(range(9))
    assert sorted(model.texts_encoded) == list(range(27))
    assert len(set(model.pairs_scored)) == len(model.pairs_scored)
    # Pairs that both directions want are scored once.
    i2t = {(i, t) for i in range(9) for t in similarity[i].topk(5).indices.tolist()}
    t2i = {(i, t) for t in range(27) for i in similarity[:, t].topk(5).indices.tolist()}
    assert set(model.pairs_scored) == i2t | t2i
    again = FakeRetrievalModel(similarity, matching)
    evaluate_retrieval(
        again, FakeProcessor(), rows_for(owners), rerank=5, batch_size=4, keep_states=False, show_progress=False
    )
    assert sorted(again.images_encoded) == sorted([*range(9), *range(9)])


def test_similarities_exist_in_blocks(monkeypatch: pytest.MonkeyPatch):
    similarity = torch.rand(40, 3, 40, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(ranking, "BLOCK_ELEMENTS", 7 * 3 * 40)
    monkeypatch.setattr(ranking, "KEPT_ELEMENTS", 0)
    model = FakeRetrievalModel(similarity)
    result = evaluate_retrieval(model, FakeProcessor(), rows_for(list(range(40))), details=True, show_progress=False)
    assert model.largest_block == 7
    expected = protocol_by_hand(similarity.amax(dim=1), list(range(40)))
    assert result["details"]["ranks"]["i2t_itc"] == expected["i2t"]
    assert result["details"]["ranks"]["t2i_itc"] == expected["t2i"]


def test_folds_are_ranked_by_themselves():
    torch.manual_seed(1)
    owners = sorted([*range(12), 0, 5, 11, 11])
    similarity, matching = torch.rand(12, len(owners)), torch.rand(12, len(owners))
    whole = evaluate_retrieval(
        FakeRetrievalModel(similarity, matching), FakeProcessor(), rows_for(owners), rerank=3, folds=3,
        show_progress=False,
    )["metrics"]  # fmt: skip
    parts = []
    for fold in range(3):
        images = range(4 * fold, 4 * fold + 4)
        # The rows keep their numbers, so that the model knows them.
        rows = [row for image, row in enumerate(rows_for(owners)) if image in images]
        parts.append(
            evaluate_retrieval(
                FakeRetrievalModel(similarity, matching), FakeProcessor(), rows, rerank=3, show_progress=False
            )["metrics"]
        )
    for name in parts[0]:
        assert whole[f"{name}_3_folds"] == pytest.approx(sum(part[name] for part in parts) / 3)


def test_rows_of_one_image_are_joined():
    separate = [
        {"image": numbered_image(0), "text": "t0", "image_id": 7},
        {"image": numbered_image(1), "text": "t1", "image_id": 8},
        {"image": numbered_image(0), "text": "t2", "image_id": 7},
    ]
    gallery, failures = Gallery.from_rows(separate)
    assert failures == []
    assert gallery.rows == [0, 1]
    assert gallery.image_ids == [7, 8]
    assert gallery.captions() == [["t0", "t2"], ["t1"]]
    similarity = torch.rand(2, 3)
    results = [
        evaluate_retrieval(FakeRetrievalModel(similarity), FakeProcessor(), rows, show_progress=False)["metrics"]
        for rows in (separate, rows_for([0, 1, 0]))
    ]
    assert results[0] == results[1]


def test_equal_texts_count_as_the_official_protocol_or_as_right():
    rows = [{"image": numbered_image(0), "text": ["t0"]}, {"image": numbered_image(1), "text": ["t0"]}]
    model = FakeRetrievalModel(torch.tensor([[0.5], [0.4]]), torch.tensor([[1.0], [2.0]]))
    official = evaluate_retrieval(model, FakeProcessor(), rows, rerank=2, show_progress=False)["metrics"]
    # An image's own caption ties with its twin, and a caption's own image is beaten or beats.
    assert (official["i2t_r1_itc"], official["t2i_r1_itc"]) == (0.0, 0.5)
    assert (official["i2t_r1_itm"], official["t2i_r1_itm"]) == (0.0, 0.5)
    matched = evaluate_retrieval(model, FakeProcessor(), rows, rerank=2, equal_texts_match=True, show_progress=False)[
        "metrics"
    ]
    assert {matched[f"{d}_r1_{k}"] for d in ("i2t", "t2i") for k in ("itc", "itm")} == {1.0}
    assert model.pairs_scored == [(0, 0), (1, 0)] * 2


def test_unreadable_images_stop_the_evaluation_or_are_left_out_and_counted():
    rows = rows_for([0, 1, 2, 3, 3])
    rows[1]["image"] = {"bytes": b"this is not an image", "path": None}
    rows[1] |= {"source": "pairs.tar", "key": "00017"}
    model = FakeRetrievalModel(torch.rand(4, 5), torch.rand(4, 5))
    with pytest.raises(ErrorRateExceeded, match=r"1 of 4 images.*row 1 \(pairs.tar, 00017\): image_not_an_image"):
        evaluate_retrieval(model, FakeProcessor(), rows, show_progress=False)
    result = evaluate_retrieval(
        model, FakeProcessor(), rows, rerank=2, max_bad_rate=0.3, details=True, show_progress=False
    )
    assert result["samples"]["skipped_images"] == 1
    assert result["samples"]["skipped_images_reasons"] == {"image_not_an_image": 1}
    assert result["samples"]["texts"] == 4
    without = evaluate_retrieval(
        model, FakeProcessor(), [rows[0], *rows[2:]], rerank=2, details=True, show_progress=False
    )
    assert result["metrics"] == without["metrics"]
    assert result["details"] == without["details"]
    for row in rows:
        row["image"] = None
    with pytest.raises(ErrorRateExceeded, match="none of the images"):
        evaluate_retrieval(model, FakeProcessor(), rows, max_bad_rate=1.0, show_progress=False)


def test_images_without_text_stop_the_evaluation_or_are_left_out_and_counted():
    rows = rows_for([0, 1, 2])
    rows[0]["text"], rows[1]["text"] = [], ["t1", "  ", None]
    model = FakeRetrievalModel(torch.rand(3, 3))
    with pytest.raises(ErrorRateExceeded, match="3 of 5 texts.*row 0.*text_missing.*row 1.*text_empty"):
        evaluate_retrieval(model, FakeProcessor(), rows, show_progress=False)
    result = evaluate_retrieval(model, FakeProcessor(), rows, max_bad_rate=0.9, show_progress=False)
    assert (result["samples"]["images"], result["samples"]["texts"]) == (2, 2)
    assert result["samples"]["skipped_texts_reasons"] == {"text_missing": 2, "text_empty": 1}


def test_bad_arguments_are_named():
    model, processor, rows = FakeRetrievalModel(torch.rand(2, 2)), FakeProcessor(), rows_for([0, 1])
    with pytest.raises(ValueError, match="rerank=4 needs a matching head, which FakeRetrievalModel does not have"):
        evaluate_retrieval(model, processor, rows, rerank=4)
    with pytest.raises(ValueError, match="rerank=0"):
        evaluate_retrieval(model, processor, rows, rerank=0)
    with pytest.raises(ValueError, match="combine='sum'"):
        evaluate_retrieval(model, processor, rows, combine="sum")
    with pytest.raises(ValueError, match="folds=3"):
        evaluate_retrieval(model, processor, rows, folds=3, show_progress=False)
    with pytest.raises(ValueError, match="no column 'text'; it has.*'caption'"):
        evaluate_retrieval(model, processor, [{"image": numbered_image(0), "caption": "t0"}])
    with pytest.raises(ValueError, match="no rows"):
        evaluate_retrieval(model, processor, [])
    with pytest.raises(ValueError, match="limit=0"):
        evaluate_retrieval(model, processor, rows, limit=0)
    with pytest.raises(ValueError, match="batch_size"):
        evaluate_retrieval(model, processor, rows, batch_size=0, show_progress=False)


@pytest.mark.parametrize("where", ["similarity", "matching"])
def test_scores_that_are_not_numbers_are_refused(where: str):
    scores = {"similarity": torch.rand(2, 2), "matching": torch.rand(2, 2)}
    scores[where][0, 1] = float("nan")
    model = FakeRetrievalModel(**scores)
    with pytest.raises(ValueError, match="NaN"):
        evaluate_retrieval(model, FakeProcessor(), rows_for([0, 1]), rerank=2, show_progress=False)


def test_long_texts_are_cut_and_counted():
    model, processor = FakeRetrievalModel(torch.rand(4, 4)), FakeProcessor()
    # "t3" has five tokens, "t2" four, "t1" three, "t0" two.
    result = evaluate_retrieval(model, processor, rows_for([0, 1, 2, 3]), max_length=3, show_progress=False)
    assert result["samples"]["truncated_texts"] == 2


def test_the_model_is_left_as_it_was():
    model = FakeRetrievalModel(torch.rand(2, 2))
    model.train()
    evaluate_retrieval(model, FakeProcessor(), rows_for([0, 1]), show_progress=False)
    assert model.training


def test_images_decoded_by_workers():
    similarity = torch.rand(5, 5)
    rows = rows_for([0, 1, 2, 3, 4])
    rows[3]["image"] = {"bytes": b"x", "path": None}
    options = {"max_bad_rate": 0.5, "batch_size": 2, "details": True, "show_progress": False}
    results = [
        evaluate_retrieval(FakeRetrievalModel(similarity), FakeProcessor(), rows, workers=workers, **options)
        for workers in (0, 2)
    ]
    assert results[0] == results[1]


def test_limit_and_streams():
    similarity = torch.rand(5, 5)
    rows = rows_for([0, 1, 2, 3, 4])
    limited = evaluate_retrieval(FakeRetrievalModel(similarity), FakeProcessor(), rows, limit=3, show_progress=False)
    stream = evaluate_retrieval(
        FakeRetrievalModel(similarity), FakeProcessor(), (row for row in rows), limit=3, show_progress=False
    )
    assert limited == stream
    assert limited["samples"]["images"] == 3


def blip2_rows() -> list[dict]:
    return [
        {"image": image, "text": [blip2.TEXTS[i], blip2.TEXTS[(i + 1) % 4][:12] + " dot"], "image_id": i}
        for i, image in enumerate(blip2.images(4))
    ]


@pytest.mark.parametrize("keep_states", [True, False])
def test_blip2_is_reranked_by_its_own_scores(keep_states: bool):
    model, processor, rows = blip2.retrieval_model(), blip2.retrieval_processor(), blip2_rows()
    result = evaluate_retrieval(
        model, processor, rows, rerank=3, batch_size=3, pair_batch_size=5, keep_states=keep_states, details=True,
        show_progress=False,
    )  # fmt: skip
    captions = [text for row in rows for text in row["text"]]
    owners = [i for i, row in enumerate(rows) for _ in row["text"]]
    inputs = processor(images=[row["image"] for row in rows], text=captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        images = model.embed_images(pixel_values=inputs["pixel_values"])
        similarity = model.similarity(images, model.embed_texts(inputs["input_ids"], inputs["attention_mask"]))
        matching = torch.stack(
            [
                model.matching_scores(
                    images, torch.full((len(captions),), image), inputs["input_ids"], inputs["attention_mask"]
                )
                for image in range(len(rows))
            ]
        )
    plain = protocol_by_hand(similarity, owners)
    expected = protocol_by_hand(similarity, owners, matching, 3)
    for direction in ("i2t", "t2i"):
        assert result["details"]["ranks"][f"{direction}_itc"] == plain[direction]
        found = result["details"]["ranks"][f"{direction}_itm"]
        assert [min(rank, 3) for rank in found] == [min(rank, 3) for rank in expected[direction]]


def test_clip_is_ranked_by_its_own_similarities():
    processor = clip.processor()
    config = CLIPConfig(
        text_config=clip.text_config_of(processor), vision_config=clip.vision_config(), projection_dim=24
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    rows = [{"image": i, "text": t} for i, t in zip(clip.images(4), clip.TEXTS)]
    result = evaluate_retrieval(model, processor, rows, details=True, show_progress=False)
    inputs = processor(images=clip.images(4), text=list(clip.TEXTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits_per_image
    expected = protocol_by_hand(logits, [0, 1, 2, 3])
    assert result["details"]["ranks"] == {"i2t_itc": expected["i2t"], "t2i_itc": expected["t2i"]}
    with pytest.raises(ValueError, match="CLIPModel does not have"):
        evaluate_retrieval(model, processor, rows, rerank=2)
