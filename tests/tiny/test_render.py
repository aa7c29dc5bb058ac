"""The pictures: enough motion, large enough objects, and the same however the work is cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tiny import render
from tiny.clips import Clips, make_clips
from tiny.motion import integrate
from tiny.scenes import MAX_OBJECTS, draw_scenes

SEEDS = (*range(10), *range(1_000_000, 1_000_010))


@pytest.fixture(scope="module")
def clips() -> Clips:
    return make_clips(SEEDS, return_masks=True)


def test_repeating_the_last_input_frame_scores_15_to_22_db(clips: Clips) -> None:
    pictures = clips.frames.float()
    error = (pictures[:, 9:] - pictures[:, 8:9]).square().mean(dim=(1, 2, 3, 4))
    psnr = 10 * torch.log10(255**2 / error)
    assert psnr.min() >= 15
    assert psnr.max() <= 22
    assert 17 < psnr.median() < 20


def test_every_object_covers_two_percent_of_every_frame() -> None:
    scenes = draw_scenes(SEEDS[::2])
    motion = integrate(scenes.bodies, 33)
    for index in range(MAX_OBJECTS):
        having = scenes.bodies.radius[index] > 0
        masks = render.object_masks(scenes, motion, 128, 192, objects=[index])[having]
        assert masks.float().mean(dim=(2, 3)).min() >= 0.02


def test_masks_cover_what_moves(clips: Clips) -> None:
    assert clips.masks is not None
    assert clips.masks.shape == clips.frames.shape[:-1]
    still = clips.scenes.pan == 0
    change = (clips.frames[still, 20].float() - clips.frames[still, 8].float()).square().sum(dim=-1)
    moved = clips.masks[still, 20] | clips.masks[still, 8]
    # Shadows and smooth edges make the rest.
    assert change[moved].sum() > 0.9 * change.sum()


def test_pixels_do_not_depend_on_batch_chunk_or_length(
    clips: Clips, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(render.MEMORY, "cpu", 1)  # one clip a chunk
    part = make_clips(SEEDS[3:6])
    assert torch.equal(part.frames, clips.frames[3:6])
    assert part.captions == clips.captions[3:6]
    assert part.masks is None
    panning = int(clips.scenes.pan.nonzero()[0][0])
    short = make_clips([SEEDS[panning]], frames=9)
    assert torch.equal(short.frames[0], clips.frames[panning, :9])


@pytest.mark.parametrize(("height", "width"), [(16, 16), (33, 50), (96, 96), (200, 480)])
def test_any_size(height: int, width: int) -> None:
    small = make_clips([0, 1, 6], frames=5, height=height, width=width, return_masks=True)
    assert small.frames.shape == (3, 5, height, width, 3)
    assert small.masks is not None
    assert (small.masks.float().mean(dim=(2, 3)) > 0.03).all()


def test_an_object_has_its_colour_at_its_centre() -> None:
    scene = draw_scenes([2])
    scene = replace(scene, brightness=scene.brightness * 0 + 1)
    motion = integrate(scene.bodies, 1)
    picture = render.render(scene, motion, 128, 192)[0, 0]
    for index, (colour, _) in enumerate(scene.objects(0)):
        x, y = (int(motion.x[0, 0, index] * 128), int(motion.y[0, 0, index] * 128))
        red, _, blue = picture[y, x].tolist()
        assert (blue > red) == (colour in ("blue", "cyan", "purple"))


@pytest.mark.gpu
def test_a_gpu_paints_what_the_cpu_paints(clips: Clips) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    same = make_clips(SEEDS, device="cuda").frames.cpu()
    difference = (same.int() - clips.frames.int()).abs()
    assert (difference > 1).float().mean() < 1e-4
