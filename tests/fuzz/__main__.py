"""Coverage-guided fuzzing of the parsers that read hostile bytes, with atheris (libFuzzer).

A parser gives the message back or raises the one exception that refuses it; anything else is a finding: its input and
traceback lie in runs/fuzz/TARGET/findings then. What was learned about the input stays in runs/fuzz/TARGET/corpus,
where the next run goes on.
"""

import argparse
import hashlib
import io
import json
import random
import re
import socket
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT = 16_000_000
LONGEST = 16_384  # bytes of an input
BLOCK = 512

MANIFEST: dict[str, Any] = {
    "name": "n",
    "author": "a",
    "track": "laptop",
    "vocab_size": 300,
    "bos": 256,
    "tokenizer": "bytes",
    "form": "step",
    "lanes": 4,
}
PARTS = MANIFEST | {"layout": "parts", "transform": "case-1", "compiler": True}
WINDOW = {key: value for key, value in MANIFEST.items() if key != "lanes"}
WINDOW |= {"form": "window", "context": 8, "window": "document", "stride": 4, "packages": ["torch"]}
VALUES: list[Any] = [None, True, False, 0, 1, -1, 2**31, 2**63, 10**40, 0.5, 1e400, "", "x", "bytes", "laptop", "main"]
VALUES += [
    "step",
    "window",
    "simple",
    "packed",
    "document",
    "documents",
    "parts",
    "a.py",
    "\u202e",
    "\ud800",
    "x" * 200,
    [],
    ["torch"],
    [1],
    {},
]
VALUES += [["a/b"], {"a": {}}, [[]], 64, 255, 256, 300, 1 << 17, 1 << 20, 1 << 28]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz",
        description=__doc__,
        epilog="example:\n  scripts/fuzz wire --seconds 300",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(TARGETS)} (default: all)")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default: %(default)s)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.targets) - set(TARGETS):
        parser.error(f"there is no target {min(unknown)!r}; choose from {', '.join(TARGETS)}")
    try:
        import atheris  # noqa: F401
    except ImportError:
        print("fuzz: atheris is not installed; run: .venv/bin/pip install -e '.[fuzz]'", file=sys.stderr)
        return 3
    if args.child:
        fuzz(args.targets[0], args.seconds)
    return max(run(target, args.seconds) for target in args.targets or TARGETS)


def run(target: str, seconds: int) -> int:
    """Fuzz one target in a process of its own and print what came of it; returns 1 if anything was found."""
    findings = folder(target, "findings")
    before = set(findings.glob("*.txt"))
    corpus = folder(target, "corpus")
    for number, seed in enumerate(TARGETS[target][1]()):
        (corpus / f"seed-{number}").write_bytes(seed)
    start = time.monotonic()
    command = [sys.executable, __file__, target, "--seconds", str(seconds), "--child"]
    child = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    log = child.stderr
    found = sorted(set(findings.glob("*.txt")) - before)
    count = re.search(r"stat::number_of_executed_units:\s*(\d+)", log)
    executions = int(count[1]) if count else 0
    covered = re.findall(r"cov: (\d+)", log) or ["?"]
    print(
        f"{target}: {executions:,} executions, {executions / (time.monotonic() - start):,.0f} per second, "
        f"{covered[-1]} edges covered, {len(found)} findings",
        flush=True,
    )
    for path in found:
        print(f"  {path} says what {path.stem} beside it causes")
    if child.returncode and not found:
        print(log[-3000:], file=sys.stderr)
    return int(bool(found or child.returncode))


def folder(target: str, name: str) -> Path:
    path = ROOT / "runs" / "fuzz" / target / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def fuzz(target: str, seconds: int) -> None:
    """Fuzz one target in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=["pgolf.artifact", "pgolf.sandbox.wire"]):
        import pgolf.artifact
        import pgolf.sandbox.wire  # noqa: F401
    read, _, mutate = TARGETS[target]
    findings = folder(target, "findings")

    def one(data: bytes) -> None:
        try:
            read(data)
        except Exception as error:
            name = hashlib.sha256("".join(traceback.format_tb(error.__traceback__)[-2:]).encode()).hexdigest()[:12]
            if not (findings / name).exists():
                (findings / name).write_bytes(data)
                (findings / f"{name}.txt").write_text(traceback.format_exc())

    options = [f"-max_total_time={seconds}", f"-max_len={LONGEST}", "-timeout=10", "-rss_limit_mb=4096"]
    options += ["-print_final_stats=1", f"-artifact_prefix={findings}/", str(folder(target, "corpus"))]
    more = {"custom_mutator": lambda data, size, seed: mutate(data, size, random.Random(seed))} if mutate else {}
    atheris.Setup([sys.argv[0], *options], one, **more)
    atheris.Fuzz()


# The artifact


def read_artifact(data: bytes) -> None:
    from pgolf.artifact import parse
    from pgolf.errors import Refused

    try:
        parse(data, LIMIT)
    except Refused as error:
        check_sentence(error)


def read_tar(data: bytes) -> None:
    from pgolf.artifact import tar_members
    from pgolf.errors import Refused

    try:
        names = [name for name, _ in tar_members(data)]
    except Refused as error:
        check_sentence(error)
    else:
        assert len(set(names)) == len(names)
        assert all(part not in ("", ".", "..") for name in names for part in name.split("/"))


def read_manifest(data: bytes) -> None:
    from pgolf.artifact import parse_manifest
    from pgolf.errors import Refused

    try:
        hash(parse_manifest(data))
    except Refused as error:
        check_sentence(error)


def check_sentence(error: Exception) -> None:
    """A refusal is one printable line."""
    assert str(error).isprintable() and len(str(error)) < 2000, repr(str(error))


def tar(manifest: dict[str, Any], *more: tuple[str, bytes, bytes]) -> bytes:
    """A small tar: the required members, and (name, type, contents)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        required = [("submission.json", json.dumps(manifest).encode()), ("predict.py", b"p"), ("train.py", b"t")]
        for name, kind, data in [*((n, tarfile.REGTYPE, d) for n, d in required), *more]:
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), kind
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue().rstrip(b"\0") + bytes(2 * BLOCK + -len(buffer.getvalue().rstrip(b"\0")) % BLOCK)


def tars() -> Iterator[bytes]:
    yield tar(MANIFEST)
    yield tar(WINDOW, ("lib", tarfile.DIRTYPE, b""), ("lib/" + "x" * 90 + "/" + "y" * 60, tarfile.REGTYPE, b"z" * 600))
    yield tar(PARTS | {"tokenizer": "t.py"}, ("t.py", tarfile.REGTYPE, b"t"), ("ü", tarfile.AREGTYPE, b""))
    yield tar(MANIFEST, ("link", tarfile.SYMTYPE, b""), ("../up", tarfile.REGTYPE, b""), ("/abs", tarfile.CHRTYPE, b""))


def artifacts() -> Iterator[bytes]:
    import zstandard

    for data in tars():
        for level in (-5, 1, 22):
            yield zstandard.ZstdCompressor(level=level, write_checksum=level > 1).compress(data)


def manifests() -> Iterator[bytes]:
    return (json.dumps(manifest).encode() for manifest in (MANIFEST, PARTS, WINDOW))


def mutate_tar(data: bytes, size: int, rng: random.Random) -> bytes:
    """Any mutation, a header's field or block order among them; mostly with sound checksums afterwards."""
    import atheris

    tar = bytearray(data)
    blocks = len(tar) // BLOCK
    match rng.randrange(4) if blocks else 0:
        case 1:
            at = rng.randrange(blocks) * BLOCK
            start, width = rng.choice([(0, 100), (100, 8), (124, 12), (148, 8), (156, 1), (257, 8), (345, 155)])
            field = atheris.Mutate(bytes(tar[at + start : at + start + width]), width)[:width]
            tar[at + start : at + start + width] = field.ljust(width, b"\0")
        case 2:
            source, target = (rng.randrange(blocks) * BLOCK for _ in range(2))
            tar[target:target] = tar[source : source + BLOCK]
        case _:
            tar = bytearray(atheris.Mutate(bytes(tar), size))
    if rng.random() < 0.9:
        for at in range(0, len(tar) - BLOCK + 1, BLOCK):
            if tar[at + 257 : at + 262] == b"ustar":
                tar[at + 148 : at + 156] = b" " * 8
                tar[at + 148 : at + 156] = b"%06o\0 " % sum(tar[at : at + BLOCK])
    return bytes(tar[:size])


def mutate_manifest(data: bytes, size: int, rng: random.Random) -> bytes:
    """Any mutation, or another value for a field."""
    import atheris

    try:
        values = json.loads(data)
        assert isinstance(values, dict) and rng.random() < 0.5
    except (ValueError, RecursionError, AssertionError):
        return bytes(atheris.Mutate(data, size))
    key = rng.choice([*PARTS, *WINDOW, "unknown"])
    if rng.random() < 0.2:
        values.pop(key, None)
    else:
        values[key] = rng.choice(VALUES)
    return json.dumps(values).encode()[:size]


# The wire


def read_wire(data: bytes) -> None:
    """The first byte chooses the parser; what it accepts, it must write back as the same bytes."""
    from pgolf.sandbox import wire

    if not data:
        return
    if (number := data[0] % 6) == 5:
        receive(data[1:])
        return
    decode, encode = (
        (wire.decode_texts, wire.encode_texts),
        (wire.decode_tokens, wire.encode_tokens),
        (wire.Step.decode, wire.Step.encode),
        (wire.WindowBatch.decode, wire.WindowBatch.encode),
        (wire.Logits.decode, wire.Logits.encode),
    )[number]
    try:
        message: Any = decode(data[1:])
    except wire.WireError as error:
        check_sentence(error)
    else:
        assert encode(message) == data[1:]


def receive(data: bytes) -> None:
    """The first byte is the kind that is due and the second how long it may be; the rest comes over a socket."""
    from pgolf.sandbox import wire

    if len(data) < 2:
        return
    kinds = list(wire.Kind)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data[2:])
        theirs.shutdown(socket.SHUT_WR)
        channel = wire.Channel(ours, time.monotonic() + 5)
        try:
            while True:
                assert len(channel.receive(kinds[data[0] % len(kinds)], data[1])) <= data[1]
        except wire.WireError as error:
            assert str(error)


def wires() -> Iterator[bytes]:
    import numpy as np

    from pgolf.sandbox import wire

    ids = np.arange(6, dtype=np.int32)
    yield b"\0" + wire.encode_texts([b"abc", b"", b"\xff"])
    yield b"\1" + wire.encode_tokens([ids, ids[:0], ids[:1]])
    yield b"\2" + wire.Step(3, ids[:3], ids[3:]).encode()
    yield b"\3" + wire.WindowBatch(1, 0, 2, ids.reshape(2, 3)).encode()
    yield b"\4" + wire.Logits(9, 5, 7, wire.Dtype.BFLOAT16).encode()
    for kind in wire.Kind:
        frame = bytes([kind]) + (5).to_bytes(4, "little") + b"hello"
        yield b"\5" + bytes([list(wire.Kind).index(kind), 5]) + frame + frame


Mutator = Callable[[bytes, int, random.Random], bytes]
TARGETS: dict[str, tuple[Callable[[bytes], None], Callable[[], Iterator[bytes]], Mutator | None]] = {
    "artifact": (read_artifact, artifacts, None),
    "tar": (read_tar, tars, mutate_tar),
    "manifest": (read_manifest, manifests, mutate_manifest),
    "wire": (read_wire, wires, None),
}

if __name__ == "__main__":
    sys.exit(main())
