"""LoRA against the reference: every form of a file, forward, gradients, a step, merged weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, cases
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from worldline import losses
from worldline.families.diffusion import weights as edm
from worldline.families.predict2_5 import weights as flow
from worldline.sampling.edm import precondition
from worldline.shapes import LatentShape
from worldline.train.lora import (
    LowRankLinear,
    add_adapters,
    restore,
    save_diffusers,
    save_peft,
)
from worldline.weights.checkpoint import open_checkpoint
from worldline.weights.lora import METADATA, Adapter
from worldline.weights.networks import Network, open_adapter

DENOISING, FLOW = cases("dit_lora_tiny"), cases("flow_lora_tiny")
CASES = DENOISING + FLOW


@dataclass(frozen=True)
class Kind:
    """What the cases of one family differ in.

    Attributes:
        run: case, network -> tensors by their names in the case, the loss among them.
        optimizer: keywords of AdamW.
    """

    weights: Any
    run: Callable[[Case, nn.Module], dict[str, Tensor]]


def kind_of(case: Case) -> Kind:
    return Kind(edm, denoise) if case in DENOISING else Kind(flow, follow_flow)


def base_of(case: Case) -> Path:
    return case.path / str(case.spec["checkpoint"]).split(" ")[0]


@cache
def network_of(case: Case) -> Network[Any]:
    stated = case.spec["model"]
    settings = {"rope_ratio": [stated[f"rope_{axis}_extrapolation_ratio"] for axis in "thw"]}
    settings |= {name: stated[name] for name in ("base_fps", "timestep_scale") if name in stated}
    found: Network[Any] = kind_of(case).weights.open_network(base_of(case), settings)
    return found


def scale_of(case: Case) -> float:
    stated = case.spec["lora"]
    return float(stated.get("scaling", stated.get("scale", 1)))


def denoise(case: Case, model: Any) -> dict[str, Tensor]:
    latents, noise = 0.5 * case.tensor("in.latent"), case.tensor("in.epsilon")
    uniform, multiplier = case.tensor("in.sigma_uniform"), case.spec["video_noise_multiplier"]
    sigma = (torch.special.ndtri(uniform).exp() * multiplier).float()
    augment = torch.special.ndtri(case.tensor("in.augment_uniform"))
    augment = losses.log_normal_sigmas(augment, mean=-3, deviation=2)
    mask = losses.condition_mask(latents, case.tensor("in.num_condition_t").expand(len(latents)))
    known = losses.noised_latents(latents, case.tensor("in.augment_noise"), augment)
    inputs = losses.noised_latents(latents, noise, sigma).lerp(known, mask)
    times, fps = sigma.log() / 4, case.tensor("in.fps")
    text = case.tensor("in.text") * case.tensor("in.text_keep")[:, None, None]
    output = model(
        inputs,
        times,
        model.encode_context(text),
        model.make_positions(LatentShape(*latents.shape[2:]), fps[0].item()),
        condition_mask=mask,
        padding_mask=case.tensor("in.padding_mask"),
    )
    level = sigma.view(-1, 1, 1, 1, 1)
    skip, out, scale, _ = precondition(level)
    denoised = skip * inputs / scale + out * output
    # the head of the uncertainty is frozen; the mean counts conditioning frames, without error
    head = {n.removeprefix("logvar."): t for n, t in base_tensors(case).items() if "logvar" in n}
    waves = math.sqrt(2) * torch.cos(times[:, None] * head["0.freqs"] + head["0.phases"])
    uncertainty = (waves @ head["1.weight"].T)[:, 0]
    each = losses.denoising_loss(output, latents, noise, sigma, mask)
    each = each * (1 - mask).mean((1, 2, 3, 4)) * (-uncertainty).exp() + uncertainty
    return {
        "sigma": sigma,
        "net_in": inputs,
        "net_x0_pred": denoised,
        "x0_pred": denoised.lerp(latents, mask),
        "loss": each.mean(),
    }


@cache
def base_tensors(case: Case) -> dict[str, Tensor]:
    source = open_checkpoint(base_of(case))
    return {name: source.read(name).float() for name in source.entries}


def follow_flow(case: Case, model: Any) -> dict[str, Tensor]:
    latents, noise = case.tensor("in.latent"), case.tensor("in.epsilon")
    sigma = losses.shifted_sigmas(
        case.tensor("in.time_normal"), shift=case.spec["training"]["shift"]
    )
    mask = losses.condition_mask(latents, case.tensor("in.num_conditional_frames"))
    inputs = losses.flowed_latents(latents, noise, sigma).lerp(latents, mask)
    assert not case.spec["model"].get("rope_enable_fps_modulation")
    assert case.tensor("in.fps").isfinite().all()
    text = case.tensor("in.text") * case.tensor("in.text_keep")[:, None, None]
    velocity = model(
        inputs,
        1000 * sigma[:, None],
        model.encode_context(text),
        model.make_positions(LatentShape(*latents.shape[2:])),
        condition_mask=mask,
        padding_mask=case.tensor("in.padding_mask"),
    )
    return {
        "sigma": sigma[:, None],
        "timesteps": 1000 * sigma[:, None],
        "net_in": inputs,
        "net_out": velocity,
        "loss": losses.flow_loss(velocity, latents, noise, mask).mean(),
    }


def files_of(case: Case) -> list[Path]:
    """Every file or folder of the adapter in the case."""
    named = ("peft", "diffusers_model", "diffusers_pipeline")
    trained = list(case.path.glob("train/checkpoints/**/*.pt"))
    trained += [path.parent for path in case.path.glob("train/**/.metadata")]
    folders = [path for name in named if (path := case.path / name).is_dir()]
    assert folders
    assert trained
    return [*folders, *trained]


def match(case: Case, path: Path) -> Adapter:
    adapter = network_of(case).match_adapter(open_adapter(path))
    if adapter.notes:  # its file states no scale
        return network_of(case).match_adapter(open_adapter(path), scale_of(case))
    return adapter


def halves(case: Case, group: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Tensors of the case about each half, by our names of the matrices."""
    weights, pairs = kind_of(case).weights, {}
    names = case.spec["trainable"]
    for down, up in zip(names[::2], names[1::2], strict=True):
        stem = down.removesuffix(weights.LORA.ends[0])
        ours = weights.KEYS.ours(f"{stem}.weight") or weights.KEYS.ours(f"{stem}.0.weight")
        pairs[ours] = case.tensor(f"{group}.{down}"), case.tensor(f"{group}.{up}")
    return pairs


@pytest.mark.parametrize("case", CASES, ids=str)
def test_files_hold_the_adapter(case: Case) -> None:
    expected = halves(case, "adapter")
    for path in files_of(case):
        adapter = match(case, path)
        assert adapter.updates.keys() == expected.keys(), path
        assert adapter.factors == [pytest.approx(scale_of(case))], path
        for ours, update in adapter.updates.items():
            for half, value in zip(update.halves, expected[ours], strict=True):
                assert torch.equal(half.read(), value.to(half.meta.dtype)), (path, ours)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_form_computes_the_same(case: Case) -> None:
    base = kind_of(case).run(case, network_of(case).read("cpu", torch.float32))
    case.compare("loss_base", base["loss"])
    for path in files_of(case):
        adapter = match(case, path)
        model = network_of(case).adapted(adapter).read("cpu", torch.float32)
        whole = all(u.down.meta.dtype == torch.float32 for u in adapter.updates.values())
        if not whole:  # rounded to bf16 in the file
            assert kind_of(case).run(case, model)["loss"] != base["loss"]
            continue
        for name, tensor in kind_of(case).run(case, model).items():
            case.compare(name, tensor)
        parameters = dict(model.named_parameters())
        for name in case.names("merged.*"):
            ours = kind_of(case).weights.KEYS.ours(name.removeprefix("merged."))
            case.compare(name, parameters[ours])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scale_0_is_the_base(case: Case) -> None:
    network = network_of(case)
    adapter = network.match_adapter(open_adapter(files_of(case)[0]), 0.0)
    same, model = network.adapted(adapter).read("cpu", None), network.read("cpu", None)  # type: ignore[arg-type]
    for one, other in zip(same.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def adapted(case: Case) -> tuple[nn.Module, dict[str, LowRankLinear]]:
    """The network with the case's adapter beside its layers."""
    model = network_of(case).read("cpu", torch.float32)
    recipe = replace(
        kind_of(case).weights.LORA,
        targets=tuple(halves(case, "adapter")),
        rank=case.spec["lora"]["rank"],
        scale=scale_of(case),
    )
    layers = add_adapters(model, recipe, torch.Generator().manual_seed(1))
    return model, layers


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_and_a_step(case: Case) -> None:
    model, layers = adapted(case)
    case.compare("loss_base", kind_of(case).run(case, model)["loss"])  # up is 0
    restore(layers, match(case, case.path / "peft"))
    tensors = kind_of(case).run(case, model)
    for name, tensor in tensors.items():
        case.compare(name, tensor)
    tensors["loss"].backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == len(case.spec["trainable"])
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    names = case.spec["trainable"]
    ordered = [
        half for ours in halves(case, "adapter") for half in (layers[ours].down, layers[ours].up)
    ]
    for name, parameter in zip(names, ordered, strict=True):
        assert parameter.grad is not None
        case.compare(f"grad.{name}", parameter.grad)
    step = case.spec["one_step"]
    case.compare("grad_norm", nn.utils.clip_grad_norm_(trained, step["grad_clip_norm"]))
    keywords = {name: step[name] for name in ("lr", "eps", "weight_decay")}
    torch.optim.AdamW(trained, betas=tuple(step["betas"]), **keywords).step()
    for name, parameter in zip(names, ordered, strict=True):
        case.compare(f"after_step.{name}", parameter)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_new_adapters_start_as_the_reference_has_them(case: Case) -> None:
    _, layers = adapted(case)
    recipe, stated = kind_of(case).weights.LORA, case.spec["lora"]
    for layer in layers.values():
        assert not layer.up.any()
        bound = layer.in_features**-0.5 if recipe.start == "uniform" else 5 / stated["rank"]
        assert bound / 5 < layer.down.abs().max() <= bound
    assert recipe.rank == stated["official"]["rank"]
    official = stated["official"].get("alpha", recipe.rank * stated["official"].get("scale", 1))
    assert recipe.scale == official / recipe.rank


@pytest.mark.parametrize("case", CASES, ids=str)
def test_written_files_are_the_reference_s(case: Case, tmp_path: Path) -> None:
    weights, pairs, scale = kind_of(case).weights, halves(case, "adapter"), scale_of(case)
    save_peft(pairs, scale, weights.KEYS, tmp_path / "peft")
    for level in ("model", "pipeline"):
        file = tmp_path / f"diffusers_{level}" / "pytorch_lora_weights.safetensors"
        file.parent.mkdir()
        save_diffusers(pairs, scale, weights.DIFFUSERS_KEYS, file, pipeline=level == "pipeline")
    for file in sorted(tmp_path.rglob("*.safetensors")):
        theirs = case.path / file.relative_to(tmp_path)
        if theirs.is_file():
            same_tensors(load_file(file), load_file(theirs))
            ours, others = (settings_of(path) for path in (file, theirs))
            assert ours["lora_alpha"] == pytest.approx(others["lora_alpha"])
            for name in ("r", "peft_type", "bias"):
                assert ours[name] == others[name]
            assert {*ours} <= {*others}


def settings_of(file: Path) -> dict[str, Any]:
    """Configuration of an adapter beside its tensors, or in the header, without prefixes."""
    beside = file.with_name("adapter_config.json")
    if beside.is_file():
        found: dict[str, Any] = json.loads(beside.read_text())
        return found
    with safe_open(file, "pt") as opened:
        stated = json.loads(opened.metadata()[METADATA])
    return {name.removeprefix("transformer."): value for name, value in stated.items()}


def same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tensor_is_used(case: Case) -> None:
    assert case.unused() == []
