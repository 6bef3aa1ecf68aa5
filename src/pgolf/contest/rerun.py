"""Train a submission again from its sources, score what comes out, and compare with its claim.

    read -> check data -> draw seeds -> calibrate -> per seed: train, compare, score -> plausibility -> verdict

Training and scoring run in fresh sandboxes, one at a time, each under the machine's lock. What is finished is kept in
a folder (see `state`): a re-run that was killed goes on where it was.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

from pgolf import artifact, repeat, rules
from pgolf.artifact import Artifact
from pgolf.contest import claim, rerun_record, state
from pgolf.contest.calibrate import calibrate
from pgolf.contest.case import Case, Options, ScoredText, check, identity, prepare, unnamed
from pgolf.contest.judgement import judged
from pgolf.contest.rerun_record import Calibration, Claimed, Declared, Rerun, SeedRun, SeedScore
from pgolf.contest.state import Folder
from pgolf.contest.verdict import judge
from pgolf.errors import EnvironmentBroken, Refused, UsageError
from pgolf.machine import cores
from pgolf.sandbox import box, training
from pgolf.score import score as scorer
from pgolf.score.devices import find_device
from pgolf.score.losses import Losses
from pgolf.score.record import Environment, Packed, Record, Submission, Text

_CALIBRATION = "calibration.json"
_FOLDERS = Path("runs") / "rerun"


def rerun(path: Path, options: Options, say: Callable[[str], None] = lambda line: None) -> tuple[Rerun, Path | None]:
    """Run the submission at `path` again; `say` gets a line whenever something begins or ends.

    Returns the record and where it was written. Its status is "ok" (there is a verdict), "refused" or "failed" (the
    machine or the data is not fit; what is finished is kept). Raises UsageError, and EnvironmentBroken before anything
    has begun.
    """
    device = find_device(options.device)
    begun = Rerun(artifact=Packed(None, 0), machine=Environment.of(device), processes=options.processes)
    try:
        found = claim.read(path, options.claimed)
        begun = replace(begun, artifact=Packed(None, _size(found.artifact)), claimed=Claimed(found.bpb, found.seeds))
        received = artifact.read(found.artifact, rules.ARTIFACT_BYTES)
        begun = _described(begun, received)
        if reasons := scorer.reasons_of_submission(received.manifest):
            raise Refused(f"no score of this artifact counts: {'; '.join(reasons)}")
        case = prepare(found, received, options, device, say)
    except Refused as error:
        return _refused(begun, str(error)), None
    latest = replace(begun, data=Text(case.dataset.name, case.training_digest), limits=case.limits)
    with state.opened(options.out or _FOLDERS / received.sha256[:16], identity(latest, case)) as folder:
        try:
            for record in _stages(latest, case, folder):
                latest = record  # which knows more than the one before
        except Refused as error:
            latest = _refused(latest, str(error))
        except state.Foreign:
            raise
        except (EnvironmentBroken, UsageError) as error:  # wrong usage later on: something has gone since the start
            latest = replace(latest, status="failed", reason=str(error))
        except OSError as error:
            reason = f"{error.filename or 'input or output'}: {error.strerror or error}"
            latest = replace(latest, status="failed", reason=reason)
        place = folder.root / state.RECORD
        rerun_record.write(latest, place)
    return latest, place


def _size(path: Path) -> int:
    if not path.is_file():
        raise UsageError(f"{path}: no such artifact")
    return path.stat().st_size


def _refused(record: Rerun, reason: str) -> Rerun:
    claimed = record.claimed.bpb if record.claimed else None
    return replace(record, status="refused", reason=reason, verdict=judge(claimed, (), 0.0, refused=reason))


def _described(begun: Rerun, received: Artifact) -> Rerun:
    return replace(
        begun,
        track=received.manifest.track,
        submission=Submission(received.manifest.name, received.manifest.author),
        artifact=Packed(received.sha256, received.size),
        members=rerun_record.members(received),
    )


def _stages(record: Rerun, case: Case, folder: Folder) -> Iterator[Rerun]:
    """Yield the record whenever more of it is known, so that what ends the re-run leaves what was known by then."""
    check(case, folder)
    seeds = folder.prepare(case.options.seeds)
    if (calibration := folder.read(_CALIBRATION, Calibration)) is None:
        case.say("measuring the machine")
        calibration = calibrate(case.dataset, case.track, case.device, case.options.processes, case.options.isolated)
        folder.write(_CALIBRATION, asdict(calibration))
    yield (record := replace(record, calibration=calibration))
    for number, seed in enumerate(seeds, 1):
        where = f"seed {number} of {len(seeds)}"
        run = folder.run(number) or _train(case, folder, number, seed, calibration, where)
        for text in case.texts if run.status == "ok" else ():
            run = _scored(run, text, _score(case, folder, number, run, text, where))
            if run.status != "ok":
                break
        yield (record := _with(record, run))
        if run.status != "ok":
            raise Refused(f"{where}: {run.reason}")
    yield judged(record, case, folder)


def _with(record: Rerun, run: SeedRun) -> Rerun:
    """The record with one more seed, and the seconds of all."""
    seeds = (*record.seeds, run)
    seconds = {
        "calibrate": record.calibration.seconds if record.calibration else 0.0,
        "train": sum(sum(each.seconds.values()) for each in seeds),
        "score": sum(score.seconds for each in seeds for score in each.scores),
    }
    return replace(record, seeds=seeds, seconds={**seconds, "total": sum(seconds.values())})


def _train(case: Case, folder: Folder, number: int, seed: int, calibration: Calibration, where: str) -> SeedRun:
    """Train in a fresh sandbox and keep the result. A refusal is one; a machine that fails leaves none."""
    told, track = case.artifact.manifest.training, case.track
    declared = told.arguments if told else ()
    compiler = shutil.which("g++") is not None  # for torch.compile, as the author had it
    processes = case.options.processes
    job = repeat.job(
        case.artifact, case.dataset, seed, declared, device=case.device, compiler=compiler, processes=processes
    )
    most = track.train_seconds or 3600 * case.options.max_hours
    limits = training.Limits(track.prepare_seconds, most, track.artifact_bytes)
    case.say(f"{where}: training" + (f", {track.train_seconds:g} s" if track.train_seconds else ""))
    given: dict[str, bytes | None] = {}
    with box.listening() as printed:
        try:
            done = training.train(job, limits, isolated=case.options.isolated)
            content, given = done.artifact, {state.ARTIFACT: done.artifact, state.LOG: done.log}
            run = SeedRun(seed, "ok", None, dict(done.seconds), _packed(content), None)
            run = _compared(run, case.artifact, content)
        except Refused as error:
            reason = str(error)
            if isinstance(error, training.Late):
                reason += f"; {_busy(calibration)}"
                if error.phase == "train" and track.train_seconds is None:
                    reason += "; --max-hours allows more, for the track does"
            run = SeedRun(seed, "refused", reason, {}, None, None)
    folder.finish(number, run, {**given, state.OUTPUT: "".join(printed[:1]).encode("utf-8", "replace")})
    case.say(f"{where}: {run.reason}" if run.reason else f"{where}: trained in {run.seconds['train']:.1f} s")
    return run


def _busy(calibration: Calibration) -> str:
    """What tells a slow submission from a busy machine."""
    load = os.getloadavg()[0]
    naive = f", naive took {calibration.naive_ms:.0f} ms a step at calibration" if calibration.naive_ms else ""
    return (
        f"the machine's load average was {load:.1f} on {cores()} cores{naive}; if other programs ran, remove "
        "the folder of this seed and start again"
    )


def _packed(content: bytes) -> Packed:
    return Packed(hashlib.sha256(content).hexdigest(), len(content))


def _compared(run: SeedRun, submitted: Artifact, content: bytes) -> SeedRun:
    """The run with what its artifact declares, refused when that is not the submission."""
    try:
        written = artifact.parse(content, rules.track(submitted.manifest.track).artifact_bytes)
    except Refused as error:
        return replace(run, status="refused", reason=f"what its train.py wrote is no artifact: {error}")
    if told := written.manifest.training:
        run = replace(run, declared=Declared(told.steps, told.tokens, told.parameters, dict(told.settings)))
    if differing := list(repeat.differences(submitted, written)):
        named = ", ".join(map(str, differing[:5]))
        return replace(run, status="refused", reason=f"its train.py does not write what was submitted: {named} differ")
    return run


def _score(case: Case, folder: Folder, number: int, run: SeedRun, text: ScoredText, where: str) -> Record:
    """The record of a score, made now unless it is there. Raises EnvironmentBroken when the machine fails."""
    found = folder.score(number, text.shown.sha256)
    if found and run.artifact and found.artifact.sha256 == run.artifact.sha256:
        return found
    case.say(f"{where}: scoring on {text}")
    options = scorer.Options(
        case.track.name, case.device, isolated=case.options.isolated, fresh_machine=case.options.fresh_machine
    )
    kept: list[Losses] = []
    with unnamed(text, case.say):
        result = scorer.score(folder.artifact(number), text.dataset, options, kept.append)
        if result.status == "failed":
            raise EnvironmentBroken(f"{where}: {result.reason}")
    folder.finish_score(number, text.shown.sha256, result, next(iter(kept), None))
    ended = result.status if result.bpb is None else f"{result.bpb:.6f} bpb"
    case.say(f"{where}: {ended} on {text} in {result.seconds['total']:.1f} s")
    return result


def _scored(run: SeedRun, text: ScoredText, result: Record) -> SeedRun:
    """The run with one more score."""
    score = SeedScore(text.shown, result.bpb, result.eligible, result.reasons, result.seconds["total"])
    run = replace(run, scores=(*run.scores, score))
    if result.status == "refused":
        why = " (its record in the folder of the re-run says why)" if text.secret else f": {result.reason}"
        return replace(run, status="refused", reason=f"refused by the scorer on {text}{why}")
    return run
