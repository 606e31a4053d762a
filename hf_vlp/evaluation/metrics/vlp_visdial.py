"""R@1/5/10, MRR, mean rank and NDCG of VisDial."""

import datasets
import evaluate

from hf_vlp.evaluation.dialog import dialog_metrics

_DESCRIPTION = """\
Where the right candidate stands (R@1/5/10, MRR, mean rank; equal scores count against), and the gain of the order by
relevance (NDCG over the relevant candidates).
"""

_INPUTS = """\
predictions: for each turn the scores of its candidates, higher is better.
references: for each turn the position of the right candidate.
relevance: for each turn the relevance of its candidates, empty where nobody judged them.
Returns recall_at_1, recall_at_5, recall_at_10, mrr, ndcg in [0, 1], and mean_rank from 1.
"""

_CITATION = """\
@inproceedings{das2017visual,
  title={Visual Dialog},
  author={Das, Abhishek and Kottur, Satwik and Gupta, Khushi and Singh, Avi and Yadav, Deshraj and Moura,
          Jos{\\'e} M. F. and Parikh, Devi and Batra, Dhruv},
  booktitle={CVPR}, year={2017}
}
"""


class VlpVisdial(evaluate.Metric):
    """`evaluate` module of `hf_vlp.evaluation.dialog.dialog_metrics`."""

    def _info(self) -> evaluate.MetricInfo:
        numbers = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": numbers, "references": datasets.Value("int64"), "relevance": numbers}
            ),
        )

    def _compute(
        self, predictions: list[list[float]], references: list[int], relevance: list[list[float]]
    ) -> dict[str, float]:
        return dialog_metrics(predictions, references, relevance)
