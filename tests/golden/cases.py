"""Finds golden cases and compares with them by their own tolerances.

The root is $WORLDLINE_GOLDEN, else `../shared/golden` beside the repository where that exists,
else the reduced copy in `tests/golden/cases`. A module of golden tests reads

    @pytest.mark.parametrize("case", cases("tok_dv_tiny"), ids=str)
    def test_decoder(case: Case) -> None:
        case.compare("t9.recon", decode(case.tensor("t9.codes")))

    @pytest.mark.parametrize("case", cases("tok_dv_tiny"), ids=str)
    def test_every_tensor_is_used(case: Case) -> None:
        assert case.unused() == []
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = REPOSITORY.parent / "shared" / "golden"
REDUCED = Path(__file__).resolve().parent / "cases"
# The kinds whose `case.json` has no field "case", and what it holds of each and of none before it.
_TELLING = {
    "flow_unipc_sampler": {"toy_field"},
    "p25_e2e_tiny": {"vae_checkpoint"},
    "dit25_diffusers_layout": {"diffusers_transformer_config"},
    "reason1_tiny": {"config", "rule"},
    "wan_vae_tiny": {"vae", "encode", "decode"},
    "dit25_tiny": {"net", "checkpoint"},
    "dit25_14b_like_tiny": {"net", "checkpoint"},
}


def golden_root() -> Path:
    """Return the folder that holds the case folders."""
    if named := os.environ.get("WORLDLINE_GOLDEN"):
        return Path(named).absolute()  # tests may change the working folder
    return SHARED if SHARED.is_dir() else REDUCED


class Case:
    """One case folder.

    Attributes:
        kind: what `cases` was asked for.
        path: the folder.
        spec: its `case.json`.
    """

    def __init__(self, kind: str, path: Path, spec: dict[str, Any]) -> None:
        self.kind = kind
        self.path = path
        self.spec = spec
        self.used: set[str] = set()

    def __str__(self) -> str:
        return self.path.name if self.kind in self.path.name else f"{self.kind}-{self.path.name}"

    def __repr__(self) -> str:
        return f"Case({str(self)!r})"

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    @cached_property
    def _stored(self) -> tuple[str, ...]:
        file = self.path / "io.safetensors"
        if not file.is_file():  # some cases are text only
            return ()
        with safe_open(file, "pt") as opened:
            return tuple(sorted(opened.keys()))

    def names(self, pattern: str = "*") -> list[str]:
        """List the stored tensors that match, without marking them as used."""
        return [name for name in self._stored if fnmatchcase(name, pattern)]

    def tensor(self, name: str) -> Tensor:
        """Read one tensor of `io.safetensors`, which then counts as used."""
        if name not in self._stored:
            raise KeyError(f"{self} has no tensor {name!r}")
        self.used.add(name)
        with safe_open(self.path / "io.safetensors", "pt") as opened:
            return opened.get_tensor(name)

    def tolerance(self, name: str, dtype: torch.dtype) -> dict[str, Any]:
        """Return the first entry of `tol` that fits; integers need one that names them."""
        kind = str(dtype).removeprefix("torch.")
        if "uint8 stored as float" in str((self.spec.get("tensors") or {}).get(name, "")):
            kind = "uint8"  # pixels: a value next to a half may round either way
        for entry in self.spec["tol"]:
            if not fnmatchcase(name, entry["match"]) or entry.get("dtype", kind) != kind:
                continue
            if not dtype.is_floating_point and "dtype" not in entry and entry["match"] != name:
                continue
            return entry
        if dtype.is_floating_point:
            raise AssertionError(f"{self}: no tolerance in case.json fits {name} ({kind})")
        return {"atol": 0}

    def compare(self, name: str, ours: Tensor | np.ndarray) -> None:
        """Assert that `ours` agrees with the stored tensor, in shape and within its tolerance."""
        stored = self.tensor(name)
        entry = self.tolerance(name, stored.dtype)
        ours = torch.as_tensor(ours).detach().cpu()
        assert ours.shape == stored.shape, (
            f"{self} {name}: shape {tuple(ours.shape)}, stored {tuple(stored.shape)}"
        )
        if not stored.dtype.is_floating_point:
            assert not ours.dtype.is_floating_point, f"{self} {name}: {ours.dtype} for integers"
        if stored.numel() == 0:
            return
        a, b = ours.to(torch.float64), stored.to(torch.float64)
        if not stored.dtype.is_floating_point and "dtype" not in entry and not entry.get("atol"):
            assert torch.equal(ours.to(stored.dtype), stored), (
                f"{self} {name}: {int((a != b).sum())} of {b.numel()} values differ"
            )
            return
        # Equal infinities and equal NaN agree; their difference would be NaN.
        same = (a == b) | (a.isnan() & b.isnan())
        gap = torch.where(same, torch.zeros_like(a), (a - b).abs()).nan_to_num(nan=torch.inf)
        if "mean_atol" in entry:
            assert gap.mean() <= entry["mean_atol"], (
                f"{self} {name}: mean error {gap.mean():.3g} > {entry['mean_atol']}"
            )
        if "atol" in entry or "rtol" in entry:
            scale = torch.where(b.isfinite(), b.abs(), torch.zeros_like(b))
            bound = entry.get("atol", 0) + entry.get("rtol", 0) * scale
            over = gap > bound
            worst = gap.argmax()
            assert not over.any(), (
                f"{self} {name}: {int(over.sum())} of {over.numel()} values off, "
                f"largest error {gap.max():.3g} where {bound.flatten()[worst]:.3g} is allowed"
            )
        if "max_fraction_off" in entry:
            share = (gap > 0).double().mean().item()
            assert share <= entry["max_fraction_off"], (
                f"{self} {name}: {share:.2%} of values off, {entry['max_fraction_off']:.2%} allowed"
            )

    def optional(self, name: str) -> bool:
        """Tell whether `case.json` calls the tensor optional."""
        lines = self.spec.get("tensors") or {}
        line = lines.get(name)
        if line is None:  # a line may stand for several tensors
            line = next((text for key, text in lines.items() if fnmatchcase(name, key)), "")
        return re.search(r"\boptional\b", str(line), re.IGNORECASE) is not None

    def unused(self) -> list[str]:
        """List the tensors that no test has read so far and that are not optional."""
        return [n for n in self._stored if n not in self.used and not self.optional(n)]


def watched(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Run, and return what every module gave out, by its name; under "" what `run` returned."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _module, _inputs, output: outputs.__setitem__(name, output)

    handles = [module.register_forward_hook(keep(n)) for n, module in model.named_modules() if n]
    try:
        outputs[""] = run()
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _names(name: str, kind: str) -> bool:
    # A twin may add to the name ("ar_base_tiny_2"), but no letter may touch the kind's own.
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(kind)}(?![A-Za-z])", name) is not None


def _is_of_kind(kind: str, folder: str, spec: dict[str, Any]) -> bool:
    if _names(folder, kind) or "case" in spec:
        return _names(folder, kind) or _names(str(spec["case"]), kind)
    if any(_names(folder, other) for other in _TELLING):
        return False
    return kind == next((one for one, fields in _TELLING.items() if fields <= spec.keys()), None)


@cache
def _found(root: Path, kind: str) -> tuple[Case, ...]:
    cases = []
    for file in sorted(root.glob("*/case.json")):
        spec = json.loads(file.read_text(encoding="utf-8"))
        if _is_of_kind(kind, file.parent.name, spec):
            cases.append(Case(kind, file.parent, spec))
    return tuple(cases)


def cases(kind: str) -> list[Any]:
    """List the cases of a kind, for `parametrize`; the same objects at each call.

    A root named by $WORLDLINE_GOLDEN may hold only some kinds: the others then give an empty list,
    whose test `conftest.py` removes. The reduced copy gives a skip. Anywhere else it is an error.
    """
    root = golden_root()
    found = list(_found(root, kind))
    if found:
        return found
    if os.environ.get("WORLDLINE_GOLDEN"):
        if not root.is_dir():
            raise NotADirectoryError(f"WORLDLINE_GOLDEN is {root}, which is not a folder")
        return []
    if root == REDUCED:
        skip = pytest.mark.skip(reason=f"{kind} is not in the reduced copy of the golden cases")
        return [pytest.param(None, marks=skip, id=kind)]
    raise LookupError(f"no golden case of kind {kind!r} in {root}")
