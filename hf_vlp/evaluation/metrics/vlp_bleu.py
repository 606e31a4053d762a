"""BLEU-1..4 of captions as the COCO caption evaluation computes them."""

import datasets
import evaluate

from hf_vlp.evaluation.caption_scores import bleu
from hf_vlp.evaluation.ptb_tokenizer import tokenize_captions

_DESCRIPTION = """\
Corpus BLEU-1 to BLEU-4 with the closest reference length, equal to the COCO caption evaluation on the same tokens.
"""

_INPUTS = """\
predictions: one caption an image.
references: a list of reference captions for each image.
tokenized: the captions are tokenised already (tokens separated by single blanks); by default they are tokenised here.
Returns bleu_1, bleu_2, bleu_3 and bleu_4 in [0, 1].
"""

_CITATION = """\
@inproceedings{papineni2002bleu,
  title={Bleu: a method for automatic evaluation of machine translation},
  author={Papineni, Kishore and Roukos, Salim and Ward, Todd and Zhu, Wei-Jing},
  booktitle={ACL}, year={2002}
}
"""


class VlpBleu(evaluate.Metric):
    """`evaluate` module of `hf_vlp.evaluation.caption_scores.bleu`."""

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
        return {f"bleu_{n}": score.corpus for n, score in enumerate(bleu(predictions, references), start=1)}
