"""Training steps of all families against the reference: losses, gradients, updates, averages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, cases, watched
from torch import Tensor, nn

from worldline.families.autoregressive import weights as ar_weights
from worldline.families.autoregressive.model import ARTransformer, make_positions
from worldline.families.autoregressive.objective import NextTokenObjective
from worldline.families.diffusion import weights as dit_weights
from worldline.families.diffusion.model import DiT
from worldline.families.diffusion.objective import (
    DenoisingObjective,
    Draws,
    Uncertainty,
    clean_latents,
)
from worldline.families.predict2_5 import objective as flow
from worldline.families.predict2_5 import weights as flow_weights
from worldline.families.predict2_5.model import FlowDiT
from worldline.losses import IGNORED
from worldline.sampling.edm import SIGMA_DATA, precondition
from worldline.train.optim import Average, Cosine, Linear, Power, make_optimizer
from worldline.weights.checkpoint import open_checkpoint
from worldline.weights.stream import load_into

AUTOREGRESSIVE = cases("ar_train_step_tiny")
DENOISING = cases("dit_train_step_tiny")
FLOW = cases("flow_train_step_tiny")
VARIANTS = ("t2w", "v2w")


class Trained(nn.Module):
    """What a step changes, by the names of the reference's files.

    Attributes:
        released: our name of each parameter -> the reference's.
    """

    def __init__(self, released: Mapping[str, str], **modules: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(modules)
        self.released = released

    def named(self) -> dict[str, nn.Parameter]:
        return {
            self.released[name.removeprefix("parts.")]: parameter
            for name, parameter in self.named_parameters()
        }


def released_names(keys: Any, network: nn.Module, prefix: str) -> dict[str, str]:
    return {
        f"network.{name}": f"{prefix}{keys.released(name).removeprefix(prefix)}"
        for name, _ in network.named_parameters()
    }


def check_step(
    case: Case, trained: Trained, loss: Callable[[], Tensor], prefix: str, stated: dict[str, Any]
) -> None:
    """Loss, gradients, their norm, and all parameters after one step."""
    optimizer = adamw(trained, stated, stated["lr"])
    value = loss()
    value.backward()
    for name, parameter in trained.named().items():
        if f"{prefix}grad.{name}" in case:
            assert parameter.grad is not None, name
            case.compare(f"{prefix}grad.{name}", parameter.grad)
    norm = nn.utils.clip_grad_norm_(trained.parameters(), stated["grad_clip_norm"])
    [norm_name] = (
        case.names(f"{prefix}grad_norm*")
        if prefix
        else [name for name in case.names("grad_norm*") if name != "grad_norms_no_z"]
    )
    case.compare(norm_name, norm)
    average = Average(dict(trained.named_parameters()), Power(0.1))
    optimizer.step()
    average.set_weight(1)
    average.update()
    for name, parameter in trained.named().items():
        if f"{prefix}after_step.{name}" in case:
            case.compare(f"{prefix}after_step.{name}", parameter)
    averages = zip(average.values.values(), trained.parameters(), strict=True)
    assert all(torch.allclose(value, parameter, rtol=1e-6) for value, parameter in averages)


def adamw(trained: nn.Module, stated: Mapping[str, Any], rate: float) -> torch.optim.Optimizer:
    optimizer = make_optimizer(
        dict(trained.named_parameters()),
        betas=tuple(stated["betas"]),
        eps=stated["eps"],
        weight_decay=stated["weight_decay"],
        decay_all=True,
    )
    optimizer.defaults["lr"].fill_(rate)
    return optimizer


def check_run(
    case: Case,
    trained: Trained,
    losses: Iterator[Tensor],
    prefix: str,
    stated: dict[str, Any],
    rate: Callable[[int], float],
) -> None:
    """Several steps: rates, losses, norms, final parameters and averages."""
    sequence = stated["seq"]
    accumulated, most = sequence.get("grad_accum_iter", 1), stated["one_step"]["grad_clip_norm"]
    optimizer = adamw(trained, stated["one_step"], 0.0)
    average = Average(dict(trained.named_parameters()), Power(0.1))
    rates, values, norms, done = [], [], [], 0
    for micro, loss in zip(range(sequence["iterations"]), losses, strict=False):
        rates.append(rate(done))
        optimizer.defaults["lr"].fill_(rates[-1])
        (loss / accumulated).backward()
        values.append(loss.detach())
        if (micro + 1) % accumulated:
            continue
        norms.append(nn.utils.clip_grad_norm_(trained.parameters(), most))
        optimizer.step()
        optimizer.zero_grad()
        average.set_weight(micro + 1)  # the reference counts batches here
        average.update()
        done += 1
    assert done == sequence["optimizer_steps"]
    case.compare(f"{prefix}seq.lr_before_iteration", torch.tensor(rates, dtype=torch.float64))
    case.compare(f"{prefix}seq.loss", torch.stack(values))
    case.compare(f"{prefix}seq.grad_norm", torch.stack(norms))
    averages = dict(zip(trained.named(), average.values.values(), strict=True))
    for name, parameter in trained.named().items():
        for kind, value in (("final", parameter), ("ema", averages[name])):
            if f"{prefix}seq.{kind}.{name}" in case:
                case.compare(f"{prefix}seq.{kind}.{name}", value)


# --- autoregressive -----------------------------------------------------------------------------


def load_ar(case: Case) -> Trained:
    [path] = case.path.glob("*/model.pt")
    stated = case.spec["model"]
    source = open_checkpoint(path)
    settings = {"video_latent_shape": stated["video_latent_shape"], **stated}
    config = ar_weights.read_config(source, settings)
    with torch.device("meta"):
        model = ARTransformer(config)
    load_into(model, source, ar_weights.KEYS, device="cpu", dtype=torch.float32)
    names = released_names(ar_weights.KEYS, model, "model.")
    return Trained(names, network=model)


def ar_objective(case: Case) -> NextTokenObjective:
    stated = case.spec["model"]
    _, rows, columns = stated["video_latent_shape"]
    given, rest = divmod(stated["ignore_first_num_tokens"] + 1, rows * columns)
    assert rest == 0
    coefficient = case.spec["hyperparameters"]["z_loss_coeff"]
    return NextTokenObjective(conditioning=given, z_coefficient=coefficient)


def ar_losses(case: Case, trained: Trained, tokens: Tensor) -> Any:
    model: Any = trained.parts["network"]
    positions = make_positions(model.config, "cpu", torch.float32)
    return ar_objective(case).loss(model, (tokens, positions, None))


@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=str)
def test_next_token_terms(case: Case) -> None:
    trained = load_ar(case)
    model: Any = trained.parts["network"]
    tokens = case.tensor("tokens")
    positions = make_positions(model.config, "cpu", torch.float32)
    outputs = watched(model, lambda: model(tokens, positions))
    for number in range(model.config.depth):
        case.compare(f"hidden.{number}", outputs[f"layers.{number}"])
    case.compare("final_norm_out", outputs["norm"])
    case.compare("logits", outputs[""][:, :-1])
    case.compare("logsumexp", outputs[""][:, :-1].logsumexp(-1))
    labels = ar_objective(case).labels(model, tokens)
    stated = case.spec["model"]["ignore_index"]
    case.compare("labels", torch.where(labels == IGNORED, stated, labels))
    entropy, z = ar_losses(case, trained, tokens)
    case.compare("ce_loss", entropy)
    case.compare("z_loss", z)
    case.compare("total_loss", entropy + z)
    entropy.backward()
    gradients = trained.named()
    order = case.spec["grad_norm_order"]
    case.compare("grad_norms_no_z", torch.stack([gradients[n].grad.norm() for n in order]))  # type: ignore[union-attr]


@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=str)
def test_next_token_step(case: Case) -> None:
    trained, stated = load_ar(case), case.spec["hyperparameters"]
    check_step(
        case, trained, lambda: sum(ar_losses(case, trained, case.tensor("tokens"))), "", stated
    )  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("schedule", ["real", "fast"])
@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=str)
def test_next_token_schedule(case: Case, schedule: str) -> None:
    stated, fast = case.spec["hyperparameters"], case.spec["sched_fast"]
    warmup, decay = (fast["warmup"], fast["decay"]) if schedule == "fast" else (5000, 50000)
    prefix, trained = f"sched_{schedule}.", load_ar(case)
    steps = len(case.tensor(f"{prefix}lr"))
    batches, optimizer = case.tensor("sched.tokens"), adamw(trained, stated, 0.0)
    rates, losses, norms = [], [], []
    for step in range(steps):
        rates.append(Cosine(peak=stated["lr"], warmup=warmup, decay=decay)(step))
        optimizer.defaults["lr"].fill_(rates[-1])
        loss = sum(ar_losses(case, trained, batches[step]))
        loss.backward()  # type: ignore[union-attr]
        losses.append(loss.detach())  # type: ignore[union-attr]
        norms.append(nn.utils.clip_grad_norm_(trained.parameters(), stated["grad_clip_norm"]))
        optimizer.step()
        optimizer.zero_grad()
    case.compare(f"{prefix}lr", torch.tensor(rates, dtype=torch.float64))
    case.compare(f"{prefix}loss", torch.stack(losses))
    case.compare(f"{prefix}grad_norm", torch.stack(norms))
    for name, parameter in trained.named().items():
        if f"{prefix}final.{name}" in case:
            case.compare(f"{prefix}final.{name}", parameter)


# --- diffusion ----------------------------------------------------------------------------------


def load_dit(case: Case, variant: str) -> Trained:
    stated = case.spec[variant]
    path = case.path / stated["checkpoint"].split()[0]
    ratio = [stated["model"][f"rope_{axis}_extrapolation_ratio"] for axis in "thw"]
    settings = {"rope_ratio": ratio, "base_fps": stated["model"]["base_fps"]}
    found = dit_weights.open_network(path.parent, settings)
    with torch.device("meta"):
        model = DiT(found.config)
    load_into(model, found.source, found.keys, device="cpu", dtype=torch.float32)
    names = released_names(found.keys, model, "net.") | {"uncertainty.weight": "logvar.1.weight"}
    return Trained(names, network=model, uncertainty=read_uncertainty(path))


def read_uncertainty(path: Path) -> Uncertainty:
    source = open_checkpoint(path)
    module = Uncertainty(source.tensors["logvar.0.freqs"].shape[0])
    stored = {"frequencies": "logvar.0.freqs", "phases": "logvar.0.phases"}
    tensors = {name: source.read(key).float() for name, key in stored.items()}
    module.load_state_dict(tensors | {"weight": source.read("logvar.1.weight").float()})
    return module


def dit_objective(case: Case, variant: str, scale: float) -> DenoisingObjective:
    stated = case.spec[variant]
    given = stated["condition"] or {}
    return DenoisingObjective(
        noise_factor=stated["video_noise_multiplier"],
        noise_mean=stated["p_mean"],
        noise_deviation=stated["p_std"],
        text_dropout=stated["text_dropout_rate"],
        most_conditioning=given.get("first_random_n_num_condition_t_max", 0),
        condition_mean=given.get("augment_p_mean", -3.0),
        condition_deviation=given.get("augment_p_std", 2.0),
        scale=scale,
    )


def dit_draws(case: Case, objective: DenoisingObjective, prefix: str, at: int | None) -> Draws:
    def get(name: str) -> Tensor:
        tensor = case.tensor(f"{prefix}in.{name}")
        return tensor if at is None else tensor[at]

    noise = get("epsilon")
    masked = f"{prefix}in.num_condition_t" in case
    nothing = torch.zeros(len(noise))
    return Draws(
        text_kept=get("text_keep"),
        sigma=objective.levels(get("sigma_uniform")),
        noise=noise,
        num_conditioning=get("num_condition_t").expand(len(noise)) if masked else nothing.long(),
        condition_sigma=(
            objective.condition_levels(get("augment_uniform")) if masked else nothing + 1
        ),
        condition_noise=get("augment_noise") if masked else torch.zeros(()),
    )


def dit_batch(case: Case, variant: str, prefix: str, at: int | None) -> Any:
    [fps] = {float(value) for value in case.tensor(f"{variant}.in.fps")}
    latent, text = (case.tensor(f"{prefix}in.{name}") for name in ("latent", "text"))
    latent, text = (x if at is None else x[at] for x in (latent, text))
    return latent, text, fps, case.tensor(f"{variant}.in.padding_mask")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", DENOISING, ids=str)
def test_denoising_step(case: Case, variant: str) -> None:
    stated = case.spec[variant]
    trained = load_dit(case, variant)
    network: Any = trained.parts["network"]
    uncertainty: Any = trained.parts["uncertainty"]
    objective = dit_objective(case, variant, stated["loss_scale"])
    prefix = f"{variant}."
    draws, batch = dit_draws(case, objective, prefix, None), dit_batch(case, variant, prefix, None)
    x0 = SIGMA_DATA * batch[0]
    x, mask = objective.inputs(x0, draws)
    sigma = draws.sigma.view(-1, 1, 1, 1, 1)
    scale, times = precondition(draws.sigma).scale, precondition(draws.sigma).noise
    case.compare(f"{prefix}x0", x0)
    case.compare(f"{prefix}sigma", draws.sigma)
    case.compare(f"{prefix}xt", x0 + sigma * draws.noise)
    weight = (draws.sigma**2 + SIGMA_DATA**2) / (draws.sigma * SIGMA_DATA) ** 2
    case.compare(f"{prefix}weights_per_sigma", weight)
    case.compare(f"{prefix}logvar", uncertainty(times)[:, None])
    kept = batch[1] * draws.text_kept[:, None, None]
    case.compare(f"{prefix}crossattn_emb", kept)
    if variant == "v2w":
        case.compare(f"{prefix}augment_sigma", draws.condition_sigma)
        case.compare(f"{prefix}condition_video_input_mask", mask)
        case.compare(f"{prefix}net_in", x)
    else:
        assert torch.allclose(x, scale.view(-1, 1, 1, 1, 1) * (x0 + sigma * draws.noise))
    seen: list[Tensor] = []
    handle = network.register_forward_hook(lambda _module, _inputs, y: seen.append(y.detach()))
    plain = objective.loss(network, None, batch, draws) / objective.scale
    loss = objective.loss(network, uncertainty, batch, draws)
    handle.remove()
    estimate = clean_latents(x, seen[0], draws.sigma)
    if variant == "v2w":
        case.compare(f"{prefix}net_x0_pred", estimate)
    estimate = torch.where(mask > 0, x0, estimate)
    case.compare(f"{prefix}x0_pred", estimate)
    case.compare(f"{prefix}mse_per_sample", (estimate - x0).square().mean((1, 2, 3, 4)))
    case.compare(f"{prefix}edm_loss_per_sample", plain)
    case.compare(f"{prefix}loss_per_sample", loss / objective.scale)
    case.compare(f"{prefix}loss", loss.mean())
    check_step(case, trained, loss.mean, prefix, stated["one_step"])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", DENOISING, ids=str)
def test_denoising_run(case: Case, variant: str) -> None:
    stated, prefix = case.spec[variant], f"{variant}.seq."
    sequence, trained = stated["seq"], load_dit(case, variant)
    network: Any = trained.parts["network"]
    objective = dit_objective(case, variant, sequence["loss_scale"])

    def losses() -> Iterator[Tensor]:
        for at in count():
            draws = dit_draws(case, objective, prefix, at)
            batch = dit_batch(case, variant, prefix, at)
            yield objective.loss(network, trained.parts["uncertainty"], batch, draws).mean()  # type: ignore[arg-type]

    check_run(case, trained, losses(), f"{variant}.", stated, rate(sequence))


def rate(stated: Mapping[str, Any]) -> Linear:
    return Linear(
        peak=stated["lr"],
        warmup=stated["warm_up_steps"],
        cycle=stated.get("cycle_length", 1e13),
        start=stated["f_start"],
        top=stated["f_max"],
        end=stated["f_min"],
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", DENOISING, ids=str)
def test_denoising_rates(case: Case, variant: str) -> None:
    if not (stated := case.spec[variant].get("lr_real")):
        return
    ours = Linear(peak=stated["base_lr"], warmup=2500)
    for step, theirs in zip(stated["iterations"], stated["lr"], strict=True):
        assert ours(step) == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("case", DENOISING, ids=str)
def test_powers_of_averages(case: Case) -> None:
    for deviation, stated in case.spec["ema_power"].items():
        decay = Power(float(deviation))
        assert decay.exponent == pytest.approx(stated["exponent"], rel=1e-9)
        for step, beta in stated["beta_at_iteration"].items():
            assert decay(int(step) + 1) == pytest.approx(beta, rel=1e-6)


# --- flow ---------------------------------------------------------------------------------------


@cache
def flow_settings(path: Path, names: tuple[float, ...], scale: float) -> Any:
    return flow_weights.open_network(path, {"rope_ratio": list(names), "timestep_scale": scale})


def load_flow(case: Case) -> Trained:
    stated = case.spec["model"]
    ratio = tuple(stated[f"rope_{axis}_extrapolation_ratio"] for axis in "thw")
    path = case.path / case.spec["checkpoint"].split()[0]
    found = flow_settings(path, ratio, stated["timestep_scale"])
    with torch.device("meta"):
        model = FlowDiT(found.config)
    load_into(model, found.source, found.keys, device="cpu", dtype=torch.float32)
    return Trained(released_names(found.keys, model, "net."), network=model)


def flow_objective(case: Case, high: float = 0.0) -> flow.FlowObjective:
    stated = case.spec["training"]
    shares = stated["conditional_frames_probs"]
    return flow.FlowObjective(
        text_dropout=stated["text_dropout_rate"],
        conditioning=tuple(shares[str(number)] for number in range(len(shares))),
        high_share=high,
        shift=stated["shift"],
    )


def flow_inputs(case: Case, prefix: str, at: int | None) -> tuple[Any, flow.Draws]:
    def get(name: str) -> Tensor:
        tensor = case.tensor(f"{prefix}in.{name}")
        return tensor if at is None else tensor[at]

    normal = get("time_normal")
    never = torch.ones_like(normal)
    levels = flow_objective(case).levels(normal, never, never.long())
    draws = flow.Draws(get("text_keep"), levels, get("epsilon"), get("num_conditional_frames"))
    return (get("latent"), get("text"), case.tensor("in.padding_mask")), draws


@pytest.mark.parametrize("case", FLOW, ids=str)
def test_flow_step(case: Case) -> None:
    trained, objective = load_flow(case), flow_objective(case)
    network: Any = trained.parts["network"]
    batch, draws = flow_inputs(case, "", None)
    latents = batch[0]
    x, mask = objective.inputs(latents, draws)
    sigma = draws.sigma.view(-1, 1, 1, 1, 1)
    case.tensor("in.fps")  # without effect
    case.compare("sigma", draws.sigma[:, None])
    case.compare("timesteps", 1000 * draws.sigma[:, None])
    case.compare("xt", sigma * draws.noise + (1 - sigma) * latents)
    case.compare("condition_mask", mask[..., :1, :1])
    case.compare("net_in", x)
    case.compare("crossattn_emb", batch[1] * draws.text_kept[:, None, None])
    seen: list[Tensor] = []
    handle = network.register_forward_hook(lambda _module, _inputs, y: seen.append(y.detach()))
    loss = objective.loss(network, batch, draws)
    handle.remove()
    case.compare("net_out", seen[0])
    case.compare("velocity_pred", torch.where(mask > 0, draws.noise - latents, seen[0]))
    case.compare("loss_per_sample", loss)
    case.compare("loss", loss.mean())
    check_step(case, trained, loss.mean, "", case.spec["one_step"])


@pytest.mark.parametrize("case", FLOW, ids=str)
def test_flow_run(case: Case) -> None:
    sequence, trained = case.spec["seq"], load_flow(case)
    network: Any = trained.parts["network"]

    def losses() -> Iterator[Tensor]:
        for at in count():
            yield flow_objective(case).loss(network, *flow_inputs(case, "seq.", at)).mean()

    check_run(case, trained, losses(), "", case.spec, rate(sequence))


@pytest.mark.parametrize("case", FLOW, ids=str)
def test_flow_levels(case: Case) -> None:
    table = case.tensor("table.sigmas")
    case.compare("table.timesteps", 1000 * table)
    stated, high = case.spec["high"], flow.high_levels(case.spec["training"]["shift"])
    assert len(high) == stated["candidates"]
    assert torch.allclose(high, table[: len(high)])
    objective = flow_objective(case, stated["ratio"])
    drawn = [case.tensor(f"high.in.{name}") for name in ("time_normal", "rand", "candidate_index")]
    levels = objective.levels(*drawn)
    case.compare("high.sigma", levels[:, None])
    case.compare("high.timesteps", 1000 * levels[:, None])
    real = case.spec["lr_real"]
    ours = Linear(
        peak=real["base_lr"],
        warmup=real["warm_up_steps"][0],
        cycle=real["cycle_lengths"][0],
        start=real["f_start"],
        top=real["f_max"],
        end=real["f_min"],
    )
    for step, theirs in zip(real["iterations"], real["lr"], strict=True):
        assert ours(step) == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("case", [*AUTOREGRESSIVE, *DENOISING, *FLOW], ids=str)
def test_every_tensor_is_used(case: Case) -> None:
    assert case.unused() == []
