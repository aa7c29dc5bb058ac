"""Repositories of released models: folders, hub caches, layouts, downloads; needs no torch."""

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from worldline.errors import CheckpointError
from worldline.files import UNFINISHED

# a whole transformer in NVIDIA's layout, in order of preference
TRANSFORMER_FILES = ("model.safetensors", "model.safetensors.index.json", "model.pt")
WEIGHTS = (".pt", ".pth", ".jit", ".safetensors", ".bin", ".ckpt")
_DIFFUSERS_FILE = "diffusion_pytorch_model"
_MOST_FILES = 100_000  # that are looked at for those of a broken download


def hub_cache() -> Path:
    """Folder in which huggingface_hub keeps repositories, by the variables that it reads."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(os.path.expandvars(hub or f"{home}/hub")).expanduser()


def snapshots(root: Path, name: str, revision: str = "") -> list[Path]:
    """Snapshots of a repository in a hub cache.

    Those with weights come first; of them `revision`, then `main`, then the newest. A name without
    an owner is NVIDIA's.
    """
    cache = root / f"models--{(name if '/' in name else f'nvidia/{name}').replace('/', '--')}"
    try:
        current = (cache / "refs" / "main").read_text().strip()
    except (OSError, ValueError):
        current = ""

    def preference(path: Path) -> tuple[bool, bool, bool, int]:
        # a link whose blob is missing is no file
        whole = any(p.suffix in WEIGHTS and p.is_file() for p in path.rglob("*"))
        named = path.name == revision, path.name == current
        return whole, *named, path.stat().st_mtime_ns

    return sorted(filter(Path.is_dir, cache.glob("snapshots/*")), key=preference, reverse=True)


def model_name(folder: Path) -> str:
    """Name of a model's folder; of a snapshot in a hub cache that of the repository."""
    folder = folder.absolute()
    if folder.parent.name == "snapshots" and "--" in folder.parent.parent.name:
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name


def released_folders(root: Path, name: str, revision: str = "") -> list[Path]:
    """Folders of a released model: by its whole name, in a hub cache, by its last name.

    The name is that of the hub, such as "nvidia/Cosmos-Predict2.5-2B"; `revision` is the snapshot
    that is preferred in a cache.
    """
    folders = [root / name, *snapshots(root, name, revision), root / Path(name).name]
    return [path for path in folders if path.is_dir()]


def repository_folders(name: str, roots: Sequence[Path]) -> list[Path]:
    """Folders of a released model below the roots and in the user's hub cache, preferred first."""
    places = dict.fromkeys((*roots, hub_cache()))
    return [folder for root in places for folder in released_folders(root, name)]


def find_repository(name: str, roots: Sequence[Path]) -> Path:
    """The preferred one of `repository_folders`; CheckpointError without any."""
    for folder in repository_folders(name, roots):
        return folder
    raise CheckpointError(f"{name} is missing: no folder of it in {' or '.join(map(str, roots))}")


def holds_diffusers(path: Path) -> bool:
    """Whether a folder, or a file in it, has diffusers' layout of a transformer."""
    folders = (path.parent,) if path.is_file() else (path, path / "transformer")
    return any(any(f.glob(f"{_DIFFUSERS_FILE}*")) or _is_diffusers(f) for f in folders)


def _is_diffusers(folder: Path) -> bool:
    """Whether a config.json is of diffusers."""
    try:
        with (folder / "config.json").open("rb") as file:
            return b'"_class_name"' in file.read(1 << 20)
    except OSError:
        return False


def unfinished(folder: Path) -> str:
    """End of a message about absent files that names those of a broken download; "" without any."""
    # downloads of a hub cache are in a folder beside
    beside = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    every = (path for root in {folder, beside} for path in islice(root.rglob("*"), _MOST_FILES))
    names = sorted({path.name for path in every if path.suffix in UNFINISHED})[:3]
    return f"; a download was not finished ({', '.join(names)}): download it again" if names else ""
