"""Guardrails of the released models: prompts and videos are checked, faces are blurred."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from worldline.guardrails import faces, frames, language
from worldline.guardrails.base import Guardrails
from worldline.guardrails.blocklist import COSMOS1, PREDICT, Blocklist, Nearness
from worldline.repositories import find_repository, repository_folders
from worldline.weights.networks import read_network

SIGLIP = "google/siglip-so400m-patch14-384"
REPOSITORIES = ("nvidia/Cosmos-Guardrail1", "nvidia/Cosmos-1.0-Guardrail")


@dataclass(frozen=True)
class Release:
    """Guardrails of one release."""

    repositories: tuple[str, ...]  # of all but the language models, the preferred one first
    near: Nearness
    models: tuple[language.GuardModel, ...]  # the first one present is used
    rule: frames.Rule
    download: str  # arguments of `worldline checkpoints download` that fetch all files


RELEASES = {
    "1.0": Release(
        REPOSITORIES[::-1],
        COSMOS1,
        (language.AEGIS,),
        frames.PREDICT1,
        "--cosmos_version 1.0 guardrails",
    ),
    # Aegis until April 2025, in the folder `guardrail` of each model
    "Predict1": Release(
        REPOSITORIES,
        PREDICT,
        (language.LLAMA_GUARD_3, language.AEGIS),
        frames.PREDICT1,
        "guardrails",
    ),
    "predict2.5": Release(
        REPOSITORIES,
        PREDICT,
        (language.QWEN3GUARD,),
        frames.PREDICT2_5,
        "Cosmos-Guardrail1 Qwen3Guard-Gen-0.6B",
    ),
}


def load(
    name: str,
    roots: Sequence[Path],
    *,
    folder: str | Path | None = None,
    device: torch.device | str = "cpu",
    offload: bool = False,
    text: bool = True,
) -> Guardrails:
    """Load all guardrails of a release.

    Args:
        name: a key of `RELEASES`.
        roots: folders of checkpoints.
        folder: of all but the language models; found below `roots` if None.
        device: where the networks run.
        offload: the networks stay in host memory between checks.
        text: prompts are checked too.

    Raises:
        CheckpointError, OSError, ImportError, ValueError: a file is absent, damaged or of another
            model, or a package is.
    """
    release = RELEASES[name]
    home = "cpu" if offload else device
    folder = Path(folder or next(find_folders(release, roots)))
    classifiers: list[Blocklist | language.LanguageGuard] = []
    if text:
        model, places = _language_model(release, roots, folder)
        blocklist = Blocklist(folder / "blocklist", release.near)
        classifiers = [blocklist, language.LanguageGuard(model, places, home)]
    filters = folder / "video_content_safety_filter"
    siglip = find_repository(SIGLIP, [filters, *roots])
    classifier = read_network(
        frames.frame_classifier, filters / "safety_filter.pt", frames.key_map, home
    )
    video = frames.FrameFilter(frames.FrameFeatures(siglip, home), classifier, release.rule)
    retinaface = folder / "face_blur_filter/Resnet50_Final.pth"
    blur = faces.FaceBlur(read_network(faces.RetinaFace, retinaface, faces.key_map, home))
    return Guardrails(classifiers, [video], [blur], device=device, offload=offload)


def files(
    name: str, roots: Sequence[Path], *, folder: str | Path | None = None, text: bool = True
) -> list[Path]:
    """All files that decide the verdicts of `load` with the same arguments, unopened and sorted.

    Raises:
        CheckpointError: a folder is absent.
    """
    release = RELEASES[name]
    folder = Path(folder or next(find_folders(release, roots)))
    filters = folder / "video_content_safety_filter"
    parts = [filters / "safety_filter.pt", folder / "face_blur_filter/Resnet50_Final.pth"]
    parts.append(find_repository(SIGLIP, [filters, *roots]))
    if text:
        model, places = _language_model(release, roots, folder)
        repositories = filter(None, (model.released, model.adapter))
        parts += [folder / "blocklist", *(find_repository(each, places) for each in repositories)]
    paths = (path for part in parts for path in (part, *part.rglob("*")))
    return sorted(path for path in paths if path.is_file())


def _language_model(
    release: Release, roots: Sequence[Path], folder: Path
) -> tuple[language.GuardModel, list[Path]]:
    """The first language model that is present, and where its folders are looked for."""
    places = [*roots, folder, folder / "aegis"]
    present = (m for m in release.models if repository_folders(m.released, places))
    return next(present, release.models[0]), places


def find_folders(release: Release, roots: Sequence[Path]) -> Iterator[Path]:
    """Folders of the release's repositories, then those named `guardrail`, as in a model's."""
    for name in release.repositories:
        yield from repository_folders(name, roots)
    for root in roots:
        yield from sorted(root.glob("**/guardrail/"))
    find_repository(release.repositories[0], roots)  # names what is missing
