"""What sends a re-run to a person: found where it is, and silent on what is honest."""

import base64
import math
from dataclasses import replace

import numpy as np
import pytest

from conftest import ROOT
from contest.fakes import CALIBRATION
from pgolf import rules
from pgolf.artifact import is_code
from pgolf.contest import plausible
from pgolf.contest.rerun_record import Declared, entropy
from pgolf.contest.verdict import Speed
from pgolf.score.losses import Losses

NOISE = np.random.default_rng(0).bytes(9000)


def test_code_is_no_noise() -> None:
    """All code of the project, file by file."""
    files = [path for name in ("src", "baselines", "tests") for path in (ROOT / name).rglob("*") if is_code(path.name)]
    assert len(files) > 100
    assert [*plausible.sources({str(path): path.read_bytes() for path in files})] == []


@pytest.mark.parametrize("coded", [NOISE, base64.b64encode(NOISE), base64.b85encode(NOISE), NOISE.hex().encode()])
def test_literals_that_hold_weights_are_noise(coded: bytes) -> None:
    code = (ROOT / "baselines" / "naive" / "train.py").read_bytes()
    (found,) = plausible.sources({"train.py": code + b"\nW = '" + coded + b"'\n", "predict.py": code})
    assert found.startswith("train.py: ")


def test_more_arithmetic_than_the_machine_can_do() -> None:
    declared = Declared(steps=10, tokens=1_000_000, parameters=1_000_000, settings={})  # 6e12 operations
    assert [*plausible.operations(declared, 31.0, CALIBRATION, 1)] == []  # the peak is 0.2 TFLOP/s
    (found,) = plausible.operations(declared, 29.0, CALIBRATION, 1)
    assert "the machine's peak is 0.20" in found
    assert [*plausible.operations(declared, 29.0, CALIBRATION, 2)] == []
    assert [*plausible.operations(declared, 59.0, replace(CALIBRATION, bf16_tflops=None), 1)] != []


def scored(rates: list[float], size: int = 2000) -> Losses:
    sizes = np.full(len(rates), size, dtype=np.int64)
    return Losses("", "", np.array(rates) * math.log(2) * sizes, sizes)


def test_documents_that_are_known_by_heart_stand_out() -> None:
    honest = [*np.random.default_rng(0).normal(2.3, 0.12 * 2.3, 900)]  # as naive's
    assert [*plausible.stretch(scored(honest))] == []
    (found,) = plausible.stretch(scored([*honest[:-5], *[0.1] * 5]))
    assert found.startswith("5 documents, the first is number 895")
    assert [*plausible.stretch(scored([*honest, *[0.1] * 5], rules.STRETCH_DOCUMENT_BYTES - 1))] == []
    assert [*plausible.stretch(scored([2.3] * 100_000 + [0.1]))] == []  # it gains nothing


def test_a_public_text_that_is_known_better_than_source_explains() -> None:
    public, given = (2.0, 2_500_000), {"train.py": NOISE}  # 72,000 bits, and 250,000 for the difficulty
    assert [*plausible.slices(public, 2.12, given)] == []
    assert [*plausible.slices(public, 1.5, given)] == []
    (found,) = plausible.slices(public, 2.14, given)
    assert "350,000 bits less" in found


def test_a_claim_from_a_machine_that_does_not_exist() -> None:
    assert [*plausible.speed(Speed(rules.SLOWEST, "declared steps"))] == []
    assert [*plausible.speed(Speed(0.4, "declared steps"))] != []


def test_entropy_of_bytes() -> None:
    assert entropy(b"") == entropy(b"aaaa") == 0
    assert entropy(b"abab") == 1
    assert entropy(bytes(range(256))) == 8
