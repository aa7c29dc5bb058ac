"""What is public is importable, documented, and no more than that."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import worldline


def test_all_is_importable_and_nothing_else_is_public() -> None:
    for name in worldline.__all__:
        assert getattr(worldline, name) is getattr(worldline, name)
    assert list(worldline.__all__) == sorted(worldline.__all__)
    script = (
        "import sys, types, worldline\n"
        "dir(worldline)\n"
        "assert 'torch' not in sys.modules\n"
        "for name in worldline.__all__: getattr(worldline, name)\n"
        "worldline.load, worldline.World\n"
        "public = {n for n in dir(worldline) if not n.startswith('_')\n"
        "          and not isinstance(getattr(worldline, n), types.ModuleType)}\n"
        "extra = public - set(worldline.__all__) - {'Any', 'TYPE_CHECKING', 'annotations',\n"
        "                                           'import_module'}\n"
        "assert not extra, extra\n"
        "from worldline.world import load\n"
        "assert worldline.load is load, 'a module hides the function'\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("name", worldline.__all__)
def test_public_names_are_documented(name: str) -> None:
    found = getattr(worldline, name)
    assert inspect.getdoc(found)
    if not inspect.isclass(found):
        return
    for attribute, value in vars(found).items():
        if inspect.isfunction(value) and not attribute.startswith("_"):
            assert inspect.getdoc(value), f"{name}.{attribute}"


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        worldline.nothing  # noqa: B018


def test_errors_form_a_tree() -> None:
    assert issubclass(worldline.InputError, (worldline.Error, ValueError))
    assert issubclass(worldline.CheckpointError, worldline.InputError)
    assert issubclass(worldline.InsufficientMemoryError, worldline.InputError)
    assert worldline.GuardrailRefusal("x", "video").exit_code == 3
    assert worldline.InputError.exit_code == 2
    assert worldline.Error.exit_code == 1
