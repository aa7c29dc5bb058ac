"""Losses have closed forms on constant pictures, shifted windows and flat logits."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from worldline.errors import CheckpointError
from worldline.losses import (
    FeatureNetwork,
    ReconstructionObjective,
    Reduction,
    Schedule,
    color_distance,
    condition_mask,
    consistency_distance,
    denoising_loss,
    flow_loss,
    flowed_latents,
    gram_distance,
    join_windows,
    kl_divergence,
    log_normal_sigmas,
    next_token_labels,
    next_token_loss,
    noised_latents,
    perceptual_distance,
    reconstruction_terms,
    reduce,
    shifted_sigmas,
    split_windows,
    total,
)
from worldline.sampling import edm
from worldline.sampling.solvers import finish

WIDTHS = (4, 4, 6, 6, 8, 8, 8, 8, 8, 8, 10, 10, 10)
INDICES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # of torchvision's vgg16().features
STAGES = (1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5)


def slice_name(i: int) -> str:
    return f"slice{STAGES[i]}.{INDICES[i]}"


def features_name(i: int) -> str:
    return f"features.{INDICES[i]}"


def network_file(name: Callable[[int], str] = slice_name) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i, (before, after) in enumerate(zip((3, *WIDTHS[:-1]), WIDTHS, strict=True)):
        weight = torch.randn(after, before, 3, 3, generator=generator)
        tensors[f"{name(i)}.weight"] = weight / before**0.5 / 2
        tensors[f"{name(i)}.bias"] = 0.1 * torch.randn(after, generator=generator)
    return tensors


def random_video(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# Schedules


@pytest.mark.parametrize(
    ("boundaries", "values", "expected"),
    [
        ((3, 5), (1.0, 2.0, 4.0), [1, 1, 1, 2, 2, 4, 4]),
        ((3, 5), (1.0, 2.0), [1, 1, 1, 2, 2, 2, 2]),
        ((0,), (7.0,), [7] * 7),
        ((), (7.0,), [7] * 7),
    ],
)
def test_weight_changes_at_the_boundary(
    boundaries: tuple[int, ...], values: tuple[float, ...], expected: list[float]
) -> None:
    schedule = Schedule(boundaries, values)
    assert [schedule.at(i) for i in range(7)] == expected


@pytest.mark.parametrize(
    ("boundaries", "values"),
    [((), ()), ((1, 2), (1.0,)), ((1,), (1.0, 2.0, 3.0)), ((5, 3), (1, 2))],
)
def test_schedule_refuses_what_has_no_meaning(
    boundaries: tuple[int, ...], values: tuple[float, ...]
) -> None:
    with pytest.raises(ValueError, match=r"as many values|must rise"):
        Schedule(boundaries, values)


# Feature network


def test_features_halve_the_picture_from_stage_to_stage() -> None:
    network = FeatureNetwork(network_file())
    shapes = [tuple(x.shape) for x in network(random_video(0, 2, 3, 32, 48))]
    widths = [WIDTHS[i] for i in (1, 3, 6, 9, 12)]
    assert shapes == [(2, c, 32 >> k, 48 >> k) for k, c in enumerate(widths)]


def test_both_namings_give_the_same_network() -> None:
    images = random_video(0, 1, 3, 16, 16)
    torchvision = network_file(features_name) | {"classifier.0.weight": torch.zeros(2, 2)}
    for ours, theirs in zip(
        FeatureNetwork(network_file())(images),
        FeatureNetwork(torchvision)(images),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_features_pass_gradients_to_the_picture_only() -> None:
    network = FeatureNetwork(network_file())
    images = random_video(0, 1, 3, 16, 16).requires_grad_()
    sum(x.sum() for x in network(images)).backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0
    assert not any(p.requires_grad for p in network.parameters())


def test_damaged_feature_files_are_named() -> None:
    missing = network_file()
    del missing["slice3.12.bias"]
    with pytest.raises(CheckpointError, match=r"Missing.*\.12\.bias\""):
        FeatureNetwork(missing)
    for name, shape in (
        ("slice6.30.bias", (1,)),
        ("slice2.5.weight", (6, 5, 3, 3)),
        ("slice2.5.bias", (5,)),
        ("slice2.5.weight", ()),
    ):
        with pytest.raises(CheckpointError, match=re.escape(name.partition(".")[2])):
            FeatureNetwork(network_file() | {name: torch.zeros(shape)})


def test_features_refuse_pictures_that_vanish() -> None:
    network = FeatureNetwork(network_file())
    with pytest.raises(ValueError, match="at least 16 x 16 pixels, got 8 x 32"):
        network(torch.zeros(1, 3, 8, 32))


# Distances


def test_color_distance_in_bfloat16_is_computed_in_float32() -> None:
    x, y = torch.tensor([1.0]).bfloat16(), torch.tensor([-0.00390625]).bfloat16()
    assert color_distance(x, y).item() == 1.00390625  # bf16 would round it to 1


def test_kl_is_the_integral_of_the_log_ratio() -> None:
    mean, logvar = torch.tensor(0.5), torch.tensor(-0.7)
    z = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    normal = torch.distributions.Normal(mean.double(), (logvar.double() / 2).exp())
    unit = torch.distributions.Normal(z.new_tensor(0), z.new_tensor(1))
    log_p = normal.log_prob(z)
    integral = torch.trapezoid(log_p.exp() * (log_p - unit.log_prob(z)), z)
    assert kl_divergence(mean, logvar).item() == pytest.approx(integral.item(), rel=1e-5)
    assert kl_divergence(torch.zeros(3), torch.zeros(3)).tolist() == [0, 0, 0]


def test_perceptual_distance_keeps_frames_apart() -> None:
    x, y = torch.zeros(1, 2, 3, 4, 4), torch.zeros(1, 2, 3, 4, 4)
    y[:, 1] = -2
    assert perceptual_distance(x, y).tolist() == [[0, 2]]


def test_layers_of_features_are_weighted() -> None:
    def features(images: Tensor) -> list[Tensor]:
        return [images, 3 * images[..., ::2, ::2]]

    objective = ReconstructionObjective(perceptual=Schedule((), (2.0,)), layer_weights=(10, 0.5))
    x = torch.zeros(1, 3, 1, 4, 4)
    terms = reconstruction_terms(objective, x, x + 1, 0, features=features)
    assert terms["perceptual"].unique().tolist() == [23]


def test_gram_ignores_where_and_when_a_feature_is() -> None:
    x = random_video(0, 2, 3, 5, 4, 4)
    shuffled = x.flatten(3).roll((1, 5), (1, 3)).reshape(x.shape)
    assert gram_distance(x, shuffled).max() < 1e-12
    frames = [features.flatten(0, 1)[:, None] for features in (x, shuffled)]
    assert gram_distance(*frames).max() > 1e-6  # frame by frame it differs


def test_gram_of_constant_features() -> None:
    x, y = torch.full((2, 2, 3, 2, 2), 2.0), torch.full((2, 2, 3, 2, 2), 1.0)  # G is 4, and 1
    assert gram_distance(x, y).tolist() == [[9], [9]]


# Windows


@pytest.mark.parametrize(("num_frames", "step"), [(3, 1), (5, 2), (4, 4), (9, 3)])
def test_joined_windows_give_back_the_clip(num_frames: int, step: int) -> None:
    video = random_video(0, 2, 3, 9, 4, 6)
    windows = split_windows(video, num_frames, step)
    num_windows = (9 - num_frames) // step + 1
    assert windows.shape == (2 * num_windows, 3, num_frames, 4, 6)
    assert torch.equal(windows[num_windows], video[1, :, :num_frames])
    joined = join_windows(windows, num_windows, step)
    torch.testing.assert_close(joined, video[:, :, : num_frames + (num_windows - 1) * step])


def test_windows_of_one_clip_are_consistent_until_one_moves() -> None:
    windows = split_windows(random_video(0, 2, 3, 9, 4, 4), 5, 2)
    assert consistency_distance(windows, 3, 2) == 0
    windows = windows.clone()
    windows[3] += 0.5  # the first of three in the second clip: one of four pairs
    assert consistency_distance(windows, 3, 2).item() == pytest.approx(0.125)


def test_a_single_window_has_no_inconsistency() -> None:
    windows = random_video(0, 2, 3, 5, 4, 4).requires_grad_()
    distance = consistency_distance(windows, 1, 2)
    distance.backward()
    assert distance.item() == 0
    assert windows.grad is not None


def test_windows_that_do_not_fit_are_refused() -> None:
    video = torch.zeros(1, 3, 5, 2, 2)
    with pytest.raises(ValueError, match="leave gaps"):
        join_windows(video, 2, 6)
    with pytest.raises(ValueError, match="do not overlap"):
        consistency_distance(video, 1, 5)


# Terms and total


@pytest.mark.parametrize(
    ("reduction", "of_clips", "of_images"),
    [
        (Reduction.MEAN, 1, 1),
        (Reduction.SUM, 3 * 5 * 4, 3 * 4),
        (Reduction.SUM_PER_FRAME, 3 * 4, 3 * 4),
    ],
)
def test_reductions_of_ones(reduction: Reduction, of_clips: float, of_images: float) -> None:
    assert reduce(torch.ones(2, 3, 5, 2, 2), reduction) == of_clips
    assert reduce(torch.ones(2, 3, 2, 2), reduction) == of_images
    assert reduce(torch.tensor(4.0), reduction) == 4  # already one number


def test_reduction_of_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match="median"):
        reduce(torch.ones(2, 3), Reduction("median"))


def test_every_term_is_counted_once() -> None:
    terms = {"color": torch.full((2, 3, 4, 4), 2.0), "frame_consistency": torch.tensor(0.25)}
    assert total(terms) == 2.25
    with pytest.raises(ValueError, match="no term"):
        total({})


EVERYTHING = ReconstructionObjective(
    perceptual=Schedule((10,), (0.1, 0.0)),
    gram=Schedule((5, 10), (0.0, 0.5, 0.0)),
    kl=Schedule((), (2.0,)),
)


def test_terms_have_the_shape_that_is_summed() -> None:
    network = FeatureNetwork(network_file())
    x, y = random_video(0, 2, 3, 5, 16, 32), random_video(1, 2, 3, 5, 16, 32)
    terms = reconstruction_terms(
        EVERYTHING,
        x,
        y,
        7,
        features=network,
        posterior=(torch.ones(2, 4, 3, 2, 2), torch.zeros(2, 4, 3, 2, 2)),
    )
    assert {name: tuple(term.shape) for name, term in terms.items()} == {
        "color": (2, 3, 5, 16, 32),
        "perceptual": (2, 3, 5, 16, 32),
        "gram": (2, 3, 1, 16, 32),
        "kl": (2, 4, 3, 2, 2),
    }
    assert terms["kl"].unique().tolist() == [1]
    assert terms["gram"].min() > 0


def test_a_clip_of_one_frame_is_an_image() -> None:
    network = FeatureNetwork(network_file())
    x, y = random_video(0, 2, 3, 1, 16, 16), random_video(1, 2, 3, 1, 16, 16)
    clip = reconstruction_terms(EVERYTHING, x, y, 7, features=network)
    image = reconstruction_terms(EVERYTHING, x[:, :, 0], y[:, :, 0], 7, features=network)
    for reduction in Reduction:
        torch.testing.assert_close(total(clip, reduction), total(image, reduction))


def test_a_term_of_weight_zero_does_not_run_its_network() -> None:
    def fail(images: Tensor) -> list[Tensor]:
        raise AssertionError("the feature network ran")

    x = random_video(0, 1, 3, 2, 16, 16)
    terms = reconstruction_terms(EVERYTHING, x, x, 10, features=fail)
    assert terms["perceptual"].abs().max() == terms["gram"].abs().max() == 0


def test_terms_refuse_what_does_not_fit() -> None:
    x = torch.zeros(1, 3, 2, 16, 16)
    with pytest.raises(ValueError, match="shapes differ"):
        reconstruction_terms(ReconstructionObjective(), x, x[:, :, :1], 0)
    with pytest.raises(ValueError, match="perceptual term needs a feature network"):
        reconstruction_terms(EVERYTHING, x, x, 0)


# Next token


def test_labels_are_the_tokens_moved_by_one() -> None:
    tokens = torch.arange(12).reshape(2, 6).int()
    assert next_token_labels(tokens, 2).tolist() == [
        [-100, -100, 3, 4, 5],
        [-100, -100, 9, 10, 11],
    ]
    assert tokens.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]  # untouched
    with pytest.raises(ValueError, match="first 5 of 5 labels"):
        next_token_labels(tokens, 5)


def test_flat_logits_know_nothing() -> None:
    labels = next_token_labels(torch.arange(12).reshape(2, 6), 2)
    assert next_token_loss(torch.zeros(2, 5, 50), labels).item() == pytest.approx(math.log(50))
    loss = next_token_loss(torch.zeros(2, 5, 50), labels, z_coefficient=0.1)
    assert loss.item() == pytest.approx(math.log(50) + 0.1 * math.log(50) ** 2)


def test_cross_entropy_reads_counted_labels_only() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 5, 50, generator=generator)
    tokens = torch.randint(50, (2, 6), generator=generator)
    labels = next_token_labels(tokens, 3)
    expected = F.cross_entropy(logits[:, 3:].flatten(0, 1), tokens[:, 4:].flatten())
    torch.testing.assert_close(next_token_loss(logits, labels), expected)
    changed = logits.clone()
    changed[:, :3] += 1  # the z-loss sees it, the cross entropy does not
    assert next_token_loss(changed, labels) == next_token_loss(logits, labels)
    losses = [next_token_loss(x, labels, z_coefficient=1e-4) for x in (logits, changed)]
    assert losses[0] != losses[1]


def test_gradient_is_softmax_minus_label() -> None:
    logits = random_video(0, 1, 3, 7).requires_grad_()
    labels = torch.tensor([[-100, 4, 6]])
    next_token_loss(logits, labels).backward()
    expected = logits.detach().softmax(-1) - F.one_hot(labels.clamp(min=0), 7)
    expected[:, 0] = 0
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, expected / 2)


def test_next_token_loss_of_bfloat16_logits_is_float32() -> None:
    logits = random_video(0, 1, 3, 7).bfloat16()
    labels = torch.tensor([[1, 4, 6]])
    loss = next_token_loss(logits, labels, z_coefficient=1e-4)
    expected = next_token_loss(logits.float(), labels, z_coefficient=1e-4)
    assert loss.dtype == torch.float32
    assert loss == expected


def test_logits_of_the_last_position_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size"):
        next_token_loss(torch.zeros(1, 6, 7), torch.zeros(1, 5, dtype=torch.int64))


def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    latents, noise, more = torch.randn(
        3, 3, 2, 4, 2, 2, generator=torch.Generator().manual_seed(seed)
    )
    return 0.5 * latents, noise, more


def test_factors_of_a_tensor_are_those_of_a_number() -> None:
    for sigma in (0.002, 0.5, 80.0):
        ours = [float(factor) for factor in edm.precondition(torch.tensor([sigma]))]
        assert ours == pytest.approx(list(edm.precondition(sigma)), rel=1e-5)


def test_conditioning_frames_come_first_and_as_many_as_a_clip_has() -> None:
    mask = condition_mask(drawn(1)[0], torch.tensor([0, 1, 3]))
    assert mask.shape == (3, 1, 4, 2, 2)
    assert mask[:, 0, :, 0, 0].tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]]
    assert torch.equal(mask, mask[..., :1, :1].expand(mask.shape))


def test_noised_frames_are_those_of_a_sampler() -> None:
    latents, noise, more = drawn(0)
    seen: list[Tensor] = []

    def network(inputs: Tensor, times: Tensor, conditional: bool) -> Tensor:
        seen.append(inputs)
        return torch.zeros_like(inputs)

    known = edm.Conditioning(latents[:, :, :2], more[:, :, :2], sigma=0.001)
    options = {"sampler": "edm_euler", "num_steps": 2, "guidance": 0.0}
    finish(edm.sample(network, noise, **options, conditioning=known))
    inputs = noised_latents(latents, more, torch.full((3,), 0.001))
    torch.testing.assert_close(inputs[:, :, :2], seen[0][:, :, :2], rtol=1e-5, atol=1e-6)
    # all but noise: samplers begin with noise alone
    inputs = noised_latents(latents, noise, torch.full((3,), 80.0))
    torch.testing.assert_close(inputs[:, :, 2:], seen[0][:, :, 2:], rtol=0, atol=0.03)


def test_the_denoising_loss_is_the_weighted_error_of_the_estimate() -> None:
    latents, noise, _ = drawn(2)
    sigma = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    wide = sigma.view(-1, 1, 1, 1, 1)
    output = torch.randn(latents.shape, generator=torch.Generator().manual_seed(9))
    mask = torch.zeros(3, 1, 4, 2, 2)
    mask[1, :, :2] = 1
    noised = latents.double() + wide * noise
    estimate = 0.25 / (wide**2 + 0.25) * noised + 0.5 * wide * (wide**2 + 0.25).rsqrt() * output
    weight = (wide**2 + 0.25) / (0.5 * wide) ** 2
    error = weight * (estimate - latents).square()
    expected = torch.stack([error[0].mean(), error[1, :, 2:].mean(), error[2].mean()])
    loss = denoising_loss(output, latents, noise, sigma, mask)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)


def test_an_output_that_knows_the_clean_latents_has_no_loss() -> None:
    latents, noise, _ = drawn(3)
    sigma = torch.tensor([0.002, 1.0, 80.0])
    skip, out, _, _ = (factor.view(-1, 1, 1, 1, 1) for factor in edm.precondition(sigma))
    noised = latents + sigma.view(-1, 1, 1, 1, 1) * noise
    output = (latents - skip * noised) / out
    assert denoising_loss(output, latents, noise, sigma, torch.zeros(3, 1, 4, 2, 2)).max() < 1e-9


def test_noise_levels_are_log_normal() -> None:
    normal = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    logarithm = log_normal_sigmas(normal, mean=0.2, deviation=1.4).log()
    assert logarithm.mean().item() == pytest.approx(0.2, abs=0.05)
    assert logarithm.std().item() == pytest.approx(1.4, rel=0.02)


def test_states_of_a_flow_lie_between_data_and_noise() -> None:
    latents, noise, _ = drawn(5)
    sigma = torch.tensor([0.0, 0.25, 1.0])
    inputs = flowed_latents(latents, noise, sigma)
    assert torch.equal(inputs[0], latents[0])
    torch.testing.assert_close(inputs[1], 0.75 * latents[1] + 0.25 * noise[1])
    assert torch.equal(inputs[2], noise[2])
    # the right velocity leads from any of them to the data
    torch.testing.assert_close(inputs - sigma.view(-1, 1, 1, 1, 1) * (noise - latents), latents)


def test_the_flow_loss_is_the_squared_error_of_the_velocity() -> None:
    latents, noise, velocity = drawn(6)
    mask = torch.zeros(3, 1, 4, 2, 2)
    mask[1, :, :2] = 1
    error = (velocity - (noise - latents)).double().square()
    expected = torch.stack(
        [error[0].mean(), error[1, :, 2:].sum() / error[1].numel(), error[2].mean()]
    )
    loss = flow_loss(velocity, latents, noise, mask)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert flow_loss(noise - latents, latents, noise, mask).max() < 1e-12


def test_noise_levels_of_a_flow_are_shifted_towards_noise() -> None:
    normal = torch.tensor([0.0, 2.0, -2.0, 40.0, -40.0])
    # the level that is evenly spaced, on its grid; then the shift by 5
    level = torch.tensor([0.5, 1 - 0.880, 1 - 0.119, 0.001, 1.0])
    torch.testing.assert_close(shifted_sigmas(normal), 5 * level / (1 + 4 * level))
    torch.testing.assert_close(shifted_sigmas(normal, shift=1.0), level)
    torch.testing.assert_close(shifted_sigmas(normal / 2, deviation=2.0), shifted_sigmas(normal))
