"""Reversible transforms that stand before a tokenizer: owned and versioned by the harness.

Text goes through `apply` before it is encoded and through `invert` after it was decoded, so any tokenizer behind a
transform is as lossless as it is alone. This module runs in a sandbox beside the tokenizer, on text that a hostile
decoder made: it imports only the standard library, and both directions take time linear in the text.

A transform never changes once it has a name; what it should do otherwise is a new one.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Transform:
    """Two pure functions with `invert(apply(text)) == text` for every text."""

    apply: Callable[[str], str]
    invert: Callable[[str], str]
    """Accepts any text. The result has at most as many UTF-8 bytes as its argument."""


# case-1: "The NASA rocket" becomes "<UP>the<CAPS> nasa rocket". A word has the same pieces however it is written, and
# a marker before its space says its case.
#
# - Only letters whose lower and upper case are one character each and lead back to each other take part; 'İ', 'ß',
#   'ǅ' or the Kelvin sign stay as they are. Case pairs never change once both letters exist, and Unicode 3.2, which
#   every Python has, fixes which ones exist: so each version of Python has the same table.
# - CAPS stands for a run of two or more capitals that no small letter follows; every other capital has its own UP.
# - A marker that the text itself contains is written after an UP. Nothing else can be meant, since an UP is otherwise
#   followed by a space or a small letter.

UP, CAPS = "\ue000", "\ue001"  # private use: text hardly has them

LOWER = {
    c: c.lower()
    for c in map(chr, range(0x10450))  # no case pair of Unicode 3.2 lies beyond
    if len(c.lower()) == 1
    and c != c.lower()
    and c.lower().upper() == c
    and c.lower().lower() == c.lower()
    and unicodedata.ucd_3_2_0.category(c) != "Cn"
    and unicodedata.ucd_3_2_0.category(c.lower()) != "Cn"
}
UPPER = {lower: upper for upper, lower in LOWER.items()}

_CAPITAL, _SMALL = (f"[{''.join(map(re.escape, letters))}]" for letters in (LOWER, UPPER))
_CASED = re.compile(f"(?P<marker>[{UP}{CAPS}])|(?P<caps> ?{_CAPITAL}{{2,}}(?!{_SMALL}))|(?P<up> ?{_CAPITAL})")
_MARKED = re.compile(f"{UP}(?P<marker>[{UP}{CAPS}])|{CAPS}(?P<caps> ?{_SMALL}+)|{UP}(?P<up> ?{_SMALL})")


def _lower_case(text: str) -> str:
    return _CASED.sub(_mark, text)


def _restore_case(text: str) -> str:
    return _MARKED.sub(_unmark, text)


def _mark(match: re.Match[str]) -> str:
    if match["marker"]:
        return UP + match["marker"]
    return (CAPS if match["caps"] else UP) + "".join(LOWER.get(c, c) for c in match[0])


def _unmark(match: re.Match[str]) -> str:
    return match["marker"] or "".join(UPPER.get(c, c) for c in match["caps"] or match["up"])


TRANSFORMS: Mapping[str, Transform] = MappingProxyType({"case-1": Transform(_lower_case, _restore_case)})
"""By name."""
