"""CIDEr of captions, as the COCO caption evaluation prints it or as the paper first defines it."""

import datasets
import evaluate

from hf_vlp.evaluation.caption_scores import cider
from hf_vlp.evaluation.ptb_tokenizer import tokenize_captions

_DESCRIPTION = """\
CIDEr. By default the number that the COCO caption evaluation prints under this name, which is CIDEr-D.
"""

_INPUTS = """\
predictions: one caption an image.
references: a list of reference captions for each image.
tokenized: the captions are tokenised already (tokens separated by single blanks); by default they are tokenised here.
variant: "coco", or "paper" for the cosine without clipping and length penalty.
Returns cider, at most 10.
"""

_CITATION = """\
@inproceedings{vedantam2015cider,
  title={CIDEr: Consensus-based Image Description Evaluation},
  author={Vedantam, Ramakrishna and Zitnick, C. Lawrence and Parikh, Devi},
  booktitle={CVPR}, year={2015}
}
"""


class VlpCider(evaluate.Metric):
    """`evaluate` module of `hf_vlp.evaluation.caption_scores.cider`."""

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
        self, predictions: list[str], references: list[list[str]], tokenized: bool = False, variant: str = "coco"
    ) -> dict[str, float]:
        if not tokenized:
            predictions = tokenize_captions(predictions)
            references = [tokenize_captions(captions) for captions in references]
        return {"cider": cider(predictions, references, variant=variant).corpus}
