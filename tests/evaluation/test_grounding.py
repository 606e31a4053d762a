import pytest
import torch
from PIL import Image

from hf_vlp.evaluation import evaluate_grounding
from hf_vlp.evaluation.grounding import (
    best_proposal,
    box_accuracy,
    box_of_map,
    covered_share,
    hottest_point,
    iou,
    points_into,
    resized_map,
)
from tests.evaluation.task_fakes import Classifier, Pointer, TaskProcessor


def test_iou_by_hand():
    assert iou([0, 0, 2, 2], [0, 0, 2, 2]) == 1.0
    assert iou([0, 0, 2, 2], [1, 0, 3, 2]) == pytest.approx(2 / 6)
    assert iou([0, 0, 1, 1], [2, 2, 3, 3]) == 0.0
    assert box_accuracy([[0, 0, 2, 2], [0, 0, 1, 1]], [[[9, 9, 10, 10], [0, 0, 2, 1]], [[0, 0, 2, 2]]]) == {
        "accuracy": 0.5,
        "mean_iou": pytest.approx((0.5 + 0.25) / 2),
    }
    with pytest.raises(ValueError, match="0 predicted boxes for 0"):
        box_accuracy([], [])


def test_the_hottest_point():
    heat = torch.zeros(4, 6)
    heat[1, 4] = 1
    assert hottest_point(heat) == (4.5, 1.5)
    # A map that says nothing points at the middle.
    assert hottest_point(torch.zeros(4, 6)) == (3.0, 2.0)
    with pytest.raises(ValueError, match="NaN"):
        hottest_point(torch.full((2, 2), float("nan")))
    assert points_into((4.5, 1.5), [[0, 0, 1, 1], [4, 1, 5, 2]])
    assert not points_into((4.5, 1.5), [[0, 0, 4, 4]]) and points_into((4.5, 1.5), [[0, 0, 4, 4]], tolerance=0.5)
    # Patches lie where they lie in the image, whatever its size.
    for width, height in ((30, 20), (64, 64)):
        x, y = hottest_point(resized_map(heat, width, height))
        assert 4 / 6 <= x / width <= 5 / 6 and 1 / 4 <= y / height <= 2 / 4


def test_boxes_from_maps():
    heat = torch.zeros(10, 10)
    heat[2:5, 3:7] = 1
    heat[8, 8] = 0.9
    # The other hot spot does not touch the hottest region.
    assert box_of_map(heat) == (3, 2, 7, 5)
    assert box_of_map(torch.ones(4, 6)) == (0, 0, 6, 4)
    small, large = [3, 2, 7, 5], [0, 0, 10, 10]
    # 12 / sqrt(12) against 12.9 / sqrt(100).
    assert best_proposal(heat, [large, small]) == 1
    assert best_proposal(heat, [large, small], alpha=0) == 0
    assert covered_share([[0, 0, 5, 10], [0, 0, 10, 5]], 10, 10) == 0.75


def rows() -> list[dict]:
    boxes = [[4.0, 4.0, 12.0, 12.0], [20.0, 20.0, 28.0, 28.0], [4.0, 20.0, 12.0, 28.0]]
    made = []
    for number, box in enumerate(boxes):
        image = Image.new("RGB", (32, 32), (number, 0, 7))
        made.append({"image": image, "text": f"thing {number}", "boxes": [box], "proposals": boxes})
    return made


def maps() -> torch.Tensor:
    """The first two point at their object, the third at the first one's."""
    heat = torch.zeros(3, 4, 4)
    heat[0, 0, 0] = heat[0, 0, 1] = heat[0, 1, 0] = heat[0, 1, 1] = 1
    heat[1, 2:, 2:] = 2
    heat[2] = heat[0]
    return heat


def evaluate(data: list[dict], **options) -> dict:
    return evaluate_grounding(Pointer(maps()), TaskProcessor(), data, batch_size=2, show_progress=False, **options)


def test_maps_are_compared_with_boxes():
    result = evaluate(rows(), details=True)
    metrics = result["metrics"]
    assert metrics["pointing_game"] == metrics["proposal_accuracy"] == 2 / 3
    assert metrics["pointing_game_chance"] == 64 / 1024 and metrics["proposal_accuracy_chance"] == 1 / 3
    assert [one["hit"] for one in result["details"]] == [True, True, False]
    assert metrics["map_box_mean_iou"] > 0
    without = [{name: value for name, value in row.items() if name != "proposals"} for row in rows()]
    assert "proposal_accuracy" not in evaluate(without)["metrics"]


def test_what_cannot_be_grounded():
    data = rows()
    data[1]["boxes"] = [[5.0, 5.0, 5.0, 9.0]]
    assert evaluate(data, max_bad_rate=0.5)["samples"]["skipped_records_reasons"] == {"box_wrong": 1}
    with pytest.raises(ValueError, match="Classifier has no grounding_maps"):
        evaluate_grounding(Classifier([0], 2), TaskProcessor(), rows())
