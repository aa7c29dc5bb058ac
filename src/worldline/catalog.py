"""Every released checkpoint that is known, read from `catalog.toml`; needs no torch."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from worldline.errors import did_you_mean
from worldline.repositories import hub_cache, model_name, released_folders

BUNDLED_PREFIX = "tiny-"
_FIRST = "Cosmos-1.0-"  # how names of the first generation begin

Generation = Literal["1.0", "Predict1"]
Presence = Literal["present", "other size", "partial", "absent"]
Layouts = tuple[tuple[str, ...], ...]


class _Record(BaseModel):
    """A table of `catalog.toml`, which describes its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class File(_Record):
    """One released file; `nbytes` is 0 and `md5` "" where they are unknown."""

    name: str
    nbytes: int = 0
    md5: str = ""


class FlowModel(_Record):
    """One of the released models of Cosmos-Predict2.5, which differ in nothing but values."""

    name: str
    repository: str
    revision: str
    file: str
    nbytes: int
    experiment: str
    schedule: str = "shifted"
    known_timestep: float | None = None


class Entry(_Record):
    """One released checkpoint."""

    name: str
    family: str  # table of catalog.toml, not a name in FAMILIES
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
    supported: bool = True
    by_size: bool = False
    failure_rates: tuple[int, int] | None = None
    models: tuple[FlowModel, ...] = ()
    revision: str | None = None
    fetch: Layouts = (("model.pt",), ("model*.safetensors",))
    fetch_beside: tuple[str, ...] = ("config.json", "LICENSE*")
    fetch_never: tuple[str, ...] = ()
    fetch_1_0: Layouts | None = None

    @property
    def first_generation(self) -> Entry | None:
        """The same of Cosmos 1.0, which has other repositories; None where it has no such."""
        for name in self.folders:
            if name.startswith(_FIRST):
                place = {"repository": f"nvidia/{name}", "destination": name}
                return self.model_copy(update={**place, "fetch": self.fetch_1_0 or self.fetch})
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of the first layout whose files are all known; 0 if there is none."""
        sizes = {file.name: file.nbytes for file in self.files}
        known = (layout for layout in self.layouts if all(map(sizes.get, layout)))
        return sum(sizes[name] for name in next(known, ()))

    def presence(self, checkpoint_dir: str | Path) -> tuple[Presence, Path | None]:
        """State of the checkpoint on this machine, by names and sizes alone, and its folder.

        "other size" is a whole checkpoint under the released name, but far smaller than it.
        """
        needed = {file.name: file.nbytes for file in self.files}
        places = product((Path(checkpoint_dir), hub_cache()), self.folders)
        present = [path for place in places for path in released_folders(*place)]
        for path, layout in product(present, self.layouts):
            sizes = {name: [file.stat().st_size for file in path.glob(name)] for name in layout}
            if all(max(sizes[name], default=0) >= (needed.get(name) or 1) for name in layout):
                small = sum(map(sum, sizes.values())) < self.nbytes / 2
                return "other size" if small else "present", path
        return ("partial", present[0]) if present else ("absent", None)


def _read() -> Iterator[Entry]:
    data = tomllib.loads(Path(__file__).with_name("catalog.toml").read_text())
    for table in data["checkpoints"]:
        name, models = table["name"], table.get("models", [])
        table = {**data["families"].get(table["family"], {}), **table}
        table = {"repository": f"nvidia/{name}", "destination": name, "folders": [name], **table}
        table["models"] = [{**model, "repository": table["repository"]} for model in models]
        files = [{"name": model["file"], "nbytes": model["nbytes"]} for model in models]
        table["files"] = files + table.get("files", [])
        whole = [[file["name"] for file in table["files"]]]
        table["layouts"] = [[model["file"]] for model in models] + table.get("layouts", whole)
        yield Entry(**table)


ENTRIES = tuple(_read())
_NAMED = {entry.name: entry for entry in ENTRIES}
_DECODER = _NAMED["Cosmos-Predict1-7B-Decoder-DV8x16x16ToCV8x8x8-720p"]
_FLOW = _NAMED["Cosmos-Predict2.5-2B"]

# folders of the diffusion decoder of the autoregressive models
DECODERS: dict[str, str] = dict(zip(("Predict1", "1.0"), _DECODER.folders, strict=True))
# released models of Predict2.5, the default one first; repository and revision of their tokenizer
FLOW_MODELS = tuple(model for entry in ENTRIES for model in entry.models)
FLOW_TOKENIZER = (_FLOW.repository, _FLOW.revision or "")


def find(folder: str) -> Entry | None:
    """Entry of this name, or with a folder of it, of any generation.

    A post-trained model, such as "…_post-trained" or "…_post-trained-4gpu_80gb", is an instance of
    the one that it was made from.
    """
    names = {folder, folder.partition("_post-trained")[0]}
    return next((entry for entry in ENTRIES if names & {entry.name, *entry.folders}), None)


def advice(name: str) -> str:
    """End of a message about a model that is not there; "" if nothing is known of it."""
    if (entry := find(name)) is not None:
        if not entry.supported:
            return f"; this version does not run {entry.name}: see `worldline models`"
        if "_post-trained" in name:
            return f"; it is what post-training makes of {entry.name}"
        return f"; `worldline checkpoints download {name}` fetches it"
    return did_you_mean(name, [folder for entry in ENTRIES for folder in entry.folders], 0.8)


def generation_by_name(folder: Path) -> Generation:
    """Generation in the name of a folder, or of a hub cache around it."""
    return "1.0" if _FIRST in model_name(folder) else "Predict1"
