"""The plain forms against their formulas, and the kernels against the plain forms."""

import pytest
import torch

from worldline.nn.modulation import Residual, add_and_modulate, norm_heads, sinusoid
from worldline.nn.rope import Rotation, stretched_angles_3d
from worldline.shapes import LatentShape

GRID = LatentShape(3, 4, 5)


def rotation(size: int, device: str = "cpu") -> Rotation:
    angles = stretched_angles_3d(GRID, size, ratio=(2.0, 1.0, 1.5), time_scale=(30.0, 24.0))
    return Rotation(angles.cos().to(device), angles.sin().to(device))


def inputs(width: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    batch, length = 2, GRID.tokens
    return {
        "stream": draw(batch, length, width),
        "update": draw(batch, length, width),
        "gate": draw(batch, width),
        "added": draw(length, width),
        "shift": draw(batch, width),
        "scale": draw(batch, width),
    }


def test_the_norm_sees_what_was_added() -> None:
    given = inputs(48, torch.float64)
    residual = Residual(given["stream"], given["update"], given["gate"])
    stream, normed = add_and_modulate(residual, given["added"], given["shift"], given["scale"])
    total = given["stream"] + given["gate"][:, None] * given["update"] + given["added"]
    assert torch.equal(stream, total)
    back = (normed - given["shift"][:, None]) / (1 + given["scale"][:, None])
    assert torch.allclose(back.mean(-1), torch.zeros(2, GRID.tokens, dtype=torch.float64))
    assert torch.allclose(back.var(-1, correction=0), torch.ones(1, dtype=torch.float64), 1e-4)


def test_runs_of_tokens_may_have_vectors_of_their_own() -> None:
    """A clip whose frames are modulated differently is its frames, one after the other."""
    given, frames = inputs(48, torch.float64), GRID.frames
    more = {name: torch.randn(2, frames, 48, dtype=torch.float64) for name in ("gate", "a", "b")}
    residual = Residual(given["stream"], given["update"], more["gate"])
    together = add_and_modulate(residual, None, more["a"], more["b"])
    cut = [given[name].chunk(frames, dim=1) for name in ("stream", "update")]
    for frame, (stream, update) in enumerate(zip(*cut, strict=True)):
        gate, shift, scale = (vectors[:, frame] for vectors in more.values())
        alone = add_and_modulate(Residual(stream, update, gate), None, shift, scale)
        for ours, theirs in zip(alone, together, strict=True):
            assert torch.equal(ours, theirs.chunk(frames, dim=1)[frame])
    one = add_and_modulate(
        residual._replace(gate=given["gate"][:, None]), None, *[given["shift"][:, None]] * 2
    )
    same = add_and_modulate(residual._replace(gate=given["gate"]), None, *[given["shift"]] * 2)
    assert torch.equal(one[1], same[1])


def test_the_norm_may_be_wider_than_the_stream() -> None:
    given = inputs(48, torch.bfloat16)
    shift, scale = given["shift"].float(), given["scale"].float()
    residual = Residual(given["stream"], given["update"], given["gate"])
    stream, normed = add_and_modulate(residual, None, shift, scale, torch.float32)
    assert (stream.dtype, normed.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(normed, add_and_modulate(Residual(stream.float()), None, shift, scale)[1])


def test_heads_have_unit_mean_square_before_the_weight() -> None:
    x = torch.randn(1, GRID.tokens, 2, 24)
    y = norm_heads(x, torch.ones(24), rotation(24))
    assert torch.allclose(y.square().mean(-1), torch.ones(1, GRID.tokens, 2), atol=1e-4)
    assert torch.allclose(norm_heads(3 * x, torch.ones(24), rotation(24)), y, atol=1e-5)


def test_stretching_moves_the_longest_period_by_the_ratio() -> None:
    """NTK: the fastest channel keeps its period, the slowest is stretched by the ratio."""
    grid = LatentShape(2, 1, 1)
    plain = stretched_angles_3d(grid, 24, ratio=(1.0, 1.0, 1.0), time_scale=None)[1]
    wide = stretched_angles_3d(grid, 24, ratio=(2.0, 1.0, 1.0), time_scale=None)[1]
    half = 4  # of the 8 channels of time
    assert plain[0] == wide[0] == 1
    assert torch.isclose(plain[half - 1] / wide[half - 1], torch.tensor(2.0))


def test_the_sinusoid_starts_with_cosines() -> None:
    waves = sinusoid(torch.zeros(3), 8)
    assert torch.equal(waves, torch.tensor([[1.0] * 4 + [0.0] * 4] * 3))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [96, 4096, 5120])
@pytest.mark.parametrize("what", ["all", "no addition", "no update", "nothing due"])
def test_modulation_kernel(width: int, what: str) -> None:
    given = inputs(width, torch.bfloat16, "cuda")
    due = (given["update"], given["gate"]) if what in ("all", "no addition") else (None, None)
    added = given["added"] if what in ("all", "no update") else None
    exact = {name: tensor.double() for name, tensor in given.items()}
    exact_due = (exact["update"], exact["gate"]) if due[0] is not None else (None, None)
    wanted = add_and_modulate(
        Residual(exact["stream"], *exact_due),
        None if added is None else exact["added"],
        exact["shift"],
        exact["scale"],
    )
    with torch.inference_mode():
        got = add_and_modulate(
            Residual(given["stream"], *due), added, given["shift"], given["scale"]
        )
    for ours, theirs in zip(got, wanted, strict=True):
        gap = (ours.double() - theirs).abs() / (1 + theirs.abs())
        assert gap.max() < 2**-6
        assert gap.mean() < 2**-9


@pytest.mark.gpu
def test_modulation_kernel_by_runs_and_wider() -> None:
    given, frames = inputs(96, torch.bfloat16, "cuda"), GRID.frames
    gate, shift, scale = (torch.randn(2, frames, 96, device="cuda") for _ in range(3))
    exact = Residual(given["stream"].double(), given["update"].double(), gate.bfloat16().double())
    wanted = add_and_modulate(exact, None, shift.double(), scale.double())
    with torch.inference_mode():
        residual = Residual(given["stream"], given["update"], gate.bfloat16())
        stream, normed = add_and_modulate(residual, None, shift, scale, torch.float32)
        # the norm of the stream as it was rounded
        again = add_and_modulate(Residual(stream.float()), None, shift, scale)[1]
    assert ((stream.double() - wanted[0]).abs() / (1 + wanted[0].abs())).max() < 2**-7
    assert normed.dtype == torch.float32
    assert torch.allclose(normed, again, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "size"), [(2, 32), (5, 24), (32, 128), (40, 128)])
@pytest.mark.parametrize("turned", [True, False])
def test_norm_heads_kernel(heads: int, size: int, turned: bool) -> None:
    x = torch.randn(2, GRID.tokens, heads, size, device="cuda", dtype=torch.bfloat16)
    weight = torch.rand(size, device="cuda", dtype=torch.bfloat16) + 0.5
    how = rotation(size, "cuda") if turned else None
    wanted = norm_heads(x.float(), weight.float(), how)
    with torch.inference_mode():
        got = norm_heads(x.clone(), weight, how)
    assert ((got.float() - wanted).abs() / (1 + wanted.abs())).max() < 2**-7
