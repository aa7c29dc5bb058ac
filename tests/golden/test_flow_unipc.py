"""The flow sampler against the reference, step by step: an analytic field and a tiny network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, cases
from flow_networks import model_of
from networks import collected
from torch import Tensor

from worldline.sampling.flow import (
    SHIFT,
    Conditioning,
    Network,
    Schedule,
    guided_velocity,
    make_schedule,
    unipc,
)
from worldline.sampling.solvers import standard_noise
from worldline.shapes import LatentShape

CASES = cases("flow_unipc_sampler")


def scenarios() -> list[Any]:
    """List (case, name) of every scenario of every case."""
    found = []
    for case in CASES:
        if not isinstance(case, Case):  # what stands for a case that is not here
            found.append(pytest.param(None, "", marks=case.marks, id=str(case.id)))
            continue
        found += [pytest.param(case, name, id=f"{case}-{name}") for name in case.spec["scenarios"]]
    return found


def toy(case: Case) -> Network:
    formulas = {
        True: case.spec["toy_field"]["cond"].split("=")[1],
        False: case.spec["toy_field"]["uncond"].split("=")[1],
    }

    def network(latents: Tensor, timesteps: Tensor, conditional: bool) -> Tensor:
        known = {"x": latents, "t": timesteps[:, None, :, None, None]}
        names = ("sin", "cos", "exp", "tanh", "abs", "sqrt", "log", "sigmoid")
        functions = {name: getattr(torch, name) for name in names}
        return eval(formulas[conditional], {"__builtins__": {}}, functions | known)

    return network


def tiny(case: Case, frames: int) -> Network:
    """Return the case's own network; the first `frames` latent frames are marked as given."""
    model, shape = model_of(case), case.tensor("gt_latents").shape
    texts = {True: case.tensor("prompt_embeds"), False: case.tensor("negative_prompt_embeds")}
    contexts = {branch: model.encode_context(text) for branch, text in texts.items()}
    positions = model.make_positions(LatentShape(*shape[2:]))
    mask = torch.zeros(shape[0], 1, *shape[2:])
    mask[:, :, :frames] = 1

    def network(latents: Tensor, timesteps: Tensor, conditional: bool) -> Tensor:
        return model(latents, timesteps, contexts[conditional], positions, condition_mask=mask)

    return network


def schedule_of(stated: dict[str, Any]) -> Schedule:
    name: Any = "karras" if stated["karras"] else "shifted"
    return make_schedule(name, stated["num_steps"], shift=stated.get("shift", SHIFT))


@pytest.mark.parametrize(("case", "name"), scenarios())
def test_schedule(case: Case, name: str) -> None:
    schedule = schedule_of(case.spec["scenarios"][name])
    case.compare(f"{name}.sigmas", schedule.sigmas)
    case.compare(f"{name}.timesteps", schedule.timesteps)


@pytest.mark.parametrize(("case", "name"), scenarios())
def test_every_step(case: Case, name: str) -> None:
    stated = case.spec["scenarios"][name]
    noise, clean = case.tensor(f"{name}.noise"), case.tensor("gt_latents")
    assert torch.equal(noise, standard_noise(stated["seed"], noise.shape))
    frames, timestep = stated["num_conditional_frames"], stated["conditional_frame_timestep"]
    known = None
    if frames:
        known = Conditioning(clean[:, :, :frames], None if timestep < 0 else timestep)
    network = toy(case) if stated["net"] == "toy" else tiny(case, frames)

    schedule = schedule_of(stated)
    settings: dict[str, Any] = {"guidance": stated["guidance"], "conditioning": known}
    velocity = guided_velocity(network, noise, schedule, **settings)
    case.compare(f"{name}.velocity_first", velocity(noise, 0))
    made, end = collected(unipc(velocity, noise, schedule.sigmas))
    case.compare(f"{name}.final", end)
    kept = torch.stack([made[step].x for step in stated["kept_steps"]])
    stored = case.tensor(f"{name}.latents_after_step")
    case.compare(f"{name}.latents_after_step", kept.view(stored.shape))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tensor_is_used(case: Case) -> None:
    assert case.unused() == []
