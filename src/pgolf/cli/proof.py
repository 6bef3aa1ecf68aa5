"""`pgolf compress`, `decompress` and `prove`."""

import argparse
import sys
from pathlib import Path

from pgolf import artifact, rules
from pgolf.cli.command import Commands, add_command, add_data, add_sandbox, exit_code, positive, print_record
from pgolf.data.dataset import default_dataset
from pgolf.errors import UsageError
from pgolf.files import beside, write_atomically
from pgolf.proof import compression, prove
from pgolf.sandbox import lock, probe
from pgolf.score import record
from pgolf.score.devices import Runtime, find_device, one_thread

_STANDARD = Path("-")


def add_compress(commands: Commands) -> None:
    parser = add_command(
        commands,
        "compress",
        "compress a text with an artifact's predictor",
        "Compress one UTF-8 file, which is one document, with the predictor of an artifact; it takes about "
        "as long as scoring it.",
        "pgolf compress artifact.zst story.txt -o story.pgz",
        _compress,
    )
    parser.add_argument("artifact", type=Path, help="the submission: one .zst file")
    parser.add_argument("text", type=Path, help="a UTF-8 file")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the compressed file")
    add_sandbox(parser)


def _compress(args: argparse.Namespace) -> int:
    """Compress and report the sizes."""
    runtime = _prepare_coding(args)
    text = _read(args.text, compression.MOST_BYTES)
    with lock.hold(), one_thread(runtime.device):
        done = compression.compress(_read_artifact(args.artifact), [text], runtime)
    file = done.packet.encode()
    _write(file, args.out)
    print(compression.table(done, len(file)))
    return 0


def add_decompress(commands: Commands) -> None:
    parser = add_command(
        commands,
        "decompress",
        "get the text back",
        "Decompress a file of `pgolf compress` with the same artifact, on the same kind of machine. Several documents "
        'are written as lines of JSON, {"text": ...} each.',
        "pgolf decompress artifact.zst story.pgz -o story.txt",
        _decompress,
    )
    parser.add_argument("artifact", type=Path, help="the submission that compressed it")
    parser.add_argument("packed", type=Path, help="the compressed file; - is standard input")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the text; - is standard output")
    add_sandbox(parser)


def _decompress(args: argparse.Namespace) -> int:
    """Decompress, or leave nothing."""
    runtime = _prepare_coding(args)
    packet = compression.Packet.decode(_read(args.packed, compression.MOST_BYTES), str(args.packed))
    with lock.hold(), one_thread(runtime.device):
        texts = compression.decompress(_read_artifact(args.artifact), packet, runtime)
    if args.out == _STANDARD:
        sys.stdout.buffer.write(compression.text_file(texts))
        return 0
    _write(compression.text_file(texts), args.out)
    print(f"{args.out}: {packet.text_bytes:,} bytes of text, byte for byte")
    return 0


def _runtime(args: argparse.Namespace) -> Runtime:
    return Runtime(find_device(args.device), not args.no_sandbox)


def _prepare_coding(args: argparse.Namespace) -> Runtime:
    """How to run it. Raises the errors that can be known before a model runs for long."""
    if not args.out.parent.is_dir():
        raise UsageError(f"{args.out.parent}: no such folder")
    sources = [args.artifact, args.text if "text" in args else args.packed]
    if args.out.exists() and any(source.exists() and args.out.samefile(source) for source in sources):
        raise UsageError(f"{args.out}: would overwrite what it is made from")
    runtime = _runtime(args)
    if runtime.isolated:
        probe.isolation()
    return runtime


def _read_artifact(path: Path) -> artifact.Artifact:
    return artifact.read(path, rules.ARTIFACT_BYTES)


def _read(path: Path, most: int) -> bytes:
    try:
        with open(0, "rb", closefd=False) if path == _STANDARD else path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > most:
        raise UsageError(f"{path}: has more than {most:,} bytes")
    return data


def _write(data: bytes, path: Path) -> None:
    try:
        write_atomically(path, data)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from None


def add_prove(commands: Commands) -> None:
    parser = add_command(
        commands,
        "prove",
        "prove a score by compressing the text to it",
        "Code the first steps of the scored schedule and let another process, which has only the artifact and the "
        "code, decode the text. Needs the record of `pgolf score`; the figures go "
        "into it.",
        "pgolf prove artifact.zst --data data/demo\n\n"
        "exit codes: 0 proven, 1 refused, 2 wrong usage, 3 this machine or the data is broken",
        _prove,
    )
    parser.add_argument("artifact", type=Path, help="the submission: one .zst file")
    add_data(parser)
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--all", action="store_true", help="every step")
    amount.add_argument("--bytes", type=positive, metavar="N", help="steps with about N bytes of text")
    amount.add_argument(
        "--seconds", type=positive, default=int(rules.PROOF_SECONDS), metavar="N", help="default: %(default)s"
    )
    add_sandbox(parser)
    parser.add_argument("--json", action="store_true", help="print the figures to standard output")


def _prove(args: argparse.Namespace) -> int:
    """Prove, put the figures into the record, print them."""
    data = args.data or default_dataset()
    amount = prove.Amount(args.all, args.bytes, args.seconds)
    result = prove.prove(args.artifact, data, amount, _runtime(args))
    assert result.proof
    record.write(result, beside(args.artifact, ".score.json"))
    print_record(record.as_json(result)["proof"], prove.table(result.proof), args.json)
    return exit_code(result.proof.status)
