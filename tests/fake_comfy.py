"""The part of ComfyUI's V3 interface that the nodes use, as far as tests look at it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from fractions import Fraction
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

TYPES = {"Boolean": "BOOLEAN", "Float": "FLOAT", "Image": "IMAGE", "Int": "INT"}
TYPES |= {"String": "STRING", "Video": "VIDEO"}


class Interrupted(BaseException):
    """What ComfyUI raises where the user has interrupted."""


@dataclass
class Slot:
    type: str
    id: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def custom(name: str) -> Any:
    return SimpleNamespace(
        Input=lambda id, **options: Slot(name, id, options),
        Output=lambda **options: Slot(name, "", options),
    )


class NodeOutput:
    def __init__(self, *args: Any, ui: Any = None) -> None:
        self.args, self.ui = args, ui


@dataclass
class Components:
    images: torch.Tensor
    frame_rate: Fraction
    audio: Any = None


@dataclass
class VideoFromComponents:
    components: Components

    def get_components(self) -> Components:
        return self.components


class Fake:
    """ComfyUI: what its nodes reported, and after how many looks the user interrupts.

    Attributes:
        progress: arguments of each call of `set_progress`.
        looks: how often a node looked whether the user has interrupted.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, models: str) -> None:
        self.progress: list[dict[str, Any]] = []
        self.looks, self.patience, self.unloads = 0, 10**6, 0
        kinds = {name: custom(kind) for name, kind in TYPES.items()}
        io = SimpleNamespace(
            Custom=custom, ComfyNode=object, NodeOutput=NodeOutput, Schema=SimpleNamespace, **kinds
        )
        execution = SimpleNamespace(set_progress=lambda **facts: self.progress.append(facts))
        modules: dict[str, dict[str, Any]] = {
            "comfy": {},
            "comfy.model_management": {
                "throw_exception_if_processing_interrupted": self.look,
                "unload_all_models": self.unload,
                "soft_empty_cache": lambda: None,
            },
            "comfy_api": {},
            "comfy_api.latest": {
                "ComfyAPISync": lambda: SimpleNamespace(execution=execution),
                "ComfyExtension": object,
                "InputImpl": SimpleNamespace(VideoFromComponents=VideoFromComponents),
                "Types": SimpleNamespace(VideoComponents=Components),
                "io": io,
                "ui": SimpleNamespace(PreviewText=str),
            },
            "folder_paths": {"models_dir": models},
        }
        for name, contents in modules.items():
            module = ModuleType(name)
            vars(module).update(contents)
            monkeypatch.setitem(sys.modules, name, module)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)

    def look(self) -> None:
        self.looks += 1
        if self.looks > self.patience:
            raise Interrupted

    def unload(self) -> None:
        self.unloads += 1
