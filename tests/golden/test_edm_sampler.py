"""The EDM samplers against the reference, step by step: a Gaussian denoiser and tiny networks."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from cases import Case, cases
from networks import collected, make_network, read_unused_inputs
from torch import Tensor

from worldline.sampling.edm import Conditioning, Network, make_sigmas, precondition, sample
from worldline.sampling.solvers import Steps, finish, standard_noise

CASES = cases("edm_res_sampler")
RUN = re.compile(r"(?P<source>toy|t2w|v2w)\.(?P<sampler>[a-z0-9_]+)\.(?P<steps>\d+)\.\w+")


def runs(kind: str) -> list[Any]:
    """List (case, source, sampler, steps) of every run that a case holds of `kind`."""
    found = []
    for case in CASES:
        if not isinstance(case, Case):  # what stands for a case that is not here
            found.append(pytest.param(None, "", "", 0, marks=case.marks, id=str(case.id)))
            continue
        names = [match for name in case.names() if (match := RUN.fullmatch(name))]
        of_kind = {
            (match["source"], match["sampler"], int(match["steps"]))
            for match in names
            if (match["source"] == "toy") == (kind == "toy")
        }
        for source, sampler, steps in sorted(of_kind):
            name = f"{case}-{source}-{sampler}-{steps}"
            found.append(pytest.param(case, source, sampler, steps, id=name))
    return found


def compare(case: Case, name: str, steps: Steps) -> None:
    """Compare the end of a sampler, and the states that the case stores on the way."""
    made, end = collected(steps)
    case.compare(f"{name}.final", end)
    if f"{name}.traj" in case:
        # "state after updates 0,5,10,...,30"
        listed = re.search(r"updates (\d+),(\d+),", case.spec["tensors"][f"{name}.traj"])
        if listed:
            first, second = int(listed[1]), int(listed[2])
            made = made[first :: second - first]
        case.compare(f"{name}.traj", torch.stack([step.x for step in made]))


def toy(case: Case) -> Network:
    spread = case.spec["toy"]["s"]
    means = {True: case.tensor("toy.mu_cond"), False: case.tensor("toy.mu_uncond")}

    def network(latents: Tensor, times: Tensor, conditional: bool) -> Tensor:
        sigma = math.exp(4 * times[0].item())
        skip, out, scale, _ = precondition(sigma)
        x = latents / scale
        clean = (spread**2 * x + sigma**2 * means[conditional]) / (spread**2 + sigma**2)
        return (clean - skip * x) / out

    return network


@pytest.mark.parametrize(("case", "source", "sampler", "steps"), runs("toy"))
def test_gaussian_denoiser(case: Case, source: str, sampler: str, steps: int) -> None:
    name = f"{source}.{sampler}.{steps}"
    sigmas = make_sigmas(sampler, steps)
    if f"{name}.sigmas" in case:
        case.compare(f"{name}.sigmas", sigmas)
        assert sigmas.dtype == case.tensor(f"{name}.sigmas").dtype
        # far below the case's tolerance: which precision a table is computed in is part of it
        torch.testing.assert_close(sigmas, case.tensor(f"{name}.sigmas"), rtol=1e-6, atol=0)
    if f"{name}.timesteps" in case:
        times = [precondition(sigma).noise for sigma in sigmas[:-1].tolist()]
        case.compare(f"{name}.timesteps", torch.tensor(times))
    settings = {"sampler": sampler, "num_steps": steps, "guidance": case.spec["guidance"]}
    compare(case, name, sample(toy(case), case.tensor("toy.noise"), **settings))


def checkpoint_of(case: Case, source: str) -> str:
    """Return the path of "<path> (t2w.*)"."""
    [path] = [line.split(" ")[0] for line in case.spec["checkpoints"] if f"({source}." in line]
    return path


def conditioning_of(case: Case, name: str) -> Conditioning:
    # "Video2World (1 condition latent frame, ..."
    stated = re.search(r"(\d+) condition latent frame", case.spec["tensors"][name])
    assert stated
    noise = case.tensor("net.augment_noise")
    assert torch.equal(noise, standard_noise(case.spec["augment_seed"], noise.shape))
    clean, frames = case.tensor("net.condition_latent"), int(stated[1])
    return Conditioning(clean[:, :, :frames], noise[:, :, :frames], case.spec["augment_sigma"])


@pytest.mark.parametrize(("case", "source", "sampler", "steps"), runs("network"))
def test_tiny_network(case: Case, source: str, sampler: str, steps: int) -> None:
    name = f"{source}.{sampler}.{steps}"
    known = conditioning_of(case, f"{name}.final") if source == "v2w" else None
    checkpoint, stated = checkpoint_of(case, source), case.spec["models"][source]

    def run(negative: Tensor | None) -> Steps:
        network = make_network(
            case,
            checkpoint,
            stated,
            prefix="net.",
            frames=known.latents.shape[2] if known else 0,
            negative=negative,
        )
        return sample(
            network,
            case.tensor("net.noise"),
            sampler=sampler,
            num_steps=steps,
            guidance=case.spec["guidance"],
            conditioning=known,
        )

    compare(case, name, run(None))
    unprompted = f"{name}.final_no_negative_prompt"
    if unprompted in case:
        positive = case.tensor("net.t5_text_embeddings")
        # Text2World has no text in that branch; Video2World takes the prompt a second time
        negative = positive if source == "v2w" else torch.zeros_like(positive)
        case.compare(unprompted, finish(run(negative)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tensor_is_used(case: Case) -> None:
    read_unused_inputs(case)
    assert case.unused() == []
