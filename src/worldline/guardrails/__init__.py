"""Guardrails of the released models: prompts and videos are checked, faces are blurred."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from worldline.errors import CheckpointError, InputError
from worldline.files import find_repository, repository_folders
from worldline.guardrails import language
from worldline.guardrails.base import Guardrails
from worldline.guardrails.blocklist import COSMOS1, PREDICT, Blocklist, Nearness
from worldline.guardrails.faces import FaceBlur, load_retinaface
from worldline.guardrails.frames import (
    PREDICT1,
    PREDICT2_5,
    FrameFeatures,
    FrameFilter,
    Rule,
    load_classifier,
)

SIGLIP = "google/siglip-so400m-patch14-384"
REPOSITORIES = ("nvidia/Cosmos-Guardrail1", "nvidia/Cosmos-1.0-Guardrail")


@dataclass(frozen=True)
class Release:
    """Guardrails of one release.

    Attributes:
        repositories: of blocklist, frame classifier and face detector, the preferred one first.
        near: near matches that the blocklist refuses.
        models: language models; the first one present is used.
        rule: of the frame classifier.
        download: arguments of `worldline checkpoints download` that fetch all files.
    """

    repositories: tuple[str, ...]
    near: Nearness
    models: tuple[language.GuardModel, ...]
    rule: Rule
    download: str


RELEASES = {
    "1.0": Release(
        REPOSITORIES[::-1],
        COSMOS1,
        (language.AEGIS,),
        PREDICT1,
        "--cosmos_version 1.0 guardrails",
    ),
    # Aegis until April 2025, in the folder `guardrail` of each model
    "Predict1": Release(
        REPOSITORIES, PREDICT, (language.LLAMA_GUARD_3, language.AEGIS), PREDICT1, "guardrails"
    ),
    "predict2.5": Release(
        REPOSITORIES,
        PREDICT,
        (language.QWEN3GUARD,),
        PREDICT2_5,
        "Cosmos-Guardrail1 Qwen3Guard-Gen-0.6B",
    ),
}


def load(
    name: str,
    roots: Sequence[Path],
    *,
    flag: str,
    folder: Path | None = None,
    device: torch.device | str = "cpu",
    offload: bool = False,
    text: bool = True,
) -> Guardrails:
    """Load all guardrails of a release.

    Args:
        name: a key of `RELEASES`.
        roots: folders of checkpoints.
        flag: option that runs without guardrails, for the message of an error.
        folder: of blocklist, frame classifier and face detector; found below `roots` if None.
        device: where the networks run.
        offload: the networks stay in host memory between checks.
        text: prompts are checked too.

    Raises:
        CheckpointError: a file is absent, damaged or of another model.
    """
    release = RELEASES[name]
    home = "cpu" if offload else device
    try:
        folder = folder or find_folder(release, roots)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder")
        classifiers: list[Blocklist | language.LanguageGuard] = []
        if text:
            classifiers.append(Blocklist(folder / "blocklist", release.near))
            classifiers.append(_language_guard(release, [*roots, folder, folder / "aegis"], home))
        filter_folder = folder / "video_content_safety_filter"
        classifier = load_classifier(filter_folder / "safety_filter.pt", home)
        siglip = FrameFeatures(find_repository(SIGLIP, [filter_folder, *roots]), home)
        frames = FrameFilter(siglip, classifier, release.rule)
        retinaface = load_retinaface(folder / "face_blur_filter" / "Resnet50_Final.pth", home)
    except (InputError, OSError, ImportError) as error:
        raise CheckpointError(
            f"guardrails cannot load: {error}; `worldline checkpoints download "
            f"{release.download}` fetches them; {flag} runs without guardrails"
        ) from error
    return Guardrails(classifiers, [frames], [FaceBlur(retinaface)], device=device, offload=offload)


def find_folder(release: Release, roots: Sequence[Path]) -> Path:
    """Folder of a repository of the release, or the folder `guardrail` of a model."""
    for repository in release.repositories:
        for folder in repository_folders(repository, roots):
            return folder
    for root in roots:
        for path in sorted(root.glob("**/guardrail")):
            if path.is_dir():
                return path
    raise CheckpointError(
        f"{release.repositories[0]} is missing: no folder of it, and none named guardrail, in "
        f"{' or '.join(map(str, roots))}"
    )


def _language_guard(
    release: Release, roots: Sequence[Path], device: torch.device | str
) -> language.LanguageGuard:
    candidates = (m for m in release.models if repository_folders(m.released, roots))
    model = next(candidates, release.models[0])
    adapter = find_repository(model.adapter, roots) if model.adapter else None
    return language.load(model, find_repository(model.released, roots), device, adapter=adapter)
