"""The helper itself: a comparison that cannot fail would make every golden test worthless."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cases import Case, cases
from safetensors.torch import save_file

STORED = {
    "a.x": torch.tensor([1.0, -2.0, 3.0]),
    "b.mean": torch.tensor([0.0, 0.0, 0.0, 0.0]),
    "c.image": torch.tensor([10, 20, 30, 40], dtype=torch.uint8),
    "d.ids": torch.tensor([1, 2, 3]),
    "e.flags": torch.tensor([True, False]),
    "f.drawn": torch.tensor([5]),
}
SPEC = {
    "case": "kind_tiny",
    "tensors": {"f.drawn": "int64 [1] - drawn (CPU; optional)", "a.x": "float32 [3] - result"},
    "tol": [
        {"match": "*.mean", "mean_atol": 0.1},
        {"match": "*", "dtype": "uint8", "atol": 1, "max_fraction_off": 0.25},
        {"match": "*", "atol": 0.1, "rtol": 0.1},
    ],
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    named = [("kind_tiny", "kind_tiny"), ("other", "kind_tiny"), ("kind_tinyish", "x")]
    for name, case in [*named, ("my_kind_tiny_2", "x"), ("mykind_tiny", "x")]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "case.json").write_text(json.dumps(SPEC | {"case": case}))
        save_file(STORED, tmp_path / name / "io.safetensors")
    monkeypatch.setenv("WORLDLINE_GOLDEN", str(tmp_path))
    return tmp_path


def test_kinds(root: Path) -> None:
    found = ["kind_tiny", "my_kind_tiny_2", "kind_tiny-other"]
    assert [str(case) for case in cases("kind_tiny")] == found
    assert cases("kind_tiny")[0] is cases("kind_tiny")[0]  # what is used adds up
    assert cases("absent_tiny") == []


def test_a_case_without_a_kind_is_known_by_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {
        "a": {"net": {}, "checkpoint": "x.pt"},
        "b": {"net": {}, "checkpoint": "x.pt", "toy_field": {}},
        "dit25_14b_like_tiny_3": {"net": {}, "checkpoint": "x.pt"},
        "c": {"net": {}, "checkpoint": "x.pt", "case": "kind_tiny"},
        "d": {"vae": {}, "encode": "", "decode": ""},
    }
    for name, spec in held.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "case.json").write_text(json.dumps(spec))
    monkeypatch.setenv("WORLDLINE_GOLDEN", str(tmp_path))
    assert [case.path.name for case in cases("dit25_tiny")] == ["a"]
    assert [case.path.name for case in cases("flow_unipc_sampler")] == ["b"]
    assert [case.path.name for case in cases("dit25_14b_like_tiny")] == ["dit25_14b_like_tiny_3"]
    assert [case.path.name for case in cases("wan_vae_tiny")] == ["d"]
    assert cases("p25_e2e_tiny") == cases("reason1_tiny") == []


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("a.x", [1.19, -2.29, 3.39], [1.0, -2.0, 3.41]),
        ("a.x", [1.0, -2.0, 3.0], [1.0, -2.0, float("nan")]),
        ("b.mean", [0.3, 0.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0]),
        ("c.image", [11, 20, 30, 40], [11, 21, 30, 40]),
        ("c.image", [10, 20, 30, 39], [10, 20, 30, 42]),
        ("d.ids", [1, 2, 3], [1, 2, 4]),
        ("e.flags", [True, False], [True, True]),
    ],
)
def test_compare(name: str, good: list[float], bad: list[float], root: Path) -> None:
    case = cases("kind_tiny")[0]
    dtype = STORED[name].dtype
    case.compare(name, torch.tensor(good, dtype=dtype))
    with pytest.raises(AssertionError, match=name):
        case.compare(name, torch.tensor(bad, dtype=dtype))
    with pytest.raises(AssertionError, match="shape"):
        case.compare(name, torch.tensor(good, dtype=dtype)[None])


def test_unused(root: Path) -> None:
    case = Case("kind_tiny", root / "kind_tiny", SPEC)
    assert case.unused() == sorted(STORED)[:-1]  # the last is optional
    for name in case.names("[a-d]*"):
        case.tensor(name)
    assert case.unused() == ["e.flags"]
    with pytest.raises(KeyError, match="absent"):
        case.tensor("absent")
