"""Every way to cheat that we know of, as a real artifact: what it gains without its defence, and how it ends with it.

tests/attacks has one folder each: predict.py, which says in its first lines what it exploits, perhaps further modules,
and submission.json with what its manifest says differently. All start from the same honest model (honest.py).
"""

import importlib.util
import io
import json
import socket
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import zstandard

from conftest import write_dataset
from pgolf import rules
from pgolf.errors import EnvironmentBroken
from pgolf.sandbox import box as sandbox
from pgolf.sandbox import seccomp
from pgolf.score import audit, score, windows
from pgolf.score import predictors as predictor
from pgolf.score import tokenization as tokenizer
from pgolf.score.record import Record
from pgolf.score.windows import Index, Windows

ATTACKS = Path(__file__).parent / "attacks"
MOST_GAIN = 1e-3  # bpb
FIRST = "This text is the first document of the attack suite. Whoever finds it in memory has found the text."

BLIND = "the blind audit refuses it"
UNAUDITED, UNBOXED, UNDECODED, NEITHER = "unaudited", "unboxed", "undecoded", ""


@dataclass(frozen=True)
class Attack:
    """How an attack ends, and the defence without which it gains at least `gain` bpb on `honest`."""

    ends: str = ""
    """What the refusal says; nothing if the attack is scored and gains nothing."""
    without: str = NEITHER
    gain: float = 0.0
    honest: str = "honest"


ENDINGS = {
    # The future
    "off_by_one": Attack(BLIND, UNAUDITED, 1.0),
    "bidirectional": Attack(BLIND, UNAUDITED, 0.1),
    "target_aware_gate": Attack(BLIND, UNAUDITED, 0.05),
    "window_length": Attack(BLIND, UNAUDITED, 0.005, "honest_document"),
    "batch_neighbours": Attack(BLIND, UNAUDITED, 0.05),
    "trains_on_batch": Attack(BLIND, UNAUDITED, 0.1),
    "several_passes": Attack(BLIND, UNAUDITED, 0.1),
    "rare_peeks": Attack(BLIND, UNAUDITED, 0.1),
    "small_peeks": Attack(BLIND, UNAUDITED, 0.002),
    "long_windows": Attack("context is 131072, which the format does not allow"),
    "round_peek": Attack(BLIND, UNAUDITED, 0.01, "honest_streaming"),
    "round_neighbours": Attack(BLIND, UNAUDITED, 0.005, "honest_streaming"),
    "document_end": Attack(BLIND, UNAUDITED, 0.005, "honest_streaming"),
    # Telling the audit
    "prefix_cache": Attack(BLIND, UNAUDITED, 1.0),
    "call_count": Attack(BLIND, UNAUDITED, 0.01),
    "early_calls": Attack(BLIND, UNAUDITED, 0.5),
    "batch_shape": Attack(BLIND, UNAUDITED, 1.0),
    "honest_when_scored": Attack(BLIND),
    "stack": Attack(BLIND, UNAUDITED, 1.0),
    "last_flag": Attack(BLIND, UNAUDITED, 1.0, "honest_streaming"),
    "clock": Attack(BLIND, UNAUDITED, 0.1),
    "audit_noise": Attack(BLIND, UNAUDITED, 0.005),
    "raises_when_audited": Attack("I do not feel like being audited", UNAUDITED, 1.0),
    "hangs_when_audited": Attack("ended during audit", UNAUDITED, 1.0),
    # Probabilities
    "unnormalised_cache": Attack(),
    "extreme_logits": Attack(),
    "nan_rows": Attack("NaN or infinity"),
    # What lies outside of the box
    "reads_text": Attack("", UNBOXED, 1.0),
    "scorer_memory": Attack("", UNBOXED, 0.1),
    "inherited_things": Attack(),
    "network": Attack("", UNBOXED, 0.5),
    "encode_leak": Attack("", UNBOXED, 1.0),
    "page_cache": Attack(),
    "patches_pgolf": Attack(),
    "between_lanes": Attack("", UNBOXED, 0.005, "honest_document"),
    "survivor": Attack(),
    # Tokenizers and counts
    "drops_bytes": Attack("the tokenizer is lossy", UNDECODED, 0.01),
    "folds_case": Attack("the tokenizer is lossy", UNDECODED, 0.01),
    "lookalikes": Attack("the tokenizer is lossy", UNDECODED, 0.002),
    "hash_tokens": Attack("the tokenizer is lossy", UNDECODED, 1.0),
    "decode_remembers": Attack("the tokenizer is lossy", UNBOXED, 1.0),
    "byte_side_file": Attack(),
    "wrong_vocabulary": Attack("rows of 257 logits, but vocab_size is 300"),
    # The scorer
    "long_frame": Attack("sent 4,294,967,295 bytes of ROWS"),
    "floods": Attack("printed more than"),
    "stops_clocks": Attack("longer than its 8 s"),
}
LIES = {
    "number": "answered something else",
    "slot": "answered something else",
    "slot that is none": "answered something else",
    "fewer rows": "rows of logits where",
    "no rows": "0 rows of logits where",
    "more rows": "bytes",
    "narrow rows": "rows of 1 logits",
    "type": "unknown element type 7",
    "kind": "kind 3 where ROWS was due",
}
OTHERS = ("duplicate_scoring", "flips_ring", "round_opening")
TWO_LANES = ("between_lanes",)
HONEST = ("honest", "honest_document", "honest_streaming")


def documents(begin: int, most: int) -> list[str]:
    """Plain English of about `most` bytes: every second paragraph group of Python's own help."""
    pieces = [piece for _, topic in sorted(topics.items()) for piece in topic.split("\n\n\n")]
    found: list[str] = []
    for piece in pieces[begin::2]:
        if sum(map(len, found)) < most:
            found.append(piece[:700].encode("ascii", "ignore").decode().replace("\0", ""))
    return found


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: Path) -> Path:
    """The dataset under attack."""
    fancy = [
        "\ufb01rst, \ufb02ight and o\ufb03ce: " * 8 + "\u2460\u2461\u2462 \u00bd \uff46\uff55\uff4c\uff4c " * 8
    ] * 4
    root = tmp_path_factory.mktemp("attacked") / "text"
    return write_dataset(root, [FIRST, *documents(0, 80_000), *fancy, "And this is the LAST"], tokenizer_model)


@cache
def members_of(name: str) -> dict[str, bytes]:
    """The members of an attack's artifact but for the manifest."""
    folder = ATTACKS / name
    modules = [*folder.glob("*.py"), ATTACKS / "honest.py", ATTACKS / "recall.py"]
    members = {module.name: module.read_bytes() for module in modules}
    if "members.py" in members:
        members |= module_of(folder / "members.py").MEMBERS
    return {**members, "train.py": b"", "text.bin": "\0".join(documents(1, 60_000)).encode()}


def archive(members: dict[str, bytes]) -> bytes:
    """An artifact as a cheat packs it, without the checks of `pack`."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.USTAR_FORMAT) as writer:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            writer.addfile(info, io.BytesIO(data))
    return zstandard.compress(tar.getvalue())


def module_of(path: Path) -> ModuleType:
    """An attack's file as a module of this process."""
    spec = importlib.util.spec_from_file_location(f"attack_{path.parent.name}_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Runs:
    """Scores attacks in three threads, one of which mostly waits; what a test asks for was begun long before."""

    def __init__(self, text: Path, folder: Path, port: int) -> None:
        self.text, self.folder, self.port = text, folder, port
        self.pool = ThreadPoolExecutor(3)
        self.begun: dict[tuple[str, str], Future[Record]] = {}
        self.boxed: set[Path] = set()
        """Folders in /proc of the processes that were in a box when it was closed."""

    def artifact(self, name: str, without: str, lie: str) -> Path:
        """The packed attack. Places and ports of this test run are put into its sources."""
        folder = ATTACKS / name
        own = json.loads((folder / "submission.json").read_text()) if (folder / "submission.json").exists() else {}
        manifest = {
            "name": f"{name} {without}".strip(),
            "author": "attack",
            "track": "unlimited",
            "tokenizer": "bytes",
            "vocab_size": 257,
            "bos": 256,
            "context": 64,
        } | own
        members = {"submission.json": json.dumps(manifest).encode(), **members_of(name)}
        source = members["predict.py"].decode().replace("DATA", str(self.text)).replace("PORT", str(self.port))
        members["predict.py"] = source.replace('"LIE"', f'"{lie}"').encode()
        path = self.folder / f"{name}-{without}-{lie}.zst"
        path.write_bytes(archive(members))
        return path

    def begin(self, name: str, without: str = NEITHER, lie: str = "") -> Future[Record]:
        """Score an attack, without one of the defences."""
        key = (name, without + lie)
        if key not in self.begun:
            path = self.artifact(name, without, lie)
            defended = without == NEITHER
            self.begun[key] = self.pool.submit(
                score.score,
                path,
                self.text,
                device="cpu+cpu" if name in TWO_LANES else "cpu",
                isolated=without != UNBOXED,
                audited=defended,
                audit_seed=1,
            )
        return self.begun[key]

    def __call__(self, name: str, without: str = NEITHER, lie: str = "") -> Record:
        """The record of a score. Its "unaudited" is what the bpb would be without the audit."""
        return self.begin(name, without, lie).result()


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """All scores that the selected tests need, begun."""
    here = [item for item in request.session.items if item.path == Path(__file__)]
    selected = [item.callspec.params for item in here if hasattr(item, "callspec")]
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, args=(server, text), daemon=True).start()
        real_audit, real_check, real_close = score._audit, tokenizer.check_decoding, sandbox.Worker.close

        def noted_audit(result: Record, *rest: Any) -> None:
            result["unaudited"] = result["bpb"]
            real_audit(result, *rest)

        def check_unless(artifact: Any, *rest: Any) -> None:
            if not artifact.manifest.name.endswith(UNDECODED):
                real_check(artifact, *rest)

        def watched_close(worker: sandbox.Worker) -> None:
            started.boxed |= {Path("/proc", str(pid)) for pid in sandbox._descendants(worker._process.pid)}
            real_close(worker)

        patch.setattr(score, "find_devices", lambda device: device.split("+"))
        patch.setattr(score, "_audit", noted_audit)
        patch.setattr(sandbox.Worker, "close", watched_close)
        patch.setattr(tokenizer, "check_decoding", check_unless)
        patch.setitem(rules.TRACKS, "hurry", rules.Track("hurry", 16_000_000, None, 8.0, "CPU"))
        started = Runs(text, tmp_path_factory.mktemp("attacks"), server.getsockname()[1])
        for params in selected:
            if (name := params.get("attack")) in ENDINGS:
                attack = ENDINGS[name]
                started.begin(attack.honest)
                started.begin(name)
                if attack.without in (UNBOXED, UNDECODED):
                    started.begin(name, attack.without)
            elif name in OTHERS:
                started.begin("honest")
                started.begin(name)
            elif (lie := params.get("lie")) in LIES:
                started.begin("wire_lies", lie=lie)
        yield started
        started.pool.shutdown(cancel_futures=True)
    for folder in ("/tmp", "/dev/shm"):  # what unboxed attacks left behind
        for place in Path(folder).glob("pgolf-attack-*"):
            place.unlink()


def serve(server: socket.socket, text: Path) -> None:
    """Hand the text to whoever connects."""
    with suppress(OSError):
        while True:
            connection, _ = server.accept()
            with connection:
                connection.sendall((text / "val_documents.jsonl").read_bytes().replace(b"\\n", b"\n"))


@pytest.mark.parametrize("name", HONEST)
def test_honest_model_passes(name: str, runs: Runs) -> None:
    """What the attacks start from is accepted, and is a model that is worth something."""
    record = runs(name)
    assert record["status"] == "ok", record["reason"]
    assert record["bpb"] == record["unaudited"] < 4.0


@pytest.mark.parametrize("attack", ENDINGS)
def test_attack_ends_without_gain(attack: str, runs: Runs) -> None:
    """Refused in a sentence that names the rule, or scored like the honest model."""
    expected, record, honest = ENDINGS[attack], runs(attack), runs(ENDINGS[attack].honest)
    if expected.ends:
        assert record["status"] == "refused", record
        assert expected.ends in record["reason"]
        assert record["reason"].isprintable() and len(record["reason"]) < 500
        assert record["bpb"] is None and not record["eligible"]
    else:
        assert record["status"] == "ok", record
        assert record["bpb"] > honest["bpb"] - MOST_GAIN


@pytest.mark.parametrize("attack", [name for name, attack in ENDINGS.items() if attack.without])
def test_attack_gains_without_the_defence(attack: str, runs: Runs) -> None:
    """The attack is real: where the defence is taken away it has a better score than the honest model."""
    expected, honest = ENDINGS[attack], runs(ENDINGS[attack].honest)["bpb"]
    if expected.without == UNAUDITED:
        reached = runs(attack)["unaudited"]
    else:
        record = runs(attack, expected.without)
        assert record["status"] == "ok", record
        reached = record["bpb"]
    assert reached < honest - expected.gain, f"{reached} is no gain on {honest}"


@pytest.mark.parametrize("lie", LIES)
def test_lying_header_is_refused(lie: str, runs: Runs) -> None:
    """A worker that speaks the protocol itself is held to every field of it."""
    record = runs("wire_lies", lie=lie)
    assert record["status"] == "refused", record
    assert LIES[lie] in record["reason"]


@pytest.mark.parametrize("attack", ["duplicate_scoring"])
def test_every_token_counts_once(attack: str, runs: Runs) -> None:
    """Overlapping windows score as many tokens as windows side by side, where the contest's count was higher."""
    assert runs(attack)["tokens"] == runs("honest")["tokens"]


@pytest.mark.parametrize("attack", ["flips_ring"])
def test_rows_cannot_change_after_the_check(attack: str, runs: Runs) -> None:
    """A thread that rewrites the shared memory is either caught or without any effect."""
    record = runs(attack)
    assert record["status"] == "refused" or record["bpb"] == runs("honest")["bpb"]


def test_nothing_outlives_its_box(runs: Runs) -> None:
    """Whatever was in the boxes of all attacks is gone, the survivor's processes as well."""
    for begun in runs.begun.values():
        begun.result()
    left: set[Path] = set()
    for _ in range(50):
        left = {process for process in runs.boxed if b"pgolf.sandbox.guest" in command_of(process)}
        if not left:
            break
        time.sleep(0.1)
    assert not left


def command_of(process: Path) -> bytes:
    """The command line of a process; nothing when it is gone."""
    with suppress(OSError):
        return (process / "cmdline").read_bytes()
    return b""


@pytest.mark.parametrize("attack", ["round_opening"])
def test_end_of_a_round_tells_nothing(attack: str, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of whole documents, as far as they fit, would tell a lower bound of the next one's length."""
    record, honest = runs(attack), runs("honest_streaming")
    assert record["status"] == "ok", record["reason"]
    assert record["bpb"] > honest["bpb"] - MOST_GAIN

    def whole_documents(boundaries: Index, most: int) -> list[Windows]:
        found, begin = [], 0
        while begin < len(boundaries) - 1:
            end = int(np.searchsorted(boundaries, boundaries[begin] + most, side="right")) - 1
            edges = boundaries[begin : end + 1]
            found.append(Windows(edges[:-1], np.diff(edges), np.zeros_like(edges[:-1])))
            begin = end
        return found

    monkeypatch.setattr(windows, "rounds", whole_documents)
    record = score.score(runs.artifact(attack, "unfilled", ""), runs.text, device="cpu", audit_seed=1)
    assert record["status"] == "ok", "not even the audit finds it"
    assert record["bpb"] < honest["bpb"] - 5e-4, f"{record['bpb']} is no gain on {honest['bpb']}"


def test_page_cache_would_have_leaked(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the seccomp filter, the tokenizer's box tells the predictor's, and even the audit's, what it saw."""
    honest = runs("honest")
    monkeypatch.setattr(seccomp, "program", lambda: None)
    record = score.score(runs.artifact("page_cache", "unfiltered", ""), runs.text, device="cpu", audit_seed=1)
    if record["unaudited"] > honest["bpb"] - 0.002:
        pytest.skip("this file system does not tell which pages are in memory, or no library is large enough")
    if record["status"] != "ok":
        pytest.skip("something else on this machine wiped the board before the audit")
    assert record["bpb"] == record["unaudited"]


@pytest.mark.parametrize("folder", ["tar_tricks", "links", "bomb"])
def test_artifact_with_tricks_is_refused(folder: str, text: Path, tmp_path: Path) -> None:
    """No byte of the file is free, and reading it is harmless; no code of it runs."""
    members = {"submission.json": b"{}", **members_of("honest")}
    tar = zstandard.decompress(archive(members), max_output_size=1 << 24)

    def member(**fields: Any) -> bytes:
        info = tarfile.TarInfo()
        for name, value in fields.items():
            setattr(info, name, value)
        return info.tobuf(tarfile.USTAR_FORMAT)

    for name, (data, sentence) in module_of(ATTACKS / folder / "build.py").variants(tar, member).items():
        path = tmp_path / "a.zst"
        path.write_bytes(data)
        record = score.score(path, text, device="cpu")
        assert record["status"] == "refused", name
        assert sentence in record["reason"], name


def test_unnormalised_cache_would_have_won(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scored as the contest's entries scored themselves, by the true token's entry alone, it takes the record."""
    (tmp_path / "text.bin").write_bytes(members_of("honest")["text.bin"])
    monkeypatch.syspath_prepend(str(ATTACKS))
    cache_model = module_of(ATTACKS / "unnormalised_cache" / "predict.py").load(tmp_path, torch.device("cpu"))
    ids = torch.tensor([list("".join(documents(0, 20_000)).encode())])
    row = torch.maximum(cache_model.probabilities(ids), cache_model.scores(ids))[:, :-1]
    claimed = -row.gather(-1, ids[:, 1:, None]).log2().mean()
    proper = -(row / row.sum(-1, keepdim=True)).gather(-1, ids[:, 1:, None]).log2().mean()
    assert row.sum(-1).mean() > 50
    assert claimed < 1.5 < 5.0 < proper


def test_patched_pgolf_would_have_won(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process with the scorer, the patch makes every token free: the box's own process is the defence."""
    monkeypatch.setattr(predictor, "negative_log_likelihood", predictor.negative_log_likelihood)
    monkeypatch.setattr(audit, "draw", audit.draw)
    monkeypatch.syspath_prepend(str(ATTACKS))
    stream, rows = np.zeros(4, dtype=np.int32), np.arange(3)
    before = predictor.code_lengths(torch.zeros(3, 257), stream, rows).sum()
    module_of(ATTACKS / "patches_pgolf" / "predict.py").patch()
    assert predictor.code_lengths(torch.zeros(3, 257), stream, rows).sum() == 0 < before


def test_byte_side_file_would_have_won(text: Path) -> None:
    """Counting bytes by the side file makes the text longer, and so its bits per byte fewer."""
    table = json.loads(module_of(ATTACKS / "byte_side_file" / "members.py").MEMBERS["bytes_per_token.json"])
    lines = (text / "val_documents.jsonl").read_text().splitlines()
    true = [json.loads(line)["text"].encode() for line in lines]
    assert sum(table[byte] for document in true for byte in document) > 1.05 * sum(map(len, true))


def test_small_tokens_have_a_small_tolerance() -> None:
    """A tokenizer of four tokens a byte gets a smaller tolerance for each, so that it stays the same per byte."""
    rng = np.random.default_rng(0)
    difference, weight = 3e-4 + 1e-6 * rng.standard_normal(4000), np.ones(4000)
    assert audit.verdict(difference, weight).accepted
    assert not audit.verdict(difference, weight, rules.AUDIT_TOLERANCE / rules.AUDIT_BYTES / 4).accepted


def test_noise_has_a_limit() -> None:
    """Noise that would hide 0.005 nats a token at the contest's size is refused, wherever in the windows it lies."""
    rng = np.random.default_rng(0)
    weight = np.exp(rng.uniform(0, 7, 30_000))
    coin = rng.choice([-1.0, 1.0], 30_000)
    for noise in (0.2 * coin, 0.15 * coin * (weight > np.quantile(weight, 0.9))):
        assert not audit.verdict(noise, weight).accepted
        assert "of noise" in audit.verdict(noise, weight).reason()


def test_data_within_reach_of_the_box_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset below a folder that the box sees (a prefix of Python, /usr) could be read by the submission."""
    sandbox.check_hidden(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(EnvironmentBroken, match="which the submission can read"):
        sandbox.check_hidden(tmp_path / "data" / "text")
