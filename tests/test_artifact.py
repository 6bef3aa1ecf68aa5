"""The artifact format: packing is reproducible, and reading is strict and complete."""

import io
import json
import tarfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import damaged
from pgolf import rules
from pgolf.artifact import Manifest, code_in, pack, parse, read, source_bytes, sources
from pgolf.errors import Refused, UsageError
from pgolf.submission.folder import folder_members

LIMIT = 16_000_000
MANIFEST: dict[str, Any] = {
    "name": "n",
    "author": "a",
    "track": "laptop",
    "vocab_size": 300,
    "bos": 256,
    "form": "step",
    "lanes": 8,
    "tokenizer": "bytes",
}
WINDOW = {key: value for key, value in MANIFEST.items() if key != "lanes"} | {"form": "window", "context": 8}
GOOD = {"submission.json": json.dumps(MANIFEST).encode(), "predict.py": b"p", "train.py": b"t"}


def tar_of(*members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, data in GOOD.items():
            archive.addfile(info(name, len(data)), io.BytesIO(data))
        for member, data in members:
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def info(name: str, size: int = 0, type: bytes = tarfile.REGTYPE, linkname: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = size, type, linkname
    return member


def compressed(tar: bytes) -> bytes:
    return zstandard.compress(tar, 1)


def refusal(data: bytes) -> str:
    with pytest.raises(Refused) as caught:
        parse(data, LIMIT)
    message = str(caught.value)
    assert "\n" not in message and message.isprintable()
    return message


def test_packing_is_reproducible_and_reads_back(tmp_path: Path) -> None:
    """Same members in any order, same bytes; and all of them come back."""
    members = GOOD | {"lib/deep/weights.bin": bytes(range(256)) * 100, "empty": b""}
    pack(members, tmp_path / "a.zst", LIMIT)
    size = pack(dict(reversed(members.items())), tmp_path / "b.zst", LIMIT)
    assert (tmp_path / "a.zst").read_bytes() == (tmp_path / "b.zst").read_bytes()
    artifact = read(tmp_path / "a.zst", LIMIT)
    assert artifact.members == members
    assert artifact.size == size == (tmp_path / "a.zst").stat().st_size
    assert artifact.manifest.vocab_size == 300


def test_limit_is_exact(tmp_path: Path) -> None:
    """An artifact of exactly the limit passes, one byte more is refused, by writer and reader."""
    size = pack(GOOD, tmp_path / "a.zst", LIMIT)
    read(tmp_path / "a.zst", size)
    with pytest.raises(Refused, match=f"limit is {size - 1:,}"):
        read(tmp_path / "a.zst", size - 1)
    with pytest.raises(Refused):
        pack(GOOD, tmp_path / "b.zst", size - 1)
    assert [p.name for p in tmp_path.iterdir()] == ["a.zst"]


def test_track_limit_applies_to_what_the_artifact_declares(tmp_path: Path) -> None:
    """A laptop artifact over 1,000,000 bytes is refused though 16,000,000 would do for another track."""
    noise = b"".join(hash((i, "x")).to_bytes(9, "little", signed=True) for i in range(150_000))
    with pytest.raises(Refused, match="limit of track laptop is 1,000,000"):
        pack(GOOD | {"w": noise}, tmp_path / "a.zst", LIMIT)


BAD_MEMBERS = {
    "parent": (info("../x"), "'..'"),
    "parent inside": (info("a/../x"), "'..'"),
    "absolute": (info("/etc/passwd"), "absolute"),
    "dot": (info("./x"), "'.'"),
    "symlink": (info("x", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "regular files"),
    "hard link": (info("x", type=tarfile.LNKTYPE, linkname="predict.py"), "regular files"),
    "character device": (info("x", type=tarfile.CHRTYPE), "regular files"),
    "block device": (info("x", type=tarfile.BLKTYPE), "regular files"),
    "fifo": (info("x", type=tarfile.FIFOTYPE), "regular files"),
    "duplicate": (info("predict.py"), "twice"),
    "duplicate of a folder": (info("predict.py/x"), "one of its folders is a file"),
    "backslash": (info("a\\b"), "backslashes"),
    "control character": (info("a\x1b[31m"), "control characters"),
    "code with a name of other letters": (info("ä.py"), "name of a source file"),
    "code with a space": (info("my code/a.py"), "name of a source file"),
    "other code with a space": (info("my code/a.cpp"), "name of a source file"),
    "code with a long name": (info(f"{'a/' * 49}a.py"), "name of a source file"),
}


@pytest.mark.parametrize("name", BAD_MEMBERS)
def test_bad_member(name: str) -> None:
    """Each kind of member that could reach outside, or confuse, is refused by name and rule."""
    member, expected = BAD_MEMBERS[name]
    assert expected in refusal(compressed(tar_of((member, b""))))


def test_names_of_files_that_no_trainer_gets_are_free(tmp_path: Path) -> None:
    names = ("my weights/ä.bin", f"{'a/' * 60}a.bin", f"{'a/' * 48}a.py")
    pack(GOOD | dict.fromkeys(names, b""), tmp_path / "a.zst", LIMIT)
    assert set(names) <= read(tmp_path / "a.zst", LIMIT).members.keys()


def test_a_trainer_gets_code_and_manifest() -> None:
    code = {"train.py", "a/b.py", "mixer.cpp", "kernel.cu", "kernel.h", "submission.json"}
    others = {"weights.bin", "tokenizer.model", "settings.json", "py", "a.pyc", "a.hpp/b", "train.py/b"}
    assert sources(dict.fromkeys(code | others, b"")).keys() == code


def test_code_in_a_folder(tmp_path: Path) -> None:
    """What an editor leaves there, such as the link ".#a.py" to nowhere, is not the trainer's."""
    (tmp_path / "a.py").write_bytes(b"1")
    (tmp_path / "b.cpp").write_bytes(b"2")
    (tmp_path / "weights.bin").write_bytes(b"3")
    (tmp_path / "._a.py").write_bytes(b"4")
    (tmp_path / ".#a.py").symlink_to("nowhere")
    (tmp_path / "folder.h").mkdir()
    assert code_in(tmp_path) == {"a.py": b"1", "b.cpp": b"2"}
    assert code_in(tmp_path / "nowhere") == {}


def test_other_code_is_no_tokenizer(tmp_path: Path) -> None:
    """Its bytes would be source and tokenizer at once."""
    members = GOOD | {"t.h": b"", "submission.json": json.dumps(MANIFEST | {"tokenizer": "t.h"}).encode()}
    with pytest.raises(Refused, match=r"tokenizer is 't\.h'"):
        pack(members, tmp_path / "a.zst", LIMIT)


def test_names_of_code_count_as_source() -> None:
    assert source_bytes({"a.py": b"", "b/c.py": b"12"}) == 4 + 6 + 2


def test_other_tar_dialects_are_refused() -> None:
    """GNU and pax headers can smuggle names and sizes; only plain ustar is read."""
    long_name = info("x" * 150)
    assert "ustar" in refusal(compressed(tar_of((long_name, b""), format=tarfile.GNU_FORMAT)))
    assert "regular files" in refusal(compressed(tar_of((info("ü" * 80), b""), format=tarfile.PAX_FORMAT)))


def test_names_that_are_not_utf8() -> None:
    """A name is text or it is refused."""
    tar = bytearray(tar_of((info("QQQQ"), b"")))
    at = tar.index(b"QQQQ")
    tar[at : at + 4] = b"\xff\xfe\xfd\xfc"
    header = at - at % 512
    tar[header + 148 : header + 156] = b" " * 8
    tar[header + 148 : header + 156] = b"%06o\0 " % sum(tar[header : header + 512])
    assert "UTF-8" in refusal(compressed(bytes(tar)))


def test_too_many_members() -> None:
    """The member count is bounded."""
    many = [(info(f"m{i}"), b"") for i in range(rules.MEMBERS)]
    assert "members" in refusal(compressed(tar_of(*many)))


def test_hidden_bytes() -> None:
    """Bytes in padding, after the end mark or after the frame belong to no member and are refused."""
    tar = tar_of()
    padding = bytearray(tar)
    padding[512 + len(GOOD["submission.json"]) + 1] = 1
    assert "padding" in refusal(compressed(bytes(padding)))
    assert "end mark" in refusal(compressed(tar[:-1] + b"x"))
    assert "after the end" in refusal(compressed(tar) + b"x")
    assert "after the end" in refusal(compressed(tar) + compressed(b"more"))
    assert "end mark" in refusal(compressed(tar.rstrip(b"\0") + bytes(512 - len(tar.rstrip(b"\0")) % 512)))


def test_bombs_are_stopped_while_they_unpack() -> None:
    """An artifact that would unpack to gigabytes is refused at the cap."""
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(rules.UNPACKED_BYTES + 1))
    assert len(bomb) < 100_000
    assert "unpacks to more than" in refusal(bomb)


def test_window_is_bounded() -> None:
    """A frame that asks the decoder for a giant window is refused, since it would cost that much memory."""
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    assert "zstd" in refusal(compressor.compress(tar_of()) + compressor.flush())


@pytest.mark.parametrize("name", GOOD)
def test_required_members(name: str) -> None:
    """Training code, predictor and manifest must be there: the artifact is all that an organizer gets."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for other, data in GOOD.items():
            if other != name:
                archive.addfile(info(other, len(data)), io.BytesIO(data))
    assert refusal(compressed(buffer.getvalue())) == f"{name} is missing from the artifact"


@pytest.mark.parametrize(
    ("base", "key", "value"),
    [
        (MANIFEST, "track", "no-such"),
        (MANIFEST, "vocab_size", 0),
        (MANIFEST, "vocab_size", True),
        (MANIFEST, "vocab_size", 1e3),
        (MANIFEST, "vocab_size", 1 << 40),
        (MANIFEST, "bos", 300),
        (MANIFEST, "bos", 10),
        (MANIFEST, "form", "other"),
        (MANIFEST, "name", "\x1b[2J"),
        (MANIFEST, "name", ""),
        (MANIFEST, "author", ["a"]),
        (MANIFEST, "packages", ["../x"]),
        (MANIFEST, "tokenizer", "nowhere.model"),
        (MANIFEST, "transform", "case-0"),
        (MANIFEST, "transform", ["case-1"]),
        (MANIFEST, "compiler", 1),
        (MANIFEST, "pgolf", 1),
        (MANIFEST, "pgolf", "a version"),
        (MANIFEST, "surprise", 1),
        (MANIFEST, "training", ["--steps=1"]),
        (MANIFEST, "training", {"surprise": 1}),
        (MANIFEST, "training", {"arguments": "--steps=1"}),
        (MANIFEST, "training", {"arguments": ["\x1b[2J"]}),
        (MANIFEST, "training", {"settings": {"dim": [1]}}),
        (MANIFEST, "training", {"settings": {"name": "\x1b[2J"}}),
        (MANIFEST, "training", {"settings": {"lr": float("nan")}}),
        (MANIFEST, "training", {"settings": []}),
        (MANIFEST, "training", {"steps": -1}),
        (MANIFEST, "training", {"tokens": 1.5}),
        (MANIFEST, "lanes", 0),
        (MANIFEST, "lanes", 4097),
        (MANIFEST, "lanes", None),
        (MANIFEST, "layout", "rows"),
        (MANIFEST, "context", 8),
        (WINDOW, "context", -1),
        (WINDOW, "stride", 9),
        (WINDOW, "stride", 0),
        (WINDOW, "window", "future"),
        (WINDOW, "layout", "parts"),
    ],
)
def test_manifest_values(tmp_path: Path, base: dict[str, Any], key: str, value: object) -> None:
    """Every field is checked; the sentence names it."""
    members = GOOD | {"submission.json": json.dumps(base | {key: value}).encode()}
    with pytest.raises(Refused, match=key):
        pack(members, tmp_path / "a.zst", LIMIT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["simple", "streaming", None])
def test_retired_form_is_one_sentence(tmp_path: Path, form: str | None) -> None:
    """An artifact of the first version is told so, whatever else it declares."""
    members = GOOD | {"submission.json": json.dumps(MANIFEST | {"form": form, "round": 64}).encode()}
    with pytest.raises(Refused, match="is retired; train it again"):
        pack(members, tmp_path / "a.zst", LIMIT)


@pytest.mark.parametrize("fields", [{"vocab_size": 1 << 20, "lanes": 65}, {"vocab_size": 16_385, "lanes": 4096}])
def test_logits_in_memory_are_bounded(tmp_path: Path, fields: dict[str, int]) -> None:
    """Vocabulary and lanes may each be large, but not both."""
    members = GOOD | {"submission.json": json.dumps(MANIFEST | fields).encode()}
    with pytest.raises(Refused, match="vocab_size times lanes"):
        pack(members, tmp_path / "a.zst", LIMIT)


def test_large_manifest_is_not_parsed(tmp_path: Path) -> None:
    """45 kB of artifact held 32 MiB of brackets, which took a gigabyte to parse."""
    bomb = b'{"name": ' + b"[[]]," * 20_000
    with pytest.raises(Refused, match=r"has 100,009 bytes; the limit is 65,536"):
        pack(GOOD | {"submission.json": bomb}, tmp_path / "a.zst", LIMIT)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b"[" * 60_000])
def test_manifest_that_is_no_object(tmp_path: Path, text: bytes) -> None:
    """Broken JSON is refused in a sentence."""
    with pytest.raises(Refused, match="JSON"):
        pack(GOOD | {"submission.json": text}, tmp_path / "a.zst", LIMIT)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=120),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)
NAMES = st.sampled_from([field.name for field in fields(Manifest)]) | st.text(min_size=1, max_size=120)
SENSIBLE = st.sampled_from(
    ["step", "window", "parts", "packed", "document", "bytes", "p.py", "main", "case-1", 1, 64, 256, 300, True]
)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from([MANIFEST, WINDOW]), st.dictionaries(NAMES, JSON | SENSIBLE, max_size=3))
def test_any_manifest_is_refused_or_sound(base: dict[str, Any], changes: dict[str, Any]) -> None:
    """Whatever the fields hold: one short sentence, or a manifest that the scorer can rely upon."""
    members = GOOD | {"submission.json": json.dumps(base | changes).encode()}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members.items():
            archive.addfile(info(name, len(content)), io.BytesIO(content))
    try:
        manifest = parse(compressed(buffer.getvalue()), LIMIT).manifest
    except Refused as error:
        assert str(error).isprintable() and len(str(error)) < 500
    else:
        assert 0 <= manifest.bos < manifest.vocab_size <= rules.VOCAB_SIZE
        assert manifest.name.isprintable() and manifest.tokenizer in ("bytes", *members)
        assert manifest.vocab_size * max(manifest.lanes, manifest.context) <= rules.LOGITS
        if manifest.form == "step":
            assert 1 <= manifest.lanes <= rules.LANES and not manifest.context
        else:
            assert 1 <= (manifest.stride or manifest.context) <= manifest.context <= rules.CONTEXT


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_damage_is_refused_or_harmless(data: st.DataObject) -> None:
    """A flipped, cut or grown file is refused, or says the same as before; it never raises anything else."""
    whole = zstandard.ZstdCompressor(level=1, write_checksum=False).compress(tar_of())
    try:
        parse(damaged(data, whole), LIMIT)
    except Refused as error:
        assert str(error).isprintable()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_tar_damage_is_refused_or_harmless(data: st.DataObject) -> None:
    """The same one layer down: the tar's own bytes."""
    tar = bytearray(tar_of((info("lib/", type=tarfile.DIRTYPE), b""), (info("lib/x", 700), b"y" * 700)))
    for _ in range(data.draw(st.integers(1, 3))):
        tar[data.draw(st.integers(0, len(tar) - 1))] = data.draw(st.integers(0, 255))
    try:
        members = parse(compressed(bytes(tar)), LIMIT).members
    except Refused as error:
        assert str(error).isprintable()
    else:
        assert all(".." not in name.split("/") and not name.startswith("/") for name in members)


def test_folder_members(tmp_path: Path) -> None:
    """A folder packs without its caches and hidden files; a link is refused, since it would not travel."""
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "x.pyc").write_bytes(b"x")
    (tmp_path / ".hidden").write_bytes(b"x")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "a.py").write_bytes(b"a")
    assert folder_members(tmp_path) == {"lib/a.py": b"a"}
    (tmp_path / "link").symlink_to("/etc/passwd")
    with pytest.raises(UsageError, match="link"):
        folder_members(tmp_path)
