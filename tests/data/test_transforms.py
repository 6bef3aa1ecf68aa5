"""The transforms before a tokenizer: reversible on every text, bounded, and the same in every Python."""

import hashlib
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.data import transforms
from pgolf.data.transforms import CAPS, LOWER, TRANSFORMS, UP

CASE = TRANSFORMS["case-1"]
AWKWARD = "aAbBzZ  .\n'1" + UP + CAPS + "ǅǄǆİıßẞKkſsSΣσςéÉÐðꙊ𐐀𐐨ﬁ\u0130\u0301\ud800\udc00"  # noqa: RUF001

texts = st.text(st.one_of(st.sampled_from(AWKWARD), st.characters()))


@pytest.mark.parametrize("name", TRANSFORMS)
@given(text=texts)
@settings(max_examples=1000, deadline=None)
def test_every_text_comes_back(name: str, text: str) -> None:
    """Markers, digraphs, letters whose case mapping is not one to one, other scripts, halves of surrogate pairs."""
    assert TRANSFORMS[name].invert(TRANSFORMS[name].apply(text)) == text


@pytest.mark.parametrize("name", TRANSFORMS)
@given(text=texts)
@settings(max_examples=1000, deadline=None)
def test_hostile_text_does_not_grow(name: str, text: str) -> None:
    """What a decoder made is no product of `apply`; inverting it gives at most as many bytes."""
    back = TRANSFORMS[name].invert(text)
    assert len(back.encode(errors="surrogatepass")) <= len(text.encode(errors="surrogatepass"))


@given(text=texts)
def test_no_capital_is_left(text: str) -> None:
    assert not any(c in LOWER for c in CASE.apply(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The NASA rocket", "^the# nasa rocket"),
        ("HTMLElement", "#html^element"),
        ("iPHONEs of USAs", "i#phon^es of# us^as"),
        ("I'M A B", "^i'^m^ a^ b"),
        ("ΟΔΟΣ Σς É", "#οδοσ^ σς^ é"),
        ("İ ǅ ẞ ß \u212a", "İ ǅ ẞ ß \u212a"),
        ("^A#^", "^^^a^#^^"),
    ],
)
def test_case_markers(text: str, expected: str) -> None:
    """What the transform does; here ^ and # stand for the markers."""
    marks = str.maketrans("^#", UP + CAPS)
    assert CASE.apply(text.translate(marks)) == expected.translate(marks)


def test_the_table_is_the_same_in_every_python() -> None:
    """A name stands for one function: later versions of Unicode add letters, which must not take part."""
    table = "".join(upper + lower for upper, lower in sorted(LOWER.items()))
    digest = hashlib.sha256(table.encode()).hexdigest()
    assert digest == "2f84d12ba6630b05c29da5c31726f1e56b589f6a859395386de4eb2e138a4a21"


@pytest.mark.parametrize(
    "unit", ["A", "aA", " A", UP, CAPS, CAPS + " ", CAPS + "a", CAPS + " a", UP + " ", "A" * 17 + "b"]
)
def test_long_hostile_text_is_no_trap(unit: str) -> None:
    """Quadratic work on 400,000 characters would not end in a day."""
    text = unit * (400_000 // len(unit))
    assert CASE.invert(CASE.apply(text)) == text
    CASE.invert(text)


def test_only_the_standard_library_is_imported() -> None:
    """The module runs in a sandbox that has nothing else."""
    script = f"import runpy, sys; runpy.run_path({transforms.__file__!r}, run_name='transforms'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True)
    assert {name.partition(".")[0] for name in done.stdout.split()} <= {*sys.stdlib_module_names, "__main__"}
