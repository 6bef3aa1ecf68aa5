"""The end of a re-run: which seeds count, how fast the machine is, what is implausible, and the verdict."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from pgolf.contest import plausible
from pgolf.contest.case import Case, ScoredText
from pgolf.contest.rerun_record import Rerun
from pgolf.contest.state import Folder
from pgolf.contest.verdict import Speed, distinct, judge
from pgolf.errors import EnvironmentBroken, UsageError
from pgolf.score import losses
from pgolf.score.losses import Losses


def judged(record: Rerun, case: Case, folder: Folder) -> Rerun:
    """The finished record: plausibility and verdict."""
    kept = [_losses(folder, number, case.texts[0]) for number in range(1, len(record.seeds) + 1)]
    keys = [
        (run.artifact.sha256 if run.artifact else None, each.nats.tobytes())
        for run, each in zip(record.seeds, kept, strict=True)
    ]
    counted = distinct(keys)
    results = [record.seeds[number].scores[0] for number in counted]
    scores = [result.bpb for result in results if result.bpb is not None]
    practice = tuple(dict.fromkeys(reason for result in results for reason in result.reasons))
    found = _speed(record, case)
    quarantine = tuple(dict.fromkeys(_implausible(record, case, kept[0], found)))
    widest = case.track.interval_bpb
    verdict = judge(case.claim.bpb, scores, widest, speed=found, quarantine=quarantine, practice=practice)
    if len(counted) < len(record.seeds):
        again = (
            f"{len(record.seeds) - len(counted)} of {len(record.seeds)} seeds gave what another gave, and count once"
        )
        verdict = replace(verdict, reason=f"{verdict.reason}; {again}")
    return replace(record, status="ok", verdict=verdict, quarantine=quarantine)


def _losses(folder: Folder, number: int, text: ScoredText) -> Losses:
    try:
        return losses.read(folder.losses(number, text.shown.sha256))
    except UsageError as error:
        raise EnvironmentBroken(f"{error}; remove the folder of this seed") from None


def _implausible(record: Rerun, case: Case, first: Losses, found: Speed | None) -> Iterator[str]:
    """Why a person has to look at it."""
    devices = record.processes if case.device.startswith("cuda") else 1
    yield from plausible.sources(case.given.text)
    for run in record.seeds:
        if run.declared and record.calibration:
            yield from plausible.operations(run.declared, run.seconds["train"], record.calibration, devices)
    yield from plausible.stretch(first)
    means = [_mean(run.scores[number].bpb for run in record.seeds) for number in range(len(case.texts))]
    for secret in means[1:]:
        yield from plausible.slices((means[0], case.texts[0].bytes), secret, case.given.text)
    if found:
        yield from plausible.speed(found)


def _mean(values: Any) -> float:
    return float(np.mean([value for value in values if value is not None]))


def _speed(record: Rerun, case: Case) -> Speed | None:
    """This machine's speed over the claim's: by calibration where the claim has one, else by declared steps."""
    ours, theirs = record.calibration, case.claim.calibration
    if ours and theirs:
        if ours.naive_ms and theirs.naive_ms:
            return Speed(theirs.naive_ms / ours.naive_ms, "calibration")
        rates = [max(each.fp32_tflops, each.bf16_tflops or 0.0) for each in (ours, theirs)]
        return Speed(rates[0] / rates[1], "calibration") if rates[1] > 0 else None
    told = case.artifact.manifest.training
    steps = [run.declared.steps for run in record.seeds if run.declared]
    return Speed(_mean(steps) / told.steps, "declared steps") if told and told.steps > 0 and steps else None
