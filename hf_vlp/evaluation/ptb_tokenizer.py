"""Tokens of captions as the COCO caption evaluation makes them, without Java.

That evaluation runs the Penn-Treebank tokenizer of Stanford CoreNLP 3.4.1 over the captions, lower-cases the tokens
and drops a list of punctuation marks. The scores depend on it: it splits *can't* into *ca* and *n't*, keeps the full
stop of *st.*, holds *black-and-white* together, and keeps brackets as *-lrb-* and a doubled *!!*, since the list of
dropped marks does not have them. The rules here were found from what that program does to given texts;
`docs/evaluation.md` says on which texts the two were compared, and where they differ.

As in its generator, the rule that matches the longest text at a position wins, and of equally long ones the first.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import NamedTuple

# Marks that the evaluation drops after tokenisation.
DROPPED = frozenset(["''", "'", "``", "`", *".?!,:;", "-", "--", "..."])

_LETTER = r"[^\W\d_\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209c\u2150-\u218b\u2460-\u24ff]"
_LETTER_OR_DIGIT = rf"(?:{_LETTER}|[\u0300-\u036f\u0483-\u0487\u0591-\u05c7\u0610-\u065f\u0900-\u0e4e]|\d)"
_APOSTROPHE = r"['\u2019\u0092]"
_ENDS = rf"(?!{_LETTER_OR_DIGIT})"
_CLITIC = r"(?:['\u0092](?:s|m|d|ll|re|ve)(?![a-z])|\u2019(?:s|m|d|ll|re|ve))"
_NOT = rf"n(?:{_APOSTROPHE}|`)t"
_WORD = rf"{_LETTER}{_LETTER_OR_DIGIT}*(?:[.!?]{_LETTER}{_LETTER_OR_DIGIT}*)*"
_PART = rf"(?:[dol]{_APOSTROPHE})?{_LETTER_OR_DIGIT}+"
_JOINED = rf"(?:{_PART}(?:[-\u00ad\u2010\u2011]{_PART})+|{_LETTER_OR_DIGIT}+)"
_SLASHED = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_NUMBER = r"(?:\d*(?:[.:,]\d+)+|\d+(?:[.:,]\d+)*)"
_BLANK = r"[ \t\u00a0\u3000]"

_HOST = r"www\.(?:[^\s\"<>|.!?(){}]+\.)*[a-z]{2,}|(?:[^\s\"`'<>|.!?(){},/:;-]+\.)+(?:com|net|org|edu)"

# Abbreviations that keep their full stop. Those that are words as well do so with a capital letter only, and some only
# before a number.
_ABBREVIATIONS = """
    adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bancorp bhd bldg blvd brig bros calif capt cf
    cie cmdr co col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga
    gen gov govs hon inc ind insp intl invt jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mfg mich minn
    mlle mme mo mon mont mr mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph plc ppte pptes ppty pptys pres
    prof profs pte ptes pty ptys pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt supts sys
    tel tenn thu thurs treas tue tues univ va vs vt wed wis wisc wm wyo
"""
_CAPITALIZED = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"
_BEFORE_NUMBERS = "art ca fig figs no nos op p pp prop"
# A single letter before one of these words, capitalised, ends a sentence: "a big letter x. The man", but "j. smith".
_OPENERS = """
    A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Now Once One
    Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You
"""
_WITH_APOSTROPHE = "c'est c'mon e'er ev'ry li'l ma'am ma'ams ne'er nor'easter qu'est qu'il s'mores"
_EXTENSIONS = """
    bat bmp c cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php pl png ppt ps py tar txt wav xml
    zip
"""

_BRACKETS = {"(": "-LRB-", ")": "-RRB-", "[": "-LSB-", "]": "-RSB-", "{": "-LCB-", "}": "-RCB-"}
_REPLACED = {
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
    "&quot;": "",
    "&apos;": "",
    "&nbsp;": "",
    "\u00a2": "cents",
    "\u00a3": "#",
    "\u00a4": "$",
    "\u0080": "$",
    "\u20a0": "$",
    "\u20ac": "$",
    "\u00bc": "1/4",
    "\u00bd": "1/2",
    "\u00be": "3/4",
    "\u2153": "1/3",
    "\u2154": "2/3",
} | _BRACKETS


class _Rule(NamedTuple):
    """A pattern whose one matched group is the text of the token, and how that text is written."""

    pattern: re.Pattern[str]
    write: Callable[[str], str]


def _any_of(words: str) -> str:
    return "|".join(sorted(words.split(), key=len, reverse=True))


def _same(text: str) -> str:
    return text


def _straight(text: str) -> str:
    return text.replace("\u2019", "'").replace("\u0092", "'")


def _replaced(text: str) -> str:
    return _REPLACED.get(text.lower(), text)


def _brackets_inside(text: str) -> str:
    return _one_token(text.replace("(", _BRACKETS["("]).replace(")", _BRACKETS[")"]))


def _one_token(text: str) -> str:
    # A token with a blank inside keeps it as a no-break blank.
    return text.replace(" ", "\u00a0")


def _rule(pattern: str, write: Callable[[str], str] = _same, flags: int = re.IGNORECASE) -> _Rule:
    return _Rule(re.compile(pattern, flags), write)


_DROP = ""

_RULES: tuple[_Rule, ...] = (
    # Words. The first two leave their clitic to be the next token.
    _rule(rf"({_WORD}|{_JOINED}){_CLITIC}"),
    _rule(rf"([a-z]*?[a-z]){_NOT}"),
    _rule(r"(can)not|(gon)na|(got)ta|(lem)me|(gim)me|(wan)na"),
    _rule(r"('t)(?:is|was)"),
    _rule(rf"({_CLITIC}|{_NOT}(?![a-z]))", _straight),
    _rule(rf"([A-HJ-XZdlno]{_APOSTROPHE}{_LETTER}{{2,}})", flags=0),
    _rule(rf"({_LETTER}+[aeiouyAEIOUY]{_APOSTROPHE}[aeiouA-Z]{_LETTER}*)", flags=0),
    _rule(rf"((?:{_any_of(_WITH_APOSTROPHE)}))".replace("'", _APOSTROPHE)),
    _rule(r"('(?:em|till?|n'|n(?!\w))|ol'(?!\w)|(?:dunkin|somethin)')".replace("'", _APOSTROPHE)),
    _rule(rf"([dlj]{_APOSTROPHE}|y{_APOSTROPHE}(?=[a-z]))"),
    _rule(rf"({_APOSTROPHE}\d0s|{_APOSTROPHE}\d\d(?!\S))"),
    _rule(rf"({_WORD})"),
    _rule(rf"({_JOINED})"),
    _rule(rf"({_SLASHED}(?:/{_SLASHED}){{1,2}})"),
    _rule(r"([A-Za-z0-9]+(?:_[A-Za-z0-9]+)+)"),
    _rule(r"([A-Z]+&(?:amp;)?[A-Z]+)", lambda text: text.replace("&amp;", "&"), flags=0),
    _rule(r"(C\+\+|[CF]#)"),
    # Abbreviations.
    _rule(rf"((?:{_any_of(_ABBREVIATIONS)})\.)"),
    _rule(rf"((?:{_any_of(_CAPITALIZED)}|{_any_of(_CAPITALIZED.upper())})\.)", flags=0),
    _rule(rf"((?:{_any_of(_BEFORE_NUMBERS)})\.){_BLANK}?\d"),
    _rule(rf"([A-Za-z])\.\s+(?:{_any_of(_OPENERS + _OPENERS.upper())})(?!\S)", flags=0),
    _rule(rf"((?:[a-z0-9](?:{_LETTER_OR_DIGIT}|[.,])*-)*[a-z](?:\.[a-z])+\.|[a-z]\.|(?:ph|ed)\.d\.)"),
    _rule(rf"((?:{_WORD}|{_JOINED})\.)[,;:]"),
    _rule(rf"({_LETTER_OR_DIGIT}+(?:\.{_LETTER_OR_DIGIT}+)*\.(?:{_any_of(_EXTENSIONS)})){_ENDS}"),
    # Numbers.
    _rule(rf"([-+]?{_NUMBER})"),
    _rule(r"([a-z0-9][a-z0-9.,]*(?:-[a-z0-9]+)+)"),
    _rule(r"((?:\d{1,4}[- \u00a0])?\d{1,4}/\d{1,4})", _brackets_inside),
    _rule(r"(\d{1,2}[-/]\d{1,2}[-/]\d{2,4})"),
    _rule(r"(\(\d{3}\)[ \u00a0]?\d{3}-?\d{4})", _brackets_inside),
    _rule(r"([A-Z]*\$)", flags=0),
    # Addresses and mark-up.
    _rule(r"(https?://[^\s\"<>|(){}\[\]]*[^\s\"<>|(){}\[\].,!?:;'-])"),
    _rule(rf"((?:{_HOST})(?:/[^\s\"<>|()]*[^\s\"<>|.!?(){{}},/:;-])?)"),
    _rule(r"(<?[a-z0-9][^\s\"<>|(){}]*@[^\s\"<>|(){}\[\].,;:]+(?:\.[^\s\"<>|(){}\[\].,;:]+)*>?)"),
    _rule(rf"(@[a-z][a-z0-9_]*|#{_LETTER}+)"),
    _rule(r"(</?[a-z][a-z0-9-]*(?:[ /][^<>\n]*)?>|<[!?][a-z-][^<>\n]*>)", _one_token),
    _rule(r"(<<|>>)"),
    _rule(r"(&(?:amp|lt|gt|quot|apos|nbsp);)", _replaced),
    _rule(r"(&#\d+;)"),
    _rule(r"([<>]?[:;=][-o*']?[()DdPpO\\{@|\[\]])(?![A-Za-z0-9])", _brackets_inside, flags=0),
    _rule(r"([\^x=~<>-]_[\^x=~<>-])"),
    # Marks.
    _rule(r"(\.\.\.+|\u2026)", lambda _: "..."),
    _rule(r"([?!]+)"),
    _rule(r"(--+|[\u0096\u0097\u2013-\u2015])", lambda _: "--"),
    _rule(r"(@+|#+|_+|\*+)"),
    _rule(r"('+|`+|\"|[\u0091-\u0094\u2018\u2019\u201b-\u201d\u00ab\u00bb\u2039\u203a])", lambda _: _DROP),
    _rule(r"(\u00ad)", lambda _: "-"),
    _rule(r"(\S)", lambda text: _symbol(text)),
)
# Most of a caption is plain words, which no rule changes.
_PLAIN = re.compile(r"(?!(?i:cannot|gonna|gotta|lemme|gimme|wanna)(?:\s|$))([A-Za-z]+)(?=\s|$)")
_BLANKS = re.compile(r"\s+")


def _symbol(text: str) -> str:
    """A mark that stands alone; those that CoreNLP does not know are left out."""
    if text in _REPLACED:
        return _REPLACED[text]
    code, kind = ord(text), unicodedata.category(text)
    if code < 0x7F or (kind[0] in "LMN" and kind != "Nl" and code < 0xFE00):
        return text
    known = (
        kind == "Sm"
        or (kind == "Sk" and code < 0x2000)
        or (kind == "So" and (code < 0x100 or 0x2100 <= code < 0x2800))
        or (kind == "Sc" and code in (0xA5, 0x60B, 0xE3F, 0x20A4))
        or (kind in ("Ps", "Pe") and (code in (0x201A, 0x201E) or 0x2300 <= code < 0x2A00 or code >= 0xFF00))
        or (kind == "Po" and (code < 0x966 or 0x2016 <= code < 0x2043 or code in (0x3001, 0x3002, 0x30FB)))
        or 0xFF00 <= code < 0xFFF0
        or code == 0x201F
    )
    return text if known and code < 0x10000 else _DROP


def ptb_tokens(text: str) -> list[str]:
    """Tokens of one line as CoreNLP's command line writes them with `-lowerCase`, quotation marks left out."""
    tokens: list[str] = []
    position = 0
    while position < len(text):
        blank = _BLANKS.match(text, position)
        if blank:
            position = blank.end()
            continue
        plain = _PLAIN.match(text, position)
        if plain:
            tokens.append(plain[1])
            position = plain.end()
            continue
        best, longest = None, position
        for rule in _RULES:
            match = rule.pattern.match(text, position)
            if match and match.end() > longest:
                best, longest, write = match, match.end(), rule.write
        token = next(filter(None, best.groups()))
        written = write(token)
        tokens += written.split(" ") if written else []
        position += len(token)
    return [token.lower() for token in tokens]


def tokenize_caption(caption: str) -> str:
    """A caption as the evaluation compares it: tokens with single blanks between them.

    `"Two dogs' toys -- isn't it?"` → `"two dogs toys is n't it"`.
    """
    return " ".join(token for token in ptb_tokens(caption.replace("\n", " ")) if token not in DROPPED)


def tokenize_captions(captions: Iterable[str]) -> list[str]:
    """`tokenize_caption` of each.

    Raises:
        TypeError: a caption is not a string.
    """
    captions = list(captions)
    for index, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise TypeError(f"captions[{index}] is {type(caption).__name__}, not a string")
    return [tokenize_caption(caption) for caption in captions]
