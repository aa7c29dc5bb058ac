"""`worldline autoregressive base`: continue clips and images, one or many.

Flags, names and defaults are those of cosmos-predict1 `autoregressive/inference/base.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from worldline.choices import AUTOREGRESSIVE_OFFLOAD_FLAGS, MAX_SEED
from worldline.cli import run

if TYPE_CHECKING:
    from worldline.cli.inputs import Item
    from worldline.loading import AutoregressiveFiles
    from worldline.pipelines.requests import AutoregressiveRequest
    from worldline.world import Step, World

logger = logging.getLogger(__name__)

_INPUTS = ("input_image_or_video_path", "batch_input_path", "input_prompts_path")
_WITHOUT_EFFECT = {
    "offload_guardrail_models": "no guardrail runs",
    "offload_diffusion_decoder": "no diffusion decoder runs",
    "offload_prompt_upsampler": "base models take no prompt, so none is upsampled",
}


@click.group()
def autoregressive() -> None:
    """Run the autoregressive models.

    These are 4B and 12B, of Cosmos 1.0 and of Predict1.
    """


@autoregressive.command()
@click.option(
    "--checkpoint_dir", default="checkpoints", show_default=True, help="Holds the model folders."
)
@click.option(
    "--ar_model_dir",
    default="Cosmos-Predict1-4B",
    show_default=True,
    help="Folder of the model below --checkpoint_dir, a path, or tiny-… for a bundled one; "
    "`worldline models` lists them.",
)
@click.option(
    "--input_type",
    type=click.Choice(["image", "video"]),
    default="video",
    show_default=True,
    help="What all inputs are.",
)
@click.option("--input_image_or_video_path", help="One input: mp4, mov, mkv, webm, gif, png, jpg…")
@click.option(
    "--batch_input_path",
    help='Many inputs: a JSONL with a "visual_input" a line, or a folder of media.',
)
@click.option("--input_prompts_path", help="Another name of --batch_input_path.")
@click.option(
    "--num_input_frames",
    type=click.Choice(["1", "9"]),
    default="9",
    callback=lambda context, parameter, value: int(value),
    show_default=True,
    help="How many of the input's last frames are continued; an image has 1.",
)
@click.option(
    "--temperature",
    type=float,
    default=1.0,
    show_default=True,
    help="How evenly tokens are drawn; 0 takes the likeliest each time.",
)
@click.option(
    "--top_p",
    type=float,
    default=0.8,
    show_default=True,
    help="Draw among the likeliest tokens that together have this probability; made for 4B, use "
    "0.9 for 12B.",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help=f"Of the draws of each clip, 0 to {MAX_SEED}.",
)
@run.with_options(run.output_options())
@click.option(
    "--disable_diffusion_decoder",
    is_flag=True,
    help=f"Decode by the tokenizer alone.  {run.NEEDED_HELP}",
)
@click.option(
    "--disable_guardrail", is_flag=True, help=f"Do not check the video.  {run.NEEDED_HELP}"
)
@click.option(
    "--offload_ar_model",
    is_flag=True,
    help="Keep the transformer in host memory while it is not used.",
)
@click.option(
    "--offload_tokenizer",
    is_flag=True,
    help="Keep the tokenizer in host memory while it is not used.",
)
@click.option("--offload_diffusion_decoder", is_flag=True, help=run.NONE_RUNS_HELP)
@click.option("--offload_guardrail_models", is_flag=True, help=run.NONE_RUNS_HELP)
@click.option(
    "--offload_prompt_upsampler",
    is_flag=True,
    help="Has no effect: base models take no prompt.",
)
@run.with_options(run.machine_options())
@click.pass_context
def base(context: click.Context, /, **flags: Any) -> None:
    """Continue videos or images to 33 frames in all, without a prompt.

    A single video is written to --video_save_folder/--video_save_name.mp4, those of a batch to
    0.mp4, 1.mp4, … by the 0-based line of the JSONL; a JSON report is written beside each.
    """
    run.refuse_several_gpus(flags["num_gpus"])
    source = run.choose_one(
        flags, _INPUTS, "no input: give --input_image_or_video_path or --batch_input_path"
    )
    batch = source != "input_image_or_video_path"
    run.refuse_empty(flags, ("ar_model_dir",))
    _refuse_missing_parts(flags)
    items = _read_inputs(flags[source], flags, batch=batch)
    request = _make_request(flags)
    _log_notes(flags, run.given_flags(context), batch=batch)
    outputs = run.choose_outputs(items, flags, batch=batch)
    resolved = _resolve(flags) if flags["resume"] else {}
    tasks = [
        run.Task(item, request, output, {"input": item.path}, resolved)
        for item, output in zip(items, outputs, strict=True)
    ]
    files = _find_files(flags, request)
    if left := run.left_to_do(tasks, flags, files.identity):
        _run(left, files, flags, batch=batch)


def _refuse_missing_parts(flags: dict[str, Any]) -> None:
    from worldline.catalog import check_parts, is_bundled

    check_parts(
        is_bundled(flags["ar_model_dir"]),
        flags["disable_diffusion_decoder"] or None,
        flags["disable_guardrail"] or None,
    )


def _read_inputs(path: str, flags: dict[str, Any], *, batch: bool) -> list[Item]:
    from worldline.cli.inputs import Fields, read_batch, read_single

    kind = flags["input_type"]
    fields = Fields(kind, 1 if kind == "image" else flags["num_input_frames"])
    return read_batch(path, fields) if batch else [read_single(path, fields)]


def _make_request(flags: dict[str, Any]) -> AutoregressiveRequest:
    from worldline.pipelines.requests import AutoregressiveRequest

    return AutoregressiveRequest(
        num_input_frames=1 if flags["input_type"] == "image" else flags["num_input_frames"],
        temperature=flags["temperature"],
        top_p=flags["top_p"],
        seed=flags["seed"],
    )


def _log_notes(flags: dict[str, Any], given: set[str], *, batch: bool) -> None:
    """Say what was asked for and has no effect, and what to expect of the model."""
    from worldline.catalog import find

    run.log_bundled(flags["ar_model_dir"], given)
    run.log_without_effect(given, _WITHOUT_EFFECT)
    if flags["temperature"] == 0:
        greedy = "temperature 0 draws nothing at random"
        run.log_without_effect(given, dict.fromkeys(("top_p", "seed"), greedy))
    if batch:
        run.log_without_effect(given, run.NUMBERED)
    image = flags["input_type"] == "image"
    if image and "num_input_frames" in given and flags["num_input_frames"] != 1:
        logger.info("--num_input_frames has no effect: an image has 1 frame")
    entry = find(Path(flags["ar_model_dir"]).name)
    if entry and entry.failure_rates and (image or flags["num_input_frames"] == 1):
        one, nine = entry.failure_rates
        if one >= 5:
            logger.warning(
                "from 1 frame about %d %% of the videos of %s fail, from 9 frames %d %% "
                "(published figures)",
                one,
                entry.name,
                nine,
            )


def _find_files(flags: dict[str, Any], request: AutoregressiveRequest) -> AutoregressiveFiles:
    """Find and check the model, and that it has something to make for this request."""
    from worldline.places import find_place

    # told before torch is imported
    place = find_place(flags["ar_model_dir"], flags["checkpoint_dir"])
    from worldline.loading import open_autoregressive
    from worldline.pipelines.autoregressive import check_room

    files = open_autoregressive(place)
    check_room(files.config, files.tokenizer_config, request.num_input_frames)
    return files


def _resolve(flags: dict[str, Any]) -> dict[str, Any]:
    """Return what a report says of what the device decides."""
    from worldline.loading import choose_device, compute_dtype

    return {"dtype": str(compute_dtype(choose_device(flags["device"]))).removeprefix("torch.")}


def _run(
    tasks: Sequence[run.Task], files: AutoregressiveFiles, flags: dict[str, Any], *, batch: bool
) -> None:
    from worldline.world import load_files

    def load() -> World:
        offload = {name: flags[name] for name in AUTOREGRESSIVE_OFFLOAD_FLAGS}
        return load_files(files, device=flags["device"], **offload)

    def stream(world: World, task: run.Task) -> Iterator[Step]:
        assert task.item.path is not None
        options = {"input_type": flags["input_type"], **vars(task.request)}
        return world.stream(task.item.path, **options)

    run.run_tasks(tasks, load, stream, flags, AUTOREGRESSIVE_OFFLOAD_FLAGS, batch=batch)
