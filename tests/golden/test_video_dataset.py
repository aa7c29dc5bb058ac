"""Golden cases `video_dataset_sample`: samples of a folder, their frames, keys and order."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from cases import Case, cases
from torch.utils.data import default_collate

from worldline.parallel.mesh import Axis
from worldline.train.data.clips import Clips, Window, open_clips
from worldline.train.data.frames import Transform
from worldline.train.data.loader import Loader

CASES = cases("video_dataset_sample")


def clips(case: Case, dtype: torch.dtype | None = None) -> Clips:
    config = case.spec["config"]
    window = Window(
        num_frames=config["num_frames"],
        interval=config["sequence_interval"],
        start_interval=config["start_frame_interval"],
    )
    transform = Transform(*config["video_size"], largest_scale=math.inf)
    folder = case.path / config["dataset_dir"].split()[0]
    return open_clips(folder, window, transform, released=True, dtype=dtype)


def cut(case: Case) -> tuple[slice, ...]:
    """The words "[:, ::4, ::7, ::9]" of case.json as an index."""
    [words] = re.findall(r"\[([:\d, ]+)\]", case.spec["tensors"]["float.<index>"])
    return tuple(
        slice(*(int(number) if number else None for number in part.split(":")))
        for part in words.replace(" ", "").split(",")
    )


def described(value: Any) -> Any:
    """A collated batch in the words of case.json."""
    if isinstance(value, dict):
        return {name: described(inner) for name, inner in value.items()}
    return [str(value.dtype), [*value.shape]] if isinstance(value, torch.Tensor) else "list"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_samples(case: Case) -> None:
    found = clips(case)
    assert len(found) == case.spec["len"]
    for index, sample in enumerate(case.spec["samples"]):
        video, numbers = found.locate(index)
        assert video.path.name == sample["video"]
        assert video.frames == sample["orig_num_frames"]
        assert (numbers[0], numbers[-1]) == (sample["first"], sample["last"])
    for index, numbers in case.spec["frame_ids"].items():
        assert [*found.locate(int(index))[1]] == numbers
    with pytest.raises(IndexError):
        found[len(found)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_frames(case: Case) -> None:
    for name in case.names():
        dtype = case.tensor(name).dtype
        whole = not dtype.is_floating_point
        video = clips(case, None if whole else dtype)[int(name.partition(".")[2])]["video"]
        assert video.dtype == dtype
        case.compare(name, video if whole else video[cut(case)])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_keys(case: Case) -> None:
    for index, stated in case.spec["stats"].items():
        item = clips(case, getattr(torch, stated["dtype"].removeprefix("torch.")))[int(index)]
        video = item["video"].double()
        figures = {"mean": video.mean(), "std": video.std(), "min": video.min(), "max": video.max()}
        for name, figure in figures.items():
            assert stated[name] == pytest.approx(figure.item(), abs=1e-6)
        item["video_name"]["video_path"] = item["video_name"]["video_path"].rpartition("/")[2]
        shape, fill = stated["padding_mask"]
        assert torch.equal(item["padding_mask"], torch.full(shape, fill))
        rest = stated.keys() - figures.keys() - {"shape", "dtype", "padding_mask"}
        assert [*video.shape] == stated["shape"]
        assert {name: item[name] for name in rest} == {name: stated[name] for name in rest}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_batch(case: Case) -> None:
    stated = case.spec["collated_batch"]
    dtype = getattr(torch, stated["video"][0].removeprefix("torch."))
    batch = described(default_collate([clips(case, dtype)[0]]))
    assert {name: batch[name] for name in stated} == stated


@pytest.mark.parametrize("case", CASES, ids=str)
def test_order(case: Case) -> None:
    """Each process takes what the released sampler deals to it, but for what that one repeats."""
    found = clips(case)
    for name, stated in case.spec["sampler_order"].items():
        world, rank = map(int, re.findall(r"\d+", name))
        loader = Loader(found, num_workers=0, repeated=True, ranks=Axis(rank, world))
        whole = len(found) // world
        taken = [int(loader.order(epoch)[place]) for [(epoch, place)] in first(2 * whole, loader)]
        assert taken[:whole] == taken[whole:] == stated[:whole]


def first(count: int, loader: Loader) -> Any:
    return (place for _, place in zip(range(count), loader._places(), strict=False))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tensor_is_used(case: Case) -> None:
    assert case.unused() == []
