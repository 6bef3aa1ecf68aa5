"""Attacks on training: folders of tests/attacks with `side = "training"`, run in the trainer's sandbox.

tests/attacks/README.md explains the fields of attack.toml.
"""

import os
import re
import secrets
import socket
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from attack_tools.attack import FOLDER, module_of
from attack_tools.runs import sandboxed_processes

from pgolf import rules
from pgolf.errors import Refused
from pgolf.sandbox import environment, place, training
from pgolf.sandbox.box import Worker
from pgolf.sandbox.wire import Kind

SHARED = Path(__file__).parent / "trainer"
CHANNELS = FOLDER / "marks" / "channels.py"
ENDINGS = ("refused", "no gain", "allowed")
DEFENCES = ("sandbox", "outer clock", "artifact by socket", "late data", "training files only", "pause")
SLOW = ("train_carries_ports", "train_docstrings")
LATER = 1.0  # seconds until a harness reads a file that was announced as finished
TRIES = 8  # at a counterfactual that has to be quick
SLACK = 0.1  # seconds that two clocks of one machine may differ


@dataclass(frozen=True)
class TrainingAttack:
    """Raises ValueError for a description that contradicts itself, TypeError for an unknown field."""

    folder: Path
    side: str
    exploits: str
    ending: str
    reason: str = ""
    """A part of the refusal."""
    without: str = ""
    """The defence without which it gains."""
    gain_bits: float = 0.0
    """What it hands over without the defence, or where it is allowed, and must not have otherwise."""
    gain_seconds: float = 0.0
    """How long it works under the clock, and claims that it does not."""
    no_counterfactual: str = ""
    seeds: int = 1
    """Of several runs, each in its own sandbox, the last one's artifact counts."""
    processes: int = 1
    prepare_seconds: float = 120.0
    train_seconds: float = 120.0
    artifact_bytes: int = 1 << 20
    variants: Mapping[str, str] = field(default_factory=lambda: {"": ""})
    """Names of variants, and a part of each one's refusal."""
    test: str = ""
    """The test in tests/test_training_attacks.py that looks at what it handed over."""

    def __post_init__(self) -> None:
        checks = {
            f"ending is one of {ENDINGS}": self.ending in ENDINGS,
            f"without is one of {DEFENCES}": self.without in ("", *DEFENCES),
            "either without or no_counterfactual": bool(self.without) != bool(self.no_counterfactual),
            "gain_bits or gain_seconds go with without": not self.without or self.gain_bits + self.gain_seconds > 0,
            "a refusal has a reason": self.ending != "refused" or bool(self.reason or all(self.variants.values())),
            "exploits is one sentence": self.exploits.endswith(".") and "\n" not in self.exploits,
        }
        if broken := [rule for rule, holds in checks.items() if not holds]:
            raise ValueError(f"{self.folder / 'attack.toml'}: {broken[0]}")

    @property
    def sources(self) -> dict[str, bytes]:
        """What the sandbox gets as /artifact."""
        found = {path.name: path.read_bytes() for path in (*self.folder.glob("*.py"), *SHARED.glob("*.py"), CHANNELS)}
        if found.pop("members.py", None):
            found |= module_of(self.folder / "members.py").MEMBERS
        return found


def discover(folder: Path = FOLDER) -> dict[str, TrainingAttack]:
    """All attacks on training below `folder`, by name."""
    described = {place.parent: tomllib.loads(place.read_text()) for place in sorted(folder.glob("*/attack.toml"))}
    return {
        place.name: TrainingAttack(place, **fields)
        for place, fields in described.items()
        if fields.get("side") == "training"
    }


@dataclass(frozen=True)
class Ended:
    """What came of the last run."""

    refused: str = ""
    artifact: bytes = b""
    earlier: tuple[bytes, ...] = ()
    """The artifacts of the runs before."""
    seconds: float = 0.0
    """Charged under the clock."""
    output: str = ""


class Trainings:
    """Runs attacks on training beside a data set that they reach for."""

    def __init__(self, root: Path, port: int) -> None:
        self.root, self.port = root, port
        self.data = root / "data"
        self.data.mkdir()
        (self.data / "train_000000.bin").write_bytes(_secret("train") + os.urandom(7_000_000))
        (self.data / "board").write_bytes(os.urandom(7_000_000))  # what the channel through pages needs
        (self.data / "val_documents.jsonl").write_bytes(_secret("validation"))
        os.sync()  # pages that wait to be written cannot be dropped

    def end(self, attack: TrainingAttack, variant: str, without: str = "") -> Ended:
        """Run it with each seed."""
        words = {b"DATA": str(self.data), b"PORT": str(self.port), b"NONCE": secrets.token_hex(16)}
        sources = attack.sources
        for name, word in (("train.py", b"DATA"), ("train.py", b"PORT"), ("harness.py", b"NONCE")):
            sources[name] = sources[name].replace(word, words[word].encode())
        ended = Ended()
        for seed in range(1, attack.seeds + 1):
            before = (*ended.earlier, ended.artifact)[1 if seed == 1 else 0 :]
            ended = replace(self._run(attack, sources, seed, variant, without), earlier=before)
            assert not sandboxed_processes(), "something outlives its sandbox"
        return ended

    def _run(
        self, attack: TrainingAttack, sources: Mapping[str, bytes], seed: int, variant: str, without: str
    ) -> Ended:
        out = self.root / "artifact.zst" if without else Path("/tmp/artifact.zst")
        files = {"dataset.json": b"{}"}
        if without == "late data":
            files["train_000000.bin"] = (self.data / "train_000000.bin").read_bytes()
        if without == "training files only":
            files["val_documents.jsonl"] = (self.data / "val_documents.jsonl").read_bytes()
        arguments = ("--out", str(out), "--seed", str(seed), "--variant", variant)
        shards = {"train_000000.bin": self.data / "train_000000.bin"}
        job = training.Job(sources, files, shards, arguments, processes=attack.processes)
        limits = training.Limits(attack.prepare_seconds, attack.train_seconds, attack.artifact_bytes)
        if without == "outer clock":
            limits = replace(limits, train_seconds=120.0)
        try:
            with read_later(out) if without == "artifact by socket" else pause(attack.without == "pause"):
                found = training.train(job, limits, isolated=not without)
        except Refused as error:
            return Ended(refused=str(error))
        seconds = claimed(found.output) if without == "outer clock" else found.seconds["train"]
        return Ended("", found.artifact, (), seconds, found.output)

    def check_ending(self, attack: TrainingAttack, variant: str) -> None:
        """The attack ends as its attack.toml says."""
        found = self.end(attack, variant)
        print(f"{attack.folder.name} {variant}: {found.refused or f'{8 * len(found.artifact):,} bits'}")
        if attack.ending == "refused":
            assert attack.reason in found.refused and attack.variants[variant] in found.refused, found
            assert found.refused and found.refused.isprintable() and len(found.refused) < 500
            return
        assert not found.refused
        assert found.seconds >= attack.gain_seconds - SLACK
        if attack.ending == "allowed":
            assert 8 * len(found.artifact) >= attack.gain_bits
        else:
            assert not found.artifact, found

    def check_counterfactual(self, attack: TrainingAttack, variant: str) -> None:
        """Without the defence it gains."""
        found = self.end(attack, variant, attack.without)
        for _ in range(TRIES if attack.without == "pause" else 0):
            if not found.artifact:  # the kernel changed its secret meanwhile
                found = self.end(attack, variant, attack.without)
        assert not found.refused, found
        assert 8 * len(found.artifact) >= attack.gain_bits, found
        assert found.seconds < attack.gain_seconds - SLACK or not attack.gain_seconds, found


def claimed(output: str) -> float:
    """The training time that a log states."""
    return float(re.findall(r"trained in ([0-9.]+) s", output)[-1])


@contextmanager
def read_later(out: Path) -> Iterator[None]:
    """A harness that is told that a file is finished, and reads it a little later."""
    real = Worker.receive_one_of

    def receive(self: Worker, most: Mapping[Kind, int]) -> tuple[Kind, bytes]:
        kind, sent = real(self, most)
        if kind is not Kind.ARTIFACT:
            return kind, sent
        time.sleep(LATER)
        return kind, out.read_bytes()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "receive_one_of", receive)
        yield


PAUSE = place.PORTS_SECONDS


@contextmanager
def pause(long: bool) -> Iterator[None]:
    """A pause before a sandbox with several ranks; the tests that do not need it save the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, "PORTS_SECONDS", PAUSE if long else 0.0)
        yield


@contextmanager
def surroundings(root: Path) -> Iterator[Trainings]:
    """A lock of their own, servers that give a secret out, low limits, and a sandbox without torch, to save time."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = server.getsockname()[1]
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind(f"\0pgolf-attack-{port}")
        abstract.listen()
        for each in (server, abstract):
            threading.Thread(target=_serve, args=(each,), daemon=True).start()
        patch.setenv("PGOLF_LOCK", str(root / "lock"))
        patch.setenv("PGOLF_SECRET", _secret("validation").decode())
        patch.setitem(environment.ROLE_PACKAGES, "train", ("numpy",))
        environment.listing.cache_clear()
        patch.setattr(rules, "TRAIN_MEMORY", 800 * 1024**2 / memory)
        patch.setattr(rules, "TRAIN_DISK_BYTES", 64 * 1024**2)
        patch.setattr(rules, "TRAIN_OUTPUT_BYTES", 1024**2)
        patch.setattr(rules, "TRAIN_PROCESSES", 200)
        yield Trainings(root, port)
    environment.listing.cache_clear()
    module_of(CHANNELS).forget()
    for folder in ("/tmp", "/dev/shm", "/var/tmp", "/run"):  # what attacks without a sandbox left behind
        for left in Path(folder).glob("pgolf-attack-*"):
            left.unlink()


def _secret(kind: str) -> bytes:
    return f"pgolf-secret-{kind}-{secrets.token_hex(16)}".encode()


def _serve(server: socket.socket) -> None:
    with suppress(OSError):
        while True:
            connection, _ = server.accept()
            with connection:
                connection.sendall(_secret("validation"))


def variants(attacks: Mapping[str, TrainingAttack], every: bool) -> list[Any]:
    """Name and variant of each run; unless `every`, one a folder and none of the slow ones."""
    return [
        pytest.param(name, variant, id=f"{name}-{variant}" if variant else name)
        for name, attack in attacks.items()
        for variant in list(attack.variants)[: None if every else 1]
        if every or name not in SLOW
    ]
