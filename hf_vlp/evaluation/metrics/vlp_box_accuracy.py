"""Accuracy of boxes by IoU, and the pointing game."""

import datasets
import evaluate

from hf_vlp.evaluation.grounding import box_accuracy, points_into

_DESCRIPTION = """\
Share of predicted boxes with an IoU of at least 0.5 with a right one, and their mean IoU. A prediction of two numbers
is a point, and the share of points inside a right box is reported (pointing game).
"""

_INPUTS = """\
predictions: for each expression a box (left, top, right, bottom) or a point (x, y).
references: for each expression its right boxes.
threshold: IoU from which a box is right, 0.5 by default.
tolerance: distance from a box in pixels at which a point still counts, 0 by default.
Returns box_accuracy and mean_iou, or pointing_game, in [0, 1].
"""

_CITATION = """\
@inproceedings{zhang2016top,
  title={Top-down Neural Attention by Excitation Backprop},
  author={Zhang, Jianming and Lin, Zhe and Brandt, Jonathan and Shen, Xiaohui and Sclaroff, Stan},
  booktitle={ECCV}, year={2016}
}
"""


class VlpBoxAccuracy(evaluate.Metric):
    """`evaluate` module of `hf_vlp.evaluation.grounding.box_accuracy` and `points_into`."""

    def _info(self) -> evaluate.MetricInfo:
        numbers = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": numbers, "references": datasets.Sequence(numbers)}),
        )

    def _compute(
        self,
        predictions: list[list[float]],
        references: list[list[list[float]]],
        threshold: float = 0.5,
        tolerance: float = 0.0,
    ) -> dict[str, float]:
        sizes = {len(prediction) for prediction in predictions}
        if sizes == {2}:
            hits = [points_into((x, y), boxes, tolerance) for (x, y), boxes in zip(predictions, references)]
            return {"pointing_game": sum(hits) / len(hits)}
        if sizes != {4}:
            raise ValueError(f"predictions have {sorted(sizes)} numbers: give boxes of four or points of two")
        scores = box_accuracy(predictions, references, threshold)
        return {"box_accuracy": scores["accuracy"], "mean_iou": scores["mean_iou"]}
