"""Whatever a submission does, it gets one clear sentence, and nothing is left behind."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import ALL, SHARED, UNIFORM, MakeArtifact, needs_fineweb
from pgolf import rules
from pgolf.cli.main import main
from pgolf.sandbox import probe
from pgolf.score.score import Options, score

pytestmark = pytest.mark.xdist_group("ends")  # what one of these kills is no trace of another's

CPU = Options(device="cpu")


def evil(body: str) -> str:
    """A predictor whose step runs `body` and then answers honestly."""
    return UNIFORM.replace("        return torch.zeros", f"        {body}\n        return torch.zeros")


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No process, control group or private copy of a scorer that is over, or of this process, is left."""
    yield
    for _ in range(600):  # those of scorers that other tests kill are removed by the next one
        if not (left := leftovers()):
            break
        time.sleep(0.1)
    assert left == set()


def leftovers() -> set[str]:
    """Traces of scorers, except of those that are still at work beside the tests."""
    names = {str(path) for path in Path("/sys/fs/cgroup").glob("**/pgolf-*")}
    for base in ("/dev/shm", tempfile.gettempdir()):
        names |= {str(path) for path in Path(base).glob("pgolf-copy-*")}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            names |= set(re.findall(r"pgolf-\d+-\S+", (process / "cgroup").read_text()))
    owners = {name: int(re.findall(r"pgolf-(?:copy-\d+-)?(\d+)-", name)[0]) for name in names}
    return {name for name, pid in owners.items() if pid == os.getpid() or not Path("/proc", str(pid)).exists()}


PREDICTORS = {
    "nan": (evil("return torch.full((len(ids), VOCAB), float('nan'))"), "NaN or infinity"),
    "a broken rule": (
        evil("return torch.zeros(len(ids), VOCAB).long()"),
        "predict: ValueError: logits are torch.int64",
    ),
    "infinity": (evil("return torch.zeros(len(ids), VOCAB).log()"), "NaN or infinity"),
    "wrong width": (evil("return torch.zeros(len(ids), VOCAB + 1)"), "logits of shape (3, 3"),
    "too few lanes": (evil("return torch.zeros(len(ids) - 1, VOCAB)"), "logits of shape"),
    "three dimensions": (evil("return torch.zeros(1, len(ids), VOCAB)"), "logits of shape"),
    "integers": (evil("return torch.zeros(len(ids), VOCAB, dtype=torch.int32)"), "logits are torch.int32"),
    "import error": (
        "import no_such_module\n" + UNIFORM,
        "predict: your code raised ModuleNotFoundError: No module named 'no_such_module' (predict.py, line 1)",
    ),
    "syntax error": ("def load(:\n", "your code raised SyntaxError"),
    "raises": (
        evil("raise ValueError('no such lane')"),
        "predict: your code raised ValueError: no such lane (predict.py",
    ),
    "no load": ("x = 1\n", "has no attribute 'load'"),
    "exit": ("import sys\nsys.exit(0)\n", "SystemExit"),
    "dies": (evil("import os; os._exit(7)"), "ended before it answered (exit status 7)"),
    "dies of no signal": (evil("import os; os._exit(255)"), "ended before it answered (exit status 255)"),
    "crashes": (evil("import ctypes; ctypes.string_at(0)"), "SIGSEGV"),
    "eats memory": (evil("x = [bytearray(b'x' * 2**26) for _ in range(10**6)]"), "GiB of memory"),
    "forks": (evil("import os\n        while True: os.fork()"), ""),
    "spawns threads": (
        evil("import threading, time\n        while True: threading.Thread(target=time.sleep, args=(99,)).start()"),
        "",
    ),
    "fills disk": (
        evil("f = open('/tmp/x', 'wb')\n        while True: f.write(bytes(2**24))"),
        "No space left on device",
    ),
    "writes artifact": (evil("open('/artifact/x', 'wb')"), "Read-only file system"),
    "writes root": (evil("open('/x', 'wb')"), "Read-only file system"),
    "floods stdout": (evil("while True: print('x' * 10**5)"), "printed more than"),
    "opens a socket": (
        evil("import socket; socket.create_connection(('127.0.0.1', PORT), 2)"),
        "Operation not permitted",
    ),
    "asks the network": (
        evil("import socket; socket.create_connection(('1.1.1.1', 53), 2)"),
        "Operation not permitted",
    ),
    "looks for the text": (evil("open('DATA/val_documents.jsonl')"), "No such file or directory"),
    "ptrace": (
        evil("import ctypes; c = ctypes.CDLL(None, use_errno=True); assert c.ptrace(0, 0, 0, 0) == 0, 'denied'"),
        "denied",
    ),
    "new namespace": (
        evil("import ctypes; c = ctypes.CDLL(None); assert c.unshare(0x10000000) == 0, 'denied'"),
        "denied",
    ),
}


OUTSIDE = {"nan", "infinity", "wrong width", "too few lanes", "three dimensions", "integers", "import error"}
OUTSIDE |= {"syntax error", "no load", "exit", "dies of no signal"}
"""Refused in the same way without a sandbox, which takes a third of the time."""


ELSEWHERE = {"infinity", "three dimensions", "no load", "eats memory", "forks", "spawns threads", "floods stdout"}
ELSEWHERE |= {"opens a socket", "asks the network", "looks for the text"}
"""Much the same is an attack in tests/attacks, or a case above; run with PGOLF_TEST_ALL=1."""


@pytest.mark.parametrize("name", [name for name in PREDICTORS if ALL or name not in ELSEWHERE])
def test_hostile_predictor(
    name: str, make_artifact: MakeArtifact, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each misbehaviour is refused with a sentence that says what it was."""
    source, expected = PREDICTORS[name]
    monkeypatch.setattr(rules, "WORKER_MEMORY_BYTES", 2 * 1024**3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = source.replace("DATA", str(dataset)).replace("PORT", str(server.getsockname()[1]))
        record = score(make_artifact(source), dataset, Options(device="cpu", isolated=name not in OUTSIDE))
    assert record.status == "refused", record
    assert expected in record.reason
    assert record.reason.isprintable() and len(record.reason) < 500
    assert record.bpb is None


def test_killed_scorer_leaves_nothing(make_artifact: MakeArtifact, dataset: Path, tmp_path: Path) -> None:
    """SIGKILL while the sandbox runs: no orphan, no record, no half-written file; the next scorer clears up."""
    path = make_artifact(evil("import time; time.sleep(10**6)"))
    command = [sys.executable, "-m", "pgolf.score", str(path), "--data", str(dataset)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    time.sleep(8)
    process.kill()
    process.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zst"]
    assert score(make_artifact(UNIFORM), dataset, CPU).status == "ok"


@needs_fineweb
def test_lossy_tokenizer(make_artifact: MakeArtifact) -> None:
    """A participant's real tokenizer without byte fallback is refused at the first byte that it loses."""
    model = (SHARED / "tokenizers" / "lossy_1024_bpe.model").read_bytes()
    path = make_artifact(UNIFORM, {"tokenizer.model": model}, vocab_size=1024)
    record = score(path, SHARED / "fineweb10B_sp1024", CPU)
    assert record.status == "refused"
    assert "the tokenizer is lossy: document" in record.reason and "at byte" in record.reason


def test_damaged_tokenizer(make_artifact: MakeArtifact, dataset: Path) -> None:
    """A tokenizer file that is none is the submission's fault."""
    record = score(make_artifact(UNIFORM, {"tokenizer.model": b"nonsense"}), dataset, CPU)
    assert record.status == "refused" and record.reason.startswith("encode: ")


def test_tokenizer_larger_than_declared(make_artifact: MakeArtifact, dataset: Path) -> None:
    """Ids outside the declared vocabulary are refused before any model runs."""
    record = score(make_artifact(UNIFORM, vocab_size=270), dataset, CPU)
    assert record.status == "refused" and "vocab_size is 270" in record.reason


def test_missing_package(make_artifact: MakeArtifact, dataset: Path) -> None:
    """A package that is not here is named; the submission is not to blame."""
    record = score(make_artifact(UNIFORM, packages=["no-such-package"]), dataset, CPU)
    assert record.status == "failed" and "no-such-package" in record.reason


def test_exit_codes_and_single_sentences(
    make_artifact: MakeArtifact, dataset: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 refused, 2 wrong usage, 3 broken environment; one line each, no traceback."""
    artifact = make_artifact(UNIFORM)
    (tmp_path / "big.zst").write_bytes(bytes(16_000_001))
    (tmp_path / "cut.zst").write_bytes(artifact.read_bytes()[:-9])
    cases: list[tuple[tuple[object, ...], int, str]] = [
        ((tmp_path / "big.zst", "--data", dataset), 1, "16,000,001 bytes; the limit is 16,000,000"),
        ((tmp_path / "cut.zst", "--data", dataset), 1, "truncated"),
        ((tmp_path / "none.zst", "--data", dataset), 2, "no such artifact"),
        ((tmp_path, "--data", dataset), 2, "no such artifact"),
        ((artifact, "--data", dataset, "--out", artifact), 2, "would overwrite the artifact"),
        ((artifact, "--data", tmp_path / "nowhere"), 2, "no such dataset"),
        ((artifact, "--data", dataset, "--device", "tpu"), 2, "no device 'tpu'"),
        ((artifact, "--data", dataset, "--device", "cuda:99"), 2, "is not here"),
        ((artifact, "--data", dataset), 3, "bubblewrap is not installed"),
    ]
    for args, code, sentence in cases:
        if code == 3:
            monkeypatch.setenv("PATH", str(tmp_path))
        assert main(["score", *map(str, args)]) == code
        out, err = capfd.readouterr()
        assert sentence in err
        assert "Traceback" not in err and out == ""
        assert len(err.strip().splitlines()) == 1


HOSTILE = "print('first'); print('\\x1b[2J' + 'x' * 900 + '\\x9b'); raise ValueError('\\x1b]0;title\\x07')"


def test_output_from_inside_is_shown_on_request_only(
    make_artifact: MakeArtifact, dataset: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Traceback and prints, line by line, escaped and bounded, on stderr; the record has neither."""
    artifact = make_artifact(evil(HOSTILE))
    args = ["score", str(artifact), "--data", str(dataset), "--device", "cpu"]
    assert main([*args, "--no-sandbox"]) == 1
    quiet = capfd.readouterr().err
    assert len(quiet.splitlines()) == 1
    assert main([*args, "--verbose"]) == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1] == quiet.strip() and all(line.isprintable() for line in lines)
    shown = [line.removeprefix("predict | ") for line in lines if line.startswith("predict | ")]
    assert "first" in shown and "\\x1b[2J" + "x" * 50 in "".join(shown)
    assert any(line.startswith("Traceback") for line in shown) and "predict.py" in "".join(shown)
    assert max(map(len, lines)) < 500
    kept = artifact.with_suffix(".score.json").read_text()
    assert "Traceback" not in kept and "first" not in kept


def test_output_of_a_good_run(make_artifact: MakeArtifact, dataset: Path) -> None:
    """As a user runs it: the table ends in the score, and the record lies beside the artifact."""
    artifact = make_artifact(UNIFORM)
    command = [sys.executable, "-m", "pgolf.score", str(artifact), "--data", str(dataset), "--no-sandbox"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("score ") and line.endswith("(practice score)") for line in lines)
    assert "pgolf doctor" in lines[-1]
    assert artifact.with_suffix(".score.json").is_file()


def test_changed_text_is_a_broken_environment(
    make_artifact: MakeArtifact, tokenizer_model: Path, tmp_path: Path
) -> None:
    """A dataset whose text does not match its digest gives no score, and the submission is not blamed."""
    from conftest import DOCUMENTS, write_dataset

    root = write_dataset(tmp_path / "changed", DOCUMENTS, tokenizer_model)
    text = root / "val_documents.jsonl"
    text.write_text(text.read_text().replace("quick", "slow"))
    record = score(make_artifact(UNIFORM), root, CPU)
    assert record.status == "failed" and "digest" in record.reason


def test_isolation_is_described() -> None:
    """The sandbox is really there on the machine that runs these tests."""
    assert probe.check_isolation().description.startswith("bubblewrap")
