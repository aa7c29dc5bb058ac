"""Videos that a run makes beside the truth: what they are, and that training does not change."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.states import read_state
from tests.train.test_command import AR, MODELS, RUNS, root, run, videos, words
from worldline.families.autoregressive.model import ARTransformer, ARTransformerConfig
from worldline.families.autoregressive.objective import NextTokenObjective, TrainingStep
from worldline.shapes import LatentShape
from worldline.train.experiment import short_form
from worldline.train.loop import LoopConfig, Objective, fit
from worldline.train.optim import Rising
from worldline.train.prepare import prepare
from worldline.train.training import train
from worldline.video.read import Frames, read_video
from worldline.video.write import write_video
from worldline.weights.checkpoint import open_checkpoint

__all__ = ["root", "videos"]  # fixtures
SMALL = ["data.num_frames=9", "data.video_size=[64,96]", "data.start_frame_interval=8"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "key"),
    [*zip(MODELS, ["average.enabled=true", "lora.rank=2", "average.enabled=true"], strict=True)],
)
def test_training_does_not_change(
    root: Path, videos: Path, monkeypatch: pytest.MonkeyPatch, model: str, key: str
) -> None:
    """Weights, moments and averages have the same bits with videos at each step and without."""
    written: dict[str, Frames] = {}

    def keep(frames: Frames, path: Path, fps: float) -> None:
        written[path.name] = frames
        write_video(frames, path, fps)

    monkeypatch.setattr("worldline.train.samples.write_video", keep)
    sizes = [] if model == AR else SMALL
    line = words(model, videos, "checkpoint.save_iter=2", *sizes, key)
    for name, every in (("without", 0), ("with", 1)):
        assert run("--name", name, *line, f"trainer.sample_iter={every}") == 0
    without, with_videos = (
        read_state(root / RUNS / name / "checkpoints") for name in ("without", "with")
    )
    assert without.keys() == with_videos.keys()
    assert all(torch.equal(value, with_videos[name]) for name, value in without.items())
    assert not (root / RUNS / "without" / "samples").exists()
    folder = root / RUNS / "with" / "samples"
    names = [f"iter_{step:09}_{clip}.mp4" for step in (1, 2) for clip in (0, 1)]
    assert sorted(path.name for path in folder.iterdir()) == names
    frames, height, width = (33, 128, 192) if model == AR else (9, 64, 96)
    assert read_video(folder / names[-1]).frames.shape == (frames, height, 3 * width, 3)
    # before H.264, behind which equal columns differ, too
    truth, tokenized, made = np.split(written[names[-1]].astype(int), 3, 2)
    assert truth.shape == (frames, height, width, 3)
    # of noise a tokenizer leaves the mean colours; a model, its own pictures
    assert abs(truth - tokenized).mean() < abs(truth - truth[:, ::-1]).mean()
    assert (made != tokenized).any()


def test_the_likeliest_tokens_behind_the_true_ones() -> None:
    grid = LatentShape(3, 2, 4)
    config = ARTransformerConfig(
        depth=2,
        width=16,
        num_heads=2,
        num_kv_heads=1,
        head_size=12,
        hidden=24,
        vocabulary=11,
        embedding_rows=11,
    )
    torch.manual_seed(5)
    network = ARTransformer(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    step = TrainingStep(network, NextTokenObjective(conditioning=1), grid)
    tokens = torch.randint(11, (1, grid.tokens))
    with torch.no_grad():
        made = step.predict(None, tokens).flatten(1)  # type: ignore[arg-type]
        logits = network(tokens, step._positions(tokens))
    first = grid.tokens_per_frame
    assert torch.equal(made[:, :first], tokens[:, :first])
    assert torch.equal(made[:, first:], logits[:, first - 1 : -1].argmax(-1))


def test_videos_are_made_with_the_averages(tmp_path: Path) -> None:
    """Every second step and at the end; weights and averages come back."""
    torch.manual_seed(1)
    model = torch.nn.Linear(3, 2)
    seen: list[tuple[int, torch.Tensor]] = []
    objective = Objective(
        draw=lambda number: (torch.full((4, 3), float(number)),),
        loss=lambda x: (model(x).square().mean(), {}),
        sample=lambda done: seen.append((done, model.weight.detach().clone())),
        sample_every=2,
    )
    config = LoopConfig(steps=5, rate=lambda step: 0.1, average=Rising(0.9), save_every=1)
    _, average = fit(model, objective, config, tmp_path)
    assert average
    assert [done for done, _ in seen] == [2, 4, 5]
    assert torch.equal(seen[-1][1], average.values["weight"])
    assert not torch.equal(seen[-1][1], model.weight)
    assert torch.equal(read_state(tmp_path)["weights/weight"], model.weight)


def test_clips_that_vanish(root: Path, videos: Path, tmp_path: Path) -> None:
    """A run goes on without the videos of clips that cannot be read any more."""
    held_out = tmp_path / "held"
    shutil.copytree(videos, held_out)
    keys = [f"data.validation_dir={held_out}", *SMALL, "trainer.sample_iter=1"]
    experiment = short_form(
        "diffusion",
        {"model": MODELS[1], "job": {"name": "x"}, "data": {"dataset_dir": str(videos)}},
        [*keys, "trainer.max_iter=1", "data.num_workers=0", "checkpoint.save_state=false"],
    )
    training = prepare(experiment, "cpu", "checkpoints")
    for path in held_out.glob("*.mp4"):
        path.unlink()
    assert train(training) == 1
    assert not [*training.experiment.folder.glob("samples/*")]


@pytest.mark.slow
def test_files_of_two_processes_behind_a_look(root: Path, videos: Path) -> None:
    """Averages are whole, though held-out clips and videos gathered the weights before."""
    model, out = MODELS[2], f"data.validation_dir={videos}"
    looks = ["trainer.validation_iter=1", "trainer.sample_iter=1", out]
    line = words(model, videos, "average.enabled=true", *SMALL, *looks, steps=1)
    command = [sys.executable, "-m", "worldline", "train", "--num_gpus", "2", *line]
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    folder = root / RUNS / model
    assert len([*(folder / "samples").iterdir()]) == 2
    files = [
        open_checkpoint(folder / "checkpoints" / "iter_000000001" / name)
        for name in ("model.pt", "model_ema_bf16.pt")
    ]
    # the average of one step is that step
    for name in files[1].tensors:
        assert torch.equal(files[0].read(name), files[1].read(name)), name
