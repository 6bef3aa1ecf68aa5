"""Every way to cheat that we know of, as a real artifact: what it gains without its defence, and how it ends with it.

tests/attacks has one folder each: predict.py, which says in its first lines what it exploits, perhaps further modules,
and submission.json with what its manifest says differently; or build.py, which makes files. All start from the same
honest model (honest.py). A run takes a fixed sample; PGOLF_TEST_ALL=1 takes all, and more often. -rP prints the gains.

Attacks on what there is no more, and why they went with it:

    bidirectional, small_peeks, rare_peeks       more of the future in one's own window: off_by_one stands for them
    batch_neighbours, trains_on_batch            the future in other windows of a batch: now lane_neighbour
    several_passes, duplicate_scoring            overlapping windows: every token is scored once (test_soundness)
    window_length, long_windows, document_end    windows end where documents end: now lane_end, knows_the_end
    round_opening, round_peek, round_neighbours  rounds are gone: now document_order, learns
    call_count, early_calls, batch_shape, clock, stack, last_flag, audit_noise, honest_when_scored, prefix_cache,
    hangs_when_audited, raises_when_audited      told the audit from the score: nothing is audited (now marks)
    between_lanes, page_cache                    channels between sandboxes: marks/channels.py has them all
"""

import importlib.util
import io
import json
import os
import random
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import zstandard
from attacks.defences import WITHOUT
from attacks.texts import FIRST, TEXTS, documents
from stub import Stub

from conftest import write_dataset
from pgolf import artifact, rules
from pgolf.errors import EnvironmentBroken, Refused
from pgolf.names import beside
from pgolf.sandbox import box, lock, probe, wire
from pgolf.score import likelihood, predictors, record, score, tokenization
from pgolf.score.score import Options

ATTACKS = Path(__file__).parent / "attacks"
ALL = os.environ.get("PGOLF_TEST_ALL") == "1"
MOST_GAIN = 40  # bits
BOXED, UNBOXED = True, False
CODE = "the tokenizer is code of the submission, which has held the text before it is scored"
DEMO = "the text can be rebuilt from what is installed on the machine (demo)"
WINDOW = "not proven: window form, in which a predictor receives tokens before they are scored"


@dataclass(frozen=True)
class Attack:
    """How an attack ends, and the defence without which it gains at least `gain` bits on `honest`."""

    isolated: bool = UNBOXED
    """Whether it needs the sandbox to fail; the others fail without as well."""
    ends: str = ""
    """What the refusal says; nothing if the attack is scored and gains nothing."""
    without: str = ""
    gain: float = 0.0
    honest: str = "honest"
    text: str = "english"
    reasons: tuple[str, ...] = ()
    """Why such a score does not count, besides what is true of all of these tests."""


ENDINGS = {
    # Tokens that are still to come
    "off_by_one": Attack(without="step form", gain=10_000),
    "target_aware_gate": Attack(without="step form", gain=400),
    "peeks_socket": Attack(without="logits first", gain=10_000),
    "rewrites_ring": Attack(without="copy", gain=10_000),
    "answers_early": Attack(honest="honest_parts"),
    "times_scorer": Attack(without="constant time", gain=MOST_GAIN, text="random"),
    "document_order": Attack(without="dataset order", gain=MOST_GAIN, text="lengths"),
    "lane_end": Attack(),
    "lane_neighbour": Attack(),
    "knows_the_end": Attack(honest="honest_parts"),
    # Probabilities
    "unnormalised_cache": Attack(),
    "extreme_logits": Attack(),
    "kraft": Attack(without="fp64 sum", gain=400),
    "nan_rows": Attack(ends="NaN or infinity", without="NaN refused", gain=1000),
    "noise": Attack(),
    # What lies outside of the sandbox
    "reads_text": Attack(BOXED, without="sandbox", gain=10_000),
    "runs_programs": Attack(BOXED, without="sandbox", gain=10_000),
    "scorer_memory": Attack(BOXED, without="sandbox", gain=200),
    "inherited_things": Attack(BOXED, without="clean environment", gain=10_000),
    "network": Attack(BOXED, without="sandbox", gain=10_000),
    "encode_leak": Attack(BOXED, without="sandbox", gain=10_000, reasons=(CODE,)),
    "patches_pgolf": Attack(BOXED),
    "demo_text_in_box": Attack(BOXED),
    # Tokenizers and counts
    "drops_bytes": Attack(ends="the tokenizer is lossy", without="decoding", gain=1000, reasons=(CODE,)),
    "folds_case": Attack(ends="the tokenizer is lossy", without="decoding", gain=500, reasons=(CODE,)),
    "lookalikes": Attack(ends="the tokenizer is lossy", without="decoding", gain=500, reasons=(CODE,)),
    "hash_tokens": Attack(ends="the tokenizer is lossy", without="decoding", gain=10_000, reasons=(CODE,)),
    "decode_remembers": Attack(BOXED, "the tokenizer is lossy", "sandbox", 10_000, reasons=(CODE,)),
    "pads": Attack(reasons=(CODE,)),
    "byte_side_file": Attack(),
    "wrong_vocabulary": Attack(ends="logits of shape (64, 257) where (64, 300) were due"),
    "plan_carries": Attack(ends="the plan is 4294967296; it has to be a number of at most 32 bits"),
    "plan_changes": Attack(ends="sent a frame of kind 1 where LOGITS was due"),
    # The scorer and the machine
    "long_frame": Attack(ends="sent 4,294,967,295 bytes of LOGITS"),
    "floods": Attack(ends="printed more than"),
    "stops_clocks": Attack(BOXED, "longer than its 3 s (ended during load)"),
    "late_load": Attack(ends="longer than its 3 s (ended during load)"),
    "dies_at_the_end": Attack(ends="the process ended before it answered (exit status 0)"),
    "descriptor_in_flight": Attack(ends="sent a frame of kind 77 where LOGITS was due"),
    "deletes_files": Attack(BOXED),
    "survivor": Attack(BOXED),
    "fork_bomb": Attack(BOXED),
    "many_files": Attack(BOXED),
    "hoards_memory": Attack(BOXED, "GiB of memory"),
}


# What is scored, and by which artifacts


@cache
def members_of(name: str) -> dict[str, bytes]:
    """The members of an attack's artifact but for the manifest."""
    folder = ATTACKS / name
    modules = [*folder.glob("*.py"), ATTACKS / "honest.py", ATTACKS / "recall.py"]
    members = {module.name: module.read_bytes() for module in modules}
    if "members.py" in members:
        members |= module_of(folder / "members.py").MEMBERS
    return {**members, "train.py": b"", "text.bin": "\0".join(documents(1, 60_000)).encode()}


def manifest_of(name: str) -> dict[str, Any]:
    """The manifest of an attack's artifact."""
    own = ATTACKS / name / "submission.json"
    manifest = {"name": name, "author": "attack", "track": "unlimited", "tokenizer": "bytes", "vocab_size": 257}
    manifest |= {"bos": 256, "form": "step", "lanes": 64}
    return manifest | (json.loads(own.read_text()) if own.exists() else {})


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
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ATTACKS))
        spec.loader.exec_module(module)
    torch.set_num_threads(threads)  # which honest.py has set for its own process
    return module


class Runs:
    """Scores attacks on small texts, each once."""

    def __init__(self, root: Path, tokenizer: Path, port: int) -> None:
        self.root, self.tokenizer, self.port = root, tokenizer, port
        self.known: dict[tuple[str, ...], record.Record] = {}
        self.sandboxed: set[Path] = set()
        """Folders in /proc of the processes that were in a sandbox when it was closed."""

    @cache  # noqa: B019
    def text(self, kind: str) -> Path:
        """A dataset."""
        return write_dataset(self.root / kind, TEXTS[kind](), self.tokenizer)

    def artifact(self, name: str, text: str = "english", **fields: Any) -> Path:
        """The packed attack. Places and ports of this test run are put into its sources."""
        manifest = {key: value for key, value in (manifest_of(name) | fields).items() if value is not None}
        members = {"submission.json": json.dumps(manifest).encode(), **members_of(name)}
        if text != "english":
            members["text.bin"] = b""  # what is random is best said so
        source = members["predict.py"].decode().replace("DATA", str(self.text(text))).replace("PORT", str(self.port))
        members["predict.py"] = source.encode()
        path = self.root / f"{name}-{len(list(self.root.iterdir()))}.zst"
        path.write_bytes(archive(members))
        return path

    def __call__(self, name: str, text: str = "", without: str = "") -> record.Record:
        """The record of a score, perhaps without one of the defences."""
        text = text or ENDINGS.get(name, Attack()).text
        key = (name, text, without)
        if key not in self.known:
            attack = ENDINGS.get(name, Attack())
            fields = {"form": "window", "context": 64, "lanes": None, "layout": None} if without == "step form" else {}
            path = self.artifact(name, text, **fields)
            with WITHOUT[without]():
                options = Options(device="cpu", isolated=attack.isolated and not without)
                self.known[key] = score.score(path, self.text(text), options)
        return self.known[key]

    def bits(self, name: str, text: str = "", without: str = "") -> float:
        """The code length in bits."""
        found = self(name, text, without)
        assert found["status"] == "ok", found["reason"]
        return found["bpb"] * found["bytes"]

    def gain(self, name: str, text: str = "", without: str = "") -> float:
        """Bits below the honest model."""
        attack = ENDINGS.get(name, Attack())
        return self.bits(attack.honest, text or attack.text) - self.bits(name, text, without)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: Path) -> Iterator[Runs]:
    """Scores under a lock of the tests' own, and what attacks reach for: a server that hands the text out, a hurry."""
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as server:
        found = Runs(tmp_path_factory.mktemp("attacks"), tokenizer_model, server.getsockname()[1])
        threading.Thread(target=serve, args=(server, found), daemon=True).start()
        patch.setenv("PGOLF_LOCK", str(found.root / "lock"))
        probe.isolation.cache_clear()
        probe.check_isolation.cache_clear()
        patch.setitem(rules.TRACKS, "hurry", rules.Track("hurry", 16_000_000, None, 3.0, "CPU"))
        patch.setattr(rules, "WORKER_MEMORY_BYTES", 1 << 30)
        real_close = box.Worker.close

        def watched_close(worker: box.Worker) -> None:
            found.sandboxed |= {Path("/proc", str(process.pid)) for process in worker.processes()}
            real_close(worker)

        patch.setattr(box.Worker, "close", watched_close)
        yield found
    probe.isolation.cache_clear()
    probe.check_isolation.cache_clear()
    for folder in ("/tmp", "/dev/shm", "/var/tmp", "/run"):  # what unboxed attacks left behind
        for place in Path(folder).glob("pgolf-attack-*"):
            place.unlink()


def serve(server: socket.socket, runs: Runs) -> None:
    """Hand the text to whoever connects."""
    with suppress(OSError):
        while True:
            connection, _ = server.accept()
            with connection:
                data = (runs.text("english") / "val_documents.jsonl").read_bytes()
                connection.sendall(data.replace(b"\\n", b"\n"))


# How they end


def expected_reasons(found: record.Record, isolated: bool, more: tuple[str, ...]) -> list[str]:
    """Why no score of these tests counts: the text is small, and the lock is the tests' own."""
    size = f"the text has {found['bytes']:,} bytes, 2,000,000 are needed"
    return sorted([*more, size, *(probe.isolation().reasons(False) if isolated else ["no sandbox"])])


def test_lock_of_the_tests_is_all_that_this_machine_lacks(runs: Runs) -> None:
    """The reasons that the other tests expect are these. A machine without control groups has one more."""
    assert "the lock is not the machine's" in probe.isolation().reasons(False)
    assert runs("honest")["bpb"] < 4.0, "the model that the attacks start from is worth something"


@pytest.mark.parametrize("name", ENDINGS)
def test_attack_ends_without_gain(name: str, runs: Runs) -> None:
    """Refused in a sentence that names the rule, or scored like the honest model."""
    attack, found = ENDINGS[name], runs(name)
    assert sorted(found["reasons"]) == expected_reasons(found, attack.isolated, attack.reasons)
    assert not found["eligible"]
    if attack.ends:
        print(f"{name}: {found['reason']}")
        assert found["status"] == "refused", found
        assert attack.ends in found["reason"]
        assert found["reason"].isprintable() and len(found["reason"]) < 500
        assert found["bpb"] is None
    elif name != "demo_text_in_box":
        print(f"{name}: {runs.gain(name):.1f} bits")
        assert runs.gain(name) < MOST_GAIN


@pytest.mark.parametrize("name", [name for name, attack in ENDINGS.items() if attack.without])
def test_attack_gains_without_the_defence(name: str, runs: Runs) -> None:
    """The attack is real: where the defence is taken away it needs fewer bits than the honest model."""
    attack = ENDINGS[name]
    gain = runs.gain(name, without=attack.without)
    print(f"{name} without {attack.without}: {gain:.1f} bits")
    assert gain > attack.gain
    if attack.without == "step form":
        assert WINDOW in runs(name, without=attack.without)["reasons"]


def test_text_of_the_sandbox_is_marked(runs: Runs) -> None:
    """Who finds the text in the sandbox's own files gains by it: so such a text says so, and counts for nothing."""
    assert runs.gain("demo_text_in_box") > 1000
    index = runs.text("english") / "dataset.json"
    marked = runs.root / "demo"
    marked.mkdir()
    for file in index.parent.iterdir():
        (marked / file.name).write_bytes(file.read_bytes())
    (marked / "dataset.json").write_text(json.dumps(json.loads(index.read_text()) | {"environment": True}))
    found = score.score(runs.artifact("honest"), marked, Options(device="cpu", isolated=False))
    assert sorted(found["reasons"]) == expected_reasons(found, False, (DEMO,))


def test_pads_help_by_the_token_only(runs: Runs) -> None:
    """The scores that a submission's own units move: half the loss a token, the same bits a byte."""
    pads, honest = runs("pads"), runs("honest")
    assert pads["nats_per_token"] < 0.6 * honest["nats_per_token"]


def test_honest_ways_to_gain_are_accepted(runs: Runs) -> None:
    """Learning from what was scored, in any lane, and text that the artifact has paid for."""
    assert runs.gain("learns") > 1000
    assert 0 < runs.gain("memorised_text") < 8 * (len(FIRST) + 100)


def test_other_lane_helps_a_step_later(runs: Runs) -> None:
    """What another lane showed earlier has been scored and may be used; of the same step nothing is known."""
    assert runs.gain("lane_neighbour", "twins") < MOST_GAIN
    assert runs.gain("lane_neighbour", "staggered") > 5_000


def test_ring_cannot_change_after_the_copy(runs: Runs) -> None:
    """A thread that rewrites the shared memory is either caught or without any effect."""
    found = runs("flips_ring")
    assert found["status"] == "refused" or found["bpb"] == runs("honest")["bpb"]


def test_plan_is_what_was_said_first(runs: Runs) -> None:
    """The plan was stated before anything was shown."""
    assert runs("plan_changes")["plan"] == 7
    assert runs("honest")["plan"] == 0


@pytest.mark.parametrize(
    "name", ["reads_text", "marks", "times_scorer", "encode_leak"] if not ALL else [*ENDINGS, "marks"]
)
def test_random_text_costs_seven_bits_a_byte(name: str, runs: Runs) -> None:
    """On fresh random text, scored twice on this machine, nobody gets below what it weighs, nor the honest model.

    That model pays for the ends of documents, which all have one length here; who learns that is honest, too.
    """
    honest = runs.bits(ENDINGS[name].honest if name in ENDINGS else "honest", "random")
    for _ in range(2):
        runs.known.pop((name, "random", ""), None)
        found = runs(name, "random") if name != "marks" else boxed(runs, "marks", "random")
        if found["status"] == "ok":
            bits = found["bpb"] * found["bytes"]
            assert bits > 7 * found["bytes"] - MOST_GAIN
            assert bits > honest - MOST_GAIN or name in ("lane_end", "document_order")


def boxed(runs: Runs, name: str, text: str) -> record.Record:
    """The record of a score in the sandbox."""
    return score.score(runs.artifact(name, text), runs.text(text), Options(device="cpu"))


# Marks, and sandboxes beside each other


def test_marks_gain_in_a_second_run_outside(runs: Runs) -> None:
    """Where processes share a machine, the second run knows what the first has left."""
    CHANNELS.forget()
    honest, first = runs.bits("honest"), runs.bits("marks")
    second = runs.gain("marks", without="sandbox")
    CHANNELS.forget()
    assert first > honest - MOST_GAIN and second > MOST_GAIN


CHANNELS = module_of(ATTACKS / "marks" / "channels.py")
USE = (
    "import sys; sys.path.insert(0, sys.argv[1]); import channels; write, read = channels.CHANNELS[sys.argv[2]]\n"
    "if sys.argv[4]: write(bytes.fromhex(sys.argv[4]), sys.argv[3])\n"
    "else: print(read(sys.argv[3]).hex())"
)


@pytest.mark.parametrize("channel", CHANNELS.CHANNELS)
def test_channel_is_real(channel: str, tmp_path: Path) -> None:
    """Two processes that share a file or a kernel talk through it, here without a sandbox."""
    board, message = tmp_path / "board", os.urandom(CHANNELS.SIZE)
    board.write_bytes(os.urandom(CHANNELS.PAGE * 8 * CHANNELS.SIZE + 4096))
    os.sync()

    def use(data: str) -> str:
        arguments = [str(ATTACKS / "marks"), channel, str(board), data]
        done = subprocess.run(
            [sys.executable, "-c", USE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        if done.returncode:
            pytest.skip(f"this machine has no {channel}")
        return done.stdout.strip()

    right, heard = 0, b"nothing"
    for _ in range(3):  # others on this machine disturb some of them
        if right < 0.9 * 8 * len(heard):
            use(message.hex())
            heard = bytes.fromhex(use(""))
            right = sum((a ^ b ^ 255).bit_count() for a, b in zip(heard, message, strict=False))
            CHANNELS.forget()
    assert right > 0.9 * 8 * len(heard) >= 0.9 * 8 * 14


ASK = """
import sys
sys.path.insert(0, "/artifact")
import channels
MESSAGE = bytes.fromhex("MESSAGE_HEX")
board = channels.largest(["/usr", sys.prefix])
def attempt(name, act):
    try:
        return f"{name}: {act()}"
    except BaseException as error:
        return f"{name}: {type(error).__name__}"
def encode(text):
    return []
def decode(ids):
    if MESSAGE:
        return "|".join(attempt(name, lambda: write(MESSAGE, board)) for name, (write, _) in channels.CHANNELS.items())
    return "|".join(attempt(name, lambda: read(board).hex()) for name, (_, read) in channels.CHANNELS.items())
"""


def channel_worker(message: bytes) -> box.Worker:
    """A sandbox that writes a message on all channels, or reads them."""
    source = ASK.replace("MESSAGE_HEX", message.hex()).encode()
    members = {"code.py": source, "channels.py": (ATTACKS / "marks" / "channels.py").read_bytes()}
    return box.Worker("decode", members, isolated=True, config={"tokenizer": "code.py", "transform": None})


def said_by(worker: box.Worker) -> dict[str, str]:
    """What it says of each channel."""
    worker.channel.deadline = time.monotonic() + 120
    worker.receive(wire.Kind.READY, 0)
    worker.send(wire.Kind.TOKENS, wire.encode_tokens([torch.zeros(0, dtype=torch.int32).numpy()]))
    said = wire.decode_texts(worker.receive(wire.Kind.TEXTS, 1 << 20))[0].decode()
    return dict(line.split(": ", 1) for line in said.split("|"))


@pytest.mark.parametrize("attempt", range(20 if ALL else 1))
@pytest.mark.parametrize("beside", [True, False])
def test_no_channel_leads_into_another_sandbox(beside: bool, attempt: int, runs: Runs) -> None:
    """Not from one that ran before, nor, were the lock to fail, from one that runs beside it."""
    message = os.urandom(CHANNELS.SIZE)
    with channel_worker(message) as writer:
        said_by(writer)
        if beside:
            with channel_worker(b"") as reader:
                heard = said_by(reader)
    if not beside:
        with channel_worker(b"") as reader:
            heard = said_by(reader)
    assert set(heard) == set(CHANNELS.CHANNELS)
    for channel, words in heard.items():
        with suppress(ValueError):
            found = bytes.fromhex(words)
            right = sum((a ^ b ^ 255).bit_count() for a, b in zip(found, message, strict=False))
            assert found != message[: len(found)] and right < 0.65 * 8 * len(message), channel


def test_second_scorer_waits_for_the_first(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a score nor a refusal comes of a machine on which another sandbox runs."""
    monkeypatch.setattr(rules, "LOCK_SECONDS", 0.3)
    with lock.hold():
        found = score.score(runs.artifact("honest"), runs.text("english"), Options(device="cpu"))
    assert found["status"] == "failed" and "the lock is still held by pgolf (pid" in found["reason"]


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_prepared_lock_is_no_lock(kind: str, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who puts something else in the lock's place keeps others from scoring, but is no lock, and refuses nobody."""
    place = tmp_path / "lock"
    {"link": lambda: place.symlink_to("target"), "fifo": lambda: os.mkfifo(place), "folder": place.mkdir}[kind]()
    monkeypatch.setenv("PGOLF_LOCK", str(place))
    found = score.score(runs.artifact("honest"), runs.text("english"), Options(device="cpu"))
    assert found["status"] == "failed" and "lock" in found["reason"]
    assert not (tmp_path / "target").exists()


def test_failed_probe_is_no_refusal(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a working sandbox is at fault, not the submission; nothing of it has run."""

    def broken(*arguments: Any, **options: Any) -> None:
        raise EnvironmentBroken("bubblewrap cannot make a sandbox here")

    monkeypatch.setattr(probe, "isolation", broken)
    found = score.score(runs.artifact("honest"), runs.text("english"), Options(device="cpu"))
    assert found["status"] == "failed" and "bubblewrap" in found["reason"]


def test_nothing_outlives_its_sandbox(runs: Runs) -> None:
    """Whatever was in the sandboxes of all attacks is gone: processes, control groups, copies."""
    runs("survivor"), runs("fork_bomb"), runs("many_files")
    assert not [process for process in runs.sandboxed if b"pgolf.sandbox.guest" in command_of(process)]
    assert not list(Path("/sys/fs/cgroup").glob(f"*/pgolf-{os.getpid()}-*"))
    own = f"pgolf-copy-*-{os.getpid()}-*"
    assert not [*Path("/dev/shm").glob(own), *Path("/tmp").glob(own)]


def command_of(process: Path) -> bytes:
    """The command line of a process; nothing when it is gone."""
    with suppress(OSError):
        return (process / "cmdline").read_bytes()
    return b""


# The wire


def outcome(lie: str) -> str:
    """The refusal of a worker that tells this lie."""
    lies = module_of(ATTACKS / "wire_lies" / "predict.py")
    manifest = artifact.parse_manifest(json.dumps(manifest_of("honest")).encode())
    texts = [torch.arange(40).int().numpy()] * 20
    read = artifact.Artifact("", 0, manifest, {})
    with Stub(lambda channel, ring: lies.answer(channel, lie)), predictors.Predictor(read, 20, "cpu", False) as worker:
        worker.set_deadline(time.monotonic() + 1)
        try:
            worker.load()
            score.step_through(manifest, texts, 20, worker, lambda done: None)
        except (Refused, wire.WireError) as error:
            return str(error)
        except TimeoutError:
            return "too late"
    return "accepted"


LIES = {
    "ready of five bytes": "sent 5 bytes of READY where at most 4 are allowed",
    "number": "logits for step 1",
    "number far away": "logits for step 4294967295",
    "fewer rows": "logits of shape (19, 257) where (20, 257) were due",
    "no rows": "logits of shape (0, 257)",
    "more rows": "logits of shape (4294967295, 257)",
    "narrow": "logits of shape (20, 1)",
    "wide": "logits of shape (20, 2147483648)",
    "element type": "unknown element type 7",
    "kind": "kind 3 where LOGITS was due",
    "kind that is none": "kind 77 where LOGITS was due",
    "long header": "sent 17 bytes of LOGITS where at most 16 are allowed",
    "short header": "a payload of 12 bytes where a header has 16",
    "cut off": "the other side is gone",
    "twice": "step 1: the predictor sent logits for step 0",
    "nothing": "the other side is gone",
    "words": "score 0.1 bpb",
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_header_is_refused(lie: str, runs: Runs) -> None:
    """A worker that speaks the protocol itself is held to every field of it."""
    assert LIES[lie] in outcome(lie)


# Files


@pytest.mark.parametrize("folder", ["tar_tricks", "links", "bomb"])
def test_artifact_with_tricks_is_refused(folder: str, runs: Runs, tmp_path: Path) -> None:
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
        found = score.score(path, runs.text("english"), Options(device="cpu"))
        assert found["status"] == "refused", name
        assert sentence in found["reason"], name


def test_hostile_manifest_is_refused() -> None:
    """Every number is bounded before it costs anything; what is at the bound is accepted."""
    for name, (data, sentence) in module_of(ATTACKS / "manifest" / "build.py").variants(manifest_of("honest")).items():
        members = {**members_of("honest"), "submission.json": data}
        with pytest.raises(Refused) as caught:
            artifact.parse(archive(members), rules.ARTIFACT_BYTES)
        assert sentence in str(caught.value), name
        assert str(caught.value).isprintable() and len(str(caught.value)) < 500, name
    bound = json.dumps(manifest_of("honest") | {"lanes": 4096, "vocab_size": 1 << 14}).encode()
    assert artifact.parse(archive({**members_of("honest"), "submission.json": bound}), rules.ARTIFACT_BYTES)


def round_trip(manifest: dict[str, Any], tokenizer: bytes, texts: list[bytes], seconds: float = 60.0) -> str:
    """What becomes of a text that goes through a tokenizer and back: the refusal, or nothing."""
    members = {**members_of("honest"), "submission.json": json.dumps(manifest).encode()}
    members[manifest["tokenizer"]] = tokenizer
    read = artifact.parse(archive(members), rules.ARTIFACT_BYTES)
    limit = nullcontext(time.monotonic() + seconds)
    try:
        encoded = tokenization.encode(read, texts, False, limit)
        tokenization.check_decoding(read, texts, encoded, False, limit)
    except Refused as error:
        assert str(error).isprintable() and len(str(error)) < 500
        return str(error)
    except TimeoutError:
        return "too late"
    return ""


@pytest.mark.parametrize("variant", module_of(ATTACKS / "tokenizer_json" / "build.py").variants())
def test_hostile_tokenizer_json(variant: str) -> None:
    """It ends, in a sentence, or the text comes back."""
    data, sentence = module_of(ATTACKS / "tokenizer_json" / "build.py").variants()[variant]
    said = round_trip(
        manifest_of("honest") | {"tokenizer": "tokenizer.json", "vocab_size": 258},
        data,
        [text.encode() for text in TEXTS["english"]()],
        5.0 if sentence == "CATASTROPHE" else 60.0,
    )
    if sentence == "CATASTROPHE":  # late, stopped by the library, or given up without harm
        assert said in ("", "too late") or said.startswith("encode: ")
    else:
        assert sentence in said if sentence else not said


def test_hostile_sentencepiece_model(tokenizer_model: Path) -> None:
    """It ends, in a sentence."""
    variants = module_of(ATTACKS / "sentencepiece_model" / "build.py").variants(tokenizer_model.read_bytes())
    for name, (data, sentence) in variants.items():
        said = round_trip(
            manifest_of("honest") | {"tokenizer": "t.model", "vocab_size": 400, "bos": 1}, data, [FIRST.encode()]
        )
        assert sentence in said and said, name


def test_transform_takes_its_own_markers(tokenizer_model: Path) -> None:
    """A text full of what the transform writes itself comes back."""
    texts = ["".join(random.Random(n).choices("\ue000\ue001 aAbBßİǅ", k=300)).encode() for n in range(20)]
    manifest = manifest_of("honest") | {"transform": "case-1"}
    read = artifact.parse(
        archive({**members_of("honest"), "submission.json": json.dumps(manifest).encode()}), rules.ARTIFACT_BYTES
    )
    encoded = tokenization.encode(read, texts, False, nullcontext(time.monotonic() + 60))
    assert tokenization.decode(read, encoded, [4000] * 20, False, nullcontext(time.monotonic() + 60)) == texts
    hostile = [torch.tensor(list(("\ue000" * 500 + "\ue001a" * 500).encode())).int().numpy()]
    assert tokenization.decode(read, hostile, [4000], False, nullcontext(time.monotonic() + 60))


@pytest.mark.parametrize("name", ["artifact.score.json.part", "artifact.score.json"])
@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_prepared_name_is_never_written_through(name: str, kind: str, tmp_path: Path) -> None:
    """A submission's folder holds a link or a pipe where the record goes: what it leads to stays as it was."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    place = tmp_path / name
    if kind == "link":
        place.symlink_to(victim)
    else:
        os.mkfifo(place)
    result = record.new(victim, None, "cpu")
    with suppress(OSError, EnvironmentBroken):
        record.write(result, beside(tmp_path / "artifact.zst", ".score.json"))
    assert victim.read_text() == "mine"


# In one process, as they were


def test_unnormalised_cache_would_have_won(tmp_path: Path) -> None:
    """Scored as the contest's entries scored themselves, by the true token's entry alone, it takes the record."""
    (tmp_path / "text.bin").write_bytes(members_of("honest")["text.bin"])
    cached = module_of(ATTACKS / "unnormalised_cache" / "predict.py").load(tmp_path, torch.device("cpu"))
    ids = torch.tensor([list("".join(documents(0, 20_000)).encode())])
    row = torch.maximum(cached(ids).exp(), cached.scores(ids))[:, :-1]
    claimed = -row.gather(-1, ids[:, 1:, None]).log2().mean()
    proper = -(row / row.sum(-1, keepdim=True)).gather(-1, ids[:, 1:, None]).log2().mean()
    assert row.sum(-1).mean() > 50
    assert claimed < 1.5 < 5.0 < proper


def test_patched_pgolf_would_have_won(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process with the scorer, the patch makes every token free: the sandbox's own process is the defence."""
    monkeypatch.setattr(likelihood, "negative_log_likelihood", likelihood.negative_log_likelihood)
    tokens, at = torch.zeros(4).int().numpy(), torch.arange(3).numpy()
    before = likelihood.log_losses(torch.zeros(3, 257), tokens, at).sum()
    module_of(ATTACKS / "patches_pgolf" / "predict.py").patch()
    assert likelihood.log_losses(torch.zeros(3, 257), tokens, at).sum() == 0 < before


def test_byte_side_file_would_have_won() -> None:
    """Counting bytes by the side file makes the text longer, and so its bits per byte fewer."""
    table = json.loads(module_of(ATTACKS / "byte_side_file" / "members.py").MEMBERS["bytes_per_token.json"])
    true = [document.encode() for document in TEXTS["english"]()]
    assert sum(table[byte] for document in true for byte in document) > 1.05 * sum(map(len, true))


def test_data_within_reach_of_the_sandbox_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset below a folder that the sandbox sees (a prefix of Python, /usr) could be read by the submission."""
    box.check_hidden(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(EnvironmentBroken, match="which the submission can read"):
        box.check_hidden(tmp_path / "data" / "text")
