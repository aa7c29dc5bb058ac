"""What the benchmarks of full-size models share: released sizes, the work, random weights.

Neither time nor memory depends on the values of weights. They are drawn on the GPU, if there is
one; checkpoints of them have the official names and layouts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiny.export import cosmos_tensors, draw_weights
from worldline.families.diffusion.model import DiT, DiTConfig
from worldline.families.diffusion.weights import KEYS
from worldline.family import Compute
from worldline.locate import locate
from worldline.nn.dit import DiTSizes
from worldline.nn.modulation import fused
from worldline.opening import open_world, plan
from worldline.parallel.mesh import Mesh, plan_mesh
from worldline.shapes import LatentShape
from worldline.tokenizers.cosmos.model import CosmosTokenizer, CosmosTokenizerConfig
from worldline.weights.checkpoint import save
from worldline.weights.keymap import KeyMap

GRID = LatentShape(16, 88, 160)  # of 121 frames of 704 x 1280: 56,320 tokens
ROWS = 512  # of the text
GEMM_FLOPS = 790e12  # a second: measured best of large bf16 products on an H200
COPY_RATE = 4.3e12  # bytes a second that an H200 moves
CONTINUOUS = "Cosmos-Tokenize1-CV8x8x8-720p"
TEXT = "google-t5/t5-11b"
T5 = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "d_model": 1024,
    "d_kv": 128,
    "d_ff": 65536,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "num_heads": 128,
    "vocab_size": 32128,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "feed_forward_proj": "relu",
    "layer_norm_epsilon": 1e-6,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "is_encoder_decoder": True,
}


def flops(config: DiTSizes, grid: LatentShape = GRID) -> float:
    """Of one forward, two for each multiplication; the context's keys and values left out."""
    return config.flops(grid, ROWS)


def fill(model: nn.Module, device: torch.device) -> None:
    """Give a model of the meta device random bf16 weights on `device`."""
    model.to(torch.bfloat16).to_empty(device=device)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("norm"):
            torch.nn.init.ones_(parameter.data)
        else:
            _scatter(parameter.data)
    model.requires_grad_(False).eval()


def _scatter(value: Tensor) -> None:
    # a little below unit gain, so that activations stay within bf16's reach
    value.normal_(std=0.7 * value.shape[-1] ** -0.5)


def gap(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """The root mean square of the difference over that of the value, and the value's."""
    difference = (ours.float() - theirs.float()).square().mean().sqrt()
    size = theirs.float().square().mean().sqrt()
    return {"relative_rms": float(difference / size), "rms": float(size)}


def draw(module: nn.Module) -> dict[str, Tensor]:
    """Return a bf16 value on the host for every parameter of a module on the meta device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = {}
    for name, parameter in module.named_parameters():
        value = torch.ones(parameter.shape, device=device, dtype=torch.bfloat16)
        if parameter.ndim > 1:
            _scatter(value)
        values[name] = value.cpu()
    return values


def write_network(folder: Path, kind: type[nn.Module], config: object, keys: KeyMap = KEYS) -> None:
    """Write a transformer as `model.pt`, unless it is there."""
    if (folder / "model.pt").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        module = kind(config)
    torch.save({keys.released(n): t for n, t in draw(module).items()}, folder / "model.pt")


def write_dit(folder: Path, config: DiTConfig) -> None:
    """Write a diffusion transformer."""
    write_network(folder, DiT, config)


def write_continuous(root: Path, config: CosmosTokenizerConfig, frames: int = 16) -> None:
    """Write the continuous tokenizer, and statistics of latents that change nothing."""
    folder = root / CONTINUOUS
    if folder.exists():
        return
    folder.mkdir(parents=True)
    tokenizer = CosmosTokenizer(config)
    draw_weights(tokenizer)
    for half, tensors in cosmos_tensors(tokenizer).items():
        save(tensors, folder / f"{half}.safetensors")
    size = config.latent_channels * frames
    torch.save((torch.zeros(size), torch.ones(size)), folder / "mean_std.pt")


def write_text(root: Path, settings: dict[str, Any] = T5) -> None:
    """Write the encoder of T5."""
    folder = root / TEXT
    if folder.exists():
        return
    from transformers import T5Config, T5EncoderModel

    folder.mkdir(parents=True)
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**settings))
    save(draw(encoder), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings))
    # bytes for words: the released vocabulary is not needed to measure
    words = {"tokenizer_class": "ByT5Tokenizer", "model_max_length": ROWS, "extra_ids": 125}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))


def write_embeddings(root: Path, width: int = 1024) -> Path:
    """Write embeddings that take the place of prompts."""
    path = root / "embeddings.safetensors"
    if not path.exists():
        names = ("prompt", "negative_prompt")
        save({name: torch.randn(ROWS, width).bfloat16() for name in names}, path)
    return path


def run_command(
    words: list[str], folder: Path, name: str = "output", flag: str = "--video_save_folder"
) -> tuple[dict[str, Any], float]:
    """Run `worldline` in a fresh process; return the report of a video, and when it began."""
    command = [sys.executable, "-m", "worldline", *words, flag, str(folder)]
    # a cache of its own: each run encodes its prompts
    environment = {**os.environ, "WORLDLINE_CACHE": str(folder.with_suffix("") / "cache")}
    started = time.time()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    report = folder / f"{name}.json" if not folder.suffix else folder.with_suffix(".json")
    return json.loads(report.read_text()), started


def planned_bytes(name: str, root: Path, flags: Sequence[str], processes: int = 1) -> list[int]:
    """Peak bytes that worldline plans for a request of a model, by these flags, in bf16.

    Of the first process that shares the request, and of each other, if there are any.
    """
    switches = ("--offload_", "--disable_diffusion_decoder")
    options: dict[str, Any] = {
        flag.removeprefix("--"): True for flag in flags if flag.startswith(switches)
    }
    given = dict(pairwise(flags))
    for option in ("context_parallel", "guidance_parallel", "fsdp"):
        if value := given.get(f"--{option}"):
            options[option] = value
    opened = open_world(locate(name, root), options)
    fields = {"guidance": float(given["--guidance"])} if "--guidance" in given else {}
    request = opened.family.request.parse({**opened.defaults, **fields})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mesh = Mesh()
    if processes > 1:
        layout = opened.family.layout(opened, [request], processes)
        mesh = plan_mesh(layout)
    compute = Compute(device, torch.bfloat16, torch.bfloat16, fused(device))
    compute = replace(compute, sharded=options.get("fsdp") == "on")
    return [
        plan(opened, [request], replace(compute, mesh=role)).peak(opened.options.offloaded)
        for role in mesh.roles()
    ]
