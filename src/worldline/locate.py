"""A name or a path to the folders of a world: bundled, released or of the user; needs no torch."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import product
from os import PathLike
from pathlib import Path

from worldline.catalog import BUNDLED_PREFIX, DECODERS, FLOW_MODELS, FlowModel, advice
from worldline.errors import CheckpointError, option
from worldline.files import check_path
from worldline.repositories import (
    holds_diffusers,
    hub_cache,
    released_folders,
    snapshots,
    unfinished,
)

BUNDLED = Path(__file__).parent / "bundled"


@dataclass(frozen=True)
class Place:
    """Location of a model.

    Attributes:
        named: folder of its transformer, or the file.
        roots: folders that hold the folders of its other parts, in order of preference.
        bundled: whether it ships with the package.
        released: model of Predict2.5 whose name it was asked for by.
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
        wanted = product(self.roots, names)
        return next((path for each in wanted for path in released_folders(*each)), None)

    def find(self, names: Collection[str]) -> Path:
        """The folder that `below` gives.

        Raises:
            CheckpointError: there is none.
        """
        if (folder := self.below(names)) is None:
            raise CheckpointError(f"neither {' nor '.join(names)} is in {self.searched}")
        return folder

    def chosen(self, name: str | Path, field: str, thing: str = "folder") -> Path:
        """Folder or file that the option `field` names: below a root, or a path.

        Raises:
            CheckpointError: there is none.
        """
        cached = (path for root in self.roots for path in snapshots(root, str(name)))
        for path in (*(root / name for root in self.roots), Path(name), *cached):
            if path.exists():
                return path
        raise CheckpointError(f"no {thing} {name} ({option(field)}), nor is it in {self.searched}")


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
        InputError: a name that no file can have, such as a URL.
    """
    name, checkpoint_dir = str(check_path(name)), Path(check_path(checkpoint_dir))
    if name.startswith(BUNDLED_PREFIX):
        known = bundled_tokenizers() if tokenizer else bundled_names()
        if name not in known:
            raise CheckpointError(
                f"there is no bundled model {name}; there are: {', '.join(known)}"
            )
        return Place(BUNDLED / name.removeprefix(BUNDLED_PREFIX), (BUNDLED,), bundled=True)
    for model in FLOW_MODELS:
        if model.name == name:
            return _locate_released(model, checkpoint_dir)
    roots = (checkpoint_dir, hub_cache())
    cached = (path for root in roots for path in snapshots(root, name))
    for path in (checkpoint_dir / name, Path(name), *cached):
        if path.exists():
            if path.name.startswith("models--"):  # a repository in a hub cache
                repository = path.name.removeprefix("models--").replace("--", "/")
                path = next(iter(snapshots(path.parent, repository)), path)
            folder = path.parent if path.is_file() else path
            folder = folder.parent if folder.name == "transformer" else folder
            return Place(path, tuple(dict.fromkeys((checkpoint_dir, folder.parent, *roots))))
    hint = advice(Path(name).name)
    if not hint and any(each.name.startswith(f"{name.split('/')[0]}/") for each in FLOW_MODELS):
        hint = f"; released models are {', '.join(each.name for each in FLOW_MODELS)}"
    hint = hint or "; `worldline models` lists those that can be downloaded"
    folders = sorted(path.name for path in checkpoint_dir.glob("*") if path.is_dir())
    raise CheckpointError(
        f"no folder or file {checkpoint_dir / name}; {checkpoint_dir} "
        f"({option('checkpoint_dir')}) holds: {', '.join(folders) or 'no folder'}{hint}"
    )


def _locate_released(model: FlowModel, checkpoint_dir: Path) -> Place:
    """Place of a released model: its file or folder in the repository's, or diffusers' folder."""
    wanted = model.repository, model.revision
    cache = hub_cache()
    repositories = [f for root in (checkpoint_dir, cache) for f in released_folders(root, *wanted)]
    for repository in repositories:
        # in diffusers' layout, a repository's first model alone was released
        whole = [repository] if model is FLOW_MODELS[0] and holds_diffusers(repository) else []
        file = repository / model.file
        for named in (file, file.parent, *whole):
            if named.exists():
                roots = dict.fromkeys((checkpoint_dir, repository, repository.parent, cache))
                return Place(named, tuple(roots), released=model)
    fetch = f"; `worldline checkpoints download {model.name}` fetches it"
    hint = next(filter(None, map(unfinished, repositories)), fetch)
    searched = " or ".join(map(str, repositories)) or checkpoint_dir / model.repository
    raise CheckpointError(f"no {model.name}: there is no {model.file} in {searched}{hint}")


def bundled_names() -> list[str]:
    """Names of the bundled worlds."""
    others = ("Tokeniz", *DECODERS.values())
    folders = [path.parent.name for path in sorted(BUNDLED.glob("*/config.json"))]
    return [f"{BUNDLED_PREFIX}{n}" for n in folders if not any(other in n for other in others)]


def bundled_tokenizers() -> list[str]:
    """Names of the bundled tokenizers."""
    return [BUNDLED_PREFIX + path.name for path in sorted(BUNDLED.glob("*Tokeniz*"))]
