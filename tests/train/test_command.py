"""The train command: what it prints, writes and refuses; a killed run goes on bit for bit."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.cli.results import check_mentions
from tests.states import read_state
from worldline.cli.main import main
from worldline.errors import InputError
from worldline.locate import locate
from worldline.opening import open_world
from worldline.parallel.mesh import Axis
from worldline.train.experiment import short_form
from worldline.train.prepare import prepare
from worldline.train.training import claimed, train
from worldline.video.write import write_video
from worldline.weights.checkpoint import save
from worldline.weights.networks import open_adapter

MODELS = (
    "tiny-Cosmos-Predict1-4B",
    "tiny-Cosmos-Predict1-7B-Video2World",
    "tiny-Cosmos-Predict2.5-2B",
)
AR = "tiny-Cosmos-Predict1-4B"
RUNS = "posttraining/worldline"
MISPRINTED = "base_4b_example_tealrobotsmall_tp4"
SMALL = ("data.num_frames=9", "data.video_size=[64,96]", "trainer.sample_iter=0")
TWO = "parallel.tensor_model_parallel_size=2"


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips with captions."""
    folder = tmp_path_factory.mktemp("videos")
    generator = torch.Generator().manual_seed(0)
    (folder / "metas").mkdir()
    for number in range(3):
        frames = torch.randint(256, (33, 8, 12, 3), generator=generator, dtype=torch.uint8)
        large = frames.repeat_interleave(16, 1).repeat_interleave(16, 2)
        write_video(large.numpy(), folder / f"c{number}.mp4", 16)
        (folder / "metas" / f"c{number}.txt").write_text(f"Clip {number}.")
    return folder


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path / "runs"))
    monkeypatch.setenv("WORLDLINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "runs"


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["train", *words])
    return int(ended.value.code or 0)


def words(model: str, videos: Path, *keys: str, steps: int = 2) -> list[str]:
    line = [model, "--videos", str(videos), "--max_steps", str(steps), "--device", "cpu", "--"]
    return [
        *line,
        "trainer.precision=float32",
        "trainer.logging_iter=1",
        "data.num_workers=0",
        *keys,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_what_a_run_leaves(root: Path, videos: Path, model: str) -> None:
    """A log, the settings, states, and weights that the model's own loader opens."""
    assert run(*words(model, videos, "checkpoint.save_iter=2", "average.enabled=true")) == 0
    folder = root / RUNS / model
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["trainer"]["max_iter"] == 2
    checkpoints = folder / "checkpoints"
    lines = [json.loads(line) for line in (checkpoints / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert (checkpoints / "latest_checkpoint.txt").read_text().startswith("iter_000000002")
    [newest] = [path for path in checkpoints.iterdir() if path.suffix == ".state"]
    assert newest.name == "iter_000000002.state"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "files"),
    [
        (MODELS[0], ()),
        (MODELS[1], ("_model.pt", "_adapter/pytorch_lora_weights.safetensors")),
        (MODELS[2], ("/model", "_adapter/pytorch_lora_weights.safetensors")),
    ],
)
def test_adapters(
    root: Path,
    videos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: str,
    files: tuple[str, ...],
) -> None:
    """An adapter is trained and written in all forms, which the generating commands read alike.

    It does not go on with other weights.
    """
    line = words(model, videos, "lora.rank=3", "checkpoint.save_iter=1", "checkpoint.keep_last=2")
    if files:
        line += ["checkpoint.format=reference", "average.enabled=true"]
    assert run("--lora", *line) == 0
    checkpoints = root / RUNS / model / "checkpoints"
    first, last = (checkpoints / f"iter_{step:09}_adapter" for step in (1, 2))
    latest = (checkpoints / "latest_checkpoint.txt").read_text()
    assert latest.startswith("iter_000000002" if files else f"{last.name}\n")
    settings = json.loads((last / "adapter_config.json").read_text())
    assert settings["r"] == 3
    source = open_adapter(last)
    halves = [open_adapter(folder) for folder in (first, last)]
    network = open_world(locate(model, "checkpoints"), {})["transformer"]
    adapter = network.match_adapter(source, 1.0)
    assert len(adapter.updates) == len(settings["target_modules"])
    name = next(name for name in source.tensors if "lora_B" in name)
    assert not torch.equal(*(half.read(name) for half in halves))
    assert {key.split("/")[1].rpartition(".")[2] for key in read_state(checkpoints)} == {
        "down",
        "up",
    }

    def parameters(path: Path, scale: float = 1.0) -> list[torch.Tensor]:
        merged = network.adapted(network.match_adapter(open_adapter(path), scale))
        return [*merged.read("cpu", torch.float32).parameters()]

    base = [*network.read("cpu", torch.float32).parameters()]
    expected = parameters(last)
    assert not all(map(torch.equal, expected, base))
    assert all(map(torch.equal, parameters(last, 0.0), base))
    for end in files:
        assert all(map(torch.equal, parameters(checkpoints / f"iter_000000002{end}"), expected))

    capsys.readouterr()
    further = words(model, videos, f"checkpoint.load_path={last}", "job.name=further", steps=1)
    further += ["optimizer.lr=1e-30", "trainer.sample_iter=0"]
    assert run("--lora", *further, "lora.rank=3") == 0
    again = root / RUNS / "further" / "checkpoints" / "iter_000000001_adapter"
    assert all(map(torch.equal, parameters(again), expected))
    assert run(*further) == 2
    check_mentions(capsys.readouterr().err, f"load_path {last} --lora")

    other = tmp_path / "other" / "model.safetensors"
    shutil.copytree(network.path.parent, other.parent)
    tensors = {n: network.source.read(n) for n in network.source.tensors}
    save({n: tensor + 1 if tensor.ndim == 1 else tensor for n, tensor in tensors.items()}, other)
    bundled = str(locate(model, "checkpoints").named.parent)
    assert run("--lora", "--checkpoint_dir", bundled, *line, f"checkpoint.load_path={other}") == 2
    check_mentions(capsys.readouterr().err, f"{other} load_path job.name=OTHER")


def test_weights_alone_take_the_tokenizer_of_their_model(root: Path, videos: Path) -> None:
    model = "tiny-Cosmos-Predict1-4B"
    alone = shutil.copytree(locate(model, ".").named, root / "alone")
    line = words(model, videos, f"checkpoint.load_path={alone}")
    assert run("--dry_run", *line) == 0


def test_weights_of_another_family(
    root: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, other = "tiny-Cosmos-Predict1-4B", "tiny-Cosmos-Predict2.5-2B"
    assert run(*words(model, videos, f"checkpoint.load_path={other}")) == 2
    check_mentions(capsys.readouterr().err, f"load_path {other} {model} autoregressive predict2.5")


@pytest.mark.slow
def test_a_run_becomes_longer(root: Path, videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With other settings it is refused, and these are named."""
    assert run(*words(AR, videos, steps=1)) == 0
    assert run(*words(AR, videos, "optimizer.eps=1e-3", steps=2)) == 2
    assert "optimizer.eps was" in capsys.readouterr().err
    assert run(*words(AR, videos, steps=2)) == 0
    log = (root / RUNS / AR / "checkpoints" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2]


@pytest.mark.slow
def test_a_finished_run(root: Path, videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends at once, and names what goes on; other captions are another run, by their files."""
    clips = root.parent / "clips"
    shutil.copytree(videos, clips)
    line = ["--name", "x", *words(MODELS[1], clips, *SMALL, steps=1)]
    assert run(*line) == 0
    capsys.readouterr()
    moved = clips.rename(root.parent / "moved")
    line = [str(moved) if word == str(clips) else word for word in line]
    settings = root / RUNS / "x" / "config.yaml"
    settings.unlink()
    assert run(*line) == 0
    check_mentions(capsys.readouterr().out, f"{settings.parent}/checkpoints 1 --max_steps --name")
    assert not settings.exists()
    (moved / "metas" / "c1.txt").write_text("Clip one.")
    assert run(*line) == 2
    error = capsys.readouterr().err
    check_mentions(error, "c1.mp4 another text job.name=OTHER")
    assert "c0.mp4" not in error


def test_captions_without_an_encoder(
    root: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundled = locate(MODELS[1], ".").named
    for name in (bundled.name, "Cosmos-Tokenize1-CV8x8x8-720p"):
        shutil.copytree(bundled.parent / name, tmp_path / name)
    line = [bundled.name, "--videos", str(videos), "--checkpoint_dir", str(tmp_path), "--name", "x"]
    assert run(*line) == 2
    check_mentions(capsys.readouterr().err, f"t5-11b {tmp_path} captions")


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (["scheduler.warmup=1", "scheduler.kind=cosine"], "scheduler.warmup=1 max_iter=1 0"),
        (["scheduler.top=0", "scheduler.start=0"], "rate 0"),
        (["scheduler.warmup=7"], "scheduler.warmup 7 1"),
        ([], ""),
    ],
)
def test_notes_of_a_dry_run(
    root: Path, videos: Path, capsys: pytest.CaptureFixture[str], keys: list[str], named: str
) -> None:
    """Rates that stay at 0 or below the peak, and captions that the encoder cuts, by the first."""
    line = words(MODELS[1], videos, *SMALL, *keys, steps=1)
    assert run("--dry_run", *line) == 0
    error = capsys.readouterr().err
    assert error.count("warning") == bool(named)
    check_mentions(error, named)
    assert run("--dry_run", "--caption", "long " * 999, *line) == 0
    check_mentions(capsys.readouterr().err, "3 of 3 captions c0.mp4")


@pytest.mark.slow
def test_a_run_goes_on_from_files_of_a_trainer(root: Path, videos: Path, tmp_path: Path) -> None:
    """What is rounded in them decides little; of one clip, the order is the same."""
    shutil.copy(videos / "c0.mp4", tmp_path / "c0.mp4")
    keys = ("checkpoint.format=reference", "checkpoint.save_iter=1", "trainer.max_iter=3")
    keys = (*keys, "scheduler.warmup=0", "optimizer.lr=1e-3")
    assert run("--name", "whole", *words(AR, tmp_path, *keys)) == 0
    folders = [root / RUNS / name / "checkpoints" for name in ("whole", "more")]
    start = f"checkpoint.load_path={folders[0] / 'iter_000000002.pt'}"
    bundled = str(locate(AR, "checkpoints").named.parent)
    more = words(AR, tmp_path, *keys, start, "checkpoint.load_training_state=true")
    assert run("--name", "more", "--checkpoint_dir", bundled, *more) == 0
    logs = [
        {line["step"]: line for line in map(json.loads, path.read_text().splitlines())}
        for path in (folder / "log.jsonl" for folder in folders)
    ]
    assert [*logs[1]] == [3]
    for name in ("loss", "rate", "norm"):
        assert logs[1][3][name] == pytest.approx(logs[0][3][name], rel=0.02), name
    states = [read_state(folder) for folder in folders]
    gaps = [float((states[1][n] - each).abs().mean()) for n, each in states[0].items()]
    assert max(gaps) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS[:2])
def test_cached_clips(root: Path, videos: Path, tmp_path: Path, model: str) -> None:
    """Tokens or latents of a cache train as those that are computed."""
    keys = [f"data.cache_dir={tmp_path / 'kept'}", "trainer.max_iter=5"]
    logs = {}
    for name, more in (("without", keys[1:]), ("filled", keys), ("read", keys)):
        assert run("--name", name, *words(model, videos, *more)) == 0
        log = (root / RUNS / name / "checkpoints" / "log.jsonl").read_text().splitlines()
        logs[name] = [json.loads(line)["loss"] for line in log]
    assert len([*(tmp_path / "kept").rglob("*.safetensors")]) == 3
    assert logs["without"] == logs["filled"] == logs["read"]


def test_the_experiment_is_printed(
    root: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dry run trains nothing, and its file is the whole experiment."""
    assert run("--dryrun", *words(AR, videos, "optimizer.lr=2e-5")) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["optimizer"]["lr"] == 2e-5
    folder = root / RUNS / AR
    assert yaml.safe_load((folder / "config.yaml").read_text()) == printed
    assert not (folder / "checkpoints").exists()


def test_frames_are_given_to_a_model_that_continues_clips(
    root: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The short form trains Video2World as the released experiments do, and a stated key wins."""
    for keys, dropped in (([], 0.2), (["objective.text_dropout=0.4"], 0.4)):
        assert run("--dry_run", *words(MODELS[1], videos, *keys)) == 0
        recipe = yaml.safe_load(capsys.readouterr().out)["objective"]
        assert (recipe["noise_factor"], recipe["most_conditioning"]) == (4, 2)
        assert recipe["text_dropout"] == dropped


@pytest.mark.parametrize(
    ("scale", "keys", "named"),
    [
        (None, ["lora.scale=1.5"], None),
        (1.0, [], None),
        (1.0, ["lora.scale=1.5"], "scale 1, and lora.scale is 1.5"),
        (0.25, ["lora.scale=0.25"], None),
        (0.25, [], "scale 0.25, and lora.scale is 1"),
        (None, ["lora.rank=4"], "lora.rank"),
        (None, ["lora.targets=[wq]"], "lora.targets"),
        (None, ["lora.targets=[wk,tok_embeddings]"], "tok_embeddings"),
    ],
)
def test_an_adapter_goes_on_with_its_own_settings(
    root: Path,
    videos: Path,
    tmp_path: Path,
    scale: float | None,
    keys: list[str],
    named: str | None,
) -> None:
    """Those that its file does not state are free; others are refused by its header."""
    bundled = locate(AR, "checkpoints").named
    network = open_world(locate(AR, "checkpoints"), {})["transformer"]
    tensors = {name: network.source.read(name) for name in network.source.tensors}
    for name, meta in network.source.tensors.items():
        stem, (*rows, columns) = name.removesuffix(".weight"), meta.shape
        if rows and ("attention." in name or "feed_forward." in name):
            tensors[f"{stem}.lora_down.weight"] = torch.ones(3, columns)
            tensors[f"{stem}.lora_up.weight"] = torch.ones(rows[0], 3)
    (tmp_path / "mine").mkdir()
    if scale is not None:
        config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3 * scale}
        (tmp_path / "mine" / "adapter_config.json").write_text(json.dumps(config))
    save(tensors, tmp_path / "mine" / "model.safetensors")
    shutil.copy(bundled / "config.json", tmp_path / "mine")
    stated = {"model": AR, "checkpoint": {"load_path": str(tmp_path / "mine")}}
    stated |= {"data": {"dataset_dir": str(videos)}, "lora": {"rank": 3}}
    experiment = short_form("autoregressive", stated, ["job.name=x", *keys])
    if named is None:  # merged where all weights are trained; lines of the run name it
        whole = experiment.model_copy(
            update={"lora": experiment.lora.model_copy(update={"rank": 0})}
        )
        counts = []
        for each in (experiment, whole):
            training = prepare(each, "cpu", str(bundled.parent))
            assert training.network.adapters
            lines = [*training.describe()]
            assert sum("mine/model.safetensors: " in line for line in lines) == 2
            assert sum("rank 3" in line for line in lines) == (each is experiment)
            counts.append(training.num_trained)
        assert 0 < counts[0] < counts[1] / 10
        return
    with pytest.raises(InputError, match=re.escape(named)) as refusal:
        prepare(experiment, "cpu", str(bundled.parent))
    assert ("wq" if named == "tok_embeddings" else "model.safetensors") in str(refusal.value)


def test_a_training_that_is_over_does_not_go_on(root: Path, videos: Path, tmp_path: Path) -> None:
    """The number of its steps is read before the model is."""
    bundled = locate(AR, "checkpoints").named
    network = open_world(locate(AR, "checkpoints"), {})["transformer"]
    tensors = {name: network.source.read(name) for name in network.source.tensors}
    state = {"state": {0: {"step": torch.tensor(9.0), "exp_avg": torch.zeros(2)}}}
    path = tmp_path / "iter_000000007.pt"
    torch.save({"model": tensors, "optimizer": state}, path)
    shutil.copy(bundled / "config.json", tmp_path)
    loaded = {"load_path": str(path), "load_training_state": True}
    stated = {"model": AR, "data": {"dataset_dir": str(videos)}, "checkpoint": loaded}

    def prepare_steps(most: int) -> None:
        keys = ["job.name=x", f"trainer.max_iter={most}"]
        prepare(short_form("autoregressive", stated, keys), "cpu", str(bundled.parent))

    prepare_steps(10)
    with pytest.raises(InputError, match=r"iter_000000007\.pt: .* 9 steps, .*max_iter is 9"):
        prepare_steps(9)


@pytest.mark.parametrize(("model", "source"), [(MODELS[1], "embeddings"), (MODELS[2], "auto")])
@pytest.mark.parametrize("inner", ["", "videos"])
def test_embeddings_beside_the_videos(
    root: Path, videos: Path, tmp_path: Path, model: str, source: str, inner: str
) -> None:
    """Released folders, named as a whole or by their videos; T5's rows are no other encoder's."""
    folder = tmp_path / "data"
    shutil.copytree(videos, folder / "videos", ignore=shutil.ignore_patterns("metas"))
    shutil.copytree(videos / "metas", folder / "metas")
    (folder / "t5_xxl").mkdir()
    for number in range(3):
        rows = np.full((number + 2, 64), number, np.float16)
        (folder / "t5_xxl" / f"c{number}.pickle").write_bytes(pickle.dumps([rows]))
    experiment = short_form(
        "diffusion" if model == MODELS[1] else "predict2.5",
        {"model": model, "job": {"name": "x"}, "data": {"dataset_dir": str(folder / inner)}},
    )
    texts = prepare(experiment, "cpu", "checkpoints").clips.texts
    assert texts
    assert texts.source == source


@pytest.mark.parametrize(("keys", "text"), [([], "A long"), (["data.prompt_type=short"], "A")])
def test_one_of_several_captions(
    root: Path, videos: Path, tmp_path: Path, keys: list[str], text: str
) -> None:
    shutil.copy(videos / "c0.mp4", tmp_path)
    (tmp_path / "captions").mkdir()
    kinds = {"long": "A long", "short": "A"}
    (tmp_path / "captions" / "c0.json").write_text(json.dumps({"model": kinds}))
    stated = {"model": MODELS[2], "job": {"name": "x"}, "data": {"dataset_dir": str(tmp_path)}}
    clips = prepare(short_form("predict2.5", stated, keys), "cpu", "checkpoints").clips
    assert [*clips.text.values()] == [text]


def test_models_lie_in_the_folder_that_is_given(
    root: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The short form asks the model for its family; a decoder that no training reads is absent."""
    bundled, models = locate(AR, "checkpoints").named, tmp_path / "models"
    tokenizer = "Cosmos-Tokenize1-DV8x16x16-720p"
    shutil.copytree(bundled, models / "mine")
    shutil.copytree(bundled.parent / tokenizer, models / tokenizer)
    line = ["--dryrun", "--checkpoint_dir", str(models), *words("mine", videos)]
    assert run(*line) == 0
    assert yaml.safe_load(capsys.readouterr().out)["job"]["group"] == "worldline"


@pytest.mark.slow
def test_weights_without_a_state_are_not_overwritten(
    root: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = words(AR, videos, "checkpoint.save_state=false", steps=1)
    assert run(*line) == 0
    [kept] = (root / RUNS / AR / "checkpoints").glob("iter_*.pt")
    before = kept.read_bytes()
    assert run(*line) == 2
    assert "job.name=OTHER" in capsys.readouterr().err
    assert kept.read_bytes() == before


@pytest.mark.parametrize("name", ["iter_000000009_adapter", "iter_000000009.pt"])
def test_where_a_run_without_states_begins(
    root: Path, videos: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """With its weights, but an adapter alone is no model."""
    folder = root / RUNS / AR / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "latest_checkpoint.txt").write_text(f"{name}\n")
    assert run("--lora", *words(AR, videos)) == 2
    error = capsys.readouterr().err
    check_mentions(error, f"{folder} job.name=OTHER")
    assert ("load_path" in error) == name.endswith(".pt")


def test_two_runs_do_not_share_a_folder(
    root: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = root / RUNS / AR
    folder.mkdir(parents=True)
    with claimed(folder):
        assert run(*words(AR, videos, steps=1)) == 2
    assert str(folder) in capsys.readouterr().err
    assert not [*folder.iterdir()]


def test_settings_that_cannot_be_written(root: Path, videos: Path) -> None:
    """What the first process alone writes before the model is read fails in all processes."""
    failures: list[Exception] = []

    class Asked(Axis):
        def together(self, make: Callable[[], Any]) -> Any:
            try:
                return super().together(make)
            except Exception as error:
                failures.append(error)
                raise

    stated = {"model": AR, "job": {"name": "x"}, "data": {"dataset_dir": str(videos)}}
    training = prepare(short_form("autoregressive", stated), "cpu", "checkpoints")
    training = replace(training, mesh=replace(training.mesh, world=Asked()))
    (root / RUNS / "x" / "config.yaml").mkdir(parents=True)
    with pytest.raises(OSError, match=r"config\.yaml") as raised:
        train(training)
    assert failures == [raised.value]


def test_experiments_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--list") == 0
    assert "base_4b_example_tealrobot_tp4: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ([], ("MODEL", "experiment")),
        (
            ["--", "experiment=base_4b_example_tealrobotsmall_tp4"],
            ("base_4b_example_tealrobot_tp4",),
        ),
        ([AR, "--videos", "VIDEOS", "--", "trainer.max_itr=3"], ("trainer.max_iter",)),
        (
            [AR, "--videos", "VIDEOS", "--", "objective.z_coeff=3"],
            ("objective.z_coeff", "z_coefficient"),
        ),
        ([AR, "--videos", "VIDEOS", "--resolution", "big"], ("--resolution is 'big'", "384x640")),
        ([AR, "--videos", "VIDEOS", "--resolution", "0x3"], ("--resolution is '0x3'", "384x640")),
        ([AR, "--videos", "VIDEOS", "--resolution", f"{10**9}x3"], ("--resolution", "999999999")),
        ([AR, "--videos", "VIDEOS", "--learning_rate", "-1"], ("--learning_rate is -1", "than 0")),
        (
            [AR, "--videos", "VIDEOS", "--resolution", "3x3", "--", "data.video_size=3y3"],
            ("data.video_size is '3y3'",),
        ),
        ([AR, "--videos", "VIDEOS", "--", "--lora"], ("--lora", "before --")),
        ([AR, "--videos", "VIDEOS", "--lora", "--", "lora.rank=0"], ("lora.rank", "--lora")),
        ([AR, "--videos", "VIDEOS", "--caption", "x"], ("data.caption", AR)),
        ([AR, "--videos", "VIDEOS", "--name", "x" * 256], ("--name", "255")),
        ([AR, "--videos", "VIDEOS", "--", f"trainer.max_iter={10**9}"], ("max_iter", "999999999")),
        ([AR, "--videos", "VIDEOS", "--", "objective.conditioning=0"], ("conditioning is 0",)),
        ([AR, "--videos", "VIDEOS", "--", "objective.conditioning=5"], ("5 latent frames", "(5)")),
        ([AR, "--videos", "VIDEOS", "--num_frames", "1"], ("1 x 128 x 192", "conditioning (1)")),
        (
            [MODELS[2], "--videos", "VIDEOS", "--", "objective.conditioning=[0,0]"],
            ("objective.conditioning", "above 0"),
        ),
        ([MODELS[2], "--videos", "VIDEOS", "--", "objective.text_dropout=2"], ("text_dropout",)),
        (
            [MODELS[1], "--videos", "VIDEOS", "--resolution", "640x384"],
            ("5 x 80 x 48 latent cells", "5 x 16 x 24"),
        ),
        ([AR, "--videos", "VIDEOS", "--resolution", "100x192"], ("100",)),
        ([AR, "--videos", "VIDEOS", "--num_frames", "41"], ("33 frames", "41")),
        ([AR, "--videos", "EMPTY"], ("EMPTY",)),
        (
            [AR, "--videos", "VIDEOS", "--", "parallel.tensor_model_parallel_size=2"],
            ("has 1 process;",),
        ),
        ([AR], ("data.dataset_dir", "--videos")),
        ([AR, "VIDEOS"], ("VIDEOS", "--videos")),
        (["absent"], ("absent", "worldline models")),
        ([AR, "--videos", "VIDEOS", "--name", ""], ("job.name",)),
        (["--name", "x", "--lora", "--", "experiment=mine"], ("job.name=", "lora.rank=")),
        ([AR, "--videos", "VIDEOS", "--name", "../../x"], ("--name", "../../x")),
    ],
)
def test_what_is_refused(
    root: Path,
    videos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    line: list[str],
    named: tuple[str, ...],
) -> None:
    empty = tmp_path / "EMPTY"
    empty.mkdir()
    places = {"VIDEOS": str(videos), "EMPTY": str(empty)}
    assert run("--device", "cpu", *(places.get(word, word) for word in line)) == 2
    error = capsys.readouterr().err
    assert all(places.get(text, text) in error for text in named), error
    assert "Traceback" not in error


COMMAND = [sys.executable, "-m", "worldline", "train"]


@pytest.mark.slow
def test_stopped_runs_go_on_bit_for_bit(root: Path, videos: Path) -> None:
    """By SIGTERM, which saves; `test_kills` has those that save nothing. Videos change nothing."""
    line = words(AR, videos, "checkpoint.save_iter=2", "checkpoint.keep_last=1", steps=6)
    folders = {name: root / RUNS / name / "checkpoints" for name in ("whole", "cut")}
    assert run("--name", "whole", *line) == 0
    line.append("trainer.sample_iter=3")
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([*COMMAND, "--name", "cut", *line], env=environment)
    log, begun = folders["cut"] / "log.jsonl", time.monotonic()
    while not log.exists() or log.read_text().count("\n") < 2:
        assert time.monotonic() < begun + 120
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert run("--name", "cut", *line) == 0
    states = [read_state(folder) for folder in folders.values()]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of what torch itself imports
@pytest.mark.parametrize("model", MODELS)
def test_compiled_blocks(root: Path, videos: Path, model: str) -> None:
    """Losses are those of plain ones, up to rounding."""
    losses = []
    for name, compiled in (("plain", "off"), ("compiled", "on")):
        line = words(model, videos, f"trainer.compile={compiled}", "trainer.sample_iter=0", steps=3)
        assert run("--name", name, *line) == 0
        log = (root / RUNS / name / "checkpoints" / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(one)["loss"] for one in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_no_compiler(
    root: Path,
    videos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no C++ compiler\nand a long trace")

    monkeypatch.setattr(torch, "compile", lambda _: fail)
    assert run("--dry_run", *words(AR, videos, "trainer.compile=true")) == 2
    error = capsys.readouterr().err
    assert "trainer.compile" in error
    assert "(RuntimeError: no C++ compiler)" in error


@pytest.mark.slow
def test_a_run_that_fails_ends(root: Path, videos: Path) -> None:
    """It names the batch, and does not wait for those that read ahead."""
    keys = ["optimizer.lr=1e30", "trainer.clip_norm=1e30", "data.video_size=[64,96]"]
    line = [*words(MODELS[1], videos, *keys, steps=9), "data.num_workers=2"]
    line.remove("data.num_workers=0")
    ended = subprocess.run([*COMMAND, *line], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "not finite" in ended.stderr
    assert "frames 0 to 32" in ended.stderr


@pytest.mark.slow
def test_two_processes_stop_and_one_goes_on(root: Path, videos: Path) -> None:
    """Each has the captions of its own clips; Ctrl-C is passed on, and the step is saved."""
    line = ["--name", "two", *words(MODELS[2], videos, "checkpoint.save_iter=99", steps=60)]
    line = [word.replace("workers=0", "workers=1") for word in line]
    log = root / RUNS / "two" / "checkpoints" / "log.jsonl"
    process = subprocess.Popen([*COMMAND, "--num_gpus", "2", *line], stderr=subprocess.DEVNULL)
    begun = time.monotonic()
    while not log.exists() or not log.read_text():
        assert time.monotonic() < begun + 120
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    [state] = log.parent.glob("*.state")
    stopped = int(state.stem.removeprefix("iter_"))
    steps = [json.loads(one)["step"] for one in log.read_text().splitlines()]
    assert steps[-1] <= stopped < 60
    assert run("--name", "two", *line[2:], "optimizer.lr=0.5") == 2
    settings = root / RUNS / "two" / "config.yaml"
    assert yaml.safe_load(settings.read_text())["optimizer"]["lr"] != 0.5
    process = subprocess.Popen([*COMMAND, *line], stderr=subprocess.DEVNULL)
    while len(log.read_text().splitlines()) == len(steps):
        assert time.monotonic() < begun + 120
        time.sleep(0.05)
    process.kill()
    process.wait()
    lines = log.read_text().splitlines()[len(steps) :]
    assert json.loads(lines[0])["step"] == stopped + 1
