"""Every released checkpoint that is known, read from `catalog.toml`; needs no torch."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from worldline.errors import did_you_mean

BUNDLED_PREFIX = "tiny-"
APACHE_LICENCE = "Apache-2.0"

_WORLDS = ("autoregressive", "diffusion text", "diffusion video", "diffusion, other", "flow")

Presence = Literal["present", "other size", "partial", "absent"]
Layouts = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class File:
    """One released file.

    Attributes:
        name: path below the folder.
        nbytes: bytes of its tensors, the file is a little larger; 0 if unknown.
        md5: digest of the whole file; "" if none is published.
    """

    name: str
    nbytes: int = 0
    md5: str = ""


@dataclass(frozen=True, kw_only=True)
class FlowModel:
    """One of the released models of Cosmos-Predict2.5, which differ in nothing but values.

    Attributes:
        name: name that it is asked for by.
        repository: its repository on the hub.
        revision: commit of the repository.
        file: path below the repository's folder.
        nbytes: bytes of its tensors.
        experiment: name of the training run that it comes from.
        schedule: schedule of its noise levels.
        known_timestep: timestep of conditioning frames; None for that of all frames.
    """

    name: str
    repository: str
    revision: str
    file: str
    nbytes: int
    experiment: str
    schedule: str = "shifted"
    known_timestep: float | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One released checkpoint; `catalog.toml` describes its fields."""

    name: str
    family: str
    repository: str
    destination: str
    folders: tuple[str, ...]
    files: tuple[File, ...]
    layouts: Layouts
    parameters: int = 0
    licence: str = "NVIDIA Open Model License"
    preset: str = ""
    needs: tuple[str, ...] = ()
    command: str = ""
    failure_rates: tuple[int, int] | None = None
    models: tuple[FlowModel, ...] = ()
    revision: str | None = None
    fetch: Layouts = (("model.pt",), ("model*.safetensors",))
    fetch_beside: tuple[str, ...] = ("config.json", "LICENSE*")
    fetch_never: tuple[str, ...] = ()
    fetch_1_0: Layouts | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the first layout whose files are all known; 0 if there is none."""
        sizes = {file.name: file.nbytes for file in self.files}
        for layout in self.layouts:
            if all(sizes.get(name) for name in layout):
                return sum(sizes[name] for name in layout)
        return 0

    def presence(self, checkpoint_dir: str | Path) -> tuple[Presence, Path | None]:
        """State of the checkpoint on this machine, by names and sizes alone, and its folder.

        "other size" is a whole checkpoint under the released name, but far smaller than it.
        """
        sizes = {file.name: file.nbytes for file in self.files}
        paths = [Path(checkpoint_dir) / folder for folder in self.folders]
        present = [path for path in paths if path.is_dir()]
        for path in present:
            for layout in self.layouts:
                if all(_holds(path, pattern, sizes.get(pattern) or 1) for pattern in layout):
                    small = sum(_size(path, pattern) for pattern in layout) < self.nbytes / 2
                    return "other size" if small else "present", path
        return ("partial", present[0]) if present else ("absent", None)


def _holds(folder: Path, pattern: str, nbytes: int) -> bool:
    return any(path.is_file() and path.stat().st_size >= nbytes for path in folder.glob(pattern))


def _size(folder: Path, pattern: str) -> int:
    """Bytes of all that fits, the other ranks of a tensor-parallel set included."""
    return sum(path.stat().st_size for path in folder.glob(pattern.replace("_mp_0", "_mp_*")))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _read() -> tuple[Entry, ...]:
    data = tomllib.loads(Path(__file__).with_name("catalog.toml").read_text())
    entries = []
    for own in data["checkpoints"]:
        fields = {**data["families"].get(own["family"], {}), **own}
        name = fields["name"]
        fields.setdefault("repository", f"nvidia/{name}")
        fields.setdefault("destination", name)
        fields.setdefault("folders", [name])
        models = [
            FlowModel(**model, repository=fields["repository"])
            for model in fields.get("models", ())
        ]
        files = [File(model.file, model.nbytes) for model in models]
        files += [File(**file) for file in fields.get("files", ())]
        layouts = [[model.file] for model in models]
        layouts += fields.get("layouts") or [[file.name for file in files]]
        fields |= {"models": models, "files": files, "layouts": layouts}
        entries.append(Entry(**{field: _tuples(value) for field, value in fields.items()}))
    return tuple(entries)


ENTRIES = _read()
_NAMED = {entry.name: entry for entry in ENTRIES}
_DECODER = _NAMED["Cosmos-Predict1-7B-Decoder-DV8x16x16ToCV8x8x8-720p"]
_FLOW = _NAMED["Cosmos-Predict2.5-2B"]

# Folders of the diffusion decoder of the autoregressive models.
DECODERS: dict[str, str] = {"Predict1": _DECODER.folders[0], "1.0": _DECODER.folders[1]}
# Released models of Predict2.5, the default one first, and repository and revision of the tokenizer
# that they share.
FLOW_MODELS = tuple(model for entry in ENTRIES for model in entry.models)
FLOW_TOKENIZER = (_FLOW.repository, _FLOW.revision or "")


def find(folder: str) -> Entry | None:
    """Entry of this name, or with a folder of it, of any generation.

    A post-trained model, such as "…_post-trained" or "…_post-trained-4gpu_80gb", is an instance of
    the one that it was made from.
    """
    names = {folder, folder.partition("_post-trained")[0]}
    return next((entry for entry in ENTRIES if names & {entry.name, *entry.folders}), None)


def find_flow_model(name: str) -> FlowModel | None:
    """Released model of Predict2.5 of this name."""
    return next((model for model in FLOW_MODELS if model.name == name), None)


def advice(name: str) -> str:
    """End of a message about a model that is not there; "" if nothing is known of it."""
    if (entry := find(name)) is not None:
        if not entry.command and entry.family.startswith(_WORLDS):
            return f"; this version does not run {entry.name}: see `worldline models`"
        if "_post-trained" in name:
            return f"; it is what post-training makes of {entry.name}"
        runs = f", and `worldline {entry.command}` runs it" if entry.command else ""
        return f"; `worldline checkpoints download {name}` fetches it{runs}"
    return did_you_mean(name, [folder for entry in ENTRIES for folder in entry.folders], 0.8)


def is_bundled(name: str) -> bool:
    """Whether this is the name of a model that ships with the package."""
    return name.startswith(BUNDLED_PREFIX)
