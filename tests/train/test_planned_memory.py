"""The memory table of docs/post_training.md: that of the plan, model by model.

`python -m tests.train.test_planned_memory` prints it anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from worldline.catalog import find
from worldline.family import Opened, load_family
from worldline.locate import Place
from worldline.parallel.mesh import Layout, plan_mesh
from worldline.train.experiment import Experiment
from worldline.train.training import Training, memory_of

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


def planned(model: str, count: int, lora: bool) -> int:
    """Gigabytes of each of so many GPUs, with activations computed again."""
    folder, frames, height, width = MODELS[model]
    entry = find(folder)
    assert entry
    family = load_family(entry.command.partition(" ")[0])
    options, nowhere = family.options.parse({}), Place(Path(folder), ())
    opened = Opened(family, folder, nowhere, options, parts=family.presets(entry))
    settings: dict[str, Any] = {
        "data": {"num_frames": frames, "video_size": (height, width)},
        "average": {"enabled": "guidance" in family.request.model_fields and not lora},
        "lora": {"rank": 8 if lora else 0},
    }
    mesh, device = plan_mesh(Layout(dp=count)), torch.device("cuda")
    experiment = Experiment.model_validate(settings)
    training = Training(experiment, opened, None, None, None, mesh, device)  # type: ignore[arg-type]
    return round(memory_of(training)[True].total / 1e9)


def rows() -> list[str]:
    lines = []
    for model in MODELS:
        cells = [planned(model, count, lora) for lora in (False, True) for count in COUNTS]
        lines.append(f"| {' | '.join(map(str, [model, *cells]))} |")
    return lines


def test_the_table_is_that_of_the_plan() -> None:
    text = PAGE.read_text()
    for line in rows():
        assert line in text, f"{line}; python -m tests.train.test_planned_memory prints all"


@pytest.mark.parametrize("lora", [False, True])
def test_more_gpus_need_less_of_each(lora: bool) -> None:
    for model in MODELS:
        needs = [planned(model, count, lora) for count in COUNTS]
        assert needs == sorted(needs, reverse=True), model


if __name__ == "__main__":
    print("\n".join(rows()))
