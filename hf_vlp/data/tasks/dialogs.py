"""What a model reads of a dialog: caption, history and question as one text."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..records import BadRecord, usable_text

_ENDS = (".", "?", "!", ",", ";", ":")


def dialog_text(caption: str, history: Sequence[tuple[str, str]], question: str) -> str:
    """ "a cat on a mat. what color is it? black. is it asleep?"

    Args:
        caption: of the image; may be empty.
        history: (question, answer) of the turns before.
        question: of this turn.
    """
    parts = [_ended(caption, ".")] if caption else []
    for asked, answered in history:
        parts += [_ended(asked, "?"), _ended(answered, ".")]
    return " ".join((*parts, _ended(question, "?")))


def fitted_text(caption: str, history: Sequence[tuple[str, str]], question: str, fits: Callable[[str], bool]) -> str:
    """The text with as many of the last turns as fit; without the caption if not even that fits beside the question.

    The question stands at the end, where a plain cut would take it away first.

    Args:
        fits: whether the model can read a text whole.
    """
    for start in range(len(history) + 1):
        text = dialog_text(caption, history[start:], question)
        if fits(text):
            return text
    return dialog_text("", (), question)


def history_of(turns: Sequence[Mapping[str, Any]], turn: int) -> list[tuple[str, str]]:
    """(question, answer) of the turns before number `turn`.

    Raises:
        BadRecord: one of them lacks its question or its answer; the detail says which.
    """
    history = []
    for number, one in enumerate(turns[:turn]):
        try:
            history.append((usable_text(one.get("question")), usable_text(one.get("answer"))))
        except BadRecord as error:
            raise BadRecord("turns_wrong", f"turn {number}, which later ones follow: {error.reason}") from None
    return history


def _ended(text: str, mark: str) -> str:
    text = text.strip()
    return text if text.endswith(_ENDS) else text + mark
