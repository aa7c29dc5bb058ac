"""Golden cases of the diffusion transformers on two processes that share the tokens."""

from __future__ import annotations

from importlib import import_module
from typing import Any
from unittest import mock

import pytest

from tests.ranks import Together
from worldline.nn.dit import DiffusionTransformer
from worldline.parallel.context import Way, split_tokens
from worldline.parallel.mesh import Axis
from worldline.shapes import LatentShape

pytestmark = pytest.mark.slow

# golden test -> part of the names of its cases
TESTS = {
    "test_predict1_dit.test_diffusers_folder": "",
    "test_predict1_dit.test_bf16_as_in_the_released_pipelines": "",
    "test_predict2_5_dit.test_diffusers_folder": "",
    "test_predict2_5_e2e.test_request": "",
    "test_flow_unipc.test_every_step": "net_shift_10",
    "test_v2w_denoise.test_latents": ".10",
    "test_diffusion_decoder.test_predict1": "",
}


def cases_of(test: Any, part: str) -> list[tuple[Any, ...]]:
    """Arguments of a golden test that is not skipped."""
    [mark] = test.pytestmark
    given = [getattr(one, "values", (one,)) for one in mark.args[1]]
    return [one for one in given if one[0] is not None and part in " ".join(map(str, one))]


def check(axis: Axis, name: str, way: Way) -> set[str]:
    """Run a golden test whose networks share their tokens; the ways that they were shared."""
    module, function = name.split(".")
    test, run, ways = getattr(import_module(module), function), DiffusionTransformer.run, set()

    def shared(model: Any, latents: Any, *inputs: Any, **options: Any) -> Any:
        grid = model.config.tokens(LatentShape(*latents.shape[2:]))
        tokens = split_tokens(axis, grid, model.config.num_heads, way)
        ways.add(str(tokens))
        return run(model, latents, *inputs, **{**options, "tokens": tokens})

    with mock.patch.object(DiffusionTransformer, "run", shared):
        for arguments in cases_of(test, TESTS[name]):
            test(*arguments)
    return ways


@pytest.mark.parametrize("way", ["ulysses", "ring"])
@pytest.mark.parametrize("name", TESTS)
def test_cases_on_two_processes(two: Together, name: str, way: str) -> None:
    module, function = name.split(".")
    if not cases_of(getattr(import_module(module), function), TESTS[name]):
        pytest.skip("the cases are not here")
    expected = {"ulysses": "Ulysses", "ring": "ring attention"}[way] + " over 2 processes"
    for ways in two(check, name, way):
        assert expected in ways  # heads of some do not divide
