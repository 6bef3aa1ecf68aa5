"""The record's JSON: its fields and their order, its published schema, and the way back."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from conftest import ROOT, UNIFORM, WINDOW, MakeArtifact
from pgolf import rules
from pgolf.score import record
from pgolf.score.record import CodeLength, Environment, Packed, Proof, Record, SpotCheck, Submission, Text
from pgolf.score.score import Options, score

SCHEMA = json.loads((ROOT / "docs" / "record.schema.json").read_text())
UNBOXED = Options(device="cpu", isolated=False)

WHOLE = Record(
    rules=rules.VERSION,
    reasons=("no sandbox",),
    track="laptop",
    submission=Submission("name", "author"),
    artifact=Packed("ab" * 32, 1),
    data=Text("tiny", "cd" * 32),
    seconds={"encode": 0.25, "total": 0.5},
    code=CodeLength(64, (1.5, 2)),
    spot_check=SpotCheck(1, 0, 0.0, 0),
    environment=Environment.of("cpu"),
    reason="it ended",
    proof=Proof(reason="it ended", seconds={"total": 1.0}),
)

ORDER = {
    "": "status reason eligible reasons rules bpb nats_per_token tokens bytes documents track submission form artifact "
    "data isolation fresh_machine seconds margin plan steps code spot_check environment proof",
    "submission": "name author",
    "artifact": "sha256 bytes",
    "data": "name sha256",
    "seconds": "encode total",
    "code": "every bits",
    "spot_check": "tokens changed largest token",
    "environment": "pgolf python torch numpy sentencepiece platform processor cores device devices",
    "proof": "status reason bpb steps of_steps tokens bytes of_bytes recorded_bits code_bits data isolation "
    "environment seconds",
}


def written(result: Record, folder: Path) -> dict[str, Any]:
    """The JSON of a record, which keeps to the schema."""
    record.write(result, folder / "record.json")
    values: dict[str, Any] = json.loads((folder / "record.json").read_text())
    jsonschema.validate(values, SCHEMA)
    return values


def test_fields_and_their_order(tmp_path: Path) -> None:
    """The JSON has these fields in this order, and without a proof no "proof"."""
    values = written(WHOLE, tmp_path)
    for name, names in ORDER.items():
        assert list(values[name] if name else values) == names.split(), name
    assert list(written(replace(WHOLE, proof=None), tmp_path)) == ORDER[""].split()[:-1]


def test_schema_names_the_fields() -> None:
    """The published schema has the fields of the dataclasses, in their order, and requires all but the proof."""
    properties = SCHEMA["properties"]
    parts = {"submission": Submission, "artifact": Packed, "code": CodeLength, "spot_check": SpotCheck}
    parts |= {"environment": Environment, "proof": Proof}
    schemas = {Record: SCHEMA, Text: SCHEMA["$defs"]["text"]} | {kind: properties[n] for n, kind in parts.items()}
    for kind, schema in schemas.items():
        names = [field.name for field in fields(kind)]
        assert list(schema["properties"]) == names
        assert schema["required"] == [name for name in names if name != "proof"]
        assert schema["additionalProperties"] is False


def test_records_of_all_endings_keep_to_the_schema(make_artifact: MakeArtifact, dataset: Path, tmp_path: Path) -> None:
    """A score of each form, a refusal and a failure; the latter two have what was known by then, and no score."""
    good = score(make_artifact(UNIFORM), dataset, UNBOXED)
    window = score(make_artifact(WINDOW, form="window"), dataset, UNBOXED)
    refused = score(make_artifact(UNIFORM.replace("torch.zeros(", "torch.ones(9, ")), dataset, UNBOXED)
    failed = score(make_artifact(UNIFORM, packages=["no-such-package"]), dataset, UNBOXED)
    garbage = tmp_path / "garbage.zst"
    garbage.write_bytes(b"no artifact")
    unread = score(garbage, dataset, UNBOXED)
    for result, status in ((good, "ok"), (window, "ok"), (refused, "refused"), (failed, "failed"), (unread, "refused")):
        assert written(result, tmp_path)["status"] == status, result.reason
    assert good.steps and good.code and not good.spot_check
    assert window.spot_check and not window.steps and window.plan is None
    for early in (refused, failed):
        assert early.submission == good.submission and early.bpb is early.margin is None
    assert (refused.bytes, refused.documents, refused.data, refused.plan) == (good.bytes, good.documents, good.data, 0)
    assert list(refused.seconds) == ["encode", "decode", "load", "predict", "total"]
    assert failed.data is failed.isolation is None and list(failed.seconds) == ["total"]
    assert unread.artifact == Packed(None, 11) and unread.track is None


def test_schema_refuses_what_no_score_writes(tmp_path: Path) -> None:
    """A missing or unknown field, a score of a refusal, and a value of another type."""
    values = written(WHOLE, tmp_path)
    for wrong in ({"score": 1}, {"bpb": 1.0}, {"tokens": "9"}, {"data": {"name": "x"}}, {"eligible": True}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(values | wrong, SCHEMA)
    del values["plan"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, SCHEMA)


def test_record_is_read_back(tmp_path: Path) -> None:
    """What is written is read, and what is no record is refused."""
    place = tmp_path / "record.json"
    for result in (WHOLE, replace(WHOLE, proof=None, submission=None)):
        values = written(result, tmp_path)
        assert record.read(place) == result
    for text in (
        "",
        "7",
        "[]",
        "{}",
        json.dumps(values | {"code": 7}),
        json.dumps(values | {"bytes": "7"}),
        json.dumps(values | {"bytes": 1 << 63}),
        json.dumps(values | {"seconds": {"total": "7"}}),
        *(
            json.dumps(values | {"bpb": 7.5}).replace("7.5", number)
            for number in ("NaN", "-Infinity", "1e999", "9" * 99)
        ),
        *(json.dumps(values | {"seconds": {"total": 7.5}}).replace("7.5", number) for number in ("NaN", "1e999")),
        "[" * 9999,
    ):
        place.write_text(text)
        with pytest.raises(ValueError):
            record.read(place)
