from __future__ import annotations

import numpy as np
import pytest
import torch

from worldline.sampling.noise import MAX_SEED, standard_noise


def test_noise_is_that_of_the_legacy_generator() -> None:
    noise = standard_noise(7, (2, 3, 4))
    expected = np.random.RandomState(7).standard_normal(24).astype(np.float32)
    assert noise.dtype == torch.float32
    assert torch.equal(noise.flatten(), torch.from_numpy(expected))


def test_noise_leaves_the_global_generators_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second = standard_noise(3, (5,)), standard_noise(3, torch.Size((5,)))
    assert torch.equal(first, second)
    assert not torch.equal(first, standard_noise(4, (5,)))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_ends_of_the_seeds() -> None:
    for seed in (0, MAX_SEED):
        assert standard_noise(seed, (1,)).isfinite().all()
    for seed in (-1, MAX_SEED + 1):
        with pytest.raises(ValueError, match=f"seed {seed} "):
            standard_noise(seed, (1,))
