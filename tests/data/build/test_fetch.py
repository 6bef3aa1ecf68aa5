"""`pgolf data fetch`, against a hub on loopback: what it writes, that it goes on, and what it refuses."""

import errno
import json
import shutil
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import sentencepiece as spm
from hypothesis import given
from hypothesis import strategies as st

from hub import Files, Hub, serving
from pgolf.cli.main import main
from pgolf.data.build import fetch as fetch_module
from pgolf.data.build.byte_model import byte_model
from pgolf.data.build.checks import CONTEST_BYTES, CONTEST_DOCUMENTS, CONTEST_TOKENS, contest_difference
from pgolf.data.dataset import open_dataset
from pgolf.data.shards import count_tokens, header_bytes

NAME = "willdepueoai/parameter-golf"
TEXTS = [f"Document {number} says {'so ' * (number % 7)}and counts to {number * number}." for number in range(400)]
VALIDATION = 40
SHARD = 3000  # tokens; as in the contest's export, documents go on from one shard into the next

Fetch = Callable[..., tuple[int, str, str]]


def shards(ids: list[list[int]]) -> list[bytes]:
    """Documents as the contest's exporter cuts them."""
    tokens = np.array([t for document in ids for t in (1, *document)], dtype="<u2")
    return [header_bytes(len(part)) + part.tobytes() for part in np.split(tokens, range(SHARD, len(tokens), SHARD))]


def export(model: bytes, variant: str, tokenizer: str, description: bytes | None = None) -> Files:
    """The files of an export with one variant; the tokenizer's file has `description` where that is given."""
    processor = spm.SentencePieceProcessor(model_proto=model)
    ids = processor.encode(TEXTS)
    split = {"val": shards(ids[:VALIDATION]), "train": shards(ids[VALIDATION:])}
    key = "path" if description else "model_path"
    name, root = f"fineweb10B_{variant}", "datasets/datasets"
    size = processor.vocab_size()
    manifest = {
        "num_val_docs": VALIDATION,
        "tokenizers": [{"name": "t", "vocab_size": size, key: f"tokenizers/{tokenizer}"}],
        "datasets": [
            {"name": name, "tokenizer_name": "t", "stats": {f"files_{key}": len(each) for key, each in split.items()}}
        ],
    }
    return {
        "datasets/manifest.json": json.dumps(manifest).encode(),
        f"datasets/tokenizers/{tokenizer}": description or model,
        "datasets/docs_selected.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode(),
        **{
            f"{root}/{name}/fineweb_{key}_{number:06d}.bin": data
            for key, each in split.items()
            for number, data in enumerate(each)
        },
    }


@pytest.fixture
def files(tokenizer_model: Path) -> Files:
    return export(tokenizer_model.read_bytes(), "sp320", "fineweb_320_bpe.model")


@pytest.fixture
def hub(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the export, on which neither waiting nor chunks are longer than a test needs."""
    with serving(Hub()) as hub:
        hub.publish(NAME, files)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setattr(time, "sleep", lambda _: None)
        monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 512)
        yield hub


@pytest.fixture
def fetch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Fetch:
    """Run `pgolf data fetch` into `tmp_path / "d"`; returns exit code and both outputs."""

    def fetch(*args: object) -> tuple[int, str, str]:
        code = main(["data", "fetch", "--variant", "sp320", "--out", str(tmp_path / "d"), *map(str, args)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return fetch


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_what_is_fetched_is_the_exports_text(hub: Hub, fetch: Fetch, files: Files, tmp_path: Path) -> None:
    code, out, err = fetch("--shards", 2, "--documents")
    assert code == 0, err
    dataset = open_dataset(tmp_path / "d")
    text = dataset.canonical_text()
    assert list(text.documents) == [each.encode() for each in TEXTS[:VALIDATION]]
    assert [shard.path.read_bytes() for shard in dataset.train_shards] == [
        data for path, data in files.items() if "train_000000" in path or "train_000001" in path
    ]
    lines = (tmp_path / "d" / "docs_selected.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == TEXTS[:VALIDATION]
    assert "overlap     0 training" in out
    size, tokens = text.bytes, count_tokens(dataset.val_shards)
    assert f"NOT the contest's: 40 of 50,000 documents (-49,960), {size:,} of" in out
    assert not [name for name in names(tmp_path / "d") if name.endswith(".part")]

    hub.requests.clear()
    summary = json.loads(fetch("--shards", 2, "--documents", "--json")[1])
    assert summary["validation"]["tokens"] == tokens and not summary["validation"]["is_contest"]
    assert summary["train"]["shards"] == 2 < summary["published_shards"]
    assert hub.sent(".bin") == []  # nothing comes twice
    assert fetch("--shards", 3)[0] == 0
    assert len(hub.sent(".bin")) == 2  # one file, redirected once


def test_a_cut_connection_is_taken_up(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    hub.cut["fineweb_train_000000.bin"] = (2048, 1)
    assert fetch()[0] == 0
    assert "bytes=2048-" in hub.sent("fineweb_train_000000.bin")


def test_a_fetch_that_broke_goes_on_where_it_was(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    """The connection stays broken, so the command ends; then it is run again."""
    hub.cut["fineweb_train_000000.bin"] = (2048, 99)
    code, _, err = fetch()
    assert code == 3
    assert "the connection broke" in err and "run the same command again" in err
    assert not any(name.endswith(".bin") for name in names(tmp_path / "d"))  # no dataset yet
    hub.cut.clear()
    hub.requests.clear()
    assert fetch()[0] == 0
    assert hub.sent("fineweb_train_000000.bin")[0] == "bytes=2048-"


def test_a_hub_without_ranges_sends_the_file_again(hub: Hub, fetch: Fetch, files: Files, tmp_path: Path) -> None:
    hub.ranges = False
    hub.cut["fineweb_train_000000.bin"] = (2048, 1)
    assert fetch()[0] == 0
    (sent,) = [data for path, data in files.items() if path.endswith("train_000000.bin")]
    assert (tmp_path / "d" / "fineweb_train_000000.bin").read_bytes() == sent


def test_a_busy_hub_is_waited_for(hub: Hub, fetch: Fetch) -> None:
    hub.busy = 2
    assert fetch()[0] == 0
    hub.busy = 10**6
    code, _, err = fetch()
    assert code == 3
    assert "status 429 (too many requests)" in err


def test_a_file_that_changed_is_not_mixed_in(hub: Hub, fetch: Fetch, files: Files, tmp_path: Path) -> None:
    first = next(iter(hub.commits[NAME]))
    assert fetch()[0] == 0
    path = next(path for path in files if path.endswith("train_000000.bin"))
    changed = files[path][:-2] + b"\5\0"
    hub.publish(NAME, {**files, path: changed})
    before = {name: (tmp_path / "d" / name).read_bytes() for name in names(tmp_path / "d")}
    code, _, err = fetch("--shards", 2)
    assert code == 3
    assert "fineweb_train_000000.bin: is of revision" in err and first[:12] in err
    assert {name: (tmp_path / "d" / name).read_bytes() for name in names(tmp_path / "d")} == before
    assert fetch("--shards", 2, "--revision", first[:12])[0] == 0
    (tmp_path / "d" / "fineweb_train_000000.bin").unlink()
    assert fetch("--shards", 2)[0] == 0
    assert (tmp_path / "d" / "fineweb_train_000000.bin").read_bytes() == changed


def test_a_part_of_an_older_version_is_not_continued(hub: Hub, fetch: Fetch, files: Files, tmp_path: Path) -> None:
    path = next(path for path in files if path.endswith("train_000000.bin"))
    hub.cut["fineweb_train_000000.bin"] = (2048, 99)
    assert fetch()[0] == 3
    hub.cut.clear()
    hub.publish(NAME, {**files, path: files[path][:-2] + b"\5\0"})
    hub.requests.clear()
    assert fetch()[0] == 0
    assert set(hub.sent("fineweb_train_000000.bin")) == {None}


def test_bytes_that_are_not_the_stated_ones_are_removed(hub: Hub, fetch: Fetch, files: Files, tmp_path: Path) -> None:
    path = next(path for path in files if path.endswith("train_000000.bin"))
    hub.swapped["fineweb_train_000000.bin"] = files[path][:-2] + b"\5\0"
    code, _, err = fetch()
    assert code == 3
    assert "does not have the digest that the hub states" in err
    assert not [name for name in names(tmp_path / "d") if "train" in name]
    hub.swapped.clear()
    assert fetch()[0] == 0


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        (["--repo", "no/such"], 2, "no/such: the hub has no dataset of this name"),
        (["--repo", "a name"], 2, "a name: the hub has no dataset of this name"),
        (["--repo", "my/private"], 2, "my/private: the hub has no dataset of this name, or it is private"),
        (["--repo", "my/gated"], 2, "my/gated: is gated"),
        (["--revision", "0123"], 2, "has no revision 0123"),
        (["--variant", "sp4096"], 2, "has no variant sp4096; known are sp320"),
        (["--variant", "../../x"], 2, "is no name"),
        (["--folder", "exports"], 2, "holds no exports/manifest.json"),
        (["--shards", 99], 2, "has 6 training shards"),
    ],
)
def test_what_the_hub_does_not_have(
    hub: Hub, fetch: Fetch, tmp_path: Path, args: list[object], code: int, sentence: str
) -> None:
    hub.closed |= {"my/private": "private", "my/gated": "gated"}
    hub.commits |= {"my/private": hub.commits[NAME], "my/gated": hub.commits[NAME]}
    found, _, err = fetch(*args)
    assert found == code
    assert sentence in err and len(err.splitlines()) == 1
    assert not (tmp_path / "d").exists()


def test_a_hub_that_is_not_there(fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # discard: nothing listens
    code, _, err = fetch()
    assert code == 3
    assert "the hub cannot be reached" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "d").exists()


def test_no_space(hub: Hub, fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen before anything is fetched, and when another process fills the disk meanwhile."""
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 1000))
        code, _, err = fetch()
    assert code == 3
    assert "are to be fetched and 0.00 MB are free" in err
    assert hub.sent(".bin") == [] and not (tmp_path / "d").exists()

    with monkeypatch.context() as patch:
        patch.setattr("pgolf.data.build.hub._Counted.write", _disk_full)
        code, _, err = fetch()
    assert code == 3
    assert "No space left on device; put that right and run the same command again" in err
    assert fetch()[0] == 0


def _disk_full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_tokenizer_of_another_vocabulary(hub: Hub, fetch: Fetch, files: Files, tmp_path: Path) -> None:
    """It is fetched first, so that no shard is fetched for nothing."""
    hub.publish(NAME, {**files, "datasets/tokenizers/fineweb_320_bpe.model": byte_model()})
    code, _, err = fetch()
    assert code == 3
    assert "it has 260 pieces where the manifest says 320" in err
    assert hub.sent(".bin") == [] and not (tmp_path / "d").exists()


def test_overlap_is_counted(hub: Hub, fetch: Fetch, tmp_path: Path, tokenizer_model: Path) -> None:
    texts = TEXTS[:VALIDATION] + TEXTS[: VALIDATION // 2] + TEXTS[VALIDATION:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{__name__}.TEXTS", texts)
        hub.publish(NAME, export(tokenizer_model.read_bytes(), "sp320", "fineweb_320_bpe.model"))
    code, out, _ = fetch("--shards", 3)
    assert code == 0
    assert "overlap     20 training documents are validation documents; `pgolf rerun` refuses" in out


def test_bytes_become_a_tokenizer_that_every_command_reads(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    config = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "byte_offset": 4, "byte_count": 256}
    description = json.dumps({"tokenizer_type": "pure_byte", "config": config, "vocab_size": 260}).encode()
    hub.publish(NAME, export(byte_model(), "byte260", "fineweb_pure_byte_260.json", description))
    code, _, err = fetch("--variant", "byte260")
    assert code == 0, err
    dataset = open_dataset(tmp_path / "d")
    assert dataset.vocab_size == 260
    assert list(dataset.canonical_text().documents) == [each.encode() for each in TEXTS[:VALIDATION]]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_the_tokens_of_bytes_are_bytes(text: str) -> None:
    processor = spm.SentencePieceProcessor(model_proto=byte_model())
    ids = processor.encode(text)
    assert ids == [byte + 4 for byte in text.encode()]
    assert processor.decode(ids) == text


def test_other_folders_are_left_alone(hub: Hub, fetch: Fetch, dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "d")
    code, _, err = fetch()
    assert code == 2
    assert "holds a dataset that was built" in err
    shutil.rmtree(tmp_path / "d")
    assert fetch()[0] == 0
    (tmp_path / "d" / "fetch.json").write_text("{")
    code, _, err = fetch()
    assert code == 3
    assert "fetch.json: is damaged; delete it" in err
    (tmp_path / "d" / "fetch.json").unlink()
    hub.requests.clear()
    assert fetch()[0] == 0  # the files are the hub's, so they stay
    assert hub.sent(".bin") == []
    (tmp_path / "d" / "fetch.json").unlink()
    (tmp_path / "d" / "fineweb_train_000000.bin").write_bytes(b"mine")
    code, _, err = fetch()
    assert code == 3
    assert "is not the file that" in err
    assert (tmp_path / "d" / "fineweb_train_000000.bin").read_bytes() == b"mine"


def test_the_contests_split_is_known_by_its_counts() -> None:
    counts = CONTEST_DOCUMENTS, CONTEST_BYTES, CONTEST_TOKENS[1024]
    assert contest_difference(1024, *counts) is None
    assert contest_difference(4096, *counts[:2], 12345) is None  # another tokenizer has other tokens
    assert "50,001 of 50,000 documents (+1)" in (contest_difference(1024, counts[0] + 1, *counts[1:]) or "")
    assert contest_difference(1024, *counts[:2], counts[2] - 1)
    assert fetch_module.REPOSITORY == NAME
