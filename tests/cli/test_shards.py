"""`--shard I/N`: shards cover a batch, none overlaps, and each checks all of its lines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from worldline.cli.inputs import MediaFlags
from worldline.cli.tokenize import EncodeFlags, ReconstructFlags
from worldline.errors import InputError
from worldline.families.predict2_5.samples import SampleFlags
from worldline.request import BatchFlags

from .conftest import Make, Run
from .results import check_mentions, check_refused, files_in, write_lines

SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8"}
INDEX = {"JOB_COMPLETION_INDEX": "3"}


@pytest.fixture(autouse=True)
def _no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {**SLURM, **INDEX}:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "stated", "part"),
    [
        ({}, {}, (0, 1)),
        (SLURM, {}, (0, 1)),  # without the flag a task of Slurm makes everything
        ({}, {"shard": "6/7"}, (6, 7)),
        (SLURM, {"shard": "0/1"}, (0, 1)),
        (SLURM, {"shard": "auto"}, (5, 8)),
        (INDEX, {"shard": "auto", "shard_count": 4}, (3, 4)),
        ({**SLURM, **INDEX}, {"shard": "auto", "shard_count": 4}, (3, 4)),
        ({**SLURM, **INDEX}, {"shard": "auto"}, (5, 8)),
    ],
)
def test_where_a_shard_comes_from(
    environment: dict[str, str],
    stated: dict[str, object],
    part: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for flags in (MediaFlags, SampleFlags, ReconstructFlags):
        assert flags.parse(stated).part == part


@pytest.mark.parametrize(
    ("environment", "stated", "words"),
    [
        ({}, {"shard": "4/4"}, "4/4 3/4"),
        ({}, {"shard": "0/0"}, "0/0 I/N"),
        ({}, {"shard": "-1/4"}, "-1/4 I/N"),
        ({}, {"shard": "1"}, "I/N auto"),
        ({}, {"shard": "1/2/3"}, "1/2/3 I/N"),
        ({}, {"shard": ""}, "I/N auto"),
        ({}, {"shard": "auto"}, "SLURM_PROCID SLURM_NTASKS JOB_COMPLETION_INDEX shard_count"),
        ({"SLURM_PROCID": "1"}, {"shard": "auto"}, "SLURM_NTASKS"),
        (INDEX, {"shard": "auto"}, "JOB_COMPLETION_INDEX shard_count"),
        (INDEX, {"shard": "auto", "shard_count": 3}, "auto 3/3 2/3"),
        ({}, {"shard_count": 3}, "shard_count 3 auto"),
        ({}, {"shard": "0/3", "shard_count": 3}, "shard_count 3 auto"),
    ],
)
def test_wrong_shards_are_refused(
    environment: dict[str, str],
    stated: dict[str, object],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as refused:
        BatchFlags.parse(stated)
    check_mentions(str(refused.value), words)


def test_shards_cover_a_batch(base: Make, image: Path, tmp_path: Path) -> None:
    lines = [{"visual_input": str(image)}] * 5
    batch = write_lines(tmp_path / "batch.jsonl", *lines)
    words = ("--batch_input_path", batch, "--input_type", "image", "--resume", "--batch_size", 2)
    seen: set[str] = set()
    for index in (2, 0, 1):  # in any order: what is finished does not shift the others' lines
        result = base(*words, "--shard", f"{index}/3")
        assert result.exit_code == 0, result.stderr
        made = {name for name in files_in(tmp_path / "out") if name.endswith(".mp4")}
        assert made - seen == {f"{line}.mp4" for line in range(index, 5, 3)}
        seen = made
    assert "5 of 5 videos" in base(*words).stdout.splitlines()[-1]
    result = base(*words, "--shard", "5/6")
    assert result.exit_code == 0
    check_mentions(result.stdout, "5/6 none 5")


def test_every_shard_checks_all_lines(base: Make, image: Path, tmp_path: Path) -> None:
    lines = [{"visual_input": name} for name in (str(image), "absent.mp4", str(image))]
    batch = write_lines(tmp_path / "batch.jsonl", *lines)
    result = base("--batch_input_path", batch, "--input_type", "image", "--shard", "0/2")
    check_refused(result, "absent.mp4 line 2", tmp_path)


def test_a_single_input_has_no_shards(text2world: Make, tmp_path: Path) -> None:
    check_refused(text2world("--prompt", "rain", "--shard", "0/2"), "--shard 0/2", tmp_path)
    lines = write_lines(tmp_path / "batch.jsonl", {"prompt": "rain"})
    result = text2world("--batch_input_path", lines, "--shard", "1/2")
    assert result.exit_code == 0, result.stderr
    check_mentions(result.stdout, "1/2 none 1")


def test_samples_have_shards(run: Run, tmp_path: Path) -> None:
    sample = {"inference_type": "text2world", "prompt": "rain", "num_output_frames": 5}
    samples = [{**sample, "name": name, "resolution": "32,48"} for name in ("a", "b")]
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    words = ("--model", "tiny-Cosmos-Predict2.5-2B", "-i", tmp_path / "samples.json", "-o")
    result = run("predict2.5", *words, tmp_path / "out", "--num_steps", 1, "--shard", "1/2")
    assert result.exit_code == 0, result.stderr
    assert files_in(tmp_path / "out") == {"b.mp4", "b.json", "b.txt"}


def test_files_of_a_tokenizer_have_shards(run: Run, image: Path, tmp_path: Path) -> None:
    assert "shard" in EncodeFlags.model_fields
    media = tmp_path / "media"
    media.mkdir()
    for name in "abc":
        shutil.copy(image, media / f"{name}.png")
    words = ("--tokenizer_dir", "tiny-Cosmos-Tokenize1-DV8x16x16-720p", "--output_dir")
    result = run("tokenize", "encode", media, *words, tmp_path / "out", "--shard", "0/2")
    assert result.exit_code == 0, result.stderr
    assert files_in(tmp_path / "out") == {"a.safetensors", "c.safetensors"}
