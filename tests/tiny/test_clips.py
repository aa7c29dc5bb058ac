"""Clips and their captions, as they are drawn and mirrored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tiny import clips as module
from tiny.clips import (
    clip_batches,
    encode_views,
    make_clips,
    mirror_caption,
)
from tiny.export import draw_weights
from worldline.shapes import VideoShape
from worldline.tokenizers.cosmos.model import CosmosTokenizer, CosmosTokenizerConfig

SHAPE = VideoShape(9, 32, 48)


def test_sides_change_places_and_nothing_else_does() -> None:
    caption = "A red ball rolls to the left, with a lefty, on the right."
    assert mirror_caption(caption) == "A red ball rolls to the right, with a lefty, on the left."
    assert mirror_caption(mirror_caption(caption)) == caption


def test_captions_belong_to_their_clips() -> None:
    seeds = range(5)
    whole = make_clips(seeds, 9, 32, 48)
    parts = list(clip_batches(seeds, SHAPE, "cpu", batch=2))
    assert [caption for _, captions in parts for caption in captions] == whole.captions
    assert torch.equal(torch.cat([clips for clips, _ in parts]), whole.frames)


@pytest.mark.parametrize("together", [1, 3, 1024])
def test_clips_do_not_depend_on_what_is_drawn_with_them(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_DRAWN_TOGETHER", together)
    whole = make_clips(range(7), 9, 32, 48)
    parts = list(clip_batches(range(7), SHAPE, "cpu", batch=2))
    assert [len(captions) for _, captions in parts] == [2, 2, 2, 1]
    assert [caption for _, captions in parts for caption in captions] == whole.captions
    assert torch.equal(torch.cat([clips for clips, _ in parts]), whole.frames)


def test_drawing_stops_where_nobody_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips are drawn ahead of their use, but not all of them."""
    drawn = []
    draw = module._draw

    def spy(seeds: Sequence[int], shape: VideoShape) -> Any:
        drawn.extend(seeds)
        return draw(seeds, shape)

    monkeypatch.setattr(module, "_draw", spy)
    monkeypatch.setattr(module, "_DRAWN_TOGETHER", 2)
    batches = clip_batches(range(100), SHAPE, "cpu", batch=2)
    next(batches)
    batches.close()
    assert len(drawn) <= 4


def test_each_latent_has_the_caption_of_its_view() -> None:
    torch.manual_seed(0)
    model = CosmosTokenizer(CosmosTokenizerConfig(channels=4, level_channels=(8, 8, 8)))
    draw_weights(model)
    model.eval()
    clips = make_clips(range(2), 9, 32, 48)
    latents, captions = encode_views(
        clip_batches(range(2), SHAPE, "cpu"), torch.float32, model.encode
    )
    assert latents.shape == (4, 16, 2, 4, 6)
    assert captions == [*clips.captions, *map(mirror_caption, clips.captions)]
    video = clips.frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        mirrored = model.encode(video.flip(-1))
    torch.testing.assert_close(latents[2:].float(), mirrored, rtol=0.02, atol=0.02)
