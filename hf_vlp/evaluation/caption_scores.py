"""BLEU, ROUGE-L, CIDEr and CIDEr-D of captions, as the COCO caption evaluation computes them.

Every function takes tokenised captions: strings whose tokens are separated by single blanks, such as those of
`hf_vlp.evaluation.ptb_tokenizer.tokenize`. On the same tokens the numbers equal those of the reference evaluation code
(`pycocoevalcap` for BLEU, ROUGE-L and what it prints as CIDEr, which is CIDEr-D; the consensus evaluation of the
CIDEr paper's authors for the unclipped CIDEr).

METEOR and SPICE are left out: the first needs a Java program with its paraphrase tables, the second a Java scene-graph
parser and WordNet.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

Ngrams = Counter[tuple[str, ...]]


@dataclass(frozen=True)
class CaptionScore:
    """A score of the corpus and of each image.

    Attributes:
        corpus: for BLEU of the summed counts, for the others the mean over images.
        per_image: in the order of the predictions.
    """

    corpus: float
    per_image: list[float]


def _ngrams(tokens: Sequence[str], order: int) -> list[Ngrams]:
    """Counts of the n-grams of `tokens`, one counter for each n in 1..order."""
    return [Counter(zip(*(tokens[shift:] for shift in range(n)))) for n in range(1, order + 1)]


def _checked(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions but {len(references)} lists of references: give one prediction an image"
        )
    if not predictions:
        raise ValueError("no predictions: a caption score needs at least one image")
    for index, (prediction, captions) in enumerate(zip(predictions, references)):
        if not isinstance(prediction, str):
            raise TypeError(f"predictions[{index}] is {type(prediction).__name__}, not a tokenised string")
        if isinstance(captions, str):
            raise TypeError(f"references[{index}] is a string; give a list of reference captions for each image")
        if not captions:
            raise ValueError(f"references[{index}] is empty: an image without a reference caption cannot be scored")


# The reference keeps empty counts finite with these two: a precision without any match is 1e-15 / guesses, not 0.
_TINY = 1e-15
_SMALL = 1e-9


@dataclass
class _BleuCounts:
    candidate_length: int
    reference_length: int
    guesses: list[int]
    matches: list[int]

    def scores(self) -> list[float]:
        """BLEU-1..n: geometric means of the modified precisions, times the brevity penalty."""
        ratio = (self.candidate_length + _TINY) / (self.reference_length + _SMALL)
        penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
        scores, product = [], 1.0
        for n, (matches, guesses) in enumerate(zip(self.matches, self.guesses), start=1):
            product *= (matches + _TINY) / (guesses + _SMALL)
            scores.append(product ** (1 / n) * penalty)
        return scores


def _bleu_counts(prediction: str, captions: Sequence[str], order: int) -> _BleuCounts:
    tokens = prediction.split()
    references = [caption.split() for caption in captions]
    ceiling: Ngrams = Counter()  # most often that any one reference has the n-gram
    for reference in references:
        for counts in _ngrams(reference, order):
            ceiling |= counts
    return _BleuCounts(
        candidate_length=len(tokens),
        # The length nearest to the candidate's; the shorter of two that are equally near.
        reference_length=min((abs(len(reference) - len(tokens)), len(reference)) for reference in references)[1],
        guesses=[max(0, len(tokens) - n) for n in range(order)],
        matches=[sum((counts & ceiling).values()) for counts in _ngrams(tokens, order)],
    )


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]], order: int = 4) -> list[CaptionScore]:
    """BLEU-1 to BLEU-`order` (Papineni et al., 2002), corpus level, with the closest reference length.

    Args:
        predictions: one tokenised caption an image.
        references: the tokenised reference captions of each image.
        order: longest n-gram.

    Returns:
        `order` scores in [0, 1]; the n-th is the geometric mean of the precisions of 1- to n-grams, times the brevity
        penalty. `corpus` is computed from summed counts: it is not the mean of `per_image`.

    Raises:
        ValueError, TypeError: lengths differ, nothing to score, an image without references.
    """
    _checked(predictions, references)
    counts = [_bleu_counts(prediction, captions, order) for prediction, captions in zip(predictions, references)]
    total = _BleuCounts(
        candidate_length=sum(c.candidate_length for c in counts),
        reference_length=sum(c.reference_length for c in counts),
        guesses=[sum(column) for column in zip(*(c.guesses for c in counts))],
        matches=[sum(column) for column in zip(*(c.matches for c in counts))],
    )
    per_image = list(zip(*(c.scores() for c in counts)))
    return [CaptionScore(corpus, list(column)) for corpus, column in zip(total.scores(), per_image)]


def _longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    row = [0] * (len(right) + 1)
    for token in left:
        diagonal = 0
        for column, other in enumerate(right, start=1):
            above = row[column]
            row[column] = diagonal + 1 if token == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]], beta: float = 1.2) -> CaptionScore:
    """ROUGE-L (Lin, 2004): F-measure of the longest common subsequence, mean over images, in [0, 1].

    Precision and recall are each the best over the references, so they may come from different ones.

    Args:
        predictions: one tokenised caption an image.
        references: the tokenised reference captions of each image.
        beta: weight of recall.

    Raises:
        ValueError, TypeError: lengths differ, nothing to score, an image without references.
    """
    _checked(predictions, references)
    per_image = []
    for prediction, captions in zip(predictions, references):
        # Split at single blanks as the reference does: the empty caption is then one empty token, not none, which
        # keeps both divisions defined.
        tokens = prediction.split(" ")
        split = [caption.split(" ") for caption in captions]
        common = [_longest_common_subsequence(reference, tokens) for reference in split]
        precision = max(common) / len(tokens)
        recall = max(length / len(reference) for length, reference in zip(common, split))
        score = 0.0
        if precision and recall:
            score = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
        per_image.append(score)
    return CaptionScore(math.fsum(per_image) / len(per_image), per_image)


@dataclass(frozen=True)
class _TfIdf:
    weights: list[dict[tuple[str, ...], float]]
    norms: list[float]
    length: int


def _consensus(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    similarity: Callable[[_TfIdf, _TfIdf, int], float],
    order: int,
) -> CaptionScore:
    """10 × the mean over references and n-gram lengths of a similarity of TF-IDF vectors (CIDEr paper, eq. 1-3)."""
    _checked(predictions, references)
    counted = [[_ngrams(caption.split(), order) for caption in captions] for captions in references]
    # An n-gram counts once an image, however many of its captions have it.
    documents: Ngrams = Counter()
    for captions in counted:
        documents.update(set(chain.from_iterable(chain.from_iterable(captions))))
    log_images = math.log(len(references))

    def vector(counts: list[Ngrams]) -> _TfIdf:
        weights = [
            {gram: count * (log_images - math.log(max(1, documents[gram]))) for gram, count in grams.items()}
            for grams in counts
        ]
        norms = [math.sqrt(math.fsum(value**2 for value in one.values())) for one in weights]
        # The reference measures length in bigrams: one less than in tokens, with 0 and 1 token both at 0.
        return _TfIdf(weights, norms, counts[1].total() if order > 1 else 0)

    per_image = []
    for prediction, captions in zip(predictions, counted):
        candidate = vector(_ngrams(prediction.split(), order))
        total = math.fsum(
            similarity(candidate, reference, n) for reference in map(vector, captions) for n in range(order)
        )
        per_image.append(10.0 * total / (order * len(captions)))
    return CaptionScore(math.fsum(per_image) / len(per_image), per_image)


def cider(
    predictions: Sequence[str], references: Sequence[Sequence[str]], order: int = 4, *, variant: str = "coco"
) -> CaptionScore:
    """CIDEr (Vedantam et al., 2015), mean over images, on the scale where 10 is the greatest value.

    The document frequencies come from `references`, so the score of an image depends on the whole set, and a set of
    one image scores 0: every n-gram is then in all its documents.

    Args:
        predictions: one tokenised caption an image.
        references: the tokenised reference captions of each image.
        order: longest n-gram.
        variant: `"coco"` is what the COCO evaluation prints as CIDEr and what published tables hold; it is CIDEr-D.
            `"paper"` is the cosine similarity of the paper's eq. 2 without clipping and length penalty.

    Raises:
        ValueError, TypeError: unknown variant, lengths differ, nothing to score, an image without references.
    """
    if variant == "coco":
        return cider_d(predictions, references, order)
    if variant != "paper":
        raise ValueError(f"variant={variant!r} is not known; choose 'coco' (as in published tables) or 'paper'")

    def cosine(candidate: _TfIdf, reference: _TfIdf, n: int) -> float:
        left, right = candidate.weights[n], reference.weights[n]
        product = math.fsum(value * right[gram] for gram, value in left.items() if gram in right)
        norm = candidate.norms[n] * reference.norms[n]
        return product / norm if norm else product

    return _consensus(predictions, references, cosine, order)


def cider_d(
    predictions: Sequence[str], references: Sequence[Sequence[str]], order: int = 4, sigma: float = 6.0
) -> CaptionScore:
    """CIDEr-D (Vedantam et al., 2015, section 5): CIDEr with clipped counts and a Gaussian penalty on length.

    Args:
        predictions: one tokenised caption an image.
        references: the tokenised reference captions of each image.
        order: longest n-gram.
        sigma: width of the length penalty, in tokens.

    Returns:
        The mean over images, at most 10, and the score of each image.

    Raises:
        ValueError, TypeError: lengths differ, nothing to score, an image without references.
    """

    def clipped(candidate: _TfIdf, reference: _TfIdf, n: int) -> float:
        left, right = candidate.weights[n], reference.weights[n]
        product = math.fsum(min(value, right[gram]) * right[gram] for gram, value in left.items() if gram in right)
        norm = candidate.norms[n] * reference.norms[n]
        penalty = math.exp(-((candidate.length - reference.length) ** 2) / (2 * sigma**2))
        return penalty * (product / norm if norm else product)

    return _consensus(predictions, references, clipped, order)


def caption_metrics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, CaptionScore]:
    """All scores of tokenised captions: `bleu_1` .. `bleu_4`, `rouge_l`, `cider`, `cider_d`.

    `cider` and `cider_d` are equal, as they are in the reference code; see `cider` for the unclipped variant.

    Raises:
        ValueError, TypeError: lengths differ, nothing to score, an image without references.
    """
    scores = {f"bleu_{n}": score for n, score in enumerate(bleu(predictions, references), start=1)}
    scores["rouge_l"] = rouge_l(predictions, references)
    scores["cider_d"] = cider_d(predictions, references)
    scores["cider"] = scores["cider_d"]
    return scores
