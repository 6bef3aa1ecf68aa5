"""Train a submission again from its sources, score what comes out, and compare with its claim.

    read -> check data -> draw seeds -> calibrate -> per seed: train, compare, score -> plausibility -> verdict

Training and scoring run in fresh sandboxes, one at a time, each under the machine's lock. What is finished is kept in
a folder (see `state`): a re-run that was killed goes on where it was.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pgolf import artifact, rules
from pgolf.artifact import Artifact
from pgolf.contest import claim, plausible, rerun_record, state
from pgolf.contest.calibrate import calibrate
from pgolf.contest.claim import Claim
from pgolf.contest.rerun_record import Calibration, Claimed, Declared, Limits, Rerun, SeedRun, SeedScore, SliceText
from pgolf.contest.state import Folder
from pgolf.contest.verdict import Speed, distinct, judge
from pgolf.data.dataset import Dataset, file_digest, open_dataset, overlap, training_files
from pgolf.errors import EnvironmentBroken, Refused, UsageError
from pgolf.files import printable
from pgolf.sandbox import training
from pgolf.sandbox.box import check_hidden
from pgolf.sandbox.environment import check_installed
from pgolf.score import losses
from pgolf.score import record as score_record
from pgolf.score import score as scorer
from pgolf.score.devices import find_device
from pgolf.score.losses import Losses
from pgolf.score.record import Environment, Packed, Record, Submission, Text

_CALIBRATION = "calibration.json"
_OUT = "/tmp/artifact.zst"  # inside the sandbox; what counts is what the trainer hands over
_FOLDERS = Path("runs") / "rerun"


@dataclass(frozen=True)
class Options:
    """How to run again."""

    data: Path
    """The training data; the claim is about its validation text."""
    score_data: tuple[Path, ...] = ()
    """More datasets to score on, which the record names by digest only."""
    seeds: int = 3
    processes: int = 1
    device: str = "auto"
    out: Path | None = None
    """The folder. None: runs/rerun/<first 16 digits of the artifact's sha256>."""
    claimed: float | None = None
    """Claimed score of an artifact that comes without a submission's folder."""
    fresh_machine: bool = False
    isolated: bool = True


@dataclass(frozen=True)
class _Text:
    """A validation text to score on."""

    root: Path
    shown: SliceText
    bytes: int

    @property
    def secret(self) -> bool:
        return self.shown.name is None


@dataclass(frozen=True)
class _Case:
    """What stays the same from the first seed to the last."""

    options: Options
    device: str
    claim: Claim
    artifact: Artifact
    sources: Mapping[str, bytes]
    dataset: Dataset
    training_digest: str
    texts: tuple[_Text, ...]
    say: Callable[[str], None] = field(repr=False)

    @property
    def track(self) -> rules.Track:
        return rules.track(self.artifact.manifest.track)

    @property
    def limits(self) -> Limits:
        track = self.track
        return Limits(
            track.prepare_seconds, track.train_seconds, track.eval_seconds, track.artifact_bytes, rules.SOURCE_BYTES
        )


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
    except Refused as error:
        return _refused(begun, str(error)), None
    case = _prepare(found, received, options, device, say)
    with state.opened(options.out or _FOLDERS / received.sha256[:16]) as folder:
        latest = _described(begun, case)
        try:
            for record in _stages(latest, case, folder):
                latest = record  # which knows more than the one before
        except Refused as error:
            latest = _refused(latest, str(error))
        except EnvironmentBroken as error:
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


def _prepare(found: Claim, received: Artifact, options: Options, device: str, say: Callable[[str], None]) -> _Case:
    """Open the data. Raises UsageError when it cannot be what the submission is run again on."""
    manifest = received.manifest
    dataset = open_dataset(options.data)
    if not dataset.train_shards:
        raise UsageError(f"{options.data}: holds no training shards")
    tokenizer = received.members.get(manifest.tokenizer)
    same = tokenizer == dataset.tokenizer.read_bytes() and manifest.transform == dataset.transform
    if not same:
        raise UsageError(
            f"{options.data}: is in other tokens than the artifact's tokenizer {printable(manifest.tokenizer)} makes; "
            "build a dataset with it: pgolf data build SOURCE --tokenizer FILE"
        )
    opened = [dataset, *map(open_dataset, options.score_data)]
    texts = tuple(_text(each, None if number else each.name) for number, each in enumerate(opened))
    if len({text.shown.sha256 for text in texts}) < len(texts):
        raise UsageError("--score-data names a text that is scored already; give each once")
    sources = artifact.sources(received.members)
    return _Case(options, device, found, received, sources, dataset, _training_digest(dataset), texts, say)


def _text(dataset: Dataset, name: str | None) -> _Text:
    text = dataset.canonical_text()
    if not text.bytes:
        raise EnvironmentBroken(f"{dataset.root}: the validation text is empty")
    return _Text(dataset.root, SliceText(name, text.sha256), text.bytes)


def _training_digest(dataset: Dataset) -> str:
    """SHA-256 over the digests of tokenizer and training shards, in hexadecimal."""
    digests = map(file_digest, [dataset.tokenizer, *dataset.train_shards])
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _described(begun: Rerun, case: _Case) -> Rerun:
    received = case.artifact
    return replace(
        begun,
        track=case.track.name,
        submission=Submission(received.manifest.name, received.manifest.author),
        artifact=Packed(received.sha256, received.size),
        members=rerun_record.members(received),
        data=Text(case.dataset.name, case.training_digest),
        limits=case.limits,
    )


def _stages(record: Rerun, case: _Case, folder: Folder) -> Iterator[Rerun]:
    """Yield the record whenever more of it is known, so that what ends the re-run leaves what was known by then."""
    _check(case, folder)
    seeds = folder.prepare(_identity(record, case), case.options.seeds)
    if (calibration := folder.read(_CALIBRATION, Calibration)) is None:
        case.say("measuring the machine")
        calibration = calibrate(case.dataset, case.track, case.device, case.options.processes, case.options.isolated)
        folder.write(_CALIBRATION, calibration)
    yield (record := replace(record, calibration=calibration))
    for number, seed in enumerate(seeds, 1):
        where = f"seed {number} of {len(seeds)}"
        run = folder.run(number) or _train(case, folder, number, seed, where)
        for text in case.texts if run.status == "ok" else ():
            run = _scored(run, text, _score(case, folder, number, run, text, where))
            if run.status != "ok":
                break
        yield (record := _with(record, run))
        if run.status != "ok":
            raise Refused(f"{where}: {run.reason}")
    yield _judged(record, case, folder)


def _check(case: _Case, folder: Folder) -> None:
    """Raises Refused for sources over the limit, EnvironmentBroken when machine or data is not fit."""
    if case.claim.note:
        case.say(case.claim.note)
    if (track := case.claim.track) not in (None, case.track.name):
        raise Refused(f"the submission is for track {track}, its artifact for {case.track.name}")
    if (size := sum(map(len, case.sources.values()))) > rules.SOURCE_BYTES:
        raise Refused(
            f"the sources (*.py and submission.json) have {size:,} bytes; the limit is {rules.SOURCE_BYTES:,}"
        )
    check_installed(case.artifact.manifest.packages)
    if case.options.isolated:
        check_hidden(folder.root, case.artifact.manifest.packages)
    if folder.is_new:  # otherwise the data is the same as then
        for text in case.texts:
            with _unnamed(text, case.say):
                _check_text(case, text)


def _check_text(case: _Case, text: _Text) -> None:
    """Raises EnvironmentBroken for a text that the submission could read, or that is trained on."""
    if case.options.isolated:
        check_hidden(text.root, case.artifact.manifest.packages)
    case.say(f"comparing the training text with {_name(text)}")
    if count := overlap(case.dataset, open_dataset(text.root)):
        raise EnvironmentBroken(
            f"{case.dataset.root}: {count:,} training documents are validation documents of {text.root}; "
            "build the data again so that they are apart"
        )


@contextmanager
def _unnamed(text: _Text, say: Callable[[str], None]) -> Iterator[None]:
    """Keep where a secret text lies out of errors, which go into the record; `say` gets them as they are."""
    try:
        yield
    except (EnvironmentBroken, OSError) as error:
        if not text.secret:
            raise
        say(str(error))
        raise EnvironmentBroken(f"{_name(text)} is not fit to score on; standard error says why") from None


def _identity(record: Rerun, case: _Case) -> dict[str, Any]:
    """All that has to stay the same when a re-run goes on, in the words of the sentence that says it did not."""
    machine = asdict(record.machine)
    return {
        "artifact": record.artifact.sha256,
        "training data": case.training_digest,
        "list of texts": [text.shown.sha256 for text in case.texts],
        "version of the rules": record.rules,
        "number of processes": case.options.processes,
        "sandbox": case.options.isolated,
        "machine": {name: machine[name] for name in ("processor", "cores", "device", "devices")},
        "version of pgolf or torch": [machine["pgolf"], machine["torch"]],
    }


def _with(record: Rerun, run: SeedRun) -> Rerun:
    """The record with one more seed, and the seconds of all."""
    seeds = (*record.seeds, run)
    seconds = {
        "calibrate": record.calibration.seconds if record.calibration else 0.0,
        "train": sum(sum(each.seconds.values()) for each in seeds),
        "score": sum(score.seconds for each in seeds for score in each.scores),
    }
    return replace(record, seeds=seeds, seconds={**seconds, "total": sum(seconds.values())})


def _train(case: _Case, folder: Folder, number: int, seed: int, where: str) -> SeedRun:
    """Train in a fresh sandbox and keep the result. A refusal is one; a machine that fails leaves none."""
    manifest, track = case.artifact.manifest, case.track
    declared = manifest.training.arguments if manifest.training else ()
    arguments = ("--out", _OUT, "--track", track.name, "--seed", str(seed), *declared)
    files, shards = training_files(case.dataset)
    job = training.Job(
        case.sources,
        files,
        shards,
        arguments,
        manifest.packages,
        manifest.compiler,
        case.device,
        case.options.processes,
    )
    limits = training.Limits(track.prepare_seconds, track.train_seconds, track.artifact_bytes)
    case.say(f"{where}: training" + (f", {track.train_seconds:g} s" if track.train_seconds else ""))
    content = None
    try:
        done = training.train(job, limits, isolated=case.options.isolated)
        content, seconds = done.artifact, done.seconds
        run = _compared(SeedRun(seed, "ok", None, dict(seconds), _packed(content), None), case.artifact, content)
    except Refused as error:
        run = SeedRun(seed, "refused", str(error), {}, None, None)
    folder.finish(number, run, content)
    case.say(f"{where}: {run.reason}" if run.reason else f"{where}: trained in {run.seconds['train']:.1f} s")
    return run


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
    if differing := differences(submitted, written):
        named = ", ".join(map(printable, differing[:5]))
        return replace(run, status="refused", reason=f"its train.py does not write what was submitted: {named} differ")
    return run


def differences(submitted: Artifact, written: Artifact) -> list[str]:
    """What should be the same in two artifacts of one train.py and is not: code, tokenizer, manifest, settings."""
    a, b = submitted.manifest, written.manifest
    ours, theirs = map(_fixed_members, (submitted, written))
    found = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    first, second = (asdict(replace(x, training=None, pgolf=None)) for x in (a, b))  # pgolf: this harness's version
    found += [f"{artifact.MANIFEST}: {name}" for name in first if first[name] != second[name]]
    if a.training and b.training:
        before, after = a.training, b.training
        for name in ("arguments", "settings", "parameters"):
            if getattr(before, name) != getattr(after, name):
                found.append(f"{artifact.MANIFEST}: training.{name}")
    return found


def _fixed_members(received: Artifact) -> dict[str, bytes]:
    """Code and tokenizer."""
    found = {**artifact.sources(received.members)}
    del found[artifact.MANIFEST]
    name = received.manifest.tokenizer
    return found if name == "bytes" else found | {name: received.members[name]}


def _score(case: _Case, folder: Folder, number: int, run: SeedRun, text: _Text, where: str) -> Record:
    """The record of a score, made now unless it is there. Raises EnvironmentBroken when the machine fails."""
    name = f"seed-{number}/score-{text.shown.sha256[:16]}.score.json"
    found = folder.read(name, Record)
    if found and run.artifact and found.artifact.sha256 == run.artifact.sha256:
        return found
    case.say(f"{where}: scoring on {_name(text)}")
    options = scorer.Options(
        case.track.name, case.device, isolated=case.options.isolated, fresh_machine=case.options.fresh_machine
    )
    kept: list[Losses] = []
    with _unnamed(text, case.say):
        result = scorer.score(folder.artifact(number), text.root, options, kept.append)
        if result.status == "failed":
            raise EnvironmentBroken(f"{where}: {result.reason}")
    place = folder.root / name
    for each in kept:
        losses.write(each, losses.path(place))
        losses.path(place).chmod(0o600)
    score_record.write(result, place)
    ended = result.status if result.bpb is None else f"{result.bpb:.6f} bpb"
    case.say(f"{where}: {ended} on {_name(text)} in {result.seconds['total']:.1f} s")
    return result


def _scored(run: SeedRun, text: _Text, result: Record) -> SeedRun:
    """The run with one more score."""
    score = SeedScore(text.shown, result.bpb, result.eligible, result.reasons, result.seconds["total"])
    run = replace(run, scores=(*run.scores, score))
    if result.status == "refused":
        why = " (its record in the folder of the re-run says why)" if text.secret else f": {result.reason}"
        return replace(run, status="refused", reason=f"refused by the scorer on {_name(text)}{why}")
    return run


def _name(text: _Text) -> str:
    """A text's name for people, of a secret one its digest."""
    return f"the text {text.shown.sha256[:16]}" if text.shown.name is None else printable(text.shown.name)


def _judged(record: Rerun, case: _Case, folder: Folder) -> Rerun:
    """The finished record: plausibility and verdict."""
    kept = [_losses(folder, number, case.texts[0]) for number in range(1, len(record.seeds) + 1)]
    keys = [
        (run.artifact.sha256 if run.artifact else None, each.nats.tobytes())
        for run, each in zip(record.seeds, kept, strict=True)
    ]
    counted = distinct(keys)
    scores = [bpb for number in counted if (bpb := record.seeds[number].scores[0].bpb) is not None]
    found = _speed(record, case)
    quarantine = tuple(dict.fromkeys(_implausible(record, case, kept[0], found)))
    verdict = judge(case.claim.bpb, scores, case.track.interval_bpb, speed=found, quarantine=quarantine)
    if len(counted) < len(record.seeds):
        again = (
            f"{len(record.seeds) - len(counted)} of {len(record.seeds)} seeds gave what another gave, and count once"
        )
        verdict = replace(verdict, reason=f"{verdict.reason}; {again}")
    return replace(record, status="ok", verdict=verdict, quarantine=quarantine)


def _losses(folder: Folder, number: int, text: _Text) -> Losses:
    try:
        return losses.read(folder.seed(number) / f"score-{text.shown.sha256[:16]}.losses.npz")
    except UsageError as error:
        raise EnvironmentBroken(f"{error}; remove the folder of this seed") from None


def _implausible(record: Rerun, case: _Case, first: Losses, found: Speed | None) -> Iterator[str]:
    """Why a person has to look at it."""
    devices = record.processes if case.device.startswith("cuda") else 1
    yield from plausible.sources(case.sources)
    for run in record.seeds:
        if run.declared and record.calibration:
            yield from plausible.operations(run.declared, run.seconds["train"], record.calibration, devices)
    yield from plausible.stretch(first)
    means = [_mean(run.scores[number].bpb for run in record.seeds) for number in range(len(case.texts))]
    for secret in means[1:]:
        yield from plausible.slices((means[0], case.texts[0].bytes), secret, case.sources)
    if found:
        yield from plausible.speed(found)


def _mean(values: Any) -> float:
    return float(np.mean([value for value in values if value is not None]))


def _speed(record: Rerun, case: _Case) -> Speed | None:
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
