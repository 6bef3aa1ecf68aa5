"""The submissions of this repository: complete, and nothing in them contradicts."""

from pathlib import Path

import pytest

from conftest import ROOT
from pgolf import artifact, entry, rules
from pgolf.score import record
from pgolf.submission import claims
from pgolf.submission.findings import ERROR

FOLDERS = sorted(path for path in (ROOT / "submissions").iterdir() if path.is_dir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_claim_is_borne_out(folder: Path) -> None:
    """Three seeds, each with a score that counts, of the artifact's own code."""
    found = entry.read(folder)
    packed = artifact.read(entry.artifact_file(folder), rules.track(found.track).artifact_bytes)
    first = record.read(folder / found.seeds[0].record)
    assert first.data
    wrong = [each for each in claims.findings(folder, found, packed, first.data.sha256) if each.severity == ERROR]
    assert not wrong
    assert len(found.seeds) == 3
    assert all(record.read(folder / seed.record).eligible for seed in found.seeds)
    sources = artifact.sources(packed.members)
    del sources[artifact.MANIFEST]
    assert sources == artifact.code_in(folder / "code")
