"""A name or a path to the folders of a world: bundled, released or of the user; needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
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
    """Location of a model.

    Attributes:
        named: folder of its transformer, or the file.
        roots: folders that hold the folders of its other parts, in order of preference.
        bundled: whether it ships with the package.
        released: model of Predict2.5 as whose name it was asked for.
    """

    named: Path
    roots: tuple[Path, ...]
    bundled: bool = False
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
        """First folder of one of these names below a root."""
        folders = (root / name for root in self.roots for name in names)
        return next((folder for folder in folders if folder.is_dir()), None)

    def chosen(self, name: str | Path, flag: str) -> Path:
        """Folder or file that `flag` names: below a root, or a path.

        Raises:
            CheckpointError: there is none.
        """
        for path in (*(root / name for root in self.roots), Path(name)):
            if path.exists():
                return path
        raise CheckpointError(f"no folder {name} (--{flag}), nor is it in {self.searched}")


def locate(
    name: str | PathLike[str], checkpoint_dir: str | PathLike[str], *, tokenizer: bool = False
) -> Place:
    """Place of a model, by its name alone; of its folder only released names need a look inside.

    Args:
        name: "tiny-…" for a bundled model, a released name such as "2B/post-trained", a folder's
            name below `checkpoint_dir`, or a path of a folder or a file.
        checkpoint_dir: folder of the models, the other parts too.
        tokenizer: whether a bundled name means a tokenizer.

    Raises:
        CheckpointError: there is none.
    """
    name, checkpoint_dir = str(name), Path(checkpoint_dir)
    if is_bundled(name):
        known = bundled_tokenizers() if tokenizer else bundled_names()
        if name not in known:
            kind = "tokenizer" if tokenizer else "model"
            hint = did_you_mean(name, known, 0.8)
            names = ", ".join(known) or "none"
            raise CheckpointError(f"there is no bundled {kind} {name}; there are: {names}{hint}")
        return Place(BUNDLED / name.removeprefix(BUNDLED_PREFIX), (BUNDLED,), bundled=True)
    if (released := find_flow_model(name)) is not None:
        return _locate_released(released, checkpoint_dir)
    for path in (checkpoint_dir / name, Path(name)):
        if path.is_dir() or path.is_file():
            folder = path.parent if path.is_file() else path
            if folder.name == "transformer":
                folder = folder.parent
            return Place(path, tuple(dict.fromkeys((checkpoint_dir, folder.parent))))
    hint = advice(Path(name).name) or _released_names(name)
    if not checkpoint_dir.is_dir():
        raise CheckpointError(
            f"no checkpoint folder {checkpoint_dir} (--checkpoint_dir), so no {name} in it{hint}"
        )
    folders = sorted(path.name for path in checkpoint_dir.iterdir() if path.is_dir())
    raise CheckpointError(
        f"no folder or file {checkpoint_dir / name}; {checkpoint_dir} holds: "
        f"{', '.join(folders) or 'no folder'}{hint}"
    )


def _locate_released(model: FlowModel, checkpoint_dir: Path) -> Place:
    """Place of a released model: its file or folder in the repository's, or diffusers' folder."""
    repositories = released_folders(checkpoint_dir, model.repository, model.revision)
    for repository in repositories:
        # Of a repository in diffusers' layout only the first model was released.
        whole = [repository] if model is FLOW_MODELS[0] and holds_diffusers(repository) else []
        file = repository / model.file
        for named in (file, file.parent, *whole):
            if named.exists():
                roots = dict.fromkeys((checkpoint_dir, repository, repository.parent))
                return Place(named, tuple(roots), released=model)
    fetch = f"; `worldline checkpoints download {model.name}` fetches it"
    hint = next(filter(None, map(unfinished, repositories)), fetch)
    if not checkpoint_dir.is_dir():
        hint = f"; there is no checkpoint folder {checkpoint_dir} (--checkpoint_dir){fetch}"
    searched = " or ".join(map(str, repositories)) or checkpoint_dir / model.repository
    raise CheckpointError(f"no {model.name}: there is no {model.file} in {searched}{hint}")


def _released_names(name: str) -> str:
    """End of a message about a name like those of Predict2.5, such as "2B" or "2B/distilled"."""
    names = [model.name for model in FLOW_MODELS]
    whole = next((known for known in names if known.startswith(f"{name}/")), name)
    hint = did_you_mean(whole, names, 0.8)
    similar = hint or any(known.split("/")[0] == name.split("/")[0] for known in names)
    return f"; released names are {', '.join(names)}{hint}" if similar else ""


def bundled_configs(command: str = "") -> dict[str, Path]:
    """The config.json of each bundled world, by its name.

    Args:
        command: beginning of the command that runs it, such as "diffusion".
    """
    configs = {}
    for path in sorted(BUNDLED.glob("*/config.json")):
        folder = path.parent.name
        entry = find(folder)
        runs = entry is not None and entry.command.startswith(command)
        if "Tokeniz" not in folder and folder not in DECODERS.values() and (runs or not command):
            configs[BUNDLED_PREFIX + folder] = path
    return configs


def bundled_names() -> list[str]:
    """Names of the bundled worlds."""
    return list(bundled_configs())


def bundled_tokenizers() -> list[str]:
    """Names of the bundled tokenizers."""
    return [BUNDLED_PREFIX + path.name for path in sorted(BUNDLED.glob("*Tokeniz*"))]


def has_decoder(name: str) -> bool:
    """Whether an autoregressive world decodes by diffusion by default.

    A released one does, and a bundled one if a diffusion decoder is bundled.
    """
    return not is_bundled(name) or any((BUNDLED / folder).is_dir() for folder in DECODERS.values())
