"""The filters by their definitions, the draw by its frequencies."""

import pytest
import torch

from worldline.sampling.logits import Sampling, draw, probabilities


def test_top_p_keeps_the_token_that_crosses_the_threshold() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.25, 0.15]]).log()
    probs, ids = probabilities(logits, Sampling(top_p=0.7))
    assert ids.tolist() == [[1, 2, 3, 0]]
    assert torch.allclose(probs, torch.tensor([[2 / 3, 1 / 3, 0, 0]]))
    # exactly at the threshold the next one still stays: the test is strict
    probs, _ = probabilities(torch.tensor([[0.5, 0.25, 0.25]]).log(), Sampling(top_p=0.5))
    assert probs[0, 1] > 0


def test_a_tiny_top_p_leaves_one_token() -> None:
    logits = torch.randn(5, 100)
    probs, ids = probabilities(logits, Sampling(top_p=1e-6))
    assert torch.equal(ids[:, 0], logits.argmax(-1))
    assert torch.equal(probs[:, 0], torch.ones(5))


def test_top_k_and_no_filter() -> None:
    logits = torch.randn(3, 50)
    probs, _ = probabilities(logits, Sampling(top_p=1.0, top_k=7))
    assert (probs > 0).sum(-1).tolist() == [7, 7, 7]
    probs, ids = probabilities(logits, Sampling(top_p=1.0, temperature=2.0))
    assert torch.allclose(probs, (logits / 2).softmax(-1).gather(1, ids))


def test_draws_have_the_filtered_frequencies() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()[None]
    generator = torch.Generator().manual_seed(0)
    noise = torch.empty(20_000, 4).exponential_(1, generator=generator)
    drawn = draw(logits.expand(20_000, 4), Sampling(top_p=0.85), noise)
    share = torch.bincount(drawn, minlength=4) / 20_000
    assert torch.allclose(share, torch.tensor([4 / 9, 3 / 9, 2 / 9, 0.0]), atol=0.015)


def test_greedy_takes_the_best_and_needs_no_noise() -> None:
    logits = torch.randn(4, 30)
    assert torch.equal(draw(logits, Sampling(temperature=0)), logits.argmax(-1))


def test_bf16_logits_are_filtered_in_float32() -> None:
    logits = torch.randn(1, 5000).bfloat16()
    probs, _ = probabilities(logits, Sampling())
    assert probs.dtype == torch.float32
    assert torch.equal(probs, probabilities(logits.float(), Sampling())[0])


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": 0}, {"top_k": 3}]
)
def test_senseless_rules_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"temperature|top_"):
        Sampling(**wrong)  # type: ignore[arg-type]
