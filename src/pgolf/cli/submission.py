"""`pgolf new`, `import`, `pack`, `check`, `inspect`, `plot`, `ablate` and `try`: commands for participants."""

import argparse
import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

from pgolf import artifact, plots, rules
from pgolf.cli.command import Commands, add_command, add_data, add_sandbox, add_verbose, note, positive, shown_output
from pgolf.data.dataset import default_dataset
from pgolf.errors import EnvironmentBroken, Refused, UsageError
from pgolf.files import printable, write_atomically
from pgolf.score.devices import Runtime, find_device
from pgolf.score.score import Options
from pgolf.submission import ablate, attempt, check, claims, costs, curves, importing, inspect, new, page
from pgolf.submission.folder import folder_members


def add_new(commands: Commands) -> None:
    parser = add_command(
        commands,
        "new",
        "make the folder of a submission",
        "Make the folder of a submission: code to begin with, an entry that `pgolf check --write` fills in, a README, "
        "and AGENTS.md with the loop from training to a checked submission.",
        'pgolf new "my idea" --from golf',
        _new,
    )
    parser.add_argument("name", metavar="NAME", help="the submission's name, as a leaderboard shows it")
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="golf|naive|FOLDER|ARTIFACT",
        help="code to begin with: of a baseline, of a folder or another submission, or of an artifact",
    )
    parser.add_argument("--track", choices=rules.TRACKS, default="laptop", help="default: %(default)s")
    parser.add_argument("--author", help="default: your login name")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: submissions/<date>_<name>")
    parser.add_argument("--json", action="store_true", help="print the folder's path as JSON")


def _new(args: argparse.Namespace) -> int:
    folder = new.new(args.name, args.source, args.track, args.author, args.out)
    if args.json:
        print(json.dumps({"folder": str(folder)}, allow_nan=False))
        return 0
    print(f"{printable(folder)}: made; what to do in it, step by step: {printable(folder / 'AGENTS.md')}")
    return 0


def add_import(commands: Commands) -> None:
    parser = add_command(
        commands,
        "import",
        "make an artifact of a submission to the Parameter Golf contest",
        "Make an artifact of a contest submission: its script, unchanged, its weights and its tokenizer. The script's "
        "main does not run, only what makes the model and reads the weights, in the sandbox. Scores of it are for "
        "practice: it is in the window form.",
        "pgolf import train_gpt.py --weights final_model.int8.ptz --tokenizer fineweb_1024_bpe.model "
        "--env NUM_LAYERS=9\n  pgolf score artifact.zst --data DIR\n\n"
        "exit codes: 0 written, 1 script or weights cannot be imported, 2 wrong usage, 3 this machine is broken",
        _import,
    )
    parser.add_argument("script", type=Path, help="the submission's train_gpt.py")
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE", help="what the script saved at its end")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FILE", help="the SentencePiece model")
    parser.add_argument(
        "--env",
        type=_variable,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an environment variable that the script was run with",
    )
    parser.add_argument(
        "--set",
        type=_attribute,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an attribute of the model that training switches on, such as looping_active=True",
    )
    parser.add_argument("--context", type=positive, metavar="N", help="tokens in a window (default: the script's)")
    parser.add_argument("--stride", type=positive, metavar="N", help="new tokens in each window (default: all of it)")
    parser.add_argument("--name", help="default: the name of the script's folder")
    parser.add_argument("--author", help="default: your login name")
    parser.add_argument("--track", choices=rules.TRACKS, default="main", help="default: %(default)s")
    parser.add_argument("-o", "--out", type=Path, default=Path("artifact.zst"), help="default: %(default)s")
    add_sandbox(parser)
    add_verbose(parser)
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w{0,99}", name) or len(value) > 1000 or not value.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not NAME=VALUE, such as NUM_LAYERS=9")
    return name, value


def _attribute(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    try:
        return re.fullmatch(r"[A-Za-z_][\w.]*", name)[0], repr(ast.literal_eval(value))  # type: ignore[index]
    except (TypeError, ValueError, SyntaxError, RecursionError, MemoryError):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not NAME=VALUE, such as looping_active=True") from None


def _import(args: argparse.Namespace) -> int:
    request = importing.Request(
        script=args.script,
        weights=args.weights,
        tokenizer=args.tokenizer,
        out=args.out,
        env=dict(args.env),
        name=args.name or args.script.absolute().parent.name or "imported",
        author=args.author or new.login_name(),
        track=args.track,
        context=args.context,
        stride=args.stride,
        switches=dict(args.set),
    )
    with shown_output(args.verbose):
        result = importing.import_submission(request, Runtime(find_device(args.device), not args.no_sandbox))
    print(json.dumps(importing.as_json(result), indent=2, allow_nan=False) if args.json else importing.table(result))
    return 0


def add_pack(commands: Commands) -> None:
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
    members = folder_members(args.folder)
    if args.out.exists() and args.out.resolve().is_relative_to(args.folder.resolve()):
        members.pop(args.out.resolve().relative_to(args.folder.resolve()).as_posix(), None)  # of an earlier call
    size = artifact.pack(members, args.out, rules.ARTIFACT_BYTES)
    print(f"{args.out}: {size:,} bytes")
    return 0


def add_ablate(commands: Commands) -> None:
    parser = add_command(
        commands,
        "ablate",
        "measure what settings of a trainer are worth",
        ablate.__doc__ or "",
        "pgolf ablate xsa=0 leak=0,smear=0 --data data/demo --steps 200 --seeds 1 2 3",
        _ablate,
    )
    parser.add_argument(
        "variants", nargs="*", metavar="KEY=VALUE[,KEY=VALUE]", help="settings that differ from the base"
    )
    parser.add_argument("--data", type=Path, required=True, help="dataset folder")
    parser.add_argument("--track", default="laptop", choices=rules.TRACKS, help="default: %(default)s")
    parser.add_argument("--preset", help="the trainer's settings to begin with (default: those of the track)")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--steps", type=int, help="budget in steps: the same on any machine")
    budget.add_argument("--seconds", type=float, help="budget in seconds: needs a quiet machine")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument("--base", action="append", default=[], metavar="KEY=VALUE", help="setting of all runs")
    parser.add_argument("--trainer", type=Path, default=Path("baselines/golf/train.py"), help="default: %(default)s")
    parser.add_argument(
        "--development", action="store_true", help="score on the development text, as what decides on an entry should"
    )
    parser.add_argument(
        "--documents",
        type=int,
        metavar="N",
        help="score the first N documents only, or as many of the development text",
    )
    parser.add_argument("--no-sandbox", action="store_true", help="no sandbox: for your own code, a little faster")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/ablate"),
        help="folder of the runs, table and plot (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON")


def _ablate(args: argparse.Namespace) -> int:
    """Run what is missing, print the table, draw it."""
    try:
        rows = ablate.table(args)
    except KeyboardInterrupt:
        print("pgolf: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    (args.out / "ablation.md").write_text(ablate.markdown(rows) + "\n", encoding="utf-8")
    print(json.dumps(rows, indent=1, allow_nan=False) if args.json else ablate.markdown(rows))
    if fault := plots.draw_effects(rows, args.out / "ablation.png"):
        note(fault)
    return 0


def add_check(commands: Commands) -> None:
    parser = add_command(
        commands,
        "check",
        "see whether a submission will pass, in a minute",
        "Check a submission before it is sent, or an artifact, or a folder to be packed: the entry against its "
        "records, format, sizes, imports, a sample's score in the sandbox, the seconds that the whole text would take, "
        "and a few training steps as a re-run takes them.",
        "pgolf check runs/naive.zst --data data/demo\n  pgolf check submissions/2026-05-01_mine --data DIR --write\n\n"
        "exit codes: 0 passes, 1 will be refused, 2 wrong usage, 3 this machine or the data is broken",
        _check,
    )
    parser.add_argument("submission", type=Path, metavar="FOLDER|ARTIFACT")
    add_data(parser)
    parser.add_argument("--track", choices=rules.TRACKS, help="check against this track's limits, not its own")
    parser.add_argument("--no-train", action="store_true", help="leave the training steps out")
    parser.add_argument(
        "--write",
        action="store_true",
        help="of a submission: first fill in submission.json from artifact.zst, records/ and logs/",
    )
    add_sandbox(parser)
    add_verbose(parser)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def _check(args: argparse.Namespace) -> int:
    if args.write:
        if not check.is_submission(args.submission):
            raise UsageError(f"{args.submission}: is no submission's folder, so --write has nothing to fill in")
        claims.fill(args.submission)
    options = Options(args.track, args.device, isolated=not args.no_sandbox)
    with shown_output(args.verbose):
        report = check.check(args.submission, args.data or default_dataset(), options, train=not args.no_train)
    print(json.dumps(check.as_json(report), indent=2, allow_nan=False) if args.json else check.table(report))
    return 0 if report.passes else Refused.exit_code


def add_inspect(commands: Commands) -> None:
    parser = add_command(
        commands,
        "inspect",
        "see where an artifact's bytes went",
        "The bytes of each member in the compressed file and their entropy; of weights in .npy, .npz or safetensors "
        "the bits per weight by role. No code of the artifact runs. docs/inspect.md says how the bytes are estimated.",
        "pgolf inspect runs/naive.zst --plot runs/naive.bytes.png",
        _inspect,
    )
    parser.add_argument("artifact", type=Path, help="one .zst file")
    parser.add_argument(
        "--tensors", type=Path, metavar="FILE", help="its weights as .npz, where their own format is another"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, tensor by tensor")


def _inspect(args: argparse.Namespace) -> int:
    found = inspect.inspect(args.artifact, args.tensors)
    print(json.dumps(inspect.as_json(found), indent=2, allow_nan=False) if args.json else inspect.table(found))
    if args.plot and (fault := inspect.plot(found, args.plot)):
        note(fault)
        return EnvironmentBroken.exit_code
    return 0


def add_plot(commands: Commands) -> None:
    parser = add_command(
        commands,
        "plot",
        "draw training runs, or what the tokens of a text cost",
        "Of logs of training: the loss over time and over tokens. Of records of one text, scored with --per-token: "
        "log-loss by position, by length of the document and by class of token, with the most and least expensive "
        "documents; --page shows some of them with every token coloured by its cost.",
        "pgolf plot runs/a.jsonl runs/b.jsonl --out runs/loss.png\n"
        "  pgolf plot runs/a.score.json --out runs/cost.png --page runs/cost.html",
        _plot,
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="LOG|RECORD", help="all of one kind")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a PNG")
    parser.add_argument("--page", type=Path, metavar="FILE", help="of one record: write the coloured text as HTML")
    parser.add_argument(
        "--document",
        type=int,
        action="append",
        metavar="N",
        help="on the page, counted from 0 (may be given again; default: the most and least expensive)",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def _plot(args: argparse.Namespace) -> int:
    """Print the figures, draw them."""
    logs = [curves.is_log(path) for path in args.files]
    if any(logs) and not all(logs):
        raise UsageError("give logs of training or records of scores, not both")
    if args.page and (any(logs) or len(args.files) > 1):
        raise UsageError("--page shows the text of one record")
    if all(logs):
        runs = [curves.read(path) for path in args.files]
        print(json.dumps(curves.as_json(runs), allow_nan=False) if args.json else curves.table(runs))
        fault = curves.plot(runs, args.out) if args.out else None
    else:
        found = costs.read(args.files)
        all_costs = [costs.costs(path, each) for path, each in zip(args.files, found, strict=True)]
        if args.page:
            shown = args.document or [d.number for d in (*all_costs[0].expensive, *all_costs[0].cheap)]
            if bad := [number for number in shown if not 0 <= number < len(found[0].sizes)]:
                raise UsageError(f"--document {bad[0]}: the text has documents 0 to {len(found[0].sizes) - 1}")
            title = f"What the tokens cost: {args.files[0].name}"
            write_atomically(args.page, page.page(found[0], shown, title).encode())
        print(json.dumps(costs.as_json(all_costs), indent=1, allow_nan=False) if args.json else costs.table(all_costs))
        fault = costs.plot(all_costs, args.out) if args.out else None
    if fault:
        note(fault)
        return EnvironmentBroken.exit_code
    return 0


def add_try(commands: Commands) -> None:
    parser = add_command(
        commands,
        "try",
        "score other predictor code on trained weights, in seconds",
        "Score an artifact with other code, or other fields of its manifest, on documents spread over the development "
        "text, and compare it with the artifact as it is on the same documents. Nothing is trained, and the artifact "
        f"stays as it is. Its own log-losses are kept in {attempt.KEPT}.",
        "pgolf try runs/naive.zst --code baselines/naive --set lanes=64 --data data/demo\n\n"
        "exit codes: 0 scored, 1 refused or the code raised, 2 wrong usage, 3 this machine or the data is broken",
        _try,
    )
    parser.add_argument("artifact", type=Path, help="one .zst file")
    parser.add_argument("--code", type=Path, metavar="FOLDER", help="its source files replace those of the artifact")
    parser.add_argument(
        "--set",
        type=_field,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another value for a field of submission.json, as JSON or as a bare word; null removes it",
    )
    add_data(parser)
    parser.add_argument(
        "--documents", type=positive, default=attempt.DOCUMENTS, metavar="N", help="how many (default: %(default)s)"
    )
    add_sandbox(parser)
    add_verbose(parser)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def _field(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE, such as lanes=64")
    try:
        return key, json.loads(value)
    except (ValueError, RecursionError):
        return key, value


def _try(args: argparse.Namespace) -> int:
    """Score, print the comparison."""
    options = Options(device=args.device, documents=args.documents, isolated=not args.no_sandbox)
    data = args.data or default_dataset()
    with shown_output(args.verbose):
        result = attempt.attempt(args.artifact, args.code, dict(args.set), data, options, note)
    print(json.dumps(attempt.as_json(result), indent=2, allow_nan=False) if args.json else attempt.table(result))
    return 0
