"""`pgolf data build OWNER/NAME`: a hub dataset, streamed from a hub on loopback as FineWeb is laid out."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hub import Hub, serving
from pgolf.data.dataset import open_dataset, overlap

TEXTS = [f"Document {number} says {'so ' * (number % 7)}and counts to {number * number}." for number in range(300)]
VALIDATION = 20
NAME = "HuggingFaceFW/fineweb"
CARD = "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n"


def parquet(texts: list[str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts, "id": list(map(str, range(len(texts))))}), file, row_group_size=100)
    return file.getvalue()


def test_a_configuration_is_streamed_and_copies_of_validation_documents_dropped(
    tmp_path: Path, tokenizer_model: Path
) -> None:
    """In a process of its own: the libraries read HF_ENDPOINT when they are imported."""
    halves = {"000": TEXTS[:150], "001": TEXTS[150:] + TEXTS[:3]}
    files = {f"sample/10BT/{name}_00000.parquet": parquet(texts) for name, texts in halves.items()}
    with serving(Hub()) as hub:
        commit = hub.publish(NAME, {"README.md": CARD.encode(), "data/other.parquet": parquet(["no"]), **files})
        command = [sys.executable, "-m", "pgolf", "data", "build", NAME, "--config", "sample-10BT"]
        command += ["--val-documents", str(VALIDATION), "--dev-documents", "0", "--tokenizer", str(tokenizer_model)]
        command += ["--out", str(tmp_path / "d"), "--workers", "2", "--json"]
        variables = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["train"]["dropped_overlap"] == 3
        dataset = open_dataset(tmp_path / "d")
        assert dataset.index and dataset.index["build"]["sources"][0]["revision"] == commit
        assert dataset.index["train"]["documents"] == len(TEXTS) - VALIDATION
        assert [each.decode() for each in dataset.canonical_text().documents] == TEXTS[:VALIDATION]
        assert overlap(dataset) == 0
