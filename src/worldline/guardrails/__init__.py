"""Guardrails of the released models: prompts and videos are checked, faces are blurred."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from worldline.errors import CheckpointError
from worldline.files import find_repository, repository_folders
from worldline.guardrails import frames, language
from worldline.guardrails.base import Guardrails
from worldline.guardrails.blocklist import COSMOS1, PREDICT, Blocklist, Nearness
from worldline.guardrails.faces import FaceBlur, load_retinaface

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
    folder = Path(folder or find_folder(release, roots))
    classifiers: list[Blocklist | language.LanguageGuard] = []
    if text:
        classifiers.append(Blocklist(folder / "blocklist", release.near))
        places = [*roots, folder, folder / "aegis"]
        candidates = (m for m in release.models if repository_folders(m.released, places))
        model = next(candidates, release.models[0])
        weights = find_repository(model.released, places)
        adapter = find_repository(model.adapter, places) if model.adapter else None
        classifiers.append(language.load(model, weights, home, adapter=adapter))
    filter_folder = folder / "video_content_safety_filter"
    classifier = frames.load_classifier(filter_folder / "safety_filter.pt", home)
    siglip = frames.FrameFeatures(find_repository(SIGLIP, [filter_folder, *roots]), home)
    video = frames.FrameFilter(siglip, classifier, release.rule)
    retinaface = load_retinaface(folder / "face_blur_filter" / "Resnet50_Final.pth", home)
    return Guardrails(classifiers, [video], [FaceBlur(retinaface)], device=device, offload=offload)


def find_folder(release: Release, roots: Sequence[Path]) -> Path:
    """Folder of a repository of the release, or the folder `guardrail` of a model."""
    folders = [path for name in release.repositories for path in repository_folders(name, roots)]
    if not folders:
        folders = [path for root in roots for path in sorted(root.glob("**/guardrail/"))]
    if not folders:
        raise CheckpointError(
            f"{release.repositories[0]} is missing: no folder of it, and none named guardrail, in "
            f"{' or '.join(map(str, roots))}"
        )
    return folders[0]
