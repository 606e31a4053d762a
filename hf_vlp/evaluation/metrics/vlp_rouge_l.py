"""ROUGE-L of captions as the COCO caption evaluation computes it."""

import datasets
import evaluate

from hf_vlp.evaluation.caption_scores import rouge_l
from hf_vlp.evaluation.ptb_tokenizer import tokenize_captions

_DESCRIPTION = """\
F-measure of the longest common subsequence (beta 1.2), equal to the COCO caption evaluation on the same tokens.
"""

_INPUTS = """\
predictions: one caption an image.
references: a list of reference captions for each image.
tokenized: the captions are tokenised already (tokens separated by single blanks); by default they are tokenised here.
Returns rouge_l in [0, 1].
"""

_CITATION = """\
@inproceedings{lin2004rouge,
  title={ROUGE: A Package for Automatic Evaluation of Summaries},
  author={Lin, Chin-Yew}, booktitle={Text Summarization Branches Out}, year={2004}
}
"""


class VlpRougeL(evaluate.Metric):
    """`evaluate` module of `hf_vlp.evaluation.caption_scores.rouge_l`."""

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
        self, predictions: list[str], references: list[list[str]], tokenized: bool = False
    ) -> dict[str, float]:
        if not tokenized:
            predictions = tokenize_captions(predictions)
            references = [tokenize_captions(captions) for captions in references]
        return {"rouge_l": rouge_l(predictions, references).corpus}
