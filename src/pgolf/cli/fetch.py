"""`pgolf data fetch`: the contest's published data."""

import argparse
import json
from pathlib import Path
from time import monotonic
from typing import Any

from pgolf.cli.command import Commands, add_command, note, positive
from pgolf.data.build import fetch
from pgolf.data.build.export import dataset_name
from pgolf.files import printable


def add_fetch(commands: Commands) -> None:
    """Add `data fetch`."""
    parser = add_command(
        commands,
        "fetch",
        "fetch the contest's published shards",
        "Fetch training shards, the validation split and the tokenizer that the contest published, or another "
        "repository of that layout, into a folder that every command reads. What was interrupted goes on when the "
        "same command is run again. A training shard has 100,000,000 tokens (200 MB), the validation split 124 MB.",
        "pgolf data fetch\n  pgolf data fetch --shards 80                    # what 8xH100 read in ten minutes\n"
        "  pgolf data fetch --repo OWNER/NAME --variant sp8192",
        _fetch,
    )
    default = fetch.Wanted()
    parser.add_argument("--variant", default=default.variant, help="sp1024, byte260, ... (default: %(default)s)")
    parser.add_argument(
        "--shards", type=positive, default=default.shards, metavar="N", help="training shards (default: %(default)s)"
    )
    parser.add_argument("--repo", default=default.repository, help="dataset repository (default: %(default)s)")
    parser.add_argument("--folder", default=default.folder, help="where in it the export is (default: %(default)s)")
    parser.add_argument("--revision", help="branch, tag or commit (default: the main branch)")
    parser.add_argument(
        "--documents", action="store_true", help="also the text of the validation documents, docs_selected.jsonl"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the dataset folder (default: data/fineweb10B_VARIANT)")
    parser.add_argument("--json", action="store_true", help="print a summary for programs")


def _fetch(args: argparse.Namespace) -> int:
    start = monotonic()
    wanted = fetch.Wanted(args.repo, args.folder, args.revision, args.variant, args.shards, args.documents)
    out = args.out or Path("data") / dataset_name(args.variant)
    state = fetch.fetch(wanted, out, note)
    summary = {"data": str(out), **{k: v for k, v in state.items() if k != "files"}}
    summary["seconds"] = round(monotonic() - start, 1)
    print(json.dumps(summary, allow_nan=False) if args.json else _table(out, summary))
    return 0


def _table(out: Path, state: dict[str, Any]) -> str:
    train, text, overlap = state["train"], state["validation"], state["overlap"]
    lines = [
        f"{printable(out)}: {printable(state['repository'])}, {printable(state['variant'])}, revision "
        f"{state['revision'][:12]}, {state['seconds']:.1f} s",
        f"training    {train['shards']} of {state['published_shards']} shards, {train['documents']:,} documents, "
        f"{train['tokens']:,} tokens",
        f"validation  {text['documents']:,} documents, {text['tokens']:,} tokens, {text['bytes']:,} bytes, "
        f"sha256 {text['sha256'][:16]}",
        f"overlap     {overlap:,} training documents are validation documents"
        + ("; `pgolf rerun` refuses this data, `pgolf data apart` leaves them out" if overlap else ""),
    ]
    if text["is_contest"]:
        lines.append("The validation split is the contest's.")
    else:
        lines.append(f"The validation split is NOT the contest's: {text['difference']}.")
    return "\n".join(lines)
