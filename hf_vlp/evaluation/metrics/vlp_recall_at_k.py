"""Recall@k of ranked candidates; ties count against."""

import datasets
import evaluate
import torch

from hf_vlp.evaluation.recall import ranks_from_scores, recall_at

_DESCRIPTION = """\
Share of queries with a right candidate among the first k. A wrong candidate that scores as high as the best right one
is ranked before it.
"""

_INPUTS = """\
predictions: for each query the scores of all candidates, higher is better.
references: for each query the positions of its right candidates, at least one.
ks: depths, 1, 5 and 10 by default.
Returns recall_at_1, ... in [0, 1].
"""

_CITATION = """\
@article{young2014image,
  title={From image descriptions to visual denotations},
  author={Young, Peter and Lai, Alice and Hodosh, Micah and Hockenmaier, Julia},
  journal={TACL}, year={2014}
}
"""


class VlpRecallAtK(evaluate.Metric):
    """`evaluate` module of `hf_vlp.evaluation.recall.recall_at`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def _compute(
        self, predictions: list[list[float]], references: list[list[int]], ks: tuple[int, ...] = (1, 5, 10)
    ) -> dict[str, float]:
        scores = torch.tensor(predictions, dtype=torch.float64)
        right = torch.zeros(scores.shape, dtype=torch.bool)
        for query, positions in enumerate(references):
            right[query, list(positions)] = True
        ranks = ranks_from_scores(scores, right)
        return {f"recall_at_{k}": recall_at(ranks, k) for k in ks}
