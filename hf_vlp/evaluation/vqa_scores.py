"""VQA accuracy with the normalisation of the official evaluation (Antol et al., 2015; Goyal et al., 2017).

An answer is compared with ten human ones. Left out one at a time, the accuracy against the other nine is
min(1, matches / 3); the score is the mean over the ten ways. Both sides are normalised first, by rules that the
official code applies in a certain order with some surprises, all of them kept here since a leaderboard keeps them.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

# Words that the official normalisation knows, by what happens to them.
_WORDS = {
    "numbers": "zero one two three four five six seven eight nine ten",
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'d've": "he it she somebody someone something there they we who you",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
}
WORDS = {name: words.split() for name, words in _WORDS.items()}
NUMBERS = {word: str(number) for number, word in enumerate(WORDS["numbers"])} | {"none": "0"}
ARTICLES = {"a", "an", "the"}


def _contractions() -> dict[str, str]:
    """Misspelt contraction → contraction, by the rules of English behind the official table.

    The table is irregular in which words take which ending (*shed*, *wed*, *well*, *were* are words of their own), so
    each ending has its list of stems. A second ending may lack its apostrophe in either place.
    """
    table: dict[str, str] = {}
    for ending in ("n't", "'ve", "'d", "'ll", "'re", "'s"):
        table |= {stem + ending.replace("'", ""): stem + ending for stem in WORDS[ending]}
    for first, ending in (("nt", "n't've"), ("d", "'d've")):
        for stem in WORDS[ending]:
            table[f"{stem}{first}'ve"] = table[f"{stem}{ending[:-3]}ve"] = stem + ending
    table |= {"yall": "y'all", "yall'll": "y'all'll", "y'allll": "y'all'll"}
    table |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    table |= dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
    table |= {"maam": "ma'am", "oclock": "o'clock", "twas": "'twas"}
    # The one entry of the official table that takes an apostrophe away.
    table["somebody'd"] = "somebodyd"
    return table


CONTRACTIONS = _contractions()

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_BETWEEN_DIGITS = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
# The official code passes a regex flag where `sub` takes a count, so it removes this many full stops at most.
_FULL_STOPS_REMOVED = int(re.UNICODE)


def _strip_punctuation(answer: str) -> str:
    """Removes each mark that touches a blank, makes a blank of the others, drops full stops not before a digit."""
    remove_all = _COMMA_BETWEEN_DIGITS.search(answer) is not None
    result = answer
    for mark in _PUNCTUATION:
        touches = f"{mark} " in answer or f" {mark}" in answer
        result = result.replace(mark, "" if touches or remove_all else " ")
    return _FULL_STOP.sub("", result, count=_FULL_STOPS_REMOVED)


def _normalize_words(answer: str) -> str:
    """Lower case, number words to digits, no articles, apostrophes put back."""
    words = (NUMBERS.get(word, word) for word in answer.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def clean_answer(answer: str) -> str:
    """An answer without line breaks, tabs and outer blanks: all that is done when the ten humans agree."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def normalize_answer(answer: str) -> str:
    """An answer as the official evaluation compares it.

    `"The Two dogs."` → `"2 dogs"`; `"dont know"` → `"don't know"`; `"black-and-white"` → `"black and white"`.
    """
    return _normalize_words(_strip_punctuation(clean_answer(answer)))


# With fewer humans than this, three matches among the others cannot be reached and nobody could score 1.
FEWEST_ANSWERS = 4


def question_accuracy(prediction: str, answers: Sequence[str], *, normalize: str = "official") -> float:
    """Accuracy of one answer in [0, 1].

    Args:
        prediction: the model's answer.
        answers: the humans' answers, ten in VQA.
        normalize: `"official"` normalises both sides only where the humans disagree, as the official evaluation does
            (where all ten say "yes", a model's "Yes." is then wrong); `"always"` normalises them always.

    Raises:
        ValueError: fewer than four answers, for which the measure cannot reach 1; unknown `normalize`.
    """
    if len(answers) < FEWEST_ANSWERS:
        raise ValueError(
            f"{len(answers)} answers: VQA accuracy compares with the answers of several people and cannot reach 1 "
            f"with fewer than {FEWEST_ANSWERS}; use exact match"
        )
    if normalize not in ("official", "always"):
        raise ValueError(f"normalize={normalize!r} is not known; choose 'official' or 'always'")
    prediction, answers = clean_answer(prediction), [clean_answer(answer) for answer in answers]
    if normalize == "always" or len(set(answers)) > 1:
        prediction, answers = normalize_answer(prediction), [normalize_answer(answer) for answer in answers]
    # Without person i there are `matches - 1` matches left if i gave this answer, else `matches`.
    matches = answers.count(prediction)
    missing = len(answers) - matches
    total = matches * min(1.0, (matches - 1) / 3) + missing * min(1.0, matches / 3)
    return total / len(answers)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the normalised answer is the most frequent human one (or one of several equally frequent), else 0.

    Raises:
        ValueError: no answers.
    """
    if not answers:
        raise ValueError("no answers to compare with")
    counts = Counter(normalize_answer(answer) for answer in answers)
    return float(counts[normalize_answer(prediction)] == max(counts.values()))


def vqa_accuracy(
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    *,
    question_types: Sequence[str | None] | None = None,
    answer_types: Sequence[str | None] | None = None,
    normalize: str = "official",
) -> dict[str, Any]:
    """VQA accuracy over questions, and by type where types are given.

    Args:
        predictions: one answer a question.
        answers: the humans' answers to each question, at least four.
        question_types, answer_types: of each question ("what color is the", …; "yes/no", "number", "other").
        normalize: see `question_accuracy`.

    Returns:
        `accuracy` and `per_question` in [0, 1] (the official script prints percent, rounded to two digits), and
        `per_question_type`, `per_answer_type` with those that were given.

    Raises:
        ValueError: lengths differ, no questions, too few answers.
    """
    for name, given in (("answers", answers), ("question_types", question_types), ("answer_types", answer_types)):
        if given is not None and len(given) != len(predictions):
            raise ValueError(f"{len(predictions)} predictions but {len(given)} {name}")
    if not predictions:
        raise ValueError("no predictions: give at least one answer")
    scores = []
    for index, (prediction, given) in enumerate(zip(predictions, answers)):
        try:
            scores.append(question_accuracy(prediction, given, normalize=normalize))
        except ValueError as error:
            raise ValueError(f"answers[{index}]: {error}") from error
    result: dict[str, Any] = {"accuracy": sum(scores) / len(scores), "per_question": scores}
    if question_types is not None:
        result["per_question_type"] = mean_by(question_types, scores)
    if answer_types is not None:
        result["per_answer_type"] = mean_by(answer_types, scores)
    return result


def mean_by(groups: Sequence[Any], scores: Sequence[float]) -> dict[str, float]:
    """Mean score of each group, groups in alphabetical order; a group of None is left out."""
    members: dict[str, list[float]] = defaultdict(list)
    for group, score in zip(groups, scores):
        if group is not None:
            members[str(group)].append(score)
    return {group: sum(members[group]) / len(members[group]) for group in sorted(members)}
