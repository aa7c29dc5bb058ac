"""Tokenizer losses against the reference: every tensor of every `tok_losses_tiny` case."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from cases import Case, cases
from safetensors.torch import load_file
from torch import Tensor

from worldline.losses import (
    FeatureNetwork,
    ReconstructionObjective,
    Reduction,
    Schedule,
    consistency_distance,
    join_windows,
    reconstruction_terms,
    reduce,
    split_windows,
    total,
)

TERMS = {"lpips": "perceptual"}  # the reference's name for it; it is not the LPIPS of the paper


def schedule(boundaries: list[int], values: list[float]) -> Schedule:
    return Schedule(tuple(boundaries), tuple(values))


def objective_of(config: dict[str, Any]) -> ReconstructionObjective:
    perceptual = config["perceptual"]
    return ReconstructionObjective(
        color=schedule(**config["color"]),
        kl=schedule(**config["kl"]) if "kl" in config else None,
        perceptual=schedule(perceptual["lpips_boundaries"], perceptual["lpips_values"]),
        gram=schedule(perceptual["gram_boundaries"], perceptual["gram_values"])
        if perceptual.get("gram_enabled")
        else None,
        layer_weights=tuple(perceptual["layer_weights"]),
    )


class Reference:
    """Computes what a tensor's name says: `total.SUM.it0` is the total, summed, at iteration 0."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.config = case.spec["config"]
        self.objective = objective_of(self.config)
        tensors = load_file(case.path / "features.safetensors")
        self.features = FeatureNetwork(tensors)

    def terms(self, iteration: int, *, image: bool, recon: Tensor) -> dict[str, Tensor]:
        x = self.case.tensor("x")
        posterior = None
        if not image and self.case.names("logvar"):
            posterior = (self.case.tensor("mean"), self.case.tensor("logvar"))
        if image:
            x, recon = x[:, :, 0], recon[:, :, 0]
        return reconstruction_terms(
            self.objective, x, recon, iteration, features=self.features, posterior=posterior
        )

    def schedule(self, boundaries: str, values: str) -> Tensor:
        weights = Schedule(
            tuple(int(word) for word in boundaries.split("_") if word),
            tuple(float(word) for word in values.split("_")),
        )
        (name,) = self.case.names(f"schedule.b{boundaries}.v{values}")
        iterations = range(self.case.tensor(name).shape[0])
        return torch.tensor([weights.at(iteration) for iteration in iterations])

    def feature(self, layer: str, source: str, batch: str, frame: str) -> Tensor:
        video = self.case.tensor(source)
        return self.features(video[int(batch), :, int(frame)][None])[int(layer)]

    def scalar(self, image: str | None, term: str, reduction: str, iteration: str) -> Tensor:
        recon = self.case.tensor("recon")
        terms = self.terms(int(iteration), image=bool(image), recon=recon)
        how = Reduction(reduction.upper())
        value = total(terms, how) if term == "total" else reduce(terms[TERMS.get(term, term)], how)
        return value.reshape(1)

    def gradient(self, reduction: str, iteration: str) -> Tensor:
        recon = self.case.tensor("recon").clone().requires_grad_()
        terms = self.terms(int(iteration), image=False, recon=recon)
        (gradient,) = torch.autograd.grad(total(terms, Reduction(reduction)), recon)
        return gradient

    def consistency(self, what: str) -> Tensor:
        num_frames, step = (self.config["consistency"][k] for k in ("num_frames", "step"))
        video, windows = (self.case.tensor(f"cons.{k}") for k in ("video", "recon_windows"))
        num_windows = windows.shape[0] // video.shape[0]
        if what == "windows":
            return split_windows(video, num_frames, step)
        if what == "unshuffled":
            return join_windows(windows, num_windows, step)
        distance = consistency_distance(windows, num_windows, step)
        return (self.config["consistency"]["weight"] * distance).reshape(1)

    def compute(self, name: str) -> Tensor:
        for pattern, function in (
            (r"schedule\.b([\d_]*)\.v(.+)", self.schedule),
            (r"feat(\d+)\.(\w+)_b(\d+)_t(\d+)", self.feature),
            (r"grad_recon\.(\w+)\.it(\d+)", self.gradient),
            (r"cons\.(windows|unshuffled|loss)", self.consistency),
            (r"(image_discrete\.)?(\w+)\.(\w+)\.it(\d+)", self.scalar),
        ):
            if match := re.fullmatch(pattern, name):
                return function(*match.groups())
        raise AssertionError(f"no rule for the tensor {name}")


INPUTS = {"x", "recon", "mean", "logvar", "cons.video", "cons.recon_windows"}


@pytest.mark.parametrize("case", cases("tok_losses_tiny"), ids=str)
def test_losses_match_the_reference(case: Case) -> None:
    reference = Reference(case)
    for name in case.names("*"):
        if name not in INPUTS:
            ours = reference.compute(name)
            case.compare(name, ours)
            if name.startswith("kl."):  # far below the case's absolute tolerance
                torch.testing.assert_close(ours, case.tensor(name), rtol=1e-4, atol=0)
    assert not case.unused()
