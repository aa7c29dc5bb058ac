"""Clips and their captions, as they are drawn and mirrored."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tiny import data
from tiny.clips import Motion, Scene, make_clips
from tiny.data import (
    captioned_batches,
    encode_captioned,
    mirror_caption,
    physics_batches,
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
    parts = list(captioned_batches(seeds, SHAPE, "cpu", batch=2))
    assert [caption for _, captions in parts for caption in captions] == whole.captions
    assert torch.equal(torch.cat([clips for clips, _ in parts]), whole.frames)
    alone = list(physics_batches(seeds, SHAPE, "cpu", batch=2))
    assert torch.equal(torch.cat(alone), whole.frames)


def test_what_is_ready_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level("INFO", logger="tiny"):
        list(physics_batches(range(5), SHAPE, "cpu", batch=2))
        assert not caplog.messages  # it was quick
        monkeypatch.setattr(data, "_SECONDS_A_LINE", 0.0)
        list(physics_batches(range(5), SHAPE, "cpu", batch=2))
    told = [message.partition(" are ready")[0] for message in caplog.messages]
    assert told == ["2 of 5 clips", "4 of 5 clips", "5 of 5 clips"]


@pytest.mark.parametrize("together", [1, 3, 1024])
def test_clips_do_not_depend_on_what_is_drawn_with_them(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "_DRAWN_TOGETHER", together)
    whole = make_clips(range(7), 9, 32, 48)
    parts = list(captioned_batches(range(7), SHAPE, "cpu", batch=2))
    assert [len(captions) for _, captions in parts] == [2, 2, 2, 1]
    assert [caption for _, captions in parts for caption in captions] == whole.captions
    assert torch.equal(torch.cat([clips for clips, _ in parts]), whole.frames)


def test_drawing_stops_where_nobody_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips are drawn ahead of their use, but not all of them."""
    drawn = []
    draw = data._motion

    def spy(seeds: Sequence[int], shape: VideoShape) -> tuple[list[Scene], Motion]:
        drawn.extend(seeds)
        return draw(seeds, shape)

    monkeypatch.setattr(data, "_motion", spy)
    monkeypatch.setattr(data, "_DRAWN_TOGETHER", 2)
    batches = captioned_batches(range(100), SHAPE, "cpu", batch=2)
    next(batches)
    batches.close()
    assert len(drawn) <= 4


def test_each_latent_has_the_caption_of_its_view() -> None:
    torch.manual_seed(0)
    model = CosmosTokenizer(CosmosTokenizerConfig(channels=4, level_channels=(8, 8, 8)))
    draw_weights(model)
    model.eval()
    clips = make_clips(range(2), 9, 32, 48)
    latents, captions = encode_captioned(
        captioned_batches(range(2), SHAPE, "cpu"), torch.float32, model.encode
    )
    assert latents.shape == (4, 16, 2, 4, 6)
    assert captions == [*clips.captions, *map(mirror_caption, clips.captions)]
    video = clips.frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        mirrored = model.encode(video.flip(-1))
    torch.testing.assert_close(latents[2:].float(), mirrored, rtol=0.02, atol=0.02)
