"""Scores of attacks on small texts, and the surroundings that they reach for."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from attack_tools.attack import Attack, archive
from attack_tools.defences import DEFENCES
from attack_tools.texts import TEXTS

from conftest import write_dataset
from pgolf import rules
from pgolf.sandbox import probe
from pgolf.score import record, score
from pgolf.score.score import Options

NOISE_BITS = 40.0
"""The most that a score may be below the honest one."""
CODE = "the tokenizer is code of the submission, which has held the text before it is scored"
DEMO = "the text can be rebuilt from what is installed on the machine (demo)"
WINDOW = "not proven: window form, in which a predictor receives tokens before they are scored"
AS_WINDOWS = {"form": "window", "context": 64, "lanes": None, "layout": None}


class Runs:
    """Scores each attack on each text once."""

    def __init__(self, root: Path, tokenizer: Path, port: int, attacks: dict[str, Attack]) -> None:
        self.root, self.tokenizer, self.port, self.attacks = root, tokenizer, port, attacks
        self.known: dict[tuple[str, str, str], record.Record] = {}

    @cache  # noqa: B019
    def text(self, kind: str) -> Path:
        """A dataset."""
        folder = write_dataset(self.root / kind, TEXTS[kind](), self.tokenizer)
        if kind == "demo":
            index = folder / "dataset.json"
            index.write_text(json.dumps(json.loads(index.read_text()) | {"environment": True}))
        return folder

    def artifact(self, name: str, text: str = "english", **fields: Any) -> Path:
        """The packed attack. Paths and ports of this test run are put into its source."""
        attack = self.attacks[name]
        members = {"submission.json": json.dumps(attack.submission(**fields)).encode(), **attack.members}
        if text not in ("english", "demo"):
            members["text.bin"] = b""  # a text that is not English is best predicted without a model of English
        source = members["predict.py"].decode().replace("DATA", str(self.text(text))).replace("PORT", str(self.port))
        path = self.root / f"{name}-{len(list(self.root.iterdir()))}.zst"
        path.write_bytes(archive({**members, "predict.py": source.encode()}))
        return path

    def score(self, name: str, text: str = "english", isolated: bool = True, **fields: Any) -> record.Record:
        """A new record of a score."""
        path, options = self.artifact(name, text, **fields), Options(device="cpu", isolated=isolated)
        with accomplice(self.attacks[name].folder / "accomplice.py", self.text(text)):
            return score.score(path, self.text(text), options)

    def __call__(self, name: str, text: str = "", without: str = "") -> record.Record:
        """The record of a score, perhaps without one of the defences."""
        attack = self.attacks[name]
        text = text or attack.text
        key = (name, text, without)
        if key not in self.known:
            with DEFENCES[without]() if without else nullcontext():
                fields = AS_WINDOWS if without == "step form" else {}
                self.known[key] = self.score(name, text, attack.sandbox and not without, **fields)
        return self.known[key]

    def bits(self, name: str, text: str = "", without: str = "") -> float:
        """The code length in bits."""
        return bits_of(self(name, text, without))

    def gain(self, name: str, text: str = "", without: str = "") -> float:
        """Bits below the honest model."""
        attack = self.attacks[name]
        return self.bits(attack.baseline, text or attack.text) - self.bits(name, text, without)

    def check_ending(self, name: str) -> None:
        """The attack ends as its attack.toml says."""
        attack, found = self.attacks[name], self(name)
        code, demo = attack.submission()["tokenizer"].endswith(".py"), attack.text == "demo"
        more = ([CODE] if code else []) + ([DEMO] if demo else [])
        assert sorted(found.reasons) == sorted([*more, *self.always(found, attack.sandbox)])
        assert not found.eligible
        if attack.ending == "refused":
            print(f"{name}: {found.reason}")
            assert found.status == "refused", found
            assert attack.reason in found.reason
            assert found.reason.isprintable() and len(found.reason) < 500
            assert found.bpb is None
            return
        print(f"{name}: {self.gain(name):.1f} bits")
        if attack.ending == "no gain":
            assert self.gain(name) < NOISE_BITS
        else:
            assert self.gain(name) >= attack.gain_bits
            assert attack.ending == "allowed" or attack.reason in found.reasons

    def check_counterfactual(self, name: str) -> None:
        """Without the defence the attack needs fewer bits than the honest model."""
        attack = self.attacks[name]
        gain = self.gain(name, without=attack.without)
        print(f"{name} without {attack.without}: {gain:.1f} bits")
        assert gain > attack.gain_bits
        if attack.without == "step form":
            assert WINDOW in self(name, without=attack.without).reasons

    @staticmethod
    def always(found: record.Record, isolated: bool) -> list[str]:
        """Why no score of these tests counts: the text is small, and the lock is the tests' own."""
        size = f"the text has {found.bytes:,} bytes, 2,000,000 are needed"
        return [size, *(probe.isolation().reasons(False) if isolated else ["no sandbox"])]


@contextmanager
def accomplice(program: Path, data: Path) -> Iterator[None]:
    """While entered, the attack's program runs outside of the sandbox, if it has one."""
    running = subprocess.Popen([sys.executable, program, data]) if program.exists() else None
    try:
        yield
    finally:
        if running:
            running.kill()
            running.wait()


def bits_of(found: record.Record) -> float:
    """The code length of a score in bits."""
    assert found.status == "ok", found.reason
    return found.bpb * found.bytes


@contextmanager
def surroundings(root: Path, tokenizer: Path, attacks: dict[str, Attack]) -> Iterator[Runs]:
    """Runs under a lock of their own, with what attacks reach for: a server that gives the text out, a short limit."""
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as server:
        runs = Runs(root, tokenizer, server.getsockname()[1], attacks)
        threading.Thread(target=_serve, args=(server, runs), daemon=True).start()
        patch.setenv("PGOLF_LOCK", str(root / "lock"))
        probe.isolation.cache_clear()
        probe.check_isolation.cache_clear()
        patch.setitem(rules.TRACKS, "hurry", rules.Track("hurry", 16_000_000, 30.0, None, 3.0, "CPU"))
        patch.setattr(rules, "WORKER_MEMORY_BYTES", 1 << 30)
        yield runs
    probe.isolation.cache_clear()
    probe.check_isolation.cache_clear()
    for folder in ("/tmp", "/dev/shm", "/var/tmp", "/run"):  # what attacks without a sandbox left behind
        for place in Path(folder).glob("pgolf-attack-*"):
            place.unlink()


def _serve(server: socket.socket, runs: Runs) -> None:
    """Give the text to every client."""
    with suppress(OSError):
        while True:
            connection, _ = server.accept()
            with connection:
                data = (runs.text("english") / "val_documents.jsonl").read_bytes()
                connection.sendall(data.replace(b"\\n", b"\n"))


def sandboxed_processes() -> list[Path]:
    """Folders in /proc of the processes in sandboxes of this process: they see a private copy that it made."""
    own = f"/pgolf-copy-{Path('/proc/self/ns/pid').stat().st_ino}-{os.getpid()}-"
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if own in (process / "mountinfo").read_text():
                found.append(process)
    return found
