"""Run and post-train world foundation models.

import worldline
world = worldline.load("tiny-Cosmos-Predict1-4B")
video = world.generate("in.mp4", seed=0)
video.save("out.mp4")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worldline.client import RemoteWorld, connect
    from worldline.errors import (
        CheckpointError,
        Error,
        GuardrailRefusal,
        InputError,
        InsufficientMemoryError,
        NonFiniteError,
    )
    from worldline.step import Step, Video
    from worldline.world import World, load

__all__ = [
    "CheckpointError",
    "Error",
    "GuardrailRefusal",
    "InputError",
    "InsufficientMemoryError",
    "NonFiniteError",
    "RemoteWorld",
    "Step",
    "Video",
    "World",
    "connect",
    "load",
]

# imported when used, so that `worldline --help` does not wait for torch
_MODULES = {
    "RemoteWorld": "worldline.client",
    "Step": "worldline.step",
    "Video": "worldline.step",
    "World": "worldline.world",
    "connect": "worldline.client",
    "load": "worldline.world",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("worldline")
    if name not in __all__:
        raise AttributeError(f"module 'worldline' has no attribute {name!r}")
    module = import_module(_MODULES.get(name, "worldline.errors"))
    if hasattr(module, "document"):  # for help(); commands, which come another way, need none
        module.document()
    return getattr(module, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__, "__version__"]
