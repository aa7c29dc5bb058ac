"""Where worlds lie: in the package, below a checkpoint folder, or at a path; needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from worldline.catalog import (
    BUNDLED_PREFIX,
    DECODERS,
    FLOW_MODELS,
    FlowModel,
    advice,
    find,
    find_flow_model,
    is_bundled,
)
from worldline.errors import CheckpointError, did_you_mean
from worldline.files import holds_diffusers, released_folders, unfinished

BUNDLED = Path(__file__).parent / "bundled"


@dataclass(frozen=True)
class Place:
    """Where a world lies.

    Attributes:
        named: the folder of its transformer, or the file.
        roots: folders that hold the folders of its other parts, in order of preference.
        bundled: whether it ships with the package.
        released: the model of Predict2.5 that it was asked for as.
    """

    named: Path
    roots: tuple[Path, ...]
    bundled: bool
    released: FlowModel | None = None

    @property
    def folder(self) -> Path:
        """Folder of the transformer."""
        return self.named.parent if self.named.is_file() else self.named

    @property
    def searched(self) -> str:
        """The roots, for a message."""
        return " or ".join(map(str, self.roots))

    def below(self, names: Iterable[str]) -> Path | None:
        """Return the first folder of one of these names below a root; None if there is none."""
        for root in self.roots:
            for name in names:
                if (root / name).is_dir():
                    return root / name
        return None

    def chosen(self, name: str | Path, flag: str) -> Path:
        """Return the folder or file that `flag` names: below a root, or a path of its own.

        Raises:
            CheckpointError: there is none.
        """
        for path in (*(root / name for root in self.roots), Path(name)):
            if path.exists():
                return path
        raise CheckpointError(f"no folder {name} (--{flag}), nor is it in {self.searched}")


def find_place(model: str | Path, checkpoint_dir: str | Path) -> Place:
    """Find a world by name alone; nothing in its folder is looked at.

    Args:
        model: "tiny-…" for a bundled one, a folder's name below `checkpoint_dir`, or a path of a
            folder or of a file.
        checkpoint_dir: holds the folders, those of the other parts too.

    Raises:
        CheckpointError: there is none.
    """
    if (released := find_flow_model(str(model))) is not None:
        return _find_released(released, Path(checkpoint_dir))
    if not is_bundled(str(model)):
        named = find_model(Path(model), Path(checkpoint_dir))
        folder = named.parent if named.is_file() else named
        if folder.name == "transformer":
            folder = folder.parent
        return Place(named, tuple(dict.fromkeys((Path(checkpoint_dir), folder.parent))), False)
    return Place(_find_bundled("model", str(model), bundled_names()), (BUNDLED,), True)


def _find_released(model: FlowModel, checkpoint_dir: Path) -> Place:
    """Return where a released model lies: its folder in the repository's, or diffusers' folder."""
    roots = released_folders(checkpoint_dir, model.repository, model.revision)
    for root in roots:
        own = (root / model.file).parent
        if (root / model.file).is_file():
            own = root / model.file
        if own.exists():
            return Place(own, _around(checkpoint_dir, root), False, model)
    if model is FLOW_MODELS[0]:  # the only one that was released in diffusers' layout
        for root in roots:
            if holds_diffusers(root):
                return Place(root, _around(checkpoint_dir, root), False, model)
    fetch = f"; `worldline checkpoints download {model.name}` fetches it"
    left = next(filter(None, map(unfinished, roots)), fetch)
    if not checkpoint_dir.is_dir():
        left = f"; there is no checkpoint folder {checkpoint_dir} (--checkpoint_dir){fetch}"
    raise CheckpointError(
        f"no {model.name}: there is no {model.file} in "
        f"{' or '.join(map(str, roots)) or checkpoint_dir / model.repository}{left}"
    )


def _around(checkpoint_dir: Path, repository: Path) -> tuple[Path, ...]:
    return tuple(dict.fromkeys((checkpoint_dir, repository, repository.parent)))


def find_tokenizer(name: str, checkpoint_dir: str | Path) -> Path:
    """Return the folder, or the file, of a tokenizer.

    Args:
        name: of a folder below `checkpoint_dir`, a path, or tiny-… for a bundled one.
        checkpoint_dir: holds the folders of models.

    Raises:
        CheckpointError: there is none of this name.
    """
    if not is_bundled(name):
        return find_model(Path(name), Path(checkpoint_dir))
    return _find_bundled("tokenizer", name, bundled_tokenizers())


def _find_bundled(kind: str, name: str, have: Sequence[str]) -> Path:
    if name not in have:
        there = f"{', '.join(have) or 'none'}{did_you_mean(name, have, 0.8)}"
        raise CheckpointError(f"there is no bundled {kind} {name}; there are: {there}")
    return BUNDLED / name.removeprefix(BUNDLED_PREFIX)


def find_model(model: Path, checkpoint_dir: Path) -> Path:
    """Return the folder, or the file, that `model` names.

    Raises:
        CheckpointError: there is none.
    """
    below = checkpoint_dir / model
    for path in (below, model):
        if path.is_dir() or path.is_file():
            return path
    also = advice(model.name)
    released = [one.name for one in FLOW_MODELS]
    if model.parts[:1] in {Path(name).parts[:1] for name in released}:
        also = f"; released names are {', '.join(released)}"
    if not checkpoint_dir.is_dir():
        raise CheckpointError(
            f"no checkpoint folder {checkpoint_dir} (--checkpoint_dir), so no {model} in it{also}"
        )
    have = sorted(path.name for path in checkpoint_dir.iterdir() if path.is_dir())
    raise CheckpointError(
        f"no folder {below}; {checkpoint_dir} holds: {', '.join(have) or 'no folder'}{also}"
    )


def bundled_configs(command: str = "") -> dict[str, Path]:
    """Return the config.json of each world that ships with the package, by its name.

    Args:
        command: that runs it, such as "diffusion"; "" for any.
    """
    return {
        BUNDLED_PREFIX + path.parent.name: path
        for path in sorted(BUNDLED.glob("*/config.json"))
        if "Tokeniz" not in path.parent.name
        and path.parent.name not in DECODERS.values()
        and _is_run_by(command, path.parent.name)
    }


def _is_run_by(command: str, folder: str) -> bool:
    entry = find(folder)
    return not command or (entry is not None and entry.command.startswith(command))


def has_decoder(model: str) -> bool:
    """Tell whether a world decodes its tokens by diffusion unless told otherwise.

    A released one does, and a bundled one where a diffusion decoder ships with the package.
    """
    return not is_bundled(model) or any((BUNDLED / name).is_dir() for name in DECODERS.values())


def bundled_names() -> list[str]:
    """Return the names of the worlds that ship with the package."""
    return list(bundled_configs())


def bundled_tokenizers() -> list[str]:
    """Return the names of the tokenizers that ship with the package."""
    return [BUNDLED_PREFIX + path.name for path in sorted(BUNDLED.glob("*Tokeniz*"))]
