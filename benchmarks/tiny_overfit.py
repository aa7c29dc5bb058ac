"""Overfit a tiny autoregressive world on ten real clips, and continue them.

    python -m benchmarks.tiny_overfit --assets ../shared/assets --output overfit.json \
        --sheet overfit.png

The first 33 frames of the ten longest videos below --assets, at 128 x 192. The bundled discrete
tokenizer is trained on to reconstruct them, since it has seen generated clips alone, or with
--tokenizer_width a new one that is as many times as wide; then `worldline train` trains all weights
of the bundled world on their tokens, and the checkpoint continues each clip from 9 frames,
greedily. What the tokenizer itself loses bounds the result.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import worldline
from benchmarks.tiny_quality import GIVEN, psnr, quartiles, reconstructed
from benchmarks.tiny_runs import Frames, command, losses, report, thinned
from tiny import sizes
from tiny.clips import ClipPool
from tiny.reconstruction import train_reconstruction
from tiny.run import Run
from tiny.tokenizer import export_tokenizer
from worldline.files import digest
from worldline.losses import ReconstructionObjective
from worldline.tokenizers.cosmos.model import CosmosTokenizer
from worldline.tokenizers.cosmos.weights import open_tokenizer
from worldline.train.data.frames import Transform
from worldline.train.data.videos import measure
from worldline.video.read import read_frames
from worldline.video.write import write_video

BUNDLED = Path(worldline.__file__).parent / "bundled"
MODEL, TOKENIZER = "Cosmos-Predict1-4B", "Cosmos-Tokenize1-DV8x16x16-720p"
CLIPS = 10
FPS = 24
RATE = 1.5e-3  # peak, of the tokenizer


def longest_clips(folder: Path) -> dict[str, Frames]:
    """Name and first 33 frames of the ten longest videos below a folder, at the worlds' size."""
    shape = sizes.SHAPE
    paths = sorted(folder.rglob("*.mp4"))
    lengths = {path: getattr(video, "frames", 0) for path, video in measure(paths).items()}
    longest = sorted(paths, key=lambda path: (-lengths[path], path))
    different = {digest(path): path for path in reversed(longest)}  # some are there twice
    chosen = [path for path in longest if path in different.values()][:CLIPS]
    transform = Transform(shape.height, shape.width, largest_scale=8)
    clips = {}
    for path in chosen:
        frames = [transform(frame) for frame in read_frames(path, range(shape.frames))]
        name = "-".join(path.relative_to(folder).with_suffix("").parts)
        clips[name] = torch.stack(frames).permute(0, 2, 3, 1).numpy()
    return clips


def train_tokenizer(clips: dict[str, Frames], folder: Path, run: Run, width: int) -> int:
    """Train a tokenizer on the clips alone, write it; the number of steps done."""
    torch.manual_seed(0)
    own = sizes.TOKENIZER
    levels = tuple(width * channels for channels in own.level_channels)
    config = replace(own, channels=width * own.channels, level_channels=levels)
    stored = open_tokenizer(BUNDLED / TOKENIZER) if width == 1 else None
    model = run.network(CosmosTokenizer, config, stored)
    frames = torch.from_numpy(np.stack([*clips.values()])).to(run.device)
    pool = ClipPool(iter([(frames, [*clips])]), len(frames), sizes.SHAPE)
    done = train_reconstruction(run, model, ReconstructionObjective(), pool=pool)
    export_tokenizer(model, folder)
    return done


@click.command()
@click.option("--assets", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--tokenizer_steps", default=6000, show_default=True)
@click.option("--tokenizer_width", default=1, show_default=True)
@click.option("--tokenizer_batch", default=10, show_default=True)
@click.option("--steps", default=600, show_default=True, help="Of the world.")
@click.option("--rate", default=1e-3, show_default=True, help="Peak, of the world.")
@click.option("--words", default="", help="Further KEY=VALUE of the world's run.")
@click.option("--compile", "compiled", is_flag=True, help="Compile the tokenizer.")
@click.option("--graph", "graphed", is_flag=True, help="One CUDA graph a step of the tokenizer.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to keep all files.")
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--sheet", type=click.Path(path_type=Path), help="A PNG of all clips.")
def main(
    assets: Path,
    tokenizer_steps: int,
    tokenizer_width: int,
    tokenizer_batch: int,
    steps: int,
    rate: float,
    folder: Path | None,
    output: Path,
    sheet: Path | None,
    **options: Any,
) -> None:
    """Train, continue, print, and write a JSON file."""
    folder = folder or Path(tempfile.mkdtemp())
    clips = longest_clips(assets)
    root, device = folder / "models", str(options["device"])
    for name, frames in clips.items():
        write_video(frames, folder / "clips" / f"{name}.mp4", FPS, crf=8)
    shutil.copytree(BUNDLED / MODEL, root / MODEL, dirs_exist_ok=True)
    began = time.perf_counter()
    flags = {name: options[name] for name in ("compiled", "graphed")}
    training = Run(
        folder=folder / "tokenizer",
        steps=tokenizer_steps,
        batch=tokenizer_batch,
        rate=RATE,
        device=device,
        **flags,
    )
    train_tokenizer(clips, root / TOKENIZER, training, tokenizer_width)
    seconds = [time.perf_counter() - began]
    log = command(
        *("train", MODEL, "--checkpoint_dir", str(root), "--videos", str(folder / "clips")),
        *("--max_steps", str(steps), "--learning_rate", str(rate), "--device", device),
        *("--name", "overfit", "--", f"data.batch_size={CLIPS}", "trainer.logging_iter=20"),
        *(
            f"data.cache_dir={folder / 'cache'}",
            "checkpoint.save_state=false",
            "trainer.sample_iter=0",
        ),
        *options["words"].split(),
        folder=folder,
    )
    seconds.append(time.perf_counter() - began - seconds[0])
    learned = losses(log)
    world = worldline.load(
        log.parent / f"iter_{steps:09}.pt",
        checkpoint_dir=str(root),
        device=device,
        disable_guardrail=True,
        disable_diffusion_decoder=True,
    )
    figures: dict[str, list[float]] = {"reconstruction": [], "repeat": [], "continued": []}
    rows: list[tuple[Frames, str]] = []
    for name, truth in clips.items():
        video = world.generate(truth[:GIVEN], num_input_frames=GIVEN, temperature=0.0).frames
        still = np.broadcast_to(truth[GIVEN - 1], truth[GIVEN:].shape).copy()
        target = truth[GIVEN:]
        figures["reconstruction"].append(psnr(reconstructed(world, truth)[GIVEN:], target))
        figures["repeat"].append(psnr(still, target))
        figures["continued"].append(psnr(video[GIVEN:], target))
        rows += [(truth, f"truth: {name}"), (video, f"{figures['continued'][-1]:.2f} dB")]
        print(name, {n: round(v[-1], 2) for n, v in figures.items()}, flush=True)
    result = {
        "model": f"tiny-{MODEL}",
        "torch": torch.__version__,
        "device": str(world.device),
        "clips": [*clips],
        "frames_given": GIVEN,
        "tokenizer_width": tokenizer_width,
        "tokenizer_steps": tokenizer_steps,
        "steps": steps,
        "seconds": [round(each, 1) for each in seconds],
        "losses": thinned(learned),
        "last_loss": [*learned.values()][-1],
        "psnr_db": {name: quartiles(values) for name, values in figures.items()},
    }
    report(result, rows, output, sheet)


if __name__ == "__main__":
    main()
