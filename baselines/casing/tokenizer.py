"""A tokenizer as code: a reversible case transform, then the SentencePiece model beside this file.

"The NASA rocket" becomes "<UP>the<CAPS> nasa rocket": a word has the same pieces however it is written, and its case
is told by a marker before its space. Encoding and decoding are inverse on every text:

- Only letters whose lower and upper case are one character each and lead back to each other take part; 'İ', 'ß', 'ǅ'
  or the Kelvin sign stay as they are.
- CAPS stands for a run of two or more capitals that no small letter follows; every other capital has an UP of its own.
- A marker that the text itself contains is written after an UP. No confusion is possible, since anything else that
  follows an UP is a space or a small letter.
"""

import re
import sys
from functools import cache
from pathlib import Path

UP, CAPS = "\ue000", "\ue001"  # private use: text hardly has them

LOWER = {
    c: c.lower()
    for c in map(chr, range(sys.maxunicode + 1))
    if len(c.lower()) == 1 and c != c.lower() and c.lower().upper() == c and c.lower().lower() == c.lower()
}
UPPER = {lower: upper for upper, lower in LOWER.items()}

_CAPITAL, _SMALL = (f"[{''.join(map(re.escape, letters))}]" for letters in (LOWER, UPPER))
_CASED = re.compile(f"(?P<marker>[{UP}{CAPS}])|(?P<caps> ?{_CAPITAL}{{2,}}(?!{_SMALL}))|(?P<up> ?{_CAPITAL})")
_MARKED = re.compile(f"{UP}(?P<marker>[{UP}{CAPS}])|{CAPS}(?P<caps> ?{_SMALL}+)|{UP}(?P<up> ?{_SMALL})")


def lower_case(text: str) -> str:
    """The text with markers in place of capitals."""
    return _CASED.sub(_mark, text)


def restore_case(text: str) -> str:
    """The inverse of `lower_case`."""
    return _MARKED.sub(_unmark, text)


def _mark(match: re.Match[str]) -> str:
    if match["marker"]:
        return UP + match["marker"]
    return (CAPS if match["caps"] else UP) + "".join(LOWER.get(c, c) for c in match[0])


def _unmark(match: re.Match[str]) -> str:
    return match["marker"] or "".join(UPPER.get(c, c) for c in match["caps"] or match["up"])


def encode(text: str) -> list[int]:
    """Ids of a text."""
    ids: list[int] = _processor().encode(lower_case(text))
    return ids


def decode(ids: list[int]) -> str:
    """The text again."""
    return restore_case(_processor().decode(ids))


@cache
def _processor():  # type: ignore[no-untyped-def]
    import sentencepiece as spm

    return spm.SentencePieceProcessor(model_file=str(Path(__file__).with_name("tokenizer.model")))
