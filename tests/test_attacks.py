"""Each attack of tests/attacks ends as its attack.toml says, and gains without its defence.

tests/attacks/README.md says how to add one. A run takes a fixed sample; PGOLF_TEST_ALL=1 takes all, and more often.
-rP prints the gains.
"""

import json
import os
import random
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from attack_tools.attack import ALL, FOLDER, TEMPLATE, Attack, archive, discover, module_of, sampled
from attack_tools.defences import DEFENCES
from attack_tools.runs import NOISE_BITS, Runs, bits_of, sandboxed_processes, surroundings
from attack_tools.texts import FIRST, TEXTS, documents
from stub import Stub

from pgolf import artifact, rules
from pgolf.errors import EnvironmentBroken, Refused
from pgolf.files import beside
from pgolf.sandbox import box, lock, probe, wire
from pgolf.score import likelihood, predictors, record, score, tokenization
from pgolf.score.devices import Runtime
from pgolf.score.score import Options

pytestmark = pytest.mark.xdist_group("attacks")  # which leave marks where others look for them

ATTACKS = discover()
HONEST = ATTACKS["honest"]
SCORED = [name for name, attack in ATTACKS.items() if not attack.build and not attack.test]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: Path) -> Iterator[Runs]:
    """Scores of the attacks."""
    with surroundings(tmp_path_factory.mktemp("attacks"), tokenizer_model, dict(ATTACKS)) as found:
        yield found


# How they end


def test_lock_of_the_tests_is_all_that_this_machine_lacks(runs: Runs) -> None:
    """The reasons that the other tests expect are these. A machine without control groups has one more."""
    assert "the lock is not the machine's" in probe.isolation().reasons(False)
    assert runs("honest").bpb < 4.0, "the model that the attacks start from is worth something"


@pytest.mark.parametrize("name", SCORED)
def test_attack_ends_as_it_says(name: str, runs: Runs) -> None:
    """Refused in a sentence that names the rule, or scored like the honest model, or for a stated reason no score."""
    runs.check_ending(name)


@pytest.mark.parametrize("name", sampled({name: ATTACKS[name] for name in SCORED}))
def test_attack_gains_without_the_defence(name: str, runs: Runs) -> None:
    """The attack is real: where the defence is taken away it needs fewer bits than the honest model."""
    runs.check_counterfactual(name)


def test_every_folder_is_run() -> None:
    """By the general tests, by those of variants, or by a test that its attack.toml names. So is each test named."""
    for name, attack in ATTACKS.items():
        kind = "build.py" if attack.build else "predict.py"
        assert (attack.folder / kind).is_file(), name
        named = [attack.test] * bool(attack.test) + re.findall(r"test_\w+", attack.no_counterfactual)
        assert all(callable(globals().get(test)) for test in named), name


def test_template_becomes_an_attack(runs: Runs, tmp_path: Path) -> None:
    """The first command of the README makes a folder that is discovered, ends as it says, and gains without defence."""
    command = re.search(r"^    (cp .*)$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert command and TEMPLATE.name not in ATTACKS
    (tmp_path / "tests" / "attacks").mkdir(parents=True)
    (tmp_path / "tests" / "attack_tools").symlink_to(TEMPLATE.parent)
    subprocess.run(command[1].split(), cwd=tmp_path, check=True)
    found = discover(tmp_path / "tests" / "attacks")
    assert list(found) == ["my_attack"]
    runs.attacks |= found
    runs.check_ending("my_attack")
    runs.check_counterfactual("my_attack")


@pytest.mark.parametrize(
    "wrong",
    [
        {"ending": "wins"},
        {"text": "French"},
        {"without": "luck"},
        {"no_counterfactual": "both"},
        {"gain_bits": 0},
        {"ending": "refused"},
        {"exploits": "two\nlines"},
    ],
)
def test_contradictory_description_is_an_error(wrong: dict[str, Any]) -> None:
    """So that no attack is left out by a slip."""
    sound: dict[str, Any] = {"exploits": "A hole.", "ending": "no gain", "without": "copy", "gain_bits": 1}
    Attack(FOLDER / "x", **sound)
    with pytest.raises(ValueError, match=r"x/attack\.toml: "):
        Attack(FOLDER / "x", **sound | wrong)


def test_readme_lists_the_defences() -> None:
    """A newcomer finds each name that `without` may have."""
    table = re.findall(
        r"^\| `([^`]+)` \|",
        (FOLDER / "README.md").read_text().partition("## Defences")[2].partition("\n## ")[0],
        re.MULTILINE,
    )
    assert table == list(DEFENCES)


def test_pads_help_by_the_token_only(runs: Runs) -> None:
    """The scores that a submission's own units move: half the loss a token, the same bits a byte."""
    pads, honest = runs("pads"), runs("honest")
    assert pads.nats_per_token < 0.6 * honest.nats_per_token


def test_memorised_text_is_paid_for(runs: Runs) -> None:
    """It gains, and less than the bits that the text takes in the artifact."""
    assert 0 < runs.gain("memorised_text") < 8 * (len(FIRST) + 100)


def test_other_lane_helps_a_step_later(runs: Runs) -> None:
    """What another lane showed earlier has been scored and may be used; of the same step nothing is known."""
    assert runs.gain("lane_neighbour", "twins") < NOISE_BITS
    assert runs.gain("lane_neighbour", "staggered") > 5_000


def test_ring_cannot_change_after_the_copy(runs: Runs) -> None:
    """A thread that rewrites the shared memory is either caught or without any effect."""
    found = runs("flips_ring")
    assert found.status == "refused" or found.bpb == runs("honest").bpb


def test_plan_is_the_first_that_was_sent(runs: Runs) -> None:
    """The plan was stated before anything was shown."""
    assert runs("plan_changes").plan == 7
    assert runs("honest").plan == 0


@pytest.mark.parametrize(
    "name",
    [name for name in SCORED if ATTACKS[name].ending != "allowed"] + ["marks"] if ALL else ["marks", "encode_leak"],
)
def test_random_text_costs_seven_bits_a_byte(name: str, runs: Runs) -> None:
    """On fresh random text, scored twice on this machine, no attack takes fewer bits than the text has, or the honest
    model takes.

    That model pays for the ends of documents, which all have one length here; learning that is honest, too.
    """
    honest = runs.bits(ATTACKS[name].baseline, "random")
    for _ in range(2):
        runs.known.pop((name, "random", ""), None)
        found = runs(name, "random")
        if found.status == "ok":
            bits = found.bpb * found.bytes
            assert bits > 7 * found.bytes - NOISE_BITS
            assert bits > honest - NOISE_BITS or name in ("lane_end", "document_order")


# Marks, and sandboxes beside each other


def test_marks_gain_in_a_second_run_outside(runs: Runs) -> None:
    """Where processes share a machine, the second run knows what the first has left."""
    CHANNELS.forget()
    first, second = (runs.bits("honest") - bits_of(runs.score("marks", isolated=False)) for _ in range(2))
    CHANNELS.forget()
    assert first < NOISE_BITS < second


CHANNELS = module_of(FOLDER / "marks" / "channels.py")
USE = (
    "import sys; sys.path.insert(0, sys.argv[1]); import channels; write, read = channels.CHANNELS[sys.argv[2]]\n"
    "if sys.argv[4]: write(bytes.fromhex(sys.argv[4]), sys.argv[3])\n"
    "else: print(read(sys.argv[3]).hex())"
)


@pytest.mark.parametrize("channel", CHANNELS.CHANNELS)
def test_channel_is_real(channel: str, tmp_path: Path) -> None:
    """Two processes that share a file or a kernel talk through it, here without a sandbox."""
    CHANNELS.forget()
    board, message = tmp_path / "board", os.urandom(CHANNELS.SIZE)
    board.write_bytes(os.urandom(CHANNELS.PAGE * 8 * CHANNELS.SIZE + 4096))
    os.sync()

    def use(data: str) -> str:
        arguments = [str(FOLDER / "marks"), channel, str(board), data]
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
    members = {"code.py": source, "channels.py": (FOLDER / "marks" / "channels.py").read_bytes()}
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
    assert found.status == "failed" and "the lock is still held by pgolf (pid" in found.reason


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_prepared_lock_is_no_lock(kind: str, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who puts something else in the lock's place keeps others from scoring, but is no lock, and refuses nobody."""
    place = tmp_path / "lock"
    {"link": lambda: place.symlink_to("target"), "fifo": lambda: os.mkfifo(place), "folder": place.mkdir}[kind]()
    monkeypatch.setenv("PGOLF_LOCK", str(place))
    found = score.score(runs.artifact("honest"), runs.text("english"), Options(device="cpu"))
    assert found.status == "failed" and "lock" in found.reason
    assert not (tmp_path / "target").exists()


def test_failed_probe_is_no_refusal(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a working sandbox is at fault, not the submission; nothing of it has run."""

    def broken(*arguments: Any, **options: Any) -> None:
        raise EnvironmentBroken("bubblewrap cannot make a sandbox here")

    monkeypatch.setattr(probe, "isolation", broken)
    found = score.score(runs.artifact("honest"), runs.text("english"), Options(device="cpu"))
    assert found.status == "failed" and "bubblewrap" in found.reason


def test_nothing_outlives_its_sandbox(runs: Runs) -> None:
    """Whatever was in the sandboxes of all attacks is gone: processes, control groups, copies."""
    with channel_worker(b""):
        assert sandboxed_processes()
    runs("survivor"), runs("fork_bomb"), runs("many_files")
    assert not sandboxed_processes()
    assert not list(Path("/sys/fs/cgroup").glob(f"*/pgolf-{os.getpid()}-*"))
    own = f"pgolf-copy-*-{os.getpid()}-*"
    assert not [*Path("/dev/shm").glob(own), *Path("/tmp").glob(own)]


# The wire


def honest_artifact(data: bytes = b"", /, **fields: Any) -> artifact.Artifact:
    """The honest model with other fields in its manifest. `data`: the contents of the tokenizer that they name."""
    members = {**HONEST.members, "submission.json": json.dumps(HONEST.submission(**fields)).encode()}
    return artifact.parse(archive(members | {fields.get("tokenizer", "bytes"): data}), rules.ARTIFACT_BYTES)


def outcome(lie: str) -> str:
    """The refusal of a worker that tells this lie."""
    lies = module_of(FOLDER / "wire_lies" / "predict.py")
    read = artifact.Artifact("", 0, honest_artifact().manifest, {})
    texts = [torch.arange(40).int().numpy()] * 20
    with Stub(lambda channel, ring: lies.answer(channel, lie)), predictors.Predictor(read, 20, Runtime()) as worker:
        worker.set_deadline(time.monotonic() + 1)
        try:
            worker.load()
            score.step_through(read.manifest, texts, 20, worker, lambda done: None)
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


def built(what: str) -> list[str]:
    """Attacks whose build.py makes these."""
    return [name for name, attack in ATTACKS.items() if attack.build == what]


@pytest.mark.parametrize("name", built("artifact"))
def test_artifact_with_tricks_is_refused(name: str, runs: Runs, tmp_path: Path) -> None:
    """No byte of the file is free, and reading it is harmless; no code of it runs."""
    members = {"submission.json": b"{}", **HONEST.members}
    tar = zstandard.decompress(archive(members), max_output_size=1 << 24)

    def member(**fields: Any) -> bytes:
        info = tarfile.TarInfo()
        for name, value in fields.items():
            setattr(info, name, value)
        return info.tobuf(tarfile.USTAR_FORMAT)

    for variant, (data, sentence) in module_of(FOLDER / name / "build.py").variants(tar, member).items():
        path = tmp_path / "a.zst"
        path.write_bytes(data)
        found = score.score(path, runs.text("english"), Options(device="cpu"))
        assert found.status == "refused", variant
        assert sentence in found.reason, variant


@pytest.mark.parametrize("name", built("manifest"))
def test_hostile_manifest_is_refused(name: str) -> None:
    """Every number is bounded before it costs anything; what is at the bound is accepted."""
    for variant, (data, sentence) in module_of(FOLDER / name / "build.py").variants(HONEST.submission()).items():
        members = {**HONEST.members, "submission.json": data}
        with pytest.raises(Refused) as caught:
            artifact.parse(archive(members), rules.ARTIFACT_BYTES)
        assert sentence in str(caught.value), variant
        assert str(caught.value).isprintable() and len(str(caught.value)) < 500, variant
    assert honest_artifact(lanes=4096, vocab_size=1 << 14)


def round_trip(read: artifact.Artifact, texts: list[bytes], seconds: float = 60.0) -> str:
    """What becomes of a text that goes through a tokenizer and back: the refusal, or nothing."""
    limit = nullcontext(time.monotonic() + seconds)
    try:
        encoded = tokenization.encode(read, texts, Runtime(isolated=False), limit)
        tokenization.check_decoding(read, texts, encoded, Runtime(isolated=False), limit)
    except Refused as error:
        assert str(error).isprintable() and len(str(error)) < 500
        return str(error)
    except TimeoutError:
        return "too late"
    return ""


TOKENIZER_JSON = {
    (name, variant): made
    for name in built("tokenizer.json")
    for variant, made in module_of(FOLDER / name / "build.py").variants().items()
}


@pytest.mark.parametrize(("name", "variant"), TOKENIZER_JSON)
def test_hostile_tokenizer_json(name: str, variant: str) -> None:
    """It ends, in a sentence, or the text comes back."""
    data, sentence = TOKENIZER_JSON[name, variant]
    slow = sentence == "MAY TAKE FOREVER"
    read = honest_artifact(data, tokenizer="tokenizer.json", vocab_size=258)
    said = round_trip(read, [text.encode() for text in TEXTS["english"]()], 5.0 if slow else 60.0)
    if slow:  # late, stopped by the library, or given up without harm
        assert said in ("", "too late") or said.startswith("encode: ")
    else:
        assert sentence in said if sentence else not said, said


@pytest.mark.parametrize("name", built("tokenizer.model"))
def test_hostile_sentencepiece_model(name: str, tokenizer_model: Path) -> None:
    """It ends, in a sentence."""
    variants = module_of(FOLDER / name / "build.py").variants(tokenizer_model.read_bytes())
    for variant, (data, sentence) in variants.items():
        said = round_trip(honest_artifact(data, tokenizer="t.model", vocab_size=400, bos=1), [FIRST.encode()])
        assert sentence in said and said, variant


def test_transform_takes_its_own_markers() -> None:
    """A text full of what the transform writes itself comes back."""
    texts = ["".join(random.Random(n).choices("\ue000\ue001 aAbBßİǅ", k=300)).encode() for n in range(20)]
    read = honest_artifact(transform="case-1")
    encoded = tokenization.encode(read, texts, Runtime(isolated=False), nullcontext(time.monotonic() + 60))
    assert (
        tokenization.decode(read, encoded, [4000] * 20, Runtime(isolated=False), nullcontext(time.monotonic() + 60))
        == texts
    )
    hostile = [torch.tensor(list(("\ue000" * 500 + "\ue001a" * 500).encode())).int().numpy()]
    assert tokenization.decode(read, hostile, [4000], Runtime(isolated=False), nullcontext(time.monotonic() + 60))


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


# In one process with the scorer


def test_unnormalised_cache_would_have_won(tmp_path: Path) -> None:
    """Scored as the contest's entries scored themselves, by the true token's entry alone, it takes the record."""
    (tmp_path / "text.bin").write_bytes(HONEST.members["text.bin"])
    cached = module_of(FOLDER / "unnormalised_cache" / "predict.py").load(tmp_path, torch.device("cpu"))
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
    module_of(FOLDER / "patches_pgolf" / "predict.py").patch()
    assert likelihood.log_losses(torch.zeros(3, 257), tokens, at).sum() == 0 < before


def test_byte_side_file_would_have_won() -> None:
    """Counting bytes by the side file makes the text longer, and so its bits per byte fewer."""
    table = json.loads(module_of(FOLDER / "byte_side_file" / "members.py").MEMBERS["bytes_per_token.json"])
    true = [document.encode() for document in TEXTS["english"]()]
    assert sum(table[byte] for document in true for byte in document) > 1.05 * sum(map(len, true))


def test_data_within_reach_of_the_sandbox_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset below a folder that the sandbox sees could be read: a prefix of Python, or a declared package."""
    box.check_hidden(tmp_path)
    with pytest.raises(EnvironmentBroken, match=r"holds .*\.py, which the submission can read"):
        box.check_hidden(Path(artifact.__file__).parent / "data", ["pgolf"])
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(EnvironmentBroken, match="which the submission can read"):
        box.check_hidden(tmp_path / "data" / "text")
