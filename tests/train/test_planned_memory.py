"""The memory tables of docs/post_training.md: the plan, model by model, and what was measured.

`python -m tests.train.test_planned_memory` prints them anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from worldline.catalog import find
from worldline.family import Opened, load_family
from worldline.locate import Place
from worldline.memory import WORKSPACE
from worldline.parallel.mesh import Layout, plan_mesh
from worldline.shapes import VideoShape
from worldline.train.experiment import Experiment
from worldline.train.memory import TrainingMemory
from worldline.train.prepare import Training, memory_of

PAGE = Path(__file__).parents[2] / "docs" / "post_training.md"
COUNTS = (1, 2, 4, 8)
# name in the table: folder of the model, frames, height and width
MODELS = {
    "Predict1 4B, 384 x 640": ("Cosmos-Predict1-4B", 33, 384, 640),
    "Predict1 4B, 640 x 848": ("Cosmos-Predict1-4B", 33, 640, 848),
    "Predict1 5B": ("Cosmos-Predict1-5B-Video2World", 33, 640, 1024),
    "Predict1 12B": ("Cosmos-Predict1-12B", 33, 640, 1024),
    "Predict1 13B": ("Cosmos-Predict1-13B-Video2World", 33, 640, 1024),
    "Predict1 7B": ("Cosmos-Predict1-7B-Video2World", 121, 704, 1280),
    "Predict1 14B": ("Cosmos-Predict1-14B-Video2World", 121, 704, 1280),
    "Predict2.5 2B": ("Cosmos-Predict2.5-2B", 93, 704, 1280),
    "Predict2.5 14B": ("Cosmos-Predict2.5-14B", 93, 704, 1280),
}


class Measured(NamedTuple):
    """A run of one clip on one H200.

    Attributes:
        model: its name, as of a folder without what begins all.
        clip: frames, height and width.
        rank: of adapters; 0 where all weights are trained.
        peak: most bytes that torch allocated, in GB.
        both: whether stream and update were kept between blocks, as at those commits.
    """

    model: str
    clip: tuple[int, int, int]
    rank: int
    average: bool
    checkpointed: bool
    compiled: bool
    peak: float
    both: bool = False


# benchmarks/results/training.json, torch 2.11; compiled at d646ca5, others at 85653ef
MEASURED = (
    Measured("Predict1-4B", (33, 384, 640), 0, False, False, False, 69.56),
    Measured("Predict1-4B", (33, 640, 848), 0, False, False, False, 91.11),
    Measured("Predict1-4B", (33, 384, 640), 0, False, True, False, 66.61),
    Measured("Predict1-4B", (33, 640, 848), 0, False, True, False, 67.61),
    Measured("Predict1-4B", (33, 384, 640), 0, False, False, True, 66.61),
    Measured("Predict1-4B", (33, 640, 848), 0, False, False, True, 75.81),
    Measured("Predict1-4B", (33, 384, 640), 0, False, True, True, 66.61),
    Measured("Predict1-7B-Video2World", (121, 704, 1280), 8, True, True, True, 53.74, True),
    Measured("Predict1-5B-Video2World", (33, 384, 640), 0, False, False, False, 82.22),
    Measured("Predict1-12B", (33, 384, 640), 32, False, False, False, 69.44),
    Measured("Predict1-13B-Video2World", (33, 384, 640), 32, False, False, False, 85.98),
    Measured("Predict1-7B-Video2World", (121, 704, 1280), 8, True, True, False, 55.58, True),
    Measured("Predict2.5-2B", (93, 704, 1280), 32, True, True, False, 38.36, True),
)


def memory(
    folder: str,
    clip: tuple[int, int, int],
    rank: int,
    *,
    average: bool,
    compiled: bool = True,
    count: int = 1,
) -> dict[bool, TrainingMemory]:
    """Plans of each of so many GPUs, without and with activations computed again."""
    entry = find(folder)
    assert entry
    family = load_family(entry.command.partition(" ")[0])
    options, nowhere = family.options.parse({}), Place(Path(folder), ())
    opened = Opened(family, folder, nowhere, options, parts=family.presets(entry))
    settings: dict[str, Any] = {
        "data": {"num_frames": clip[0], "video_size": clip[1:]},
        "average": {"enabled": average},
        "lora": {"rank": rank},
        "trainer": {"compile": "on" if compiled else "off"},
    }
    mesh, device = plan_mesh(Layout(dp=count)), torch.device("cuda")
    experiment = Experiment.model_validate(settings)
    training = Training(experiment, opened, None, None, None, mesh, device)  # type: ignore[arg-type]
    return memory_of(training)


def planned(model: str, count: int, lora: bool) -> int:
    """Gigabytes of each of so many GPUs, with activations computed again."""
    folder, frames, height, width = MODELS[model]
    average = frames > 33 and not lora  # of diffusion models
    clip = frames, height, width
    plans = memory(folder, clip, 8 * lora, average=average, count=count)
    return round(plans[True].total / 1e9)


def allocated(run: Measured) -> float:
    """Gigabytes that torch is planned to allocate: all but those of libraries."""
    model, options = f"Cosmos-{run.model}", {"average": run.average, "compiled": run.compiled}
    plans = memory(model, run.clip, run.rank, **options)
    nbytes = plans[run.checkpointed].total - WORKSPACE
    if run.both:
        parts = load_family(find(model).command.partition(" ")[0]).presets(find(model))
        config, tokenizer = parts["transformer"].config, parts["tokenizer"].config
        grid = VideoShape(*run.clip).latent(tokenizer.temporal, tokenizer.spatial)
        nbytes += config.depth * config.tokens(grid).tokens * config.width * 2
    return nbytes / 1e9


def rows() -> list[str]:
    lines = []
    for model in MODELS:
        cells = [planned(model, count, lora) for lora in (False, True) for count in COUNTS]
        lines.append(f"| {' | '.join(map(str, [model, *cells]))} |")
    return lines


def measured_rows() -> list[str]:
    lines = []
    for run in MEASURED:
        trained = f"adapter of rank {run.rank}" if run.rank else "all weights"
        kept = "computed again" if run.checkpointed else "kept"
        kept += ", compiled blocks" * run.compiled
        size = " x ".join(map(str, run.clip))
        cells = [run.model, size, trained, kept, f"{allocated(run):.1f}", f"{run.peak:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def test_the_tables_are_those_of_the_plan() -> None:
    text = PAGE.read_text()
    for line in (*rows(), *measured_rows()):
        assert line in text, f"{line}; python -m tests.train.test_planned_memory prints all"


@pytest.mark.parametrize("run", MEASURED)
def test_the_plan_is_near_what_was_measured(run: Measured) -> None:
    assert run.peak <= allocated(run) <= 1.05 * run.peak


@pytest.mark.parametrize("lora", [False, True])
def test_more_gpus_need_less_of_each(lora: bool) -> None:
    for model in MODELS:
        needs = [planned(model, count, lora) for count in COUNTS]
        assert needs == sorted(needs, reverse=True), model


if __name__ == "__main__":
    print("\n".join((*rows(), "", *measured_rows())))
