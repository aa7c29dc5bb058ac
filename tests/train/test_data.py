"""Samples of video folders: which, their texts, what is skipped, and positions that resume."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections import deque
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.ranks import Together
from worldline.errors import Error, InputError
from worldline.parallel.mesh import Axis
from worldline.train.data import videos as videos_module
from worldline.train.data.clips import Cache, Clips, Window, open_clips
from worldline.train.data.frames import Transform, to_signed
from worldline.train.data.loader import Loader
from worldline.train.data.texts import Texts
from worldline.train.data.videos import ends_digest, list_videos, measure
from worldline.video.read import read_video
from worldline.video.write import write_video

SMALL = Transform(16, 24)


def movie(path: Path, frames: int, height: int = 32, width: int = 48, fps: float = 24) -> Path:
    rng = np.random.default_rng(frames)
    noise = rng.integers(0, 256, (1, height // 8, width // 8, 3), np.uint8)
    start = noise.repeat(8, 1).repeat(8, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(np.concatenate([np.roll(start, n, 2) for n in range(frames)]), path, fps)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, frames in (("a.mp4", 9), ("b.mkv", 12), ("c.mp4", 7)):
        movie(tmp_path / "data" / name, frames)
    return tmp_path / "data"


def opened(folder: Path, **options: Any) -> Clips:
    return open_clips(folder, options.pop("window", Window(num_frames=5)), SMALL, **options)


def names(loader: Loader, count: int) -> list[str]:
    return [name for batch in islice(loader, count) for name in batch["name"]]


# which files


def test_which_files_count(tmp_path: Path) -> None:
    for name in ("b.mp4", "A.MP4", "c.mov", "d.WebM", "._b.mp4", "notes.txt", "a.png", "in/e.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in list_videos(tmp_path, released=True)] == ["._b.mp4", "b.mp4"]
    assert [path.name for path in list_videos(tmp_path)] == ["A.MP4", "b.mp4", "c.mov", "d.WebM"]
    assert list_videos(tmp_path / "c.mov") == [tmp_path / "c.mov"]
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "x.avi").touch()
    assert list_videos(tmp_path) == [tmp_path / "videos" / "x.avi"]
    for wrong, words in (("absent", "absent"), ("in/none", "none"), ("empty", "0 files")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=words):
            list_videos(tmp_path / wrong)


def test_what_cannot_be_used_is_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = movie(folder / "d.mp4", 40).read_bytes()
    (folder / "d.mp4").write_bytes(whole[: len(whole) // 2])
    movie(folder / "short.mp4", 4)
    movie(folder / "small.mp4", 9, 16, 16)
    Image.new("RGB", (64, 64)).save(folder / "picture.mp4", "png")
    (folder / "folder.mov").mkdir()
    os.mkfifo(folder / "pipe.mp4")
    for number in range(9):
        (folder / f"z{number}.mp4").write_bytes(b"no video")
    transform = Transform(64, 64, largest_scale=3)
    with caplog.at_level(logging.WARNING):
        clips = open_clips(folder, Window(num_frames=5), transform)
    assert str(clips) == "16 samples of 3 videos, 15 skipped"
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 11
    assert "5 more" in lines[-1]
    for name in ("d.mp4", "short.mp4 has 4 frames", "16 x 16", "picture.mp4", "folder.mov", "pipe"):
        assert any(name in line for line in lines), name
    with pytest.raises(InputError, match=r"none of its 18 videos .* 9 frames.* 13.* 16 more"):
        open_clips(folder, Window(num_frames=13), transform)


def test_measurements_are_stored(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, paths = tmp_path / "store" / "videos.json", list_videos(folder)
    probed = []
    monkeypatch.setattr(
        videos_module,
        "probe_times",
        lambda path, probe=videos_module.probe_times: (probed.append(path.name), probe(path))[1],
    )
    found = measure(paths, store)
    assert measure(paths, store) == found
    assert len(probed) == 3
    movie(folder / "a.mp4", 6)
    os.utime(folder / "b.mkv", ns=(0, 1))
    assert measure(paths, store)[folder / "a.mp4"].frames == 6  # type: ignore[union-attr]
    assert sorted(probed[3:]) == ["a.mp4", "b.mkv"]
    store.write_text('{"recipe": [')
    assert len(measure(paths, store)) == 3
    assert len(probed) == 8
    assert measure(paths, folder / "a.mp4" / "store.json").keys() == {*paths}


# which frames


@pytest.mark.parametrize(
    ("num_frames", "interval", "start_interval"), [(1, 1, 1), (5, 2, 3), (4, 3, 1)]
)
def test_windows(folder: Path, num_frames: int, interval: int, start_interval: int) -> None:
    window = Window(num_frames=num_frames, interval=interval, start_interval=start_interval)
    clips = opened(folder, window=window)
    listed = [
        (name, [*range(start, start + num_frames * interval, interval)])
        for name, frames in (("a.mp4", 9), ("b.mkv", 12), ("c.mp4", 7))
        for start in range(0, frames, start_interval)
        if start + (num_frames - 1) * interval < frames
    ]
    found = [clips.locate(index) for index in range(len(clips))]
    assert [(video.path.name, [*numbers]) for video, numbers in found] == listed
    with pytest.raises(InputError):
        Window(num_frames=0)


def test_random_starts_reach_both_ends(folder: Path) -> None:
    clips = opened(folder, window=Window(num_frames=7, random_start=True))
    assert len(clips) == 3
    starts = [{clips.locate(i, (0, epoch))[1][0] for epoch in range(80)} for i in range(3)]
    assert starts == [{0, 1, 2}, {0, 1, 2, 3, 4, 5}, {0}]  # the last has exactly 7 frames
    assert clips.locate(1, (3, 4)) == clips.locate(1, (3, 4))


@pytest.mark.parametrize("fit", ["crop", "stretch"])
def test_pixels_of_the_denoising_trainers(folder: Path, fit: Any) -> None:
    """Bilinear, in [0, 1], truncated: of a frame of the right size some levels lose one."""
    same = Transform(32, 48, fit, "bilinear")
    clips = open_clips(folder, Window(num_frames=5, interval=2), same)
    item, frames = clips[3], read_video(folder / "b.mkv").frames
    assert item["name"] == "b.mkv, frames 2 to 10"
    levels = torch.from_numpy(frames[2:11:2]).permute(3, 0, 1, 2)
    truncated = torch.tensor([int(np.float32(n) / np.float32(255) * 255) for n in range(256)])
    assert torch.equal(item["video"], truncated[levels.long()].to(torch.uint8))
    assert ("aug_params" in item) == (fit == "crop")
    assert item["image_size"].tolist() == [32, 48, 32, 48]


@pytest.mark.parametrize(
    ("shape", "fit", "resized"),
    [((30, 40), "crop", (18, 24)), ((99, 31), "crop", (77, 24)), ((31, 99), "stretch", (16, 24))],
)
def test_sizes(shape: tuple[int, int], fit: Any, resized: tuple[int, int]) -> None:
    for resample in ("bicubic", "bilinear"):
        transform = Transform(16, 24, fit, resample)  # type: ignore[arg-type]
        assert transform.resized(*shape) == resized
        plain = transform(np.full((*shape, 3), 102, np.uint8))
        assert plain.shape == (3, 16, 24)
        assert set(plain.unique().tolist()) <= {101, 102}
    # offsets of a crop are rounded to even; the yielded ones are not
    rows = np.arange(19, dtype=np.uint8)[:, None, None].repeat(24, 1).repeat(3, 2)
    assert Transform(16, 24)(rows)[0, 0, 0] == 2
    assert Transform(16, 24).cropping(19, 24)["crop_y0"] == 1


def test_signed_numbers_are_rounded_at_each_step() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.allclose(to_signed(levels, torch.float64), levels.double() / 127.5 - 1)
    narrow = ((levels.bfloat16() / 255) - 0.5) / 0.5
    assert torch.equal(to_signed(levels, torch.bfloat16), narrow)


# texts


def test_captions(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def captions(texts: Texts) -> list[str]:
        clips = opened(folder, texts=texts)
        return [clips[i]["ai_caption"] for i in (0, 5, 13)]

    assert captions(Texts(caption="one")) == ["one"] * 3
    for stem in "abc":
        (folder / f"{stem}.txt").write_text(f"beside {stem}\n")
    assert captions(Texts()) == ["beside a", "beside b", "beside c"]
    (folder / "b.txt").unlink()
    with pytest.raises(InputError, match=r"NAME\.txt: 1 of 3 videos .*b\.mkv"):
        captions(Texts())
    (folder / "metas").mkdir()
    for stem in "abc":
        (folder / "metas" / f"{stem}.txt").write_text(f" text {stem}\n")
    assert captions(Texts()) == ["text a", "text b", "text c"]
    rows = [
        {"file": f"videos/{n}", "caption": f"line {n[0]}"} for n in ("c.mp4", "a.mp4", "b", "x")
    ]
    lines = folder / "all.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in rows))
    assert captions(Texts(source=lines)) == ["line a", "line b", "line c"]
    assert "1 captions" in caplog.text
    (folder / "captions").mkdir()
    for stem in "abc":
        kinds = {"long": f"long {stem}", "short": f"short {stem}"}
        text = json.dumps({"model": kinds, "other": {"long": "x"}})
        (folder / "captions" / f"{stem}.json").write_text(text if stem == "a" else text[1:-1])
    assert captions(Texts()) == ["long a", "long b", "long c"]
    assert captions(Texts(prompt_type="short")) == ["short a", "short b", "short c"]
    caplog.clear()
    assert captions(Texts(prompt_type="medium")) == ["long a", "long b", "long c"]
    [record] = caplog.records  # one line for all files
    assert "medium, which 3 of 3 captions lack" in record.getMessage()
    assert captions(Texts(source="text")) == ["text a", "text b", "text c"]


def test_missing_captions(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "metas").mkdir()
    (folder / "metas" / "a.txt").write_text("a ball")
    (folder / "metas" / "b.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match=r"2 of 3 videos .*b\.mkv.*c\.mp4"):
        opened(folder, texts=Texts())
    clips = opened(folder, texts=Texts(empty=True))
    assert [clips[i]["ai_caption"] for i in (0, 5, 13)] == ["a ball", "", ""]
    assert "2 of 3" in caplog.text


@pytest.mark.parametrize(
    "lines",
    [
        '{"file": "a.mp4"}',
        '{"file": "a", "caption": "x"}\n{"video": "a.mp4", "prompt": "y"}',
        "[",
        "",
    ],
)
def test_wrong_lines_of_captions(folder: Path, lines: str) -> None:
    (folder / "x.jsonl").write_text(lines)
    with pytest.raises(InputError, match=r"x\.jsonl"):
        opened(folder, texts=Texts(source=folder / "x.jsonl"))
    with pytest.raises(InputError, match="no-such"):
        opened(folder, texts=Texts(source=folder / "no-such.jsonl"))


def test_embeddings(tmp_path: Path) -> None:
    for stem, length in (("a", 3), ("b", 6)):
        movie(tmp_path / "videos" / f"{stem}.mp4", 5)
        rows = np.full((length, 8), 0.5, np.float16)
        (tmp_path / "t5_xxl").mkdir(exist_ok=True)
        (tmp_path / "t5_xxl" / f"{stem}.pickle").write_bytes(pickle.dumps([rows]))
    texts = Texts(source="embeddings", width=8, rows=6)
    clips = opened(tmp_path, texts=texts)
    for index, length in enumerate((3, 6)):
        item = clips[index]
        filled = torch.arange(6) < length
        assert torch.equal(item["t5_text_embeddings"], 0.5 * filled[:, None].expand(6, 8).float())
        assert torch.equal(item["t5_text_mask"], filled.long())
    assert all(text for _, text in clips.contents.values())
    (tmp_path / "t5_xxl" / "b.pickle").write_bytes(pickle.dumps([np.zeros((6, 8), np.float16)]))
    assert opened(tmp_path, texts=texts).changes(clips.contents) == ["b.mp4 has another text"]
    movie(tmp_path / "videos" / "c.mp4", 5)
    with pytest.raises(InputError, match=r"1 of 3 .*c\.mp4"):
        opened(tmp_path, texts=texts)
    (tmp_path / "videos" / "c.mp4").unlink()
    with pytest.raises(InputError, match=r"a\.pickle.*\(3, 8\).*16"):
        opened(tmp_path, texts=Texts(source="embeddings", width=16))


@pytest.mark.parametrize("bad", ["a\0b", "a\ud800"])
def test_captions_that_are_no_text(folder: Path, bad: str) -> None:
    """Bytes of something else, and halves of characters that JSON can spell, are named."""
    rows = [{"file": name, "caption": "a ball"} for name in ("a.mp4", "b.mkv")]
    rows.append({"file": "c.mp4", "caption": bad})
    lines = folder / "all.jsonl"
    lines.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=r"1 of 3 videos .*c\.mp4"):
        opened(folder, texts=Texts(source=lines))
    clips = opened(folder, texts=Texts(source=lines, empty=True))
    assert [clips[i]["ai_caption"] for i in (0, 5, 13)] == ["a ball", "a ball", ""]


def test_what_other_clips_differ_in(folder: Path, tmp_path: Path) -> None:
    """Contents count: a copy elsewhere is the same, another video of equal length is not."""

    def captioned(place: Path) -> Clips:
        return opened(place, texts=Texts())

    (folder / "metas").mkdir()
    for stem in "abcd":
        (folder / "metas" / f"{stem}.txt").write_text(f"text {stem}")
    before = captioned(folder)
    stored = json.loads(json.dumps(before.contents))
    copy = tmp_path / "moved"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    assert captioned(copy).changes(stored) == []
    (copy / "metas" / "b.txt").write_text("text d")
    data = bytearray((copy / "c.mp4").read_bytes())
    data[-1] ^= 1  # of an index
    (copy / "c.mp4").write_bytes(data)
    (copy / "a.mp4").rename(copy / "d.mp4")
    after = captioned(copy)
    assert str(open_clips(copy / "d.mp4", Window(num_frames=9), SMALL)) == "1 sample of 1 video"
    assert after.changes(stored) == [
        *("a.mp4 is absent", "b.mkv has another text", "c.mp4 is another video", "d.mp4 is new")
    ]
    assert opened(folder).contents["a.mp4"] == [stored["a.mp4"][0], ""]


@pytest.mark.parametrize("size", [5, 1 << 16, 200_000])
def test_the_hash_of_ends(tmp_path: Path, size: int) -> None:
    path, whole = tmp_path / "x", random.Random(size).randbytes(size)

    def digest(data: bytes) -> str:
        path.write_bytes(data)
        return ends_digest(path)

    digests = [
        digest(whole),
        digest(whole[:-1]),
        digest(b"-" + whole[1:]),
        digest(whole[:-1] + b"-"),
    ]
    assert len({*digests}) == 4
    assert digest(whole) == digests[0]


# cache


def test_cache(folder: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", "tokenizer 1, bfloat16")
    clips = opened(folder, cache=cache)
    for index in (0, 6):
        item = clips[index]
        assert "encoded" not in item
        cache.put(item["key"], torch.full((2, 3), index))
    assert torch.equal(clips[6]["encoded"], torch.full((2, 3), 6))
    assert "video" not in clips[6]
    assert all("encoded" in item for item in clips.items([0, 6]))
    assert all("video" in item and "encoded" not in item for item in clips.items([0, 1]))
    others = {
        "encoder": opened(folder, cache=Cache(cache.folder, "tokenizer 2, bfloat16")),
        "frames": opened(folder, cache=cache, window=Window(num_frames=4)),
        "size": open_clips(folder, Window(num_frames=5), Transform(16, 32), cache=cache),
    }
    assert all("video" in other[0] for other in others.values())
    os.utime(folder / "a.mp4", ns=(0, 1))
    assert "video" in opened(folder, cache=cache)[0]


# order and position


@pytest.mark.parametrize(("world", "batch_size"), [(1, 1), (1, 3), (2, 2), (3, 1)])
def test_processes_share_an_epoch(folder: Path, world: int, batch_size: int) -> None:
    clips = opened(folder)  # 16 samples
    loaders = [
        Loader(clips, batch_size=batch_size, num_workers=0, ranks=Axis(rank, world), seed=5)
        for rank in range(world)
    ]
    steps = 16 // (world * batch_size)
    epochs = [[names(loader, steps) for loader in loaders] for _ in range(2)]
    for epoch in epochs:
        taken = [name for part in epoch for name in part]
        assert len({*taken}) == len(taken) == steps * world * batch_size
    assert epochs[0] != epochs[1]
    assert all(loader.epoch == 1 for loader in loaders)


def test_a_few_samples_fill_a_batch(folder: Path) -> None:
    clips = opened(folder, window=Window(num_frames=7, random_start=True))
    loader = Loader(clips, batch_size=4, num_workers=0)
    [batch] = islice(loader, 1)
    assert batch["video"].shape == (4, 3, 7, 16, 24)
    assert len({*batch["video_name"]["video_path"]}) == 3


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("cut", [0, 3, 16, 21])
def test_a_position_resumes_to_the_sample(folder: Path, cut: int, random_start: bool) -> None:
    clips = opened(folder, window=Window(num_frames=5, random_start=random_start))
    uncut = names(Loader(clips, num_workers=0, seed=2), 40)
    first = Loader(clips, num_workers=0, seed=2)
    assert names(first, cut) == uncut[:cut]
    state = json.loads(json.dumps(first.state()))
    second = Loader(clips, num_workers=0, seed=2)
    second.restore(state)
    assert names(second, 40 - cut) == uncut[cut:]


def test_a_position_is_that_of_all_processes(folder: Path) -> None:
    clips = opened(folder)
    order = names(Loader(clips, num_workers=0), 16)

    def run(world: int, state: dict[str, Any] | None) -> tuple[list[str], dict[str, Any]]:
        taken, states = list[str](), list[dict[str, Any]]()
        for rank in range(world):
            loader = Loader(clips, num_workers=0)
            if state:
                loader.restore(state)
            loader.ranks = Axis(rank, world)
            taken += names(loader, 2)
            loader.ranks = Axis()  # no process here is another's
            states.append(loader.state())
        assert states.count(states[0]) == world
        return taken, states[0]

    state, done = None, list[str]()
    for world in (3, 1, 2):
        taken, state = run(world, state)
        done += taken
    assert sorted(done) == sorted(order[:12])


def test_a_position_of_other_data_is_refused(folder: Path) -> None:
    state = Loader(opened(folder), num_workers=0, seed=1).state()
    with pytest.raises(InputError, match="seed 1, here 2"):
        Loader(opened(folder), num_workers=0, seed=2).restore(state)
    movie(folder / "e.mp4", 5)
    with pytest.raises(InputError, match="count 16, here 17"):
        Loader(opened(folder), num_workers=0, seed=1).restore(state)


# what breaks later


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_broken_sample_is_replaced_by_the_next(
    folder: Path, batch_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    clips = opened(folder)
    order = names(Loader(clips, num_workers=0), 16)
    (folder / "b.mkv").write_bytes((folder / "b.mkv").read_bytes()[:900])

    def expected(place: int) -> str:
        return next(name for name in [*order[place:], *order] if not name.startswith("b"))

    def loader() -> Loader:
        return Loader(clips, num_workers=0, batch_size=batch_size)

    whole = loader()
    steps = 15 // batch_size
    assert names(whole, steps) == [expected(place) for place in range(15)]
    assert len(whole.broken) == sum(name.startswith("b") for name in order[:15])
    assert f"{len(whole.broken)} samples cannot be read" in str(whole)
    assert caplog.text.count("skipped: b.mkv, frames") == len(whole.broken)
    part = loader()
    names(part, 2)
    for state in (part.state(), {**part.state(), "skipped": {}}):  # whatever it knows
        resumed = loader()
        resumed.restore(state)
        assert names(resumed, steps - 2) == [expected(p) for p in range(2 * batch_size, 15)]


def test_nothing_can_be_read_any_more(folder: Path) -> None:
    loader = Loader(opened(folder), num_workers=0)
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(InputError, match=r"16 samples .*\.m[pk][4v], frames"):
        names(loader, 1)
    with pytest.raises(InputError, match="16 samples"):
        names(loader, 1)


def test_an_error_that_passes_is_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips, failures = opened(folder), [OSError(5, "I/O error")] * 2
    expected, read = names(Loader(clips, num_workers=0), 4), Clips._video

    def video(self: Clips, *place: Any) -> torch.Tensor:
        if failures:
            raise failures.pop()
        return read(self, *place)

    monkeypatch.setattr(Clips, "_video", video)
    found = names(Loader(clips, num_workers=0), 4)
    assert found[1:] == expected[1:]
    for_ever = Loader(clips, batch_size=2, num_workers=0)
    monkeypatch.setattr(Clips, "items", flaky(Clips.items))
    with pytest.raises(InputError):
        names(for_ever, 1)


def flaky(items: Any) -> Any:
    """Items that can be read one by one, and never together."""

    def one(clips: Clips, indices: Any, *draw: Any) -> Any:
        if len(indices) > 1:
            raise OSError(5, "I/O error")
        return items(clips, indices, *draw)

    return one


# workers


def test_workers(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    clips = opened(folder, dtype=torch.bfloat16)
    (folder / "c.mp4").unlink()
    plain = [*islice(Loader(clips, num_workers=0), 6)]
    state = torch.get_rng_state(), random.getstate()
    loader = Loader(clips, num_workers=1)
    batches = iter(loader)
    for ours, batch in zip(plain, batches, strict=False):
        assert ours["name"] == batch["name"]
        assert torch.equal(ours["video"], batch["video"])
    assert loader.sample == 6  # what was taken, not what was read ahead
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert all(name.startswith("c.mp4") for name in loader.broken)
    [worker] = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(Error, match=r"worker.*/dev/shm") as caught:
        deque(islice(batches, 20))
    assert "\n" not in str(caught.value)


SCRIPT = """
import sys, time
from pathlib import Path
from worldline.train.data.clips import Window, open_clips
from worldline.train.data.frames import Transform
from worldline.train.data.loader import Loader
import multiprocessing
if __name__ == "__main__":
    clips = open_clips(Path(sys.argv[1]), Window(num_frames=5), Transform(16, 24))
    for batch in Loader(clips, num_workers=2):
        print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
        time.sleep(60)
"""


@pytest.mark.slow
def test_workers_end_with_a_killed_run(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(SCRIPT)
    words = [sys.executable, str(tmp_path / "run.py"), str(folder)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout
        workers = [int(number) for number in run.stdout.readline().split()]
        run.kill()
        run.communicate(timeout=60)  # ends once no worker holds the pipe
    assert len(workers) == 2


def shared(axis: Axis, folder: Path) -> list[Any]:
    """What the processes of one batch get of it, of which the first alone reads."""
    clips = open_clips(folder, Window(num_frames=5), SMALL, ranks=axis)
    loader = Loader(clips, num_workers=0, together=axis)
    batches = [*islice(loader, 3)]
    one = {"names": [batch["name"] for batch in batches], "sum": int(batches[2]["video"].sum())}
    dealt = Loader(clips, num_workers=0, ranks=axis)
    own = names(dealt, 2)
    dealt.broken = {own[0]: "x"}
    return [one, loader.sample, own, dealt.state()]


@pytest.mark.slow
def test_two_processes(two: Together, folder: Path) -> None:
    (one, sample, own, state), (other, same, second, merged) = two(shared, folder)
    assert one == other
    assert sample == same == 3
    assert not {*own} & {*second}
    assert state == merged
    assert state["sample"] == 4
    assert state["skipped"].keys() == {own[0], second[0]}


def test_infinite_scale_is_the_released_rule() -> None:
    assert "too small" in Transform(64, 64).problem(8, 8)
    assert not Transform(64, 64, largest_scale=math.inf).problem(8, 8)
    assert "1/" in Transform(64, 64).problem(64, 6400)
    assert not Transform(64, 64, "stretch").problem(64, 6400)
