"""Where the bytes went: estimates that add up, formats known by their bytes, figures of tensors."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT, UNIFORM, MakeArtifact
from pgolf import artifact
from pgolf.cli.main import main
from pgolf.errors import UsageError
from pgolf.submission import inspect, members, tensors

NAIVE = ROOT / "submissions" / "2026-11-26_naive" / "artifact.zst"


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def safetensors(header: object, data: bytes) -> bytes:
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + data


def test_the_members_of_an_artifact_nearly_add_up_to_it() -> None:
    found = artifact.read(NAIVE, 1_000_000)
    sizes = members.compressed(found)
    assert sizes.keys() == found.members.keys()
    assert 0 <= sum(sizes.values()) - found.size < 0.005 * found.size
    assert sum(members.by_role(found, sizes).values()) == sum(sizes.values())


def test_entropy_is_that_of_the_values() -> None:
    assert tensors.entropy(np.zeros(9, np.int8)) == 0
    assert tensors.entropy(np.arange(-64, 64, dtype=np.int32)) == pytest.approx(7)
    assert tensors.entropy(np.repeat([1.0, 2.0], 50).astype(np.float16)) <= 2


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("blocks.0.attn_norm.weight", "norms"),
        ("h.0.ln_1.weight", "norms"),
        ("blocks.3.attn.query.weight", "attention"),
        ("layers.1.self_attn.q_proj.weight", "attention"),
        ("blocks.0.mlp.up.weight", "MLP"),
        ("embed.weight", "embedding"),
        ("lm_head.weight", "embedding"),
        ("mystery", "other"),
    ],
)
def test_roles_are_guessed_from_names(name: str, role: str) -> None:
    assert tensors.role(name) == role


def test_public_formats_are_known_by_their_bytes() -> None:
    codes = np.arange(12, dtype=np.int8).reshape(3, 4)
    entry = {"dtype": "I8", "shape": [3, 4], "data_offsets": [0, 12]}
    half = {"dtype": "BF16", "shape": [6], "data_offsets": [0, 12]}
    for data, name in ((npz(a=codes), "a"), (safetensors({"a": entry, "__metadata__": {}}, codes.tobytes()), "a")):
        found = tensors.recognise(data)
        assert found is not None
        assert np.array_equal(found[name], codes)
    found = tensors.recognise(safetensors({"a": half}, codes.tobytes()))
    assert found is not None
    assert tensors.figures(found)[0].dtype == "bfloat16"


CODE = {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04 rubbish",
        b"\x93NUMPY rubbish",
        npz(a=np.ones(3))[:-30],
        safetensors({"a": {"dtype": "I8", "shape": [99], "data_offsets": [0, 99]}}, b"short"),
        safetensors({"a": {"dtype": "I8", "shape": [-1], "data_offsets": [0, -1]}}, b"short"),
        safetensors([1], b""),
        safetensors({name: {"dtype": "I8", "shape": [9], "data_offsets": [0, 9]} for name in "ab"}, b"both here"),
        safetensors(
            {"__metadata__": " " * (1 << 24), "a": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}}, b"x"
        ),
        npz(a=np.array(["text"])),
    ],
)
def test_other_bytes_hold_no_tensors(data: bytes) -> None:
    assert tensors.recognise(data) is None


@pytest.mark.parametrize("shape", [[1] * 65, [1] * 400_000, [10**4000, 10**4000], [True], "1"])
def test_a_shape_is_bounded_before_it_is_multiplied(shape: object, monkeypatch: pytest.MonkeyPatch) -> None:
    multiplied: list[object] = []
    monkeypatch.setattr(tensors.math, "prod", multiplied.append)
    assert tensors.recognise(safetensors({"a": CODE | {"shape": shape}}, b"x")) is None
    assert multiplied == []


def test_tensors_in_a_member_and_beside_the_artifact(
    make_artifact: MakeArtifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = np.tile(np.arange(16, dtype=np.int8), 8)
    inside = npz(**{"embed.weight": codes, "bits:embed.weight": np.array(640.0)})
    path = make_artifact(UNIFORM, {"weights.npz": inside})
    (tmp_path / "more.npz").write_bytes(npz(**{"blocks.0.mlp.up.weight": codes}))
    command = ["inspect", str(path), "--tensors", str(tmp_path / "more.npz"), "--plot", str(tmp_path / "a.png")]
    assert main([*command, "--json"]) == 0
    given, member = json.loads(capsys.readouterr().out)["weights"]
    assert (given["source"], member["source"]) == ("more.npz", "weights.npz")
    assert member["groups"][0] == {"role": "embedding", "tensors": 1, "weights": 128, "entropy": 4.0, "stored": 5.0}
    assert given["groups"][-1]["stored"] is None
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    print(inspect.table(inspect.inspect(path)))
    assert "embedding" in capsys.readouterr().out


@pytest.mark.parametrize("bits", [math.inf, 1e308, -1.0])
def test_bits_that_no_tensor_takes(bits: float) -> None:
    """Added up they would be infinite, which JSON does not have."""
    with pytest.raises(UsageError, match="has to be one number"):
        tensors.figures({"a": np.ones(1), "bits:a": np.array(bits), "b": np.ones(1), "bits:b": np.array(bits)})


def test_what_cannot_be_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("not an artifact")
    assert main(["inspect", str(tmp_path / "text")]) == 1
    assert main(["inspect", str(tmp_path / "missing")]) == 2
    assert main(["inspect", str(NAIVE), "--tensors", str(tmp_path / "text")]) == 2
    assert "holds no tensors" in capsys.readouterr().err
