"""Where the golden cases are; the tests that need one make their own files where it is absent."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def golden() -> Path:
    """The folder of golden cases; it may lack any of them."""
    root = Path(__file__).resolve().parents[2]
    shared = root.parent / "shared" / "golden"
    named = os.environ.get("WORLDLINE_GOLDEN")
    if named:
        return Path(named)
    return shared if shared.is_dir() else root / "tests" / "golden" / "cases"
