"""Accuracy and consistency of NLVR2."""

import datasets
import evaluate

from hf_vlp.evaluation.visual_reasoning import consistency

_DESCRIPTION = """\
Accuracy, and consistency: the share of statements for which the predictions about all their pairs of images are right.
"""

_INPUTS = """\
predictions: 0 or 1 for each pair of images.
references: what is right.
groups: the statement of each; in NLVR2 the identifier without its third part.
Returns accuracy and consistency in [0, 1].
"""

_CITATION = """\
@inproceedings{suhr2019corpus,
  title={A Corpus for Reasoning about Natural Language Grounded in Photographs},
  author={Suhr, Alane and Zhou, Stephanie and Zhang, Ally and Zhang, Iris and Bai, Huajun and Artzi, Yoav},
  booktitle={ACL}, year={2019}
}
"""


class VlpNlvr2(evaluate.Metric):
    """`evaluate` module of `hf_vlp.evaluation.visual_reasoning.consistency`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("int64"),
                    "references": datasets.Value("int64"),
                    "groups": datasets.Value("string"),
                }
            ),
        )

    def _compute(self, predictions: list[int], references: list[int], groups: list[str]) -> dict[str, float]:
        right = [prediction == label for prediction, label in zip(predictions, references)]
        return {"accuracy": sum(right) / len(right), "consistency": consistency(right, groups)}
