"""The documentation tells the truth: its examples score, and its tables name what the code has."""

import json
import math
import re
import struct
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from conftest import DOCUMENTS, ROOT, write_dataset
from pgolf import rules
from pgolf.artifact import Manifest, pack
from pgolf.data.dataset import open_dataset
from pgolf.files import beside
from pgolf.proof import compression
from pgolf.proof.prove import Amount, prove
from pgolf.sandbox.probe import Isolation, isolation
from pgolf.score import record
from pgolf.score.devices import Runtime, find_device
from pgolf.score.score import Options, reasons, score

DOCS = ROOT / "docs"
ARTIFACT, SECURITY, PROOF, RULES = (
    (DOCS / f"{name}.md").read_text() for name in ("artifact", "security", "proof", "rules")
)
UNBOXED = Options(isolated=False)


def examples() -> dict[str, dict[str, bytes]]:
    """The members of each submission in docs/artifact.md, by its name: a manifest and the predictor after it."""
    blocks = re.findall(r"^```(?:json|python)\n(.*?)^```", ARTIFACT, re.MULTILINE | re.DOTALL)
    train = b"# nothing to train\n"
    return {
        json.loads(manifest)["name"]: {
            "submission.json": manifest.encode(),
            "predict.py": predict.encode(),
            "train.py": train,
        }
        for manifest, predict in zip(blocks[::2], blocks[1::2], strict=True)
    }


def test_first_example_learns_in_the_sandbox(dataset: Path, tmp_path: Path) -> None:
    """The counts beat a uniform predictor, and nothing about the submission keeps the score from counting."""
    path = tmp_path / "counts.zst"
    pack(examples()["counts"], path, 1_000_000)
    result = score(path, dataset)
    assert result.status == "ok", result.reason
    assert result.bpb < 8
    own = [reason for reason in result.reasons if reason not in isolation().reasons(fresh_machine=False)]
    assert own == [f"the text has {result.bytes:,} bytes, 2,000,000 are needed"]


def test_first_example_can_be_proven(dataset: Path, tmp_path: Path) -> None:
    """A decoder gets the whole text back from the example and the code."""
    path = tmp_path / "counts.zst"
    pack(examples()["counts"], path, 1_000_000)
    result = score(path, dataset, UNBOXED)
    record.write(result, beside(path, ".score.json"))
    proof = prove(path, dataset, Amount(everything=True), Runtime(find_device("auto"), isolated=False)).proof
    assert proof and proof.status == "ok", proof
    assert proof.bytes == result.bytes


def test_example_with_a_cache_equals_parallel_attention(tmp_path: Path, tokenizer_model: Path) -> None:
    """Step by step, on lanes, the layer codes the text in the bits that attention over whole documents takes."""
    documents = [document[:600] for document in DOCUMENTS]
    dataset = write_dataset(tmp_path / "data", documents, tokenizer_model)
    members = examples()["layer"]
    module: dict[str, Any] = {}
    exec(members["predict.py"].decode(), module)
    torch.manual_seed(1)
    layer = module["Layer"]()
    weights = torch.nn.utils.parameters_to_vector(layer.parameters()).detach().half()
    with (tmp_path / "weights.npy").open("wb") as file:
        np.save(file, weights.numpy())
    torch.nn.utils.vector_to_parameters(weights.float(), layer.parameters())
    path = tmp_path / "layer.zst"
    pack({**members, "weights.npy": (tmp_path / "weights.npy").read_bytes()}, path, 1_000_000)
    result = score(path, dataset, UNBOXED)
    assert result.status == "ok", result.reason
    bits = sum(_bits(layer, list(document.encode()), module) for document in documents)
    assert max(map(len, documents)) > 4 * module["CONTEXT"]
    assert result.bpb == pytest.approx(bits / result.bytes, rel=1e-6)


@torch.no_grad()
def _bits(layer: Any, document: list[int], module: dict[str, Any]) -> float:
    """Code length of a document, all positions at once: each attends to itself and the CONTEXT - 1 before it."""
    width, heads = module["C"], module["H"]
    ids = torch.tensor([module["BOS"], *document])
    age = torch.arange(len(ids))[:, None] - torch.arange(len(ids))
    slopes = torch.tensor([4.0**-h for h in range(1, heads + 1)])[:, None, None]
    bias = (-slopes * age).masked_fill((age < 0) | (age >= module["CONTEXT"]), -torch.inf)
    x = layer.embed(ids)
    q, k, v = layer.qkv(F.rms_norm(x, (width,))).view(-1, 3, heads, width // heads).permute(1, 2, 0, 3)
    attention = (q @ k.mT / math.sqrt(width // heads) + bias).softmax(-1)
    x = x + layer.out((attention @ v).transpose(0, 1).flatten(1))
    x = x + layer.mlp(F.rms_norm(x, (width,)))
    logits = F.rms_norm(x, (width,)) @ layer.embed.weight.T
    return float(F.cross_entropy(logits, torch.tensor([*document, module["BOS"]]), reduction="sum")) / math.log(2)


def test_every_field_is_documented() -> None:
    """The tables of docs/artifact.md name all fields of the manifest and of the record, and no others."""
    known = {
        "submission.json": {field.name for field in fields(Manifest)},
        "The record": {field.name for field in fields(record.Record)},
    }
    for heading, names in known.items():
        section = re.search(rf"^## {re.escape(heading)}$(.*?)^## ", ARTIFACT, re.MULTILINE | re.DOTALL)
        assert section
        first_columns = re.findall(r"^\| (`[^|]*) \|", section[1], re.MULTILINE)
        assert set(re.findall(r"`(\w+)`", " ".join(first_columns))) == names


def test_every_reason_is_documented(dataset: Path) -> None:
    """Each reason why a score does not count stands in docs/security.md in the words that the record has."""
    data = replace(open_dataset(dataset), from_environment=True)
    manifest = Manifest("a", "b", "main", 2, 1, "t.py", "window")
    nothing = Isolation("", False, False, False, False, 0.0)
    text = data.canonical_text()
    options = Options(documents=1, development=True)
    found = {*reasons(manifest, data, text, nothing, options), *reasons(manifest, data, text, None, options)}
    assert len(found) == 11
    table = re.sub(r"`", "", SECURITY)
    for reason in found:
        assert reason.replace(f"{text.bytes:,}", "N") in table


def test_every_finding_of_a_check_is_documented() -> None:
    """docs/participants.md has a row for each rule id in the code of `pgolf check`, and for no other."""
    code = "".join(path.read_text() for path in (ROOT / "src" / "pgolf" / "submission").glob("*.py"))
    used = set(re.findall(r'\b[fF]inding\(\s*"([\w-]+)"|: "(training-\w+)"', code))
    used = {rule for match in used for rule in match if rule}
    table = (DOCS / "participants.md").read_text().partition("## Findings")[2]
    rows = re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE)
    assert used and set(re.findall(r"`([\w-]+)`", " ".join(rows))) == used


def test_rules_are_documented() -> None:
    """The tables of docs/rules.md have every number of rules.py, its version, and the pinned versions of packages."""
    cells = dict(re.findall(r"^\| `(\w+)` \| (\S+)", RULES, re.MULTILINE))
    numbers = {name: value for name, value in vars(rules).items() if type(value) in (int, float)}
    assert f"# Rules, version {numbers.pop('VERSION')}\n" in RULES
    assert {name: float(cells[name].replace(",", "")) for name in numbers} == numbers
    for track in rules.TRACKS.values():
        seconds = f"{track.train_seconds:g} s" if track.train_seconds else "no limit"
        times = f"{track.prepare_seconds:g} s | {seconds} | {track.eval_seconds:g} s"
        row = f"`{track.name}` | {track.artifact_bytes:,} bytes | {times}"
        assert f"| {row} | {track.hardware} | {track.source_bytes:,} bytes |" in RULES
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    packages = cells.keys() - numbers.keys() - rules.TRACKS.keys()
    assert packages and {name: cells[name] for name in packages} == {name: pinned[name] for name in packages}


def test_links_lead_somewhere() -> None:
    """Each relative link in the docs names a file, and a heading where it has an anchor."""
    for page in (*ROOT.glob("*.md"), *DOCS.glob("**/*.md"), ROOT / "data" / "README.md"):
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor:
                headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
                names = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in names, f"{page.name}: {link}"


def test_file_format_is_documented() -> None:
    """The offsets in docs/proof.md are those of the header."""
    rows = re.findall(r"^\| (\d+) \| (\d+) \| ", PROOF, re.MULTILINE)
    letters = re.findall(r"\d*[a-zA-Z]", compression.HEADER.format.removeprefix("<"))
    sizes = [struct.calcsize(f"<{letter}") for letter in letters]
    assert [(int(at), int(size)) for at, size in rows] == [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]
    assert f"| {compression.HEADER.size} | E |" in PROOF
