"""Layouts of networks on disk, to convert one to another: names of tensors, files beside them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from worldline.errors import CheckpointError
from worldline.weights.keymap import KeyMap
from worldline.weights.networks import DIFFUSERS_FILES, Network

MODEL, DIFFUSERS_FILE = "model.pt", DIFFUSERS_FILES[0]


@dataclass(frozen=True)
class Layout:
    """A layout of one network.

    Attributes:
        keys: from its names of tensors to ours.
        settings: content of config.json; {} where it needs none.
        file: name of the weights in a folder of their own.
        beside: name of another file -> content.
    """

    keys: KeyMap
    settings: Mapping[str, Any] = field(default_factory=dict)
    file: str = MODEL
    beside: Mapping[str, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, network: Network[Any], file: str) -> Self:
        """That which a network is in, with the files that lie beside it."""
        present = filter(Path.is_file, network.beside)
        return cls(network.keys, file=file, beside={p.name: p.read_bytes() for p in present})

    @property
    def files(self) -> dict[str, bytes]:
        """Every file beside the weights."""
        config = {"config.json": f"{json.dumps(self.settings, indent=2)}\n".encode()}
        return {**(config if self.settings else {}), **self.beside}

    def refuse_unless_equal(self, found: Any, network: Network[Any]) -> Self:
        """Itself, where a network that is read from it has the configuration of another.

        Raises:
            CheckpointError: it has no place for a number that no tensor implies.
        """
        for name, needed in vars(network.config).items():
            if (implied := getattr(found, name)) != needed:
                raise CheckpointError(
                    f"{network.path}: {name} is {needed!s:.60}, for which the layout has no place "
                    f"(it implies {implied!s:.60})"
                )
        return self
