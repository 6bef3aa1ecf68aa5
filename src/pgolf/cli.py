"""The `pgolf` command."""

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pgolf import artifact, rules
from pgolf.commands import Commands, add_command
from pgolf.data import cli as data_cli
from pgolf.data.dataset import default_dataset, open_dataset
from pgolf.errors import EnvironmentBroken, PgolfError, Refused, UsageError
from pgolf.files import check_replaceable, printable, write_atomically
from pgolf.machine import exit_on_signals
from pgolf.names import beside
from pgolf.proof import compression as codec
from pgolf.proof import prove
from pgolf.sandbox import lock, probe
from pgolf.score import record
from pgolf.score.devices import find_device, one_thread
from pgolf.score.score import Options, score

_STANDARD = Path("-")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 refused, 2 wrong usage, 3 broken environment."""
    exit_on_signals()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a name is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except PgolfError as error:
        print(f"pgolf: {printable(error)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("pgolf: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        print(f"pgolf: {printable(error.filename or 'input or output failed')}: {error.strerror}", file=sys.stderr)
        return EnvironmentBroken.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pgolf",
        description="Parameter Golf: train under a clock, pack under a byte limit, score without trust.",
        epilog="example:\n  pgolf data demo && python baselines/naive/train.py --data data/demo --track laptop "
        "--out runs/a.zst && pgolf score runs/a.zst",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="command", required=True)
    data_cli.add_parser(commands)
    _add_pack(commands)
    _add_score(commands)
    _add_compress(commands)
    _add_decompress(commands)
    _add_prove(commands)
    _add_doctor(commands)
    return parser


def _add_pack(commands: "Commands[argparse.ArgumentParser]") -> None:
    parser = add_command(
        commands,
        "pack",
        "pack a submission's folder into one artifact",
        "Pack a folder with submission.json, predict.py, train.py, weights and tokenizer into one artifact; the same "
        "files give the same bytes.",
        "pgolf pack my-entry/ -o artifact.zst",
        _pack,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("artifact.zst"))


def _pack(args: argparse.Namespace) -> int:
    members = artifact.folder_members(args.folder)
    if args.out.exists() and args.out.resolve().is_relative_to(args.folder.resolve()):
        members.pop(args.out.resolve().relative_to(args.folder.resolve()).as_posix(), None)  # of an earlier call
    size = artifact.pack(members, args.out, rules.ARTIFACT_BYTES)
    print(f"{args.out}: {size:,} bytes")
    return 0


def _add_score(commands: "Commands[argparse.ArgumentParser]") -> None:
    parser = add_command(
        commands,
        "score",
        "check an artifact and compute its bits per byte",
        "Check an artifact against the limits of its track and compute its bits per byte, in a sandbox that is shown "
        "each token only after its logits have left.",
        "python -m pgolf.score artifact.zst --data data/demo\n\n"
        "exit codes: 0 scored, 1 the submission is refused, 2 wrong usage, 3 this machine or the data is broken",
        _score,
    )
    parser.add_argument("artifact", type=Path, help="the submission: one .zst file")
    parser.add_argument("--data", type=Path, help="dataset folder (default: the only one in ./data)")
    parser.add_argument("--track", choices=rules.TRACKS, help="score under this track's limits, not its own")
    parser.add_argument("--device", default="auto", help="cpu, cuda (all GPUs), cuda:N (default: what is there)")
    parser.add_argument("--documents", type=_positive, metavar="N", help="only the first N: a practice score")
    parser.add_argument(
        "--no-sandbox", action="store_true", help="run code you trust without sandbox: a practice score"
    )
    parser.add_argument(
        "--fresh-machine",
        action="store_true",
        help="your word that this virtual machine was made for this score and runs nothing else",
    )
    parser.add_argument("--out", type=Path, help="the record (default: artifact.score.json beside the artifact)")
    parser.add_argument("--json", action="store_true", help="print the record to standard output")


def _score(args: argparse.Namespace) -> int:
    """Score, write the record, print it."""
    data = args.data or default_dataset()
    out = args.out or beside(args.artifact, ".score.json")
    if out.resolve() == args.artifact.resolve():
        raise UsageError(f"{out}: the record would overwrite the artifact")
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent}: no such folder for the record")
    open_dataset(data)
    check_replaceable(out)
    options = Options(args.track, args.device, args.documents, not args.no_sandbox, args.fresh_machine)
    result = score(args.artifact, data, options)
    record.write(result, out)
    _print(result, record.table(result), args.json)
    return _exit_code(result)


def _print(result: record.Record, table: str, as_json: bool) -> None:
    """The record itself is on disk by now: a terminal that cannot show a name loses nothing."""
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        print(table, file=sys.stdout if result["status"] == "ok" else sys.stderr, flush=True)


def _exit_code(result: record.Record) -> int:
    return {"ok": 0, "refused": Refused.exit_code, "failed": EnvironmentBroken.exit_code}[result["status"]]


def _add_compress(commands: "Commands[argparse.ArgumentParser]") -> None:
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
    _add_sandbox(parser)


def _add_sandbox(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: what is there)")
    parser.add_argument("--no-sandbox", action="store_true", help="run code you trust without sandbox")


def _compress(args: argparse.Namespace) -> int:
    """Compress and report the sizes."""
    device = _prepare_coding(args)
    text = _read(args.text, codec.MOST_BYTES)
    with lock.hold(), one_thread(device):
        done = codec.compress(_read_artifact(args.artifact), [text], device, isolated=not args.no_sandbox)
    file = done.packet.encode()
    _write(file, args.out)
    print(codec.table(done, len(file)))
    return 0


def _add_decompress(commands: "Commands[argparse.ArgumentParser]") -> None:
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
    _add_sandbox(parser)


def _decompress(args: argparse.Namespace) -> int:
    """Decompress, or leave nothing."""
    device = _prepare_coding(args)
    packet = codec.Packet.decode(_read(args.packed, codec.MOST_BYTES), str(args.packed))
    with lock.hold(), one_thread(device):
        texts = codec.decompress(_read_artifact(args.artifact), packet, device, isolated=not args.no_sandbox)
    if args.out == _STANDARD:
        sys.stdout.buffer.write(codec.text_file(texts))
        return 0
    _write(codec.text_file(texts), args.out)
    print(f"{args.out}: {packet.text_bytes:,} bytes of text, byte for byte")
    return 0


def _prepare_coding(args: argparse.Namespace) -> str:
    """The device. Raises the errors that can be known before a model runs for long."""
    if not args.out.parent.is_dir():
        raise UsageError(f"{args.out.parent}: no such folder")
    sources = [args.artifact, args.text if "text" in args else args.packed]
    if args.out.exists() and any(source.exists() and args.out.samefile(source) for source in sources):
        raise UsageError(f"{args.out}: would overwrite what it is made from")
    device = find_device(args.device)
    if not args.no_sandbox:
        probe.isolation()
    return device


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


def _add_prove(commands: "Commands[argparse.ArgumentParser]") -> None:
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
    parser.add_argument("--data", type=Path, help="dataset folder (default: the only one in ./data)")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--all", action="store_true", help="every step")
    amount.add_argument("--bytes", type=_positive, metavar="N", help="steps with about N bytes of text")
    amount.add_argument(
        "--seconds", type=_positive, default=int(rules.PROOF_SECONDS), metavar="N", help="default: %(default)s"
    )
    _add_sandbox(parser)
    parser.add_argument("--json", action="store_true", help="print the figures to standard output")


def _prove(args: argparse.Namespace) -> int:
    """Prove, put the figures into the record, print them."""
    data = args.data or default_dataset()
    amount = prove.Amount(args.all, args.bytes, args.seconds)
    result = prove.prove(args.artifact, data, amount, args.device, isolated=not args.no_sandbox)
    record.write(result, beside(args.artifact, ".score.json"))
    _print(result["proof"], prove.table(result["proof"]), args.json)
    return _exit_code(result["proof"])


def _add_doctor(commands: "Commands[argparse.ArgumentParser]") -> None:
    parser = add_command(
        commands,
        "doctor",
        "say whether scores on this machine count",
        "Try everything that a counting score needs of this machine: what holds, what does not, and the remedy.",
        "pgolf doctor\n\nexit codes: 0 a score on this machine counts, 3 it does not",
        _doctor,
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: what is there)")
    parser.add_argument("--json", action="store_true", help="print the checks to standard output")


def _doctor(args: argparse.Namespace) -> int:
    """Print each check; the exit code says whether all that a score needs hold."""
    with lock.hold():
        checks = probe.report(find_device(args.device))
    if args.json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        for check in checks:
            word = "ok" if check.holds else "MISSING" if check.needed else "missing"
            print(f"{word:<8} {check.name:<13} {check.reason}")
            if not check.holds:
                print(f"{'':<8} {'':<13} {check.remedy}")
    return 0 if all(check.holds for check in checks if check.needed) else EnvironmentBroken.exit_code


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
