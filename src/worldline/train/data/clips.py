"""Samples of videos for training: tensors, and names for the log, by number.

Sources: nvidia-cosmos/cosmos-predict1 `cosmos_predict1/autoregressive/datasets/video_dataset.py`;
nvidia-cosmos/cosmos-predict2.5 `_src/predict2/datasets/local_datasets/dataset_video.py`, which has
one sample for each video. Axes: T frames, C colours, H/W pixels.
"""

import hashlib
import json
import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from worldline.errors import InputError, counted
from worldline.files import is_dataset
from worldline.parallel.mesh import ALONE, Axis
from worldline.text.encoder import EmbeddingCache
from worldline.train.data.frames import Transform, to_signed
from worldline.train.data.texts import Text, Texts
from worldline.train.data.videos import (
    MOST_NAMED,
    Video,
    ends_digest,
    list_videos,
    measure,
    measure_episodes,
)
from worldline.video.read import read_frames

log = logging.getLogger(__name__)

Item = dict[str, Any]  # tensors, numbers and texts of a sample, which `default_collate` joins


@dataclass(frozen=True, kw_only=True)
class Window:
    """Which frames of a video make a sample.

    Attributes:
        num_frames: T.
        interval: frames from one of a sample to the next.
        start_interval: frames from the start of a sample to that of the next one.
        random_start: one sample a video, whose start is drawn anew in each epoch, from all.
    """

    num_frames: int = 33
    interval: int = 1
    start_interval: int = 1
    random_start: bool = False

    def __post_init__(self) -> None:
        if min(self.num_frames, self.interval, self.start_interval) < 1:
            raise InputError(f"{self}: frames and intervals are 1 at least")

    @property
    def span(self) -> int:
        """Frames from the first to the last of a sample, both included."""
        return (self.num_frames - 1) * self.interval + 1

    def count(self, frames: int) -> int:
        """Samples of a video of so many frames."""
        starts = max(0, frames - self.span + 1)
        return min(1, starts) if self.random_start else -(-starts // self.start_interval)


@dataclass(frozen=True)
class Cache:
    """Tokens or latents of samples in a folder, one file each, shared by processes.

    Attributes:
        folder: of the files; a file with another key is never read.
        encoder: all that the tensors depend on but video, frames and transform: the fingerprint of
            the tokenizer, its dtype.
    """

    folder: Path
    encoder: str

    def get(self, key: str) -> Tensor | None:
        """Tensor of the sample of a key, on the CPU; None where there is none."""
        return self._files(key).get(self.encoder, key)

    def put(self, key: str, encoded: Tensor) -> None:
        """Store the tensor of a sample; one that cannot be written is no error."""
        self._files(key).put(self.encoder, key, encoded)

    def _files(self, key: str) -> EmbeddingCache:
        """One of 256 folders: to write a file lists those beside it."""
        part = hashlib.sha256(key.encode()).hexdigest()[:2]
        return EmbeddingCache(self.folder.absolute() / part, None)


@dataclass(frozen=True, eq=False)
class Clips(Dataset[Item]):
    """Samples of videos, by their numbers: sorted by path and first frame.

    An item has the keys of the released data sets: `video` (3, T, H, W), `fps`, `num_frames`,
    `orig_num_frames`, `chunk_index`, `frame_start`, `frame_end`, `video_name`, `aug_params` where
    it was cropped, `image_size` and `padding_mask` (1, H, W); those of its text (see `Texts.read`);
    and `name`, and the `key` under which a cache has its tokens or latents. Where a cache has them,
    they are `encoded`, in place of `video`.

    Attributes:
        videos: usable ones.
        window: frames of a sample.
        transform: of a frame.
        dtype: of `video` in [-1, 1]; None for levels uint8.
        texts: rule by which `text` is read; None where samples have none.
        text: of each video.
        cache: of tokens or latents.
        skipped: why other videos cannot be used.
    """

    videos: Sequence[Video]
    window: Window
    transform: Transform
    dtype: torch.dtype | None = None
    texts: Texts | None = None
    text: Mapping[Path, Text] = field(default_factory=dict)
    cache: Cache | None = None
    skipped: Sequence[str] = ()

    @cached_property
    def _ends(self) -> list[int]:
        return [*accumulate(self.window.count(video.frames) for video in self.videos)]

    def __len__(self) -> int:
        return self._ends[-1]

    def __str__(self) -> str:
        words = f"{counted(len(self), 'sample')} of {counted(len(self.videos), 'video')}"
        return f"{words}, {len(self.skipped)} skipped" if self.skipped else words

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the names and lengths of all samples, whatever folder they lie in."""
        names = [(video.path.name, video.frames) for video in self.videos]
        return hashlib.sha256(json.dumps([names, asdict(self.window)]).encode()).hexdigest()[:16]

    @cached_property
    def contents(self) -> dict[str, list[str]]:
        """Name of each video -> hash of the file and of its text, "" without one."""
        return {v.path.name: [v.digest, self._text_digest(v.path)] for v in self.videos}

    def _text_digest(self, video: Path) -> str:
        text = self.text.get(video, "")
        if isinstance(text, Path):
            return ends_digest(text)
        return (
            hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16] if text else ""
        )

    def changes(self, before: Mapping[str, Sequence[str]]) -> list[str]:
        """Files in which other clips, of such `contents`, differ from these, and how, in words."""
        now, lines = self.contents, list[str]()
        for name in sorted({*before, *now}):
            if name not in now or name not in before:
                lines.append(f"{name} is {'absent' if name in before else 'new'}")
            elif before[name][0] != now[name][0]:
                lines.append(f"{name} is another video")
            elif before[name][1] != now[name][1]:
                lines.append(f"{name} has another text")
        return lines

    def __getitem__(self, index: int) -> Item:
        return self.items([index])[0]

    def locate(self, index: int, draw: Sequence[int] = ()) -> tuple[Video, range]:
        """Video and frame numbers of a sample; a random start is a function of it and `draw`."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        place = bisect_right(self._ends, index)
        video, window = self.videos[place], self.window
        if window.random_start:
            starts = video.frames - window.span + 1
            first = int(np.random.default_rng([index, *draw]).integers(starts))
        else:
            before = self._ends[place - 1] if place else 0
            first = (index - before) * window.start_interval
        return video, range(first, first + window.span, window.interval)

    def name(self, index: int, draw: Sequence[int] = ()) -> str:
        """A sample in words: a.mp4, frames 5 to 37."""
        video, numbers = self.locate(index, draw)
        return f"{video.path.name}, frames {numbers[0]} to {numbers[-1]}"

    def items(self, indices: Sequence[int], draw: Sequence[int] = ()) -> list[Item]:
        """Samples of a batch: tokens or latents of all, or videos of all.

        Raises:
            InputError, OSError: one cannot be read.
        """
        places = [self.locate(index, draw) for index in indices]
        keys = [self._key(*place) for place in places]
        encoded = [self.cache.get(key) if self.cache else None for key in keys]
        whole = all(one is not None for one in encoded)
        items = []
        for index, (video, numbers), key, tensor in zip(
            indices, places, keys, encoded, strict=True
        ):
            pixels = {"encoded": tensor} if whole else {"video": self._video(video, numbers)}
            text = self.texts.read(self.text[video.path]) if self.texts else {}
            facts = {**self._facts(video, numbers), "name": self.name(index, draw), "key": key}
            items.append({**pixels, **facts, **text})
        return items

    def _key(self, video: Video, numbers: range) -> str:
        transform = asdict(replace(self.transform, largest_scale=0))
        frames = _places(video, numbers)
        if isinstance(frames, range):
            frames = frames.start, len(frames), frames.step
        place = str(video.file.resolve()), video.stamp
        return json.dumps([*place, frames, transform, str(self.dtype)])

    def _video(self, video: Video, numbers: range) -> Tensor:
        status = video.file.stat()
        if (status.st_size, status.st_mtime_ns) != video.stamp:
            raise InputError(f"{video.file} was changed since its frames were counted")
        shape = 3, len(numbers), self.transform.height, self.transform.width
        levels = torch.empty(shape, dtype=torch.uint8)
        frames = read_frames(video.file, _places(video, numbers), video.times)
        for place, frame in enumerate(frames):  # of all in float32, 121 of 4K take 12 GB
            levels[:, place] = self.transform(frame)
        return levels if self.dtype is None else to_signed(levels, self.dtype)

    def _facts(self, video: Video, numbers: range) -> Item:
        transform = self.transform
        size = transform.height, transform.width
        crop = {"aug_params": {"cropping": transform.cropping(video.height, video.width)}}
        return {
            "fps": video.fps or 24.0,  # as released, where it is unknown
            "num_frames": len(numbers),
            "orig_num_frames": video.frames,
            "chunk_index": 0,
            "frame_start": numbers[0],
            "frame_end": numbers[-1],
            "video_name": {"video_path": str(video.file), "start_frame_id": str(numbers[0])},
            **(crop if transform.fit == "crop" else {}),
            "image_size": torch.tensor([*size, *size], dtype=torch.float32),
            "padding_mask": torch.zeros(1, *size, dtype=self.dtype or torch.float32),
        }


def _places(video: Video, numbers: range) -> Sequence[int]:
    """Numbers in its file of some frames of a video."""
    if video.numbers is None:
        return numbers
    return video.numbers[numbers.start : numbers.stop : numbers.step]


def open_clips(
    folder: Path,
    window: Window,
    transform: Transform,
    *,
    released: bool = False,
    dtype: torch.dtype | None = None,
    texts: Texts | None = None,
    cache: Cache | None = None,
    store: Path | None = None,
    ranks: Axis = ALONE.world,
) -> Clips:
    """Samples of a folder; videos that cannot be used are logged, up to ten by name.

    Args, beside the attributes of `Clips`:
        folder: of the videos, or one video; or the name of a data set, whose tasks are its texts.
        released: which files count, see `list_videos`.
        store: file of the videos' measurements, see `measure`.
        ranks: processes that ask for the same; the first reads the folder.

    Raises:
        InputError: no video can be used, or texts are missing.
    """

    def find() -> Clips:
        usable, problems = list[Video](), list[str]()
        tasks: Mapping[Path, str] | None = None
        if is_dataset(folder):
            videos, tasks = measure_episodes(str(folder))
        else:
            videos = measure(list_videos(folder, released=released), store)
        for path, video in videos.items():
            if isinstance(video, InputError):
                problem = str(video)
            elif not window.count(video.frames):
                problem = f"{path} has {video.frames} frames; a sample takes {window.span}"
            elif reason := transform.problem(video.height, video.width):
                problem = f"{path}: {reason}"
            else:
                usable.append(video)
                continue
            problems.append(problem)
        if not usable:
            more = f", and {len(problems) - 2} more" if len(problems) > 2 else ""
            raise InputError(
                f"{folder}: none of its {len(videos)} videos can be used: "
                f"{'; '.join(problems[:2])}{more}"
            )
        for problem in problems[:MOST_NAMED]:
            log.warning("skipped: %s", problem)
        if len(problems) > MOST_NAMED:
            log.warning("%d more videos are skipped", len(problems) - MOST_NAMED)
        place = usable[0].path.parent
        root = place.parent if place.name == "videos" else place
        source = texts and (texts if tasks is None else replace(texts, source=tasks))
        text = source.find(root, [video.path for video in usable]) if source else {}
        return Clips(usable, window, transform, dtype, texts, text, cache, problems)

    return ranks.once(find)
