"""`worldline autoregressive base`: continue clips and images, one or many.

Flags, names and defaults are those of cosmos-predict1 `autoregressive/inference/base.py`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from worldline.errors import Error, GuardrailRefusal, InputError

if TYPE_CHECKING:
    from worldline.cli.inputs import Item
    from worldline.pipelines.autoregressive import AutoregressiveRequest
    from worldline.world import Step, Video, World

logger = logging.getLogger(__name__)

OFFLOAD_FLAGS = ("offload_tokenizer", "offload_ar_model")
_STAGES = {"encode": "encoding", "tokens": "drawing {total:,} tokens", "decode": "decoding"}


@click.group()
def autoregressive() -> None:
    """Autoregressive world models: 4B and 12B, of Cosmos 1.0 and Predict1."""


@autoregressive.command()
@click.option(
    "--checkpoint_dir", default="checkpoints", show_default=True, help="Holds the model folders."
)
@click.option(
    "--ar_model_dir",
    default="Cosmos-Predict1-4B",
    show_default=True,
    help="Folder of the model below --checkpoint_dir, a path, or tiny-… for a bundled one.",
)
@click.option(
    "--input_type", type=click.Choice(["image", "video"]), default="video", show_default=True
)
@click.option("--input_image_or_video_path", help="One input: mp4, mov, mkv, webm, gif, png, jpg…")
@click.option(
    "--batch_input_path",
    help="Many inputs: a JSONL with a visual_input a line, or a folder of media.",
)
@click.option("--input_prompts_path", help="Another name of --batch_input_path.")
@click.option(
    "--num_input_frames",
    type=int,
    default=9,
    show_default=True,
    metavar="[1|9]",
    help="How many of the input's last frames are continued; an image has 1.",
)
@click.option(
    "--temperature", type=float, default=1.0, show_default=True, help="0 takes the likeliest token."
)
@click.option(
    "--top_p",
    type=float,
    default=0.8,
    show_default=True,
    help="Draw among the likeliest tokens with this mass; made for 4B, use 0.9 for 12B.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draws of each clip.")
@click.option(
    "--video_save_name",
    default="output",
    show_default=True,
    help="Of a single video, without .mp4; .mov .mkv .webm .gif choose another format.",
)
@click.option("--video_save_folder", default="outputs/", show_default=True)
@click.option(
    "--resume", is_flag=True, help="Keep videos that an earlier run made in the same way."
)
@click.option("--disable_diffusion_decoder", is_flag=True, help="Decode by the tokenizer alone.")
@click.option("--disable_guardrail", is_flag=True, help="Do not check the video.")
@click.option("--offload_ar_model", is_flag=True, help="Keep it in host memory while unused.")
@click.option("--offload_tokenizer", is_flag=True, help="Keep it in host memory while unused.")
@click.option("--offload_diffusion_decoder", is_flag=True, help="Accepted; there is none yet.")
@click.option("--offload_guardrail_models", is_flag=True, help="Accepted; there are none yet.")
@click.option("--offload_prompt_upsampler", is_flag=True, help="Accepted; base models have none.")
@click.option("--num_gpus", type=int, default=1, show_default=True, help="1 in this version.")
@click.option("--device", help="cuda, cuda:1, cpu, mps…; by default the GPU, if there is one.")
@click.pass_context
def base(context: click.Context, **flags: Any) -> None:
    """Continue videos or images by 24 or 32 frames, without a prompt.

    A single video is written to --video_save_folder/--video_save_name.mp4, those of a batch to
    0.mp4, 1.mp4, … by the 0-based line of the JSONL; a JSON report is written beside each.
    """
    given = {
        name
        for name in flags
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    _refuse_several_gpus(flags["num_gpus"])
    inputs = _choose_input(flags)
    _refuse_missing_parts(flags)
    items = _read_inputs(inputs, flags)
    request = _make_request(flags)
    _log_notes(flags, given, batch=inputs.batch)
    tasks = _choose_outputs(items, inputs, flags)
    if flags["resume"]:
        tasks = _leave_out_finished(tasks, flags["ar_model_dir"], request)
        if not tasks:
            click.echo(f"nothing left to do in {flags['video_save_folder']}")
            return
    with _memory_advice(flags):
        _run(tasks, request, flags, batch=inputs.batch)


@dataclass(frozen=True)
class Inputs:
    """Where the inputs are named."""

    path: str
    batch: bool


@dataclass(frozen=True)
class Task:
    """One input and the video that it becomes."""

    item: Item
    output: Path


def _refuse_several_gpus(num_gpus: int) -> None:
    processes = os.environ.get("WORLD_SIZE", "1")
    if num_gpus != 1:
        raise InputError(f"--num_gpus is {num_gpus}; this version runs on 1")
    if processes != "1":
        raise InputError(
            f"started as {processes} processes (WORLD_SIZE); this version runs on 1 GPU: "
            "start it without torchrun"
        )


def _choose_input(flags: dict[str, Any]) -> Inputs:
    names = ("input_image_or_video_path", "batch_input_path", "input_prompts_path")
    named = [name for name in names if flags[name] is not None]
    if not named:
        raise InputError("no input: give --input_image_or_video_path or --batch_input_path")
    if len(named) > 1:
        raise InputError(f"--{' and --'.join(named)} exclude each other: give one")
    path = flags[named[0]]
    if not path:
        raise InputError(f"--{named[0]} is empty")
    return Inputs(path, batch=named[0] != "input_image_or_video_path")


def _refuse_missing_parts(flags: dict[str, Any]) -> None:
    from worldline.catalog import BUNDLED_PREFIX
    from worldline.parts import check_parts

    check_parts(
        flags["ar_model_dir"].startswith(BUNDLED_PREFIX),
        flags["disable_diffusion_decoder"] or None,
        flags["disable_guardrail"] or None,
    )


def _read_inputs(inputs: Inputs, flags: dict[str, Any]) -> list[Item]:
    from worldline.cli.inputs import read_batch, read_single

    kind = flags["input_type"]
    frames = 1 if kind == "image" else flags["num_input_frames"]
    if inputs.batch:
        return read_batch(inputs.path, kind, frames)
    return [read_single(inputs.path, kind, frames)]


def _make_request(flags: dict[str, Any]) -> AutoregressiveRequest:
    from worldline.pipelines.autoregressive import AutoregressiveRequest

    return AutoregressiveRequest(
        num_input_frames=1 if flags["input_type"] == "image" else flags["num_input_frames"],
        temperature=flags["temperature"],
        top_p=flags["top_p"],
        seed=flags["seed"],
    )
