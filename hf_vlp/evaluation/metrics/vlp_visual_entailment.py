"""Accuracy of visual entailment, in all and for each label."""

import datasets
import evaluate

from hf_vlp.evaluation.visual_entailment import label_accuracy

_DESCRIPTION = "Accuracy over contradiction, neutral and entailment, in all and for each of them."

_INPUTS = """\
predictions: 0 (contradiction), 1 (neutral) or 2 (entailment) for each pair.
references: what is right.
Returns accuracy in [0, 1], and accuracy_contradiction, accuracy_neutral, accuracy_entailment where they occur.
"""

_CITATION = """\
@article{xie2019visual,
  title={Visual Entailment: A Novel Task for Fine-Grained Image Understanding},
  author={Xie, Ning and Lai, Farley and Doran, Derek and Kadav, Asim},
  journal={arXiv:1901.06706}, year={2019}
}
"""


class VlpVisualEntailment(evaluate.Metric):
    """`evaluate` module of `hf_vlp.evaluation.visual_entailment.label_accuracy`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        scores = label_accuracy(predictions, references)
        return {"accuracy": scores["accuracy"]} | {
            f"accuracy_{name}": value for name, value in scores["per_label"].items()
        }
