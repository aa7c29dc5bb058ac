"""A command on two processes makes the videos that it makes on one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from worldline.video.read import read_video

from .conftest import run_words
from .results import write_lines


@pytest.mark.slow
def test_samples(tiny_predict2_5: Path, clip: Path, image: Path, tmp_path: Path) -> None:
    ring, halves = "ring attention over 2 processes", "guidance halves"
    samples = (
        ("text2world", {"guidance": 0}, ring),
        ("image2world", {"guidance": 2, "input_path": str(image)}, halves),
        ("video2world", {"guidance": 3, "input_path": str(clip)}, halves),
    )
    lines = (
        {"name": kind, "inference_type": kind, "prompt": "a ball", **fields}
        for kind, fields, _ in samples
    )
    file = write_lines(tmp_path / "samples.jsonl", *lines)
    words = ("predict2.5", "-i", file, "--checkpoint_dir", tiny_predict2_5, "--disable_guardrails")
    words += ("--resolution", "32,80", "--num_output_frames", 9, "--num_steps", 2, "--lossless")
    assert run_words((*words, "-o", tmp_path / "one")).exit_code == 0
    words += ("-o", tmp_path / "two", "--device", "cpu", "--context_parallel_size", 2)
    words += ("--guidance_parallel", "on", "--context_parallel", "ring")
    subprocess.run([sys.executable, "-m", "worldline", *map(str, words)], check=True)
    for kind, _, way in samples:
        one, two = (read_video(tmp_path / n / f"{kind}.mp4").frames for n in ("one", "two"))
        assert np.abs(one.astype(int) - two).max() <= 2
        report = json.loads((tmp_path / "two" / f"{kind}.json").read_text())
        assert report["attention"] == f"torch SDPA, {way}"
