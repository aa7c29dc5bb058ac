"""Video2World from texts, known frames and noise to latents: both generations, and the old bug."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from cases import Case, cases
from networks import collected, make_network, read_unused_inputs

from worldline.families.diffusion.request import Reinsertion
from worldline.sampling.edm import Conditioning, make_sigmas, sample
from worldline.sampling.solvers import Steps, standard_noise

CASES = cases("v2w_denoise_e2e")
RUN = re.compile(
    r"(?P<run>(?P<release>\w+)\.cond(?P<frames>\d+)\.(?P<steps>\d+)"
    r"(?:\.aug(?P<augment>\d+(?:\.\d+)?(?:e-?\d+)?))?(?P<unprompted>\.no_negative)?)\.final"
)
# release -> sampler, and how it puts the known frames back
RELEASES: dict[str, tuple[str, Reinsertion]] = {
    "predict1": ("edm_euler", "corrected"),
    "predict1_mar2025": ("edm_euler", "march_2025"),
    "cosmos1": ("res_2ab", "corrected"),
}


def runs(pattern: str = "*.final") -> list[Any]:
    """List (case, run) of every run that the cases hold."""
    found = []
    for case in CASES:
        if not isinstance(case, Case):  # what stands for a case that is not here
            found.append(pytest.param(None, "", marks=case.marks, id=str(case.id)))
            continue
        for name in case.names(pattern):
            run = name.removesuffix(".final")
            found.append(pytest.param(case, run, id=f"{case}-{run}"))
    return found


def conditioning_of(case: Case, stated: re.Match[str]) -> Conditioning:
    frames = int(stated["frames"])
    return Conditioning(
        case.tensor("condition_latent")[:, :, :frames],
        case.tensor("augment_noise")[:, :, :frames],
        float(stated["augment"] or case.spec["augment_sigma"]),
    )


def denoise(case: Case, run: str) -> Steps:
    stated = RUN.fullmatch(f"{run}.final")
    assert stated, f"{case}: no rule for {run}"
    sampler, reinsertion = RELEASES[stated["release"]]
    conditioning = conditioning_of(case, stated)
    network = make_network(
        case,
        case.spec["checkpoint"],
        case.spec["model"],
        frames=int(stated["frames"]),
        # without a negative prompt, Video2World takes the prompt a second time
        negative=case.tensor("t5_text_embeddings") if stated["unprompted"] else None,
    )
    return sample(
        network,
        # Cosmos 1.0 starts from the very noise that it shows the known frames with
        case.tensor("augment_noise" if stated["release"] == "cosmos1" else "noise"),
        sampler=sampler,
        num_steps=int(stated["steps"]),
        guidance=case.spec["guidance"],
        conditioning=conditioning,
        reinsertion=reinsertion,
    )


@pytest.mark.parametrize(("case", "run"), runs())
def test_latents(case: Case, run: str) -> None:
    made, end = collected(denoise(case, run))
    case.compare(f"{run}.final", end)
    if f"{run}.traj" in case:
        case.compare(f"{run}.traj", torch.stack([step.x for step in made]))


# a large augmentation lets go of the frames early, and the network then has the last word
FIRST_RELEASE = [run for run in runs("predict1_mar2025.*.final") if ".aug" not in str(run.id)]


@pytest.mark.parametrize(("case", "run"), FIRST_RELEASE)
def test_known_frames_of_the_first_release_are_scaled(case: Case, run: str) -> None:
    stated = RUN.fullmatch(f"{run}.final")
    assert stated
    conditioning = conditioning_of(case, stated)
    sigmas = make_sigmas("edm_euler", int(stated["steps"])).tolist()
    last = max(index for index, sigma in enumerate(sigmas) if conditioning.held_at(sigma))
    known = conditioning.latents
    stored = case.tensor(f"{run}.final")[:, :, : known.shape[2]]
    fitted = ((stored * known).sum() / known.square().sum()).item()
    assert fitted == pytest.approx(2 - sigmas[last + 1] / sigmas[last], abs=0.02)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_augment_noise_is_drawn_from_its_seed(case: Case) -> None:
    noise = case.tensor("augment_noise")
    assert torch.equal(noise, standard_noise(int(case.tensor("augment_seed")[0]), noise.shape))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tensor_is_used(case: Case) -> None:
    read_unused_inputs(case)
    assert case.unused() == []
