"""CIDEr-D of captions."""

import datasets
import evaluate

from hf_vlp.evaluation.caption_scores import cider_d
from hf_vlp.evaluation.ptb_tokenizer import tokenize_captions

_DESCRIPTION = """\
CIDEr-D: TF-IDF n-gram consensus with clipped counts and a penalty on length, document frequencies of the references.
"""

_INPUTS = """\
predictions: one caption an image.
references: a list of reference captions for each image.
tokenized: the captions are tokenised already (tokens separated by single blanks); by default they are tokenised here.
sigma: width of the length penalty, in tokens.
Returns cider_d, at most 10.
"""

_CITATION = """\
@inproceedings{vedantam2015cider,
  title={CIDEr: Consensus-based Image Description Evaluation},
  author={Vedantam, Ramakrishna and Zitnick, C. Lawrence and Parikh, Devi},
  booktitle={CVPR}, year={2015}
}
"""


class VlpCiderD(evaluate.Metric):
    """`evaluate` module of `hf_vlp.evaluation.caption_scores.cider_d`."""

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
        self, predictions: list[str], references: list[list[str]], tokenized: bool = False, sigma: float = 6.0
    ) -> dict[str, float]:
        if not tokenized:
            predictions = tokenize_captions(predictions)
            references = [tokenize_captions(captions) for captions in references]
        return {"cider_d": cider_d(predictions, references, sigma=sigma).corpus}
