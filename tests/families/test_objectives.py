"""Draws and losses of post-training: shares, shapes, and the frames that do not count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from worldline.families.autoregressive.model import (
    ARTransformer,
    ARTransformerConfig,
    make_positions,
)
from worldline.families.autoregressive.objective import NextTokenObjective
from worldline.families.diffusion.model import PRESETS, DiT, DiTConfig
from worldline.families.diffusion.objective import DenoisingObjective, Draws, recipe_of
from worldline.families.predict2_5.objective import FlowObjective, high_levels
from worldline.losses import IGNORED, next_token_loss
from worldline.shapes import LatentShape
from worldline.train.experiment import read

CONFIG = ARTransformerConfig(
    depth=2,
    width=48,
    num_heads=4,
    num_kv_heads=2,
    head_size=12,
    hidden=64,
    vocabulary=96,
    embedding_rows=96,
    grid=LatentShape(3, 20, 24),
)
PROMPTED = replace(CONFIG, embedding_rows=128, context_width=20, absolute_positions=True)


def build(config: ARTransformerConfig) -> ARTransformer:
    torch.manual_seed(3)
    model = ARTransformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    return model


@pytest.mark.parametrize("config", [CONFIG, PROMPTED], ids=["base", "prompted"])
def test_loss_by_rows_is_that_of_all_logits(config: ARTransformerConfig) -> None:
    """1,440 tokens a clip: more than the rows whose logits exist at once; gradients, too."""
    model, count = build(config), 2
    ids = torch.randint(config.vocabulary, (count, config.length))
    text = None if config.context_width is None else torch.randn(count, 5, config.context_width)
    positions, objective = make_positions(config, "cpu", torch.float32), NextTokenObjective()
    kept = torch.tensor([1.0, 0.0])
    terms = objective.loss(model, (ids, positions, text), kept)
    sum(terms).backward()  # type: ignore[union-attr, arg-type]
    found = [parameter.grad.clone() for parameter in model.parameters()]  # type: ignore[union-attr]
    model.zero_grad()
    context = model.encode_context(None if text is None else text * kept[:, None, None])
    labels = objective.labels(model, ids)
    assert int((labels == IGNORED).sum()) == count * (config.leading_tokens + 480 - 1)
    loss = next_token_loss(
        model(ids, positions, context=context)[:, :-1], labels, z_coefficient=1e-4
    )
    assert torch.allclose(loss, terms.cross_entropy + terms.z, rtol=1e-5)
    loss.backward()
    for ours, parameter in zip(found, model.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.allclose(ours, parameter.grad, rtol=1e-3, atol=1e-6)


def test_draws_of_denoising() -> None:
    """Median of the noise levels, shares of prompts and frames, and one number a batch."""
    objective = DenoisingObjective(noise_factor=4.0, text_dropout=0.3, most_conditioning=2)
    generator, latents = torch.Generator().manual_seed(1), torch.zeros(4000, 1, 4, 1, 1)
    draws = objective.draw(latents, generator)
    assert float(draws.sigma.median()) == pytest.approx(4, rel=0.1)
    assert float(draws.sigma.log().std()) == pytest.approx(1, rel=0.05)
    assert float(draws.condition_sigma.log().mean()) == pytest.approx(-3, abs=0.1)
    assert float(draws.text_kept.mean()) == pytest.approx(0.7, abs=0.03)
    given = [int(objective.draw(latents[:2], generator).num_conditioning[0]) for _ in range(300)]
    assert {*given} == {0, 1, 2}
    assert min(given.count(number) for number in range(3)) > 60
    assert len(draws.num_conditioning.unique()) == 1
    assert torch.equal(
        objective.draw(latents[:, :, :1], generator).num_conditioning.unique(), torch.tensor([0])
    )


def test_draws_of_flows() -> None:
    """Shares of frames given by clip; levels of the table; an image has no frame to give."""
    objective = FlowObjective(text_dropout=0.25, conditioning=(0.2, 0.3, 0.5), high_share=0.1)
    generator, latents = torch.Generator().manual_seed(2), torch.zeros(4000, 1, 3, 1, 1)
    draws = objective.draw(latents, generator)
    shares = draws.num_conditioning.bincount().float() / 4000
    assert torch.allclose(shares, torch.tensor([0.2, 0.3, 0.5]), atol=0.03)
    assert float(draws.text_kept.mean()) == pytest.approx(0.75, abs=0.03)
    assert 0 < float(draws.sigma.min()) <= float(draws.sigma.max()) <= 1
    share = float((draws.sigma >= high_levels()[-1]).float().mean())
    usual = FlowObjective().draw(latents, generator).sigma >= high_levels()[-1]
    assert share > float(usual.float().mean()) + 0.04
    assert int(objective.draw(latents[:, :, :1], generator).num_conditioning.max()) == 0


def test_draws_do_not_depend_on_what_is_computed() -> None:
    """A step's draws follow from its generator alone."""
    latents = torch.zeros(3, 2, 4, 2, 2)
    for objective in (DenoisingObjective(most_conditioning=2), FlowObjective()):
        first, second = (
            objective.draw(latents, torch.Generator().manual_seed(7)) for _ in range(2)
        )
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_clips_of_a_batch_keep_their_frame_rates() -> None:
    """A batch of three rates, two of them the same, has the losses of its clips alone."""
    config = DiTConfig(
        depth=2,
        width=48,
        num_heads=4,
        head_size=12,
        hidden=96,
        latent_channels=4,
        context_width=8,
        lora_rank=6,
        max_grid=LatentShape(4, 4, 4),
        rope_ratio=(1.0, 1.0, 1.0),
        condition_mask=False,
    )
    torch.manual_seed(5)
    network = DiT(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    objective, fps = DenoisingObjective(), torch.tensor([12.0, 30.0, 12.0])
    latents, text = torch.randn(3, 4, 3, 4, 4), torch.randn(3, 5, 8)
    draws = objective.draw(latents, torch.Generator().manual_seed(6))
    losses = objective.loss(network, None, (latents, text, fps, None), draws)

    def alone(clip: int, rate: float) -> Tensor:
        batch = latents[clip : clip + 1], text[clip : clip + 1], rate, None
        own = Draws(*(each[clip : clip + 1] if each.ndim else each for each in draws))
        return objective.loss(network, None, batch, own)[0]

    each = [alone(clip, float(rate)) for clip, rate in enumerate(fps)]
    assert torch.allclose(losses, torch.stack(each), rtol=1e-5)
    assert not torch.isclose(losses[0], alone(0, 30.0), rtol=1e-5)


def test_models_that_are_given_frames_have_the_released_recipe() -> None:
    """So that the short form trains a Video2World model as its released experiment does."""
    config = next(iter(PRESETS.values()))
    own = {given: recipe_of(replace(config, condition_mask=given)) for given in (False, True)}
    assert own[True] == read("video2world_7b_example_hdvila").objective
    assert own[False] == read("text2world_7b_example_cosmos_nemo_assets").objective
