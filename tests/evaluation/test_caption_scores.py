import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vlp.evaluation.caption_scores import CaptionScore, bleu, caption_metrics, cider, cider_d, rouge_l

GOLDEN = json.loads(Path(__file__).with_name("golden_captions.json").read_text())
PREDICTIONS = [image["prediction_tokens"] for image in GOLDEN["images"]]
REFERENCES = [image["reference_tokens"] for image in GOLDEN["images"]]

captions = st.lists(st.sampled_from(["a", "red", "blue", "circle", "star", "and"]), max_size=9).map(" ".join)
corpora = st.lists(st.tuples(captions, st.lists(captions, min_size=1, max_size=3)), min_size=1, max_size=6)


def computed() -> dict[str, CaptionScore]:
    scores = caption_metrics(PREDICTIONS, REFERENCES)
    return scores | {"cider_paper": cider(PREDICTIONS, REFERENCES, variant="paper")}


@pytest.mark.parametrize("name", sorted(GOLDEN["scores"]))
def test_numbers_of_the_reference_code(name: str):
    expected, score = GOLDEN["scores"][name], computed()[name]
    assert score.corpus == pytest.approx(expected["corpus"], rel=0, abs=1e-12)
    assert score.per_image == pytest.approx(expected["per_image"], rel=0, abs=1e-12)


def test_every_golden_score_is_computed():
    assert set(GOLDEN["scores"]) | {"cider_d"} == set(computed())
    assert computed()["cider"] == computed()["cider_d"]


def test_bleu_by_hand():
    # 3 of 4 words and 2 of 3 word pairs are right, one reference is as long as the candidate.
    scores = bleu(["a red circle here"], [["a red circle there", "a red circle"]], order=2)
    assert scores[0].corpus == pytest.approx(3 / 4, abs=1e-8)
    assert scores[1].corpus == pytest.approx(math.sqrt(3 / 4 * 2 / 3), abs=1e-8)


def test_bleu_counts_are_clipped_by_the_most_frequent_reference():
    # "the" twice in one reference and once in the other: at most twice, not three times.
    assert bleu(["the the the the"], [["the the cat sat", "the dog ran off"]])[0].corpus == pytest.approx(
        0.5, abs=1e-8
    )


def test_bleu_penalises_brevity_against_the_closest_reference():
    # References of 4 and 8 tokens are equally far from 6: the shorter counts, so there is no penalty.
    assert bleu(["a b c d e f"], [["a b c d", "a b c d e f g h"]])[0].corpus == pytest.approx(1.0, abs=1e-8)
    score = bleu(["a b c"], [["a b c d e f"]])[0].corpus
    assert score == pytest.approx(math.exp(1 - 6 / 3), abs=1e-7)


def test_corpus_bleu_is_of_sums_not_of_images():
    scores = bleu(["a b", "c d e f g h"], [["a b"], ["x y z u v w"]])[0]
    assert scores.per_image == pytest.approx([1.0, 0.0], abs=1e-8)
    assert scores.corpus == pytest.approx(2 / 8, abs=1e-8)


def test_rouge_l_by_hand():
    # Longest common subsequence "a red circle" of 3: precision 3/4, recall 3/5.
    precision, recall, beta = 3 / 4, 3 / 5, 1.2
    expected = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    assert rouge_l(["a big red circle"], [["a small red round circle"]]).corpus == pytest.approx(expected, abs=1e-15)


def test_rouge_l_takes_precision_and_recall_from_different_references():
    score = rouge_l(["a b c d"], [["a b c d e f g h", "a"]])
    precision, recall = 1.0, 1.0
    assert score.corpus == pytest.approx((1 + 1.44) * precision * recall / (recall + 1.44 * precision))


def test_cider_of_perfect_captions_is_ten():
    references = [["a red circle above the star"], ["two blue squares in a row"], ["nothing but one green dot"]]
    predictions = [one[0] for one in references]
    assert cider_d(predictions, references).corpus == pytest.approx(10.0)
    assert cider(predictions, references, variant="paper").corpus == pytest.approx(10.0)


def test_cider_by_hand():
    # Unigrams only; three images; "circle" is in one image, "a" in all, so "a" weighs log(3/3) = 0.
    references = [["a circle"], ["a star"], ["a dot"]]
    score = cider(["a circle circle", "a star", "a box"], references, order=1, variant="paper")
    assert score.per_image == pytest.approx([10.0, 10.0, 0.0])
    # CIDEr-D clips the second "circle": min(2w, w) * w / (2w * w) = 1/2; no penalty is seen by unigrams alone.
    assert cider_d(["a circle circle", "a star", "a box"], references, order=1).per_image == pytest.approx(
        [5.0, 10.0, 0.0]
    )


def test_cider_d_penalises_length():
    references = [["a red circle here"], ["two blue squares there"], ["x y z"]]
    predictions = ["a red circle here and more words", "two blue squares there", "x y z"]
    narrow = cider_d(predictions, references, sigma=1.0).per_image
    wide = cider_d(predictions, references, sigma=100.0).per_image
    # 3 tokens too long.
    assert narrow[0] / wide[0] == pytest.approx(math.exp(-9 / 2) / math.exp(-9 / 20000))
    assert narrow[1:] == pytest.approx(wide[1:])


def test_a_single_image_has_no_rare_words():
    assert cider_d(["a red circle"], [["a red circle"]]).corpus == 0.0


@settings(deadline=None)
@given(corpora)
def test_scores_stay_in_range_and_do_not_depend_on_order(corpus: list[tuple[str, list[str]]]):
    predictions, references = [p for p, _ in corpus], [r for _, r in corpus]
    scores = caption_metrics(predictions, references)
    backwards = caption_metrics(predictions[::-1], [r[::-1] for r in references[::-1]])
    for name, score in scores.items():
        top = 10.0 if name.startswith("cider") else 1.0
        assert -1e-12 <= score.corpus <= top + 1e-9
        assert score.per_image == pytest.approx(backwards[name].per_image[::-1], abs=1e-9)
        assert score.corpus == pytest.approx(backwards[name].corpus, abs=1e-9)


@pytest.mark.parametrize("function", [bleu, rouge_l, cider, cider_d, caption_metrics])
def test_bad_input_is_named(function):
    with pytest.raises(ValueError, match="2 predictions but 1 lists"):
        function(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="no predictions"):
        function([], [])
    with pytest.raises(ValueError, match=r"references\[1\] is empty"):
        function(["a", "b"], [["a"], []])
    with pytest.raises(TypeError, match=r"references\[0\] is a string"):
        function(["a"], ["a"])
    with pytest.raises(TypeError, match=r"predictions\[0\] is list"):
        function([["a"]], [["a"]])


def test_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="'coco'.*'paper'"):
        cider(["a"], [["a"]], variant="d")
