"""VQA accuracy with the official answer normalisation."""

import datasets
import evaluate

from hf_vlp.evaluation.vqa_scores import vqa_accuracy

_DESCRIPTION = """\
Mean over questions of min(1, matches / 3), averaged over the ways to leave one human answer out, after the official
normalisation of answers.
"""

_INPUTS = """\
predictions: one answer a question.
references: the human answers to each question, ten in VQA, at least four.
normalize: "official" (normalises where the humans disagree) or "always".
Returns vqa_accuracy in [0, 1].
"""

_CITATION = """\
@inproceedings{antol2015vqa,
  title={VQA: Visual Question Answering},
  author={Antol, Stanislaw and Agrawal, Aishwarya and Lu, Jiasen and Mitchell, Margaret and Batra, Dhruv and
          Zitnick, C. Lawrence and Parikh, Devi},
  booktitle={ICCV}, year={2015}
}
"""


class VlpVqaAccuracy(evaluate.Metric):
    """`evaluate` module of `hf_vlp.evaluation.vqa_scores.vqa_accuracy`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def _compute(
        self, predictions: list[str], references: list[list[str]], normalize: str = "official"
    ) -> dict[str, float]:
        return {"vqa_accuracy": vqa_accuracy(predictions, references, normalize=normalize)["accuracy"]}
