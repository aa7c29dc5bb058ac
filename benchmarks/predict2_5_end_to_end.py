"""Run `worldline predict2.5` at full size with random weights, as a user would.

    python benchmarks/predict2_5_end_to_end.py --weights checkpoints --model 2B \
        --output benchmarks/results/predict2_5_end_to_end_2b.json

93 frames of 704 x 1280 from a prompt, from an image, and from the last 5 frames of a video. Weights
(transformer, Wan2.1 tokenizer, the 7B Reason1 encoder) are drawn on the GPU and saved in the
official names and layouts, then read by the command from the page cache. Neither time nor memory
depends on their values. Each run is a process of its own. The three modes make `--steps` with all
parts resident; runs that differ in their offload flags alone make `--few` of video2world. Runs that
`--output` holds already are kept. The model `tiny` tries the script on a CPU.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from full_size import GEMM_FLOPS, ROWS, fill, flops, planned_bytes, run_command
from numpy.typing import NDArray
from PIL import Image

from tiny.encoders import REASON1 as TINY
from tiny.encoders import byte_chat_tokenizer, export_reason1
from tiny.export import dit_tensors, draw_weights, stored_tensors
from worldline.catalog import FLOW_MODELS
from worldline.families.predict2_5.model import PRESETS, FlowDiT, FlowDiTConfig
from worldline.shapes import VideoShape
from worldline.text.reason1 import RELEASED, Reason1Encoder
from worldline.tokenizers.wan.model import WanTokenizer, WanTokenizerConfig
from worldline.tokenizers.wan.weights import key_map
from worldline.video.write import write_video
from worldline.weights.checkpoint import save

REASON1 = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
CLIP = VideoShape(93, 704, 1280)
TOKENIZER = WanTokenizerConfig()
# to try the script
TINY_CLIP = VideoShape(9, 32, 48)
TINY_TOKENIZER = WanTokenizerConfig(channels=4, multipliers=(1, 1, 2, 2), num_blocks=1)
TINY_MODEL = FlowDiTConfig(
    depth=2,
    width=48,
    num_heads=2,
    head_size=24,
    hidden=96,
    context_width=16,
    lora_rank=8,
    feature_width=TINY["hidden_size"] * TINY["num_hidden_layers"],
)
_TEXT, _TOKENIZER = "--offload_text_encoder", "--offload_tokenizer"
_MODEL = "--offload_diffusion_model"
MODES = {"text2world": None, "image2world": "in.png", "video2world": "in.mp4"}
OFFLOADED = {
    "resident": [],
    "offload_text": [_TEXT],
    "offload_text_tokenizer": [_TEXT, _TOKENIZER],
    "offload_all": [_TEXT, _TOKENIZER, _MODEL],
}
PUBLISHED = {  # of the same shape: seconds of denoising of the predecessor on one H200
    "predecessor_denoise_seconds": 221.7,
    "reference_peak_gb_of_video2world": 32.6,
}


def write_weights(root: Path, size: str, *, with_text: bool) -> None:
    """Write everything that a run of this size reads."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    [model] = (model for model in FLOW_MODELS if model.name == _name(size))
    tiny = size == "tiny"
    file = root / model.repository / model.file
    if not file.exists():
        with torch.device("meta"):
            transformer = FlowDiT(TINY_MODEL if tiny else PRESETS[size])
        fill(transformer, device)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({n: t.cpu() for n, t in dit_tensors(transformer).items()}, file)
        del transformer
    file = root / "nvidia" / "Cosmos-Predict2.5-2B" / "tokenizer.pth"
    if not file.exists():
        tokenizer = WanTokenizer(TINY_TOKENIZER if tiny else TOKENIZER)
        draw_weights(tokenizer)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(stored_tensors(tokenizer, key_map(tokenizer.config)), file)
    if with_text and not (root / RELEASED).exists():
        with torch.device("meta"):
            encoder = Reason1Encoder(TINY if tiny else REASON1, byte_chat_tokenizer(), ROWS)
        fill(encoder.network, device)
        export_reason1(encoder.cpu(), root / RELEASED)
    file = root / "embeddings.safetensors"
    if not file.exists():
        width = TINY_MODEL.feature_width if tiny else PRESETS[size].feature_width
        names = ("prompt", "negative_prompt")
        save({name: torch.randn(ROWS, width).bfloat16() for name in names}, file)


def _name(size: str) -> str:
    return f"{'2B' if size == 'tiny' else size}/post-trained"


def write_inputs(folder: Path, clip: VideoShape) -> None:
    """Write an image and a video of colours that drift, of the size that is made."""
    sides = (range(9), range(clip.height), range(clip.width))
    t, y, x = np.meshgrid(*map(np.array, sides), indexing="ij")
    frames: NDArray[np.uint8]
    frames = np.stack(((x + 4 * t) % 256, (y + 2 * t) % 256, (x + y) % 256), -1).astype(np.uint8)
    Image.fromarray(frames[0]).save(folder / "in.png")
    write_video(frames, folder / "in.mp4", 16)


def write_sample(folder: Path, mode: str, name: str, steps: int, clip: VideoShape) -> Path:
    """Write the file of one sample."""
    sample: dict[str, Any] = {
        "name": name,
        "inference_type": mode,
        "prompt": f"A robot arm pours water into a glass, {name}.",
        "num_steps": steps,
        "num_output_frames": clip.frames,
        "resolution": f"{clip.height},{clip.width}",
    }
    if MODES[mode]:
        sample["input_path"] = MODES[mode]
    path = folder / "sample.json"
    path.write_text(json.dumps(sample))
    return path


def run(
    root: Path, size: str, mode: str, flags: list[str], steps: int, clip: VideoShape
) -> dict[str, Any]:
    """Figures of the report of a command that runs in a fresh process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, clip)
        sample = write_sample(folder, mode, "clip", steps, clip)
        words = ["predict2.5", "--checkpoint_dir", str(root), "--model", _name(size)]
        words += ["-i", str(sample), "--disable_guardrails", *flags]
        report, started = run_command(words, folder / "out", "clip", flag="--output_dir")
        seconds = time.time() - started
    stages = {stage["name"]: stage["seconds"] for stage in report["run"]["stages"]}
    guided = 2 * report["evaluations"]
    return {
        "mode": mode,
        "flags": flags,
        "steps": steps,
        "forwards": guided,
        "process_seconds": round(seconds, 2),
        "run_seconds": report["run"]["seconds"],
        "peak_reserved_gb": max(report["run"]["peak_gb"], report["load"]["peak_gb"]),
        "load": report["load"]["stages"],
        "stages": report["run"]["stages"],
        "seconds_a_forward": round(stages["denoise"] / guided, 4),
        "attention": report["attention"],
        "tokens": report["tokens"],
    }


def plan(root: Path, size: str, flags: list[str], clip: VideoShape) -> float | None:
    """GB that worldline plans for with these flags; None without a GPU."""
    if not torch.cuda.is_available() or clip != CLIP:
        return None
    return planned_bytes(_name(size), root, flags)[0] / 1e9


def work(modes: tuple[str, ...], variants: tuple[str, ...]) -> dict[str, tuple[str, list[str]]]:
    """The runs: name -> mode and flags; those of `--steps` come first."""
    found: dict[str, tuple[str, list[str]]] = {mode: (mode, []) for mode in modes or MODES}
    for variant in variants or OFFLOADED:
        found[f"few_{variant}"] = ("video2world", OFFLOADED.get(variant, []))
    found.pop("none", None)
    found.pop("few_none", None)
    return found


@click.command()
@click.option("--weights", type=click.Path(path_type=Path), required=True)
@click.option("--model", "size", default="2B", type=click.Choice([*PRESETS, "tiny"]))
@click.option("--mode", "modes", multiple=True, type=click.Choice([*MODES, "none"]))
@click.option("--variant", "variants", multiple=True, type=click.Choice([*OFFLOADED, "none"]))
@click.option("--steps", default=35, help="Of the modes.")
@click.option("--few", default=1, help="Of the offload variants.")
@click.option("--text/--embeddings", "with_text", default=True, help="Run Reason1, or not.")
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--commit", default="")
def main(
    weights: Path,
    size: str,
    modes: tuple[str, ...],
    variants: tuple[str, ...],
    steps: int,
    few: int,
    with_text: bool,
    output: Path,
    commit: str,
) -> None:
    """Measure the chosen modes and variants (all by default) and write a JSON file."""
    tiny = size == "tiny"
    clip = TINY_CLIP if tiny else CLIP
    started = time.time()
    torch.manual_seed(0)
    write_weights(weights, size, with_text=with_text)
    torch.cuda.empty_cache()
    print(f"weights written in {time.time() - started:.0f} s", flush=True)
    tokenizer, model = (TINY_TOKENIZER, TINY_MODEL) if tiny else (TOKENIZER, PRESETS[size])
    bound = flops(model, clip.latent(tokenizer.temporal, tokenizer.spatial)) / GEMM_FLOPS
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "model": f"Cosmos-Predict2.5 {_name(size)}, random weights",
        "clip": f"{clip.frames} frames of {clip.height} x {clip.width}",
        "text": "Reason1 encoder, random weights" if with_text else "embeddings given",
        "bound_seconds_a_forward": round(bound, 3),
        "published": PUBLISHED,
        "runs": {},
    }
    if output.exists():
        result["runs"] = json.loads(output.read_text())["runs"]
    for name, (mode, flags) in work(modes, variants).items():
        if name in result["runs"]:
            continue
        if not with_text:
            flags = [*flags, "--prompt_embeddings", str(weights / "embeddings.safetensors")]
        count = few if name.startswith("few_") else steps
        measured = run(weights, size, mode, flags, count, clip)
        measured["commit"] = commit
        measured["share_of_bound"] = round(bound / measured["seconds_a_forward"], 3)
        if with_text:
            measured["planned_gb"] = plan(weights, size, flags, clip)
        result["runs"][name] = measured
        print(name, json.dumps(measured), flush=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
