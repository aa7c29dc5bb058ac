"""Run `worldline autoregressive` at full size with random weights, as a user would.

    python benchmarks/ar_end_to_end.py --clip in.mp4 --weights checkpoints --model 4B \
        --output benchmarks/results/ar_end_to_end_4b.json

9 frames given of 33, 640 x 1024. Weights are drawn on the GPU and saved in the official layout
(flat `model.pt` files, the discrete tokenizer's as a training checkpoint), then read by the command
from the page cache. Each run is a process of its own; "first_token" counts from its start,
"run_seconds" from after loading. Video2World models run T5, or are given its output
(`--embeddings`). The model `tiny` (or `tiny-Video2World`) tries the script on a CPU.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from full_size import (
    CONTINUOUS,
    COPY_RATE,
    GEMM_FLOPS,
    T5,
    flops,
    planned_bytes,
    run_command,
    write_continuous,
    write_dit,
    write_embeddings,
    write_network,
    write_text,
)

from tiny.export import cosmos_tensors, draw_weights
from worldline.catalog import DECODERS
from worldline.families.autoregressive.model import PRESETS as TRANSFORMERS
from worldline.families.autoregressive.model import ARTransformer, ARTransformerConfig
from worldline.families.autoregressive.weights import KEYS, settings_of
from worldline.families.diffusion.model import DECODER_WINDOW, DiTConfig
from worldline.families.diffusion.model import PRESETS as DIFFUSION
from worldline.shapes import LatentShape
from worldline.tokenizers.cosmos.model import PRESETS as TOKENIZERS
from worldline.tokenizers.cosmos.model import CosmosTokenizer, CosmosTokenizerConfig
from worldline.weights.checkpoint import save

DISCRETE = "Cosmos-Tokenize1-DV8x16x16-720p"
_TEXT, _TOKENIZER = "--offload_text_encoder_model", "--offload_tokenizer"
_DECODER, _MODEL = "--offload_diffusion_decoder", "--offload_ar_model"
_PLAIN = "--disable_diffusion_decoder"
# guardrails are off in all of them, as in the last rows of the released tables; flags of a text
# encoder are left out where there is none
VARIANTS = {
    "tokenizer_alone": [_PLAIN],
    "tokenizer_alone_offload_tokenizer": [_PLAIN, _TOKENIZER],
    "tokenizer_alone_offload_ar_model": [_PLAIN, _MODEL],
    "tokenizer_alone_offload_both": [_PLAIN, _MODEL, _TOKENIZER],
    "resident": [],
    "offload_text": [_TEXT],
    "offload_text_decoder": [_TEXT, _DECODER],
    "offload_text_decoder_tokenizer": [_TEXT, _DECODER, _TOKENIZER],
    "offload_all": [_TEXT, _DECODER, _TOKENIZER, _MODEL],
    "batch_of_8": [_TEXT],
    "batch_of_8_offload_decoder": [_TEXT, _DECODER],
    "frames_161": [_TEXT, "--num_video_frames", "161"],
}
CLIPS = 8  # of a batch
PUBLISHED = {  # peak GB of the reference with everything offloaded, seconds a clip on one H100
    "4B": {"peak_gb": 18.7, "seconds": 62},
    "5B-Video2World": {"peak_gb": 21.1, "seconds": 73},
    "12B": {"peak_gb": 27.4, "seconds": 119},
    "13B-Video2World": {"peak_gb": 30.9, "seconds": 150},
}
# to try the script
TINY = ARTransformerConfig(
    depth=2,
    width=64,
    num_heads=4,
    num_kv_heads=2,
    head_size=32,
    hidden=96,
    vocabulary=64,
    embedding_rows=64,
    grid=LatentShape(5, 2, 3),
)
TINY_DISCRETE = CosmosTokenizerConfig(
    channels=4,
    level_channels=(8, 8, 8),
    num_blocks=1,
    spatial=16,
    z_channels=4,
    latent_channels=4,
    levels=(4, 4, 2, 2),
)
TINY_T5 = {**T5, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}


def architecture(name: str) -> tuple[ARTransformerConfig, DiTConfig, dict[str, Any]]:
    """Transformer, diffusion decoder and T5 of a model."""
    if not name.startswith("tiny"):
        return TRANSFORMERS[name], DIFFUSION["7B-Decoder"], T5
    config = TINY
    if name != "tiny":
        text = {"context_width": TINY_T5["d_model"], "absolute_positions": True}
        config = replace(TINY, embedding_rows=128, **text)
    small = {"depth": 2, "width": 48, "num_heads": 4, "head_size": 12, "hidden": 96}
    decoder = replace(
        DIFFUSION["7B-Decoder"],
        **small,
        context_width=TINY_T5["d_model"],
        lora_rank=8,
        vocabulary=TINY.vocabulary,
    )
    return config, decoder, TINY_T5


def write_weights(root: Path, name: str, *, with_text: bool, with_decoder: bool = True) -> Path:
    """Write everything that a run reads, in the official layout; return the model's folder.

    Training reads neither the diffusion decoder nor its tokenizer.
    """
    torch.manual_seed(0)
    config, decoder, text = architecture(name)
    small = name.startswith("tiny")
    folder = root / f"Cosmos-Predict1-{name}"
    write_network(folder, ARTransformer, config, KEYS)
    (folder / "config.json").write_text(json.dumps(settings_of(config)))
    discrete = root / DISCRETE
    if not discrete.exists():
        discrete.mkdir(parents=True)
        tokenizer = CosmosTokenizer(TINY_DISCRETE if small else TOKENIZERS["DV8x16x16"])
        draw_weights(tokenizer)
        network = {}
        for half, tensors in cosmos_tensors(tokenizer).items():
            network |= {f"network.{k}": v for k, v in tensors.items() if "quantizer" not in k}
            if small:  # only of released channels is a discrete tokenizer known by the shapes alone
                save(tensors, discrete / f"{half}.safetensors")
        if not small:
            torch.save({"model": network, "iteration": 0}, discrete / "model.pt")
    if not with_decoder:
        return folder
    write_dit(root / DECODERS["Predict1"], decoder)
    if small:  # no tensor holds the stretching, which goes by the width
        (root / DECODERS["Predict1"] / "config.json").write_text(
            json.dumps({"rope_ratio": decoder.rope_ratio})
        )
    context = {"context": torch.randn(1, 512, text["d_model"]).bfloat16()}
    torch.save(
        {**context, "context_mask": torch.ones(1, 512)}, root / DECODERS["Predict1"] / "aux_vars.pt"
    )
    continuous = TOKENIZERS["CV8x8x8"]
    if small:
        continuous = replace(continuous, channels=4, level_channels=(8, 8, 8), num_blocks=1)
    write_continuous(root, continuous)
    if config.context_width is not None and with_text:
        write_text(root, text)
    write_embeddings(root, text["d_model"])
    return folder


def step_bytes(config: ARTransformerConfig) -> float:
    """Bytes that a token of one clip reads in the mean, of bf16 weights and cache."""
    with torch.device("meta"):
        model = ARTransformer(config)
    # a step reads no embedding table, and no weights of a text's keys and values
    unread = ("embedding.weight", "cross_attention.k.weight", "cross_attention.v.weight")
    read = sum(p.numel() for n, p in model.named_parameters() if not n.endswith(unread))
    drawn = config.grid.tokens - 2 * config.grid.tokens_per_frame
    visible = config.grid.tokens - drawn / 2
    return 2 * (read + 2 * config.depth * config.num_kv_heads * config.head_size * visible)


def name_as_cosmos_1(root: Path, folder: Path) -> Path:
    """Let the first generation's names lead to the same files; return its model's folder."""
    old = f"Cosmos-1.0-Autoregressive-{folder.name.removeprefix('Cosmos-Predict1-')}"
    links = {
        old: folder.name,
        DECODERS["1.0"]: DECODERS["Predict1"],
        "Cosmos-1.0-Tokenizer-DV8x16x16": DISCRETE,
        "Cosmos-1.0-Tokenizer-CV8x8x8": CONTINUOUS,
    }
    for link, target in links.items():
        if not (root / link).exists():
            (root / link).symlink_to(target, target_is_directory=True)
    return root / old


def run(
    folder: Path, clip: Path, flags: list[str], prompt: list[str], clips: int, out: Path
) -> dict[str, Any]:
    """Figures of the reports of a command that runs in a fresh process."""
    command = "video2world" if prompt else "base"
    words = ["autoregressive", command, "--checkpoint_dir", str(folder.parent)]
    words += ["--ar_model_dir", folder.name, "--disable_guardrail", *flags]
    name = "output"
    if clips > 1:
        line: dict[str, str] = {"visual_input": str(clip.absolute())}
        if prompt[:1] == ["--prompt"]:
            line["prompt"] = prompt[1]
        lines = out / "batch.jsonl"
        lines.write_text("\n".join([json.dumps(line)] * clips))
        words += ["--batch_input_path", str(lines)]
        words += prompt if prompt[:1] == ["--prompt_embeddings"] else []
        name = str(clips - 1)
    else:
        words += ["--input_image_or_video_path", str(clip), *prompt]
    report, started = run_command(words, out, name)
    seconds = time.time() - started
    stages = {stage["name"]: stage for stage in report["run"]["stages"]}
    reports = [report]
    if clips > 1:
        reports = [json.loads((out / f"{n}.json").read_text()) for n in range(clips)]
    at_once = report["clips_at_once"]
    drawn = stages["tokens"]["seconds"] / (report["tokens"] - 1) * 1e3
    last = max(stage["ended"] for each in reports for stage in each["run"]["stages"])
    begun = min(each["load"]["stages"][-1]["ended"] for each in reports)
    return {
        "process_seconds": round(seconds, 2),
        "first_token_seconds": round(stages["prefill"]["ended"] - started, 2),
        "run_seconds": round(last - begun, 2),
        "clips": clips,
        "clips_at_once": at_once,
        "run_seconds_a_clip": round((last - begun) / clips, 2),
        "ms_a_step": round(drawn, 4),
        "peak_reserved_gb": max(r["run"]["peak_gb"] for r in (*reports, {"run": report["load"]})),
        "load": report["load"]["stages"],
        "stages_of_the_last_clip": report["run"]["stages"],
        "decoder": report["decoder"],
        "diffusion_decoder": report["diffusion_decoder"],
    }


@click.command()
@click.option("--clip", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--weights", type=click.Path(path_type=Path), required=True)
@click.option(
    "--model",
    "name",
    default="4B",
    type=click.Choice([*TRANSFORMERS, "tiny", "tiny-Video2World"]),
)
@click.option("--variant", "variants", multiple=True, type=click.Choice(list(VARIANTS)))
@click.option("--text/--embeddings", "with_text", default=True, help="Run T5, or give its output.")
@click.option("--cosmos_1", is_flag=True, help="Under the first generation's names.")
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--commit", default="")
def main(
    clip: Path,
    weights: Path,
    name: str,
    variants: tuple[str, ...],
    with_text: bool,
    cosmos_1: bool,
    output: Path,
    commit: str,
) -> None:
    """Measure the chosen variants (all by default) and write a JSON file."""
    started = time.time()
    folder = write_weights(weights, name, with_text=with_text)
    if cosmos_1:
        folder = name_as_cosmos_1(weights, folder)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.empty_cache()
    print(f"weights written in {time.time() - started:.0f} s", flush=True)
    config, decoder, _ = architecture(name)
    video2world = config.context_width is not None
    discrete, continuous = TOKENIZERS["DV8x16x16"], TOKENIZERS["CV8x8x8"]
    finer = discrete.spatial // continuous.spatial
    window = LatentShape(DECODER_WINDOW, config.grid.height * finer, config.grid.width * finer)
    forward = flops(decoder, window)
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "torch": torch.__version__,
        "commit": commit,
        "model": f"{folder.name}, random weights",
        "clip": "9 frames given of 33",
        "tokens": config.grid.tokens - 2 * config.grid.tokens_per_frame,
        "text": None,
        "bound_ms_a_step": round(step_bytes(config) / COPY_RATE * 1e3, 4),
        "bound_seconds_of_the_diffusion_decoder": round(30 * forward / GEMM_FLOPS, 2),
        "published": PUBLISHED.get(name),
        "runs": {},
    }
    if video2world:
        result["text"] = "T5-11B encoder, bf16" if with_text else "embeddings given"
    for variant in variants or VARIANTS:
        flags = [f for f in VARIANTS[variant] if f != _TEXT or (video2world and with_text)]
        prompt = ["--prompt", f"A robot arm pours water, {variant}."] if video2world else []
        if video2world and not with_text:
            prompt = ["--prompt_embeddings", str(weights / "embeddings.safetensors")]
        clips = CLIPS if variant.startswith("batch") else 1
        with tempfile.TemporaryDirectory() as out:
            measured = run(folder, clip, flags, prompt, clips, Path(out))
        [planned] = planned_bytes(folder.name, weights, flags)
        measured["planned_gb_of_a_clip"] = round(planned / 1e9, 3)
        result["runs"][variant] = measured
        print(variant, json.dumps(measured), flush=True)
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
