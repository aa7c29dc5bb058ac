"""The guardrails of each release: where their files lie, and the chain that they make."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from worldline.errors import CheckpointError
from worldline.guardrails import face_blur, language, video_filter
from worldline.guardrails.base import Guardrails, TextGuard, loading
from worldline.guardrails.blocklist import COSMOS1, PREDICT, Blocklist, Nearness
from worldline.guardrails.language import Kind, LanguageGuard, load_language_guard
from worldline.guardrails.video_filter import Rule

SIGLIP = "google/siglip-so400m-patch14-384"
_REPOSITORIES = ("nvidia/Cosmos-Guardrail1", "nvidia/Cosmos-1.0-Guardrail")


@dataclass(frozen=True)
class Chain:
    """What one release asks.

    Attributes:
        near: of the blocklist.
        kinds: its language model; of several, the first that is there.
        rule: of the frame classifier.
        fetched_as: what `worldline checkpoints download` takes for all of it.
    """

    near: Nearness
    kinds: tuple[Kind, ...]
    rule: Rule
    fetched_as: str


CHAINS = {
    "cosmos1": Chain(
        COSMOS1, (language.AEGIS,), video_filter.PREDICT1, "--cosmos_version 1.0 guardrails"
    ),
    # Aegis until April 2025, in the folder `guardrail` of each model
    "predict1": Chain(
        PREDICT, (language.LLAMA_GUARD_3, language.AEGIS), video_filter.PREDICT1, "guardrails"
    ),
    "predict2.5": Chain(
        PREDICT,
        (language.QWEN3GUARD,),
        video_filter.PREDICT2_5,
        "Cosmos-Guardrail1 Qwen3Guard-Gen-0.6B",
    ),
}


def _hub_cache() -> Path:
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")


def _places(repository: str, roots: Sequence[Path]) -> Iterator[Path]:
    """Yield where a repository may lie: by its name, or as the hub's cache lays it out."""
    cached = f"models--{repository.replace('/', '--')}"
    for root in (*roots, _hub_cache()):
        yield root / repository
        yield root / repository.rpartition("/")[2]
        yield from sorted((root / cached / "snapshots").glob("*"))


def find_repository(repository: str, roots: Sequence[Path]) -> Path:
    """Return the folder of a repository below one of `roots`, or in the hub's cache.

    Raises:
        CheckpointError: it is in none.
    """
    for path in _places(repository, roots):
        if path.is_dir():
            return path
    where = " or ".join(map(str, roots))
    raise CheckpointError(f"{repository} is missing: no folder of it in {where}")


def find_folder(
    checkpoint_dir: Path, guardrail_dir: Path | None = None, release: str = "predict1"
) -> Path:
    """Return the folder that holds `blocklist`, `video_content_safety_filter`, `face_blur_filter`.

    Args:
        checkpoint_dir: holds the models; a model's own folder `guardrail` counts too.
        guardrail_dir: the folder itself, if it is known.
        release: whose repository is looked for first.

    Raises:
        CheckpointError: there is none.
    """
    repositories = _REPOSITORIES[::-1] if release == "cosmos1" else _REPOSITORIES
    if guardrail_dir is not None:
        if not guardrail_dir.is_dir():
            raise CheckpointError(f"there is no folder {guardrail_dir}")
        return guardrail_dir
    for repository in repositories:
        for path in _places(repository, [checkpoint_dir]):
            if path.is_dir():
                return path
    for path in sorted(checkpoint_dir.glob("**/guardrail")):
        if path.is_dir():
            return path
    raise CheckpointError(
        f"{repositories[0]} is missing: no folder of it, and none named guardrail, "
        f"in {checkpoint_dir}"
    )


def load_guardrails(
    release: str,
    checkpoint_dir: Path,
    *,
    flag: str,
    guardrail_dir: Path | None = None,
    device: torch.device | str = "cpu",
    text: bool = True,
    video: bool = True,
    offload: bool = False,
) -> Guardrails:
    """Load all guardrails of a release; what cannot load is an error, not a check less.

    Args:
        release: a name of `CHAINS`.
        checkpoint_dir: holds the models.
        flag: what the user would give to run without guardrails, for messages.
        guardrail_dir: of `find_folder`.
        device: where the networks run.
        text: prompts will be checked.
        video: videos will be checked and faces blurred.
        offload: keep the networks in host memory while they do not look.

    Raises:
        CheckpointError: a file is absent or does not fit; it and `flag` are named.
    """
    if offload:
        waiting = load_guardrails(
            release,
            checkpoint_dir,
            flag=flag,
            guardrail_dir=guardrail_dir,
            text=text,
            video=video,
        )
        waiting.wait_in_host_memory(torch.device(device))
        return waiting
    chain = CHAINS[release]
    fetched_as = chain.fetched_as
    with loading("files", flag, fetched_as):
        folder = find_folder(checkpoint_dir, guardrail_dir, release)
    guards: list[TextGuard] = []
    if text:
        with loading(Blocklist.name, flag, fetched_as):
            guards.append(Blocklist(folder / "blocklist", chain.near))
        with loading(chain.kinds[0].name, flag, fetched_as):
            guards.append(_language_guard(chain, [checkpoint_dir, folder], device))
    if not video:
        return Guardrails(guards)
    filter_folder = folder / "video_content_safety_filter"
    with loading(video_filter.VideoFilter.name, flag, fetched_as):
        classifier = video_filter.VideoFilter.load(
            filter_folder / "safety_filter.pt",
            find_repository(SIGLIP, [filter_folder, checkpoint_dir]),
            chain.rule,
            device,
        )
    with loading(face_blur.FaceBlur.name, flag, fetched_as):
        path = folder / "face_blur_filter" / "Resnet50_Final.pth"
        faces = face_blur.FaceBlur.load(path, device)
    return Guardrails(guards, [classifier], [faces])


def _language_guard(
    chain: Chain, roots: Sequence[Path], device: torch.device | str
) -> LanguageGuard:
    roots = [*roots, roots[-1] / "aegis"]
    there = (
        kind for kind in chain.kinds if any(path.is_dir() for path in _places(kind.released, roots))
    )
    kind = next(there, chain.kinds[0])  # if none is there, that of the first is reported
    folder = find_repository(kind.released, roots)
    adapter = find_repository(kind.adapter, roots) if kind.adapter else None
    return load_language_guard(kind, folder, device, adapter=adapter)
