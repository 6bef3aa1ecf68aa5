"""Trainers in the sandbox: when the data is there, what is handed over, and what ends a run."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from pgolf import artifact
from pgolf.data.dataset import open_dataset, training_files
from pgolf.errors import EnvironmentBroken, Refused
from pgolf.sandbox import place, training
from pgolf.sandbox.training import Job, Limits, Trained

# The example of the protocol, without pgolf and torch.
EXAMPLE = re.search(r"^```py\n(.*?)^```", (ROOT / "docs" / "artifact.md").read_text(), re.MULTILINE | re.DOTALL)
assert EXAMPLE
HARNESS = f"""
import sys, time
from pathlib import Path
DATA = Path(sys.argv[sys.argv.index("--data") + 1])
{EXAMPLE[1]}
def send(kind, payload=b""):
    harness.sendall(struct.pack("<BI", kind, len(payload)) + payload)
"""
NAIVE = ROOT / "baselines" / "naive"
LIMITS = Limits(60.0, 60.0, 1000)


def run(body: str, limits: Limits = LIMITS, isolated: bool = False, **changes: Any) -> Trained:
    job = Job({"train.py": (HARNESS + body).encode()}, {"dataset.json": b"{}"}, {}, ())
    return training.train(replace(job, **changes), limits, isolated=isolated)


@pytest.mark.parametrize("isolated", [True, False])
def test_shards_appear_when_the_clock_starts(isolated: bool, tmp_path: Path) -> None:
    """And each run has its own: what one does to its files, the next one does not see."""
    (tmp_path / "shard").write_bytes(b"tokens")
    body = """
before = sorted(path.name for path in DATA.rglob("*"))
open_data()
shard = DATA / "shards" / "train_0.bin"
found = shard.read_bytes()
try:
    shard.write_bytes(b"changed")
except OSError:
    pass
hand_over(repr((before, found)).encode())
"""
    for _ in range(2 - isolated):
        done = run(body, isolated=isolated, shards={"train_0.bin": tmp_path / "shard"})
        assert done.artifact == b"(['dataset.json'], b'tokens')"
    assert (tmp_path / "shard").read_bytes() == b"tokens"


def test_arguments_and_sources_reach_the_trainer() -> None:
    sources = {"train.py": (HARNESS + "import other\nopen_data()\nhand_over(other.VALUE)").encode()}
    sources["other.py"] = b"import sys\nVALUE = ' '.join(sys.argv[3:]).encode()"
    assert run("", sources=sources, arguments=("--seed", "7")).artifact == b"--seed 7"


@pytest.mark.parametrize("eager", [True, False])
def test_a_few_steps_need_no_compiler(eager: bool) -> None:
    """torch's own switch: with it torch.compile returns what it was given."""
    body = "open_data()\nhand_over(os.environ.get('TORCH_COMPILE_DISABLE', '0').encode())"
    assert run("", sources={"train.py": (HARNESS + body).encode()}, eager=eager).artifact == str(int(eager)).encode()


def test_ranks_have_the_variables_of_torchrun_and_one_speaks() -> None:
    body = """
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
mine = " ".join(os.environ[name] for name in names)
if os.environ["RANK"] == "1":
    time.sleep(600)
open_data()
hand_over(mine.encode())
"""
    source = HARNESS.replace("harness = socket", 'if "PGOLF_HARNESS" in os.environ: harness = socket') + body
    assert run("", sources={"train.py": source.encode()}, processes=2).artifact == b"0 0 2 2"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("", "train.py ended with exit status 0 before it handed over an artifact"),
        ("open_data()", "train.py ended with exit status 0 before it handed over an artifact"),
        ("open_data()\nraise SystemExit(3)", "train.py ended with exit status 3 before"),
        ("open_data()\nos.kill(os.getpid(), 9)", "train.py ended with exit status -9 before"),
        ("hand_over(b'early')", "a frame of kind 12 where OPEN was due"),
        ("open_data()\nsend(10)\ntime.sleep(600)", "a frame of kind 10 where ARTIFACT or LOG was due"),
        (
            "open_data()\nsend(13, b'log')\nsend(13, b'log')\ntime.sleep(600)",
            "a frame of kind 13 where ARTIFACT was due",
        ),
        ("open_data()\nhand_over(bytes(1001))", "sent 1,001 bytes of ARTIFACT where at most 1,000 are allowed"),
        ("open_data()\nharness.sendall(struct.pack('<BI', 12, 2**32 - 1))\ntime.sleep(600)", "4,294,967,295 bytes"),
        ("open_data()\nsend(2, b'machine\\x1b[2J broken')\ntime.sleep(600)", "machine [2J broken"),
        ("harness.close()\ntime.sleep(600)", "did not ask for the data within 1 s"),
        ("time.sleep(600)", "did not ask for the data within 1 s"),
        ("open_data()\ntime.sleep(600)", "did not hand over its artifact within 1 s"),
    ],
)
def test_what_hands_over_no_artifact_is_refused(body: str, reason: str) -> None:
    """Never as a fault of the machine, whatever exit status or words it chooses."""
    prepare, train = (1.0 if f"{phase} within 1 s" in reason else 60.0 for phase in ("the data", "its artifact"))
    with pytest.raises(Refused) as error:
        run(body, Limits(prepare, train, 1000))
    assert reason in str(error.value)
    assert str(error.value).isprintable()


def test_a_missing_shard_is_the_machines_fault(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentBroken, match=r"none\.bin: cannot be read"):
        run("open_data()", isolated=True, shards={"train_0.bin": tmp_path / "none.bin"})


def test_a_baseline_trains_in_the_sandbox(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks; the artifact says how it was trained, and the log comes with it."""
    monkeypatch.setattr(place, "PORTS_SECONDS", 0.0)  # the pause is tested by an attack
    data = open_dataset(dataset)
    files, shards = training_files(data)
    assert data.canonical_text().documents[0] not in b"".join(files.values())
    tiny = ("--context=16", "--layers=2", "--dim=16", "--batch_tokens=256", "--warmup_steps=1", "--compile=0")
    arguments = ("--out", "/tmp/artifact.zst", "--track", "laptop", "--seed", "5", "--steps=2", *tiny)

    sources = artifact.code_in(NAIVE)
    done = training.train(Job(sources, files, shards, arguments, processes=2), Limits(300.0, 300.0, 1_000_000))
    assert done.log and b'"steps": 2' in done.log.splitlines()[-1]
    first = artifact.parse(done.artifact, 1_000_000)
    declared = first.manifest.training
    assert declared and (declared.steps, declared.tokens) == (2, 512)
    assert set(declared.arguments) == {"--steps=2", *tiny}
    assert artifact.sources(first.members).keys() == sources.keys() | {"submission.json"}
