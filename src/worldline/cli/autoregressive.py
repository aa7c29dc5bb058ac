"""`worldline autoregressive base` and `video2world`: continue clips and images, one or many.

Flags, names and defaults are those of cosmos-predict1 `autoregressive/inference/base.py` and
`video2world.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from worldline.choices import AUTOREGRESSIVE_OFFLOAD_FLAGS, MAX_SEED, ROLLOUTS, SEAMS
from worldline.cli import run
from worldline.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from worldline.cli.inputs import Fields, Item
    from worldline.loading import AutoregressiveFiles
    from worldline.pipelines.requests import AutoregressiveRequest
    from worldline.world import Step, World

logger = logging.getLogger(__name__)

_INPUTS = ("input_image_or_video_path", "batch_input_path", "input_prompts_path")
_PATHS = ("ar_model_dir", "text_encoder_dir", "prompt_embeddings", "guardrail_dir")
_WITHOUT_EFFECT = {
    "offload_prompt_upsampler": "autoregressive models have no prompt upsampler",
}
_WITHOUT_DECODER = dict.fromkeys(
    ("offload_diffusion_decoder", "decoder_seam"), "no diffusion decoder runs"
)
_OF_TEXT = "offload_text_encoder_model"
_OF_PROMPTS = ("prompt", "prompt_embeddings", "text_encoder_dir", "text_encoder_dtype")


def _read_batch_size(_: click.Context, __: click.Parameter, value: str) -> int | None:
    """Return the number, or None for "auto"."""
    if value == "auto":
        return None
    if not value.isdecimal() or not int(value):
        raise click.BadParameter(f"{value} is neither auto nor a number of 1 or more")
    return int(value)


def _options(model: str, likely: str, checked: str) -> run.Option:
    """Return what adds the options that both commands have."""
    options: tuple[run.Option, ...] = (
        click.option(
            "--checkpoint_dir",
            default="checkpoints",
            show_default=True,
            help="Holds the model folders.",
        ),
        click.option(
            "--ar_model_dir",
            default=model,
            show_default=True,
            help="Folder of the model below --checkpoint_dir, a path, or tiny-… for a bundled one; "
            "`worldline models` lists them.",
        ),
        click.option(
            "--input_image_or_video_path", help="One input: mp4, mov, mkv, webm, gif, png, jpg…"
        ),
        click.option(
            "--num_input_frames",
            type=click.Choice(["1", "9"]),
            default="9",
            callback=lambda context, parameter, value: int(value),
            show_default=True,
            help="How many of the input's last frames are continued; an image has 1.",
        ),
        click.option(
            "--temperature",
            type=float,
            default=1.0,
            show_default=True,
            help="How evenly tokens are drawn; 0 takes the likeliest each time.",
        ),
        click.option(
            "--top_p",
            type=float,
            default=0.8,
            show_default=True,
            help=f"Draw among the likeliest tokens that together have this probability; {likely}.",
        ),
        click.option(
            "--seed",
            type=int,
            default=0,
            show_default=True,
            help="Of the draws of each clip, and of the diffusion decoder's noise, 0 to "
            f"{MAX_SEED}.",
        ),
        *run.output_options(),
        click.option(
            "--disable_diffusion_decoder", is_flag=True, help="Decode by the tokenizer alone."
        ),
        click.option(
            "--decoder_seam",
            type=click.Choice(SEAMS),
            default="corrected",
            show_default=True,
            help="How the diffusion decoder joins windows of a clip of more than 57 frames; "
            "as_released repeats a fault of the released code.",
        ),
        click.option(
            "--num_video_frames",
            type=int,
            help="1 + 8k, the given ones included; longer than the model's own, the video goes on "
            "as --rollout says.  [default: the model's own, 33]",
        ),
        click.option(
            "--rollout",
            type=click.Choice(ROLLOUTS),
            default="tokens",
            show_default=True,
            help="Beyond the model's own length: draw on behind the last tokens, or encode the "
            "last frames again, window after window.",
        ),
        click.option(
            "--batch_size",
            default="auto",
            show_default=True,
            callback=_read_batch_size,
            help="How many inputs of a batch are drawn in step, each as it would be alone; auto: "
            "as many as fit into the memory, where that saves time.",
        ),
        *(run.offload_option(name) for name in AUTOREGRESSIVE_OFFLOAD_FLAGS if name != _OF_TEXT),
        *run.guardrail_options(checked),
        click.option(
            "--offload_prompt_upsampler",
            is_flag=True,
            help="Has no effect: these models have none.",
        ),
        *run.machine_options(),
    )
    return run.with_options(options)


@click.group()
def autoregressive() -> None:
    """Run the autoregressive models.

    These are 4B and 12B, which take no prompt, and 5B and 13B Video2World, which need one; of
    Cosmos 1.0 and of Predict1.
    """


@autoregressive.command()
@click.option(
    "--input_type",
    type=click.Choice(["image", "video"]),
    default="video",
    show_default=True,
    help="What all inputs are.",
)
@click.option(
    "--batch_input_path",
    help='Many inputs: a JSONL with a "visual_input" a line, or a folder of media.',
)
@click.option("--input_prompts_path", help="Another name of --batch_input_path.")
@_options("Cosmos-Predict1-4B", "made for 4B, use 0.9 for 12B", "the video")
@click.pass_context
def base(context: click.Context, /, **flags: Any) -> None:
    """Continue videos or images to 33 frames in all, or more, without a prompt.

    A single video is written to --video_save_folder/--video_save_name.mp4, those of a batch to
    0.mp4, 1.mp4, … by the 0-based line of the JSONL; a JSON report is written beside each.
    """
    from worldline.cli.inputs import Fields

    none = {**dict.fromkeys(_OF_PROMPTS), _OF_TEXT: False}
    kind = flags["input_type"]
    fields = Fields(kind, 1 if kind == "image" else flags["num_input_frames"])
    _make_videos(context, {**none, **flags}, fields, kind)


@autoregressive.command()
@click.option(
    "--input_type",
    type=click.Choice(["text_and_image", "text_and_video"]),
    default="text_and_video",
    show_default=True,
)
@click.option("--prompt", help="What the video shows, in a paragraph.")
@click.option(
    "--prompt_embeddings",
    help="A safetensors file of an embedding, in place of the text encoder; --prompt may then be "
    "left out.",
)
@click.option(
    "--batch_input_path", help="Many inputs: a JSONL with a visual_input and a prompt a line."
)
@click.option("--input_prompts_path", help="Another name of --batch_input_path.")
@_options(
    "Cosmos-Predict1-5B-Video2World",
    "the released examples use 0.7 for 5B, 0.8 for 13B",
    "prompt and video",
)
@click.option(
    "--text_encoder_dir",
    help="T5: folder below --checkpoint_dir, or a path.  [default: google-t5/t5-11b]",
)
@click.option(
    "--text_encoder_dtype",
    type=click.Choice(["bfloat16", "float32"]),
    help="Of the weights of T5.  [default: bfloat16 on a GPU, else float32]",
)
@run.offload_option(_OF_TEXT)
@click.pass_context
def video2world(context: click.Context, /, **flags: Any) -> None:
    """Continue videos or images to 33 frames in all, or more, by a prompt.

    A single video is written to --video_save_folder/--video_save_name.mp4, those of a batch to
    0.mp4, 1.mp4, … by the 0-based line of the JSONL; beside each the prompt (.txt) and a report
    (.json).
    """
    from worldline.cli.inputs import Fields

    kind = flags["input_type"].removeprefix("text_and_")
    fields = Fields(
        kind,
        1 if kind == "image" else flags["num_input_frames"],
        prompt="required" if flags["prompt_embeddings"] is None else "optional",
        model="Video2World model",
        example="assets/autoregressive/batch_inputs/video2world.jsonl",
        type_prefix="text_and_",
    )
    _make_videos(context, flags, fields, kind)


def _make_videos(context: click.Context, flags: dict[str, Any], fields: Fields, kind: str) -> None:
    """Check everything, then make what is asked for.

    Args:
        context: of the command.
        flags: of the command; those of prompts are None for one that takes none.
        fields: what it reads of every input.
        kind: "image" or "video".
    """
    from worldline.cli.inputs import read_batch, read_single

    run.refuse_several_gpus(flags["num_gpus"])
    source = run.choose_one(
        flags, _INPUTS, "no input: give --input_image_or_video_path or --batch_input_path"
    )
    batch = source != "input_image_or_video_path"
    run.refuse_empty(flags, _PATHS)
    run.refuse_absent(flags, "prompt_embeddings")
    if batch and flags["prompt"] is not None:
        raise InputError(f"--prompt and --{source} exclude each other: the lines hold the prompts")
    if batch:
        items = read_batch(flags[source], fields)
    else:
        items = [read_single(flags[source], fields, flags["prompt"])]
    requests = [_make_request(item, flags, kind) for item in items]
    given = run.given_flags(context)
    _log_notes(items, flags, given, kind, batch=batch)
    read = [Path(flags[name]) for name in ("prompt_embeddings",) if flags[name]]
    if batch and Path(flags[source]).is_file():
        read.append(Path(flags[source]))
    outputs = run.choose_outputs(items, flags, batch=batch, read=read)
    files = _find_files(flags, requests[0], fields)
    at_length = _idle_at_length(files, requests[0])
    run.log_without_effect(given, at_length)
    resolved = _resolve(files, flags) if flags["resume"] else {}
    idle = {*_idle_flags(flags), *at_length}
    if flags["prompt_embeddings"] is not None:
        idle.update(run.ENCODING)
    tasks = [
        run.Task(
            item,
            request,
            output,
            _files_of(item, flags, fields),
            resolved,
            undeciding=idle,
        )
        for item, request, output in zip(items, requests, outputs, strict=True)
    ]
    if left := run.left_to_do(tasks, flags, files.identity):
        _run(left, files, flags, kind, batch=batch, before=len(tasks) - len(left))


def _make_request(item: Item, flags: dict[str, Any], kind: str) -> AutoregressiveRequest:
    from worldline.pipelines.requests import AutoregressiveRequest

    return AutoregressiveRequest(
        num_input_frames=1 if kind == "image" else flags["num_input_frames"],
        temperature=flags["temperature"],
        top_p=flags["top_p"],
        seed=flags["seed"],
        prompt=item.prompt,
        decoder_seam=flags["decoder_seam"],
        num_video_frames=flags["num_video_frames"],
        rollout=flags["rollout"],
    )


def _decodes(flags: dict[str, Any]) -> bool:
    """Tell whether the diffusion decoder is to run."""
    from worldline.locate import has_decoder

    return not flags["disable_diffusion_decoder"] and has_decoder(flags["ar_model_dir"])


def _log_notes(
    items: list[Item], flags: dict[str, Any], given: set[str], kind: str, *, batch: bool
) -> None:
    """Say what was asked for and has no effect, and what to expect of the model."""
    from worldline.catalog import find

    run.log_bundled(flags["ar_model_dir"], given)
    run.log_guardrails(flags["ar_model_dir"], flags, given)
    run.log_without_effect(given, _WITHOUT_EFFECT)
    run.log_without_effect(given, _idle_flags(flags))
    if batch:
        run.log_without_effect(given, run.NUMBERED)
    else:
        run.log_without_effect(given, {"batch_size": "there is one input"})
    if flags["prompt_embeddings"] is not None:
        unread = ("text_encoder_dir", "text_encoder_dtype", _OF_TEXT)
        run.log_without_effect(given, dict.fromkeys(unread, "embeddings are given"))
        if any(item.prompt is not None for item in items):
            logger.info("prompts are written down alone: the embeddings decide")
    image = kind == "image"
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


def _idle_flags(flags: dict[str, Any]) -> dict[str, str]:
    """Return which flags have no effect beside others, and why."""
    decodes = _decodes(flags)
    idle = {} if decodes else dict(_WITHOUT_DECODER)
    if flags["temperature"] == 0:
        names = ("top_p",) if decodes else ("top_p", "seed")
        idle |= dict.fromkeys(names, "temperature 0 draws nothing at random")
    return idle


def _idle_at_length(files: AutoregressiveFiles, request: AutoregressiveRequest) -> dict[str, str]:
    """Return which flags have no effect on a video of this length, and why."""
    from worldline.models.predict1_dit.model import DECODER_WINDOW
    from worldline.pipelines.autoregressive import video_of
    from worldline.shapes import latent_frames_of

    config, tokenizer = files.config, files.tokenizer_config
    window = config.grid.frames
    latents = latent_frames_of(video_of(config, tokenizer, request).frames, tokenizer.temporal)
    idle = {}
    if latents <= window:
        idle["rollout"] = "the video is as long as the model's own"
    decoded = min(latents, window) if request.rollout == "pixels" else latents
    if files.decoder is not None and decoded <= DECODER_WINDOW:
        idle["decoder_seam"] = "one window of the decoder is enough"
    return idle


def _find_files(
    flags: dict[str, Any], request: AutoregressiveRequest, fields: Fields
) -> AutoregressiveFiles:
    """Find and check the model, and that it can make something of these requests.

    Raises:
        InputError: it cannot.
        CheckpointError: a file is absent or wrong; there is no text encoder, and one is needed.
    """
    from worldline.locate import locate

    # told before torch is imported
    place = locate(flags["ar_model_dir"], flags["checkpoint_dir"])
    if flags["text_encoder_dir"] is not None:
        place.chosen(flags["text_encoder_dir"], "text_encoder_dir")
    from worldline.loading import open_autoregressive
    from worldline.pipelines.autoregressive import check_prompt, check_room
    from worldline.pipelines.prompts import read_prompt_embedding

    files = open_autoregressive(
        place,
        text_encoder_dir=flags["text_encoder_dir"],
        diffusion_decoder=_decodes(flags),
    )
    width = files.config.context_width
    if width is None and fields.prompt != "unused":
        raise InputError(
            f"{files.folder} is a base model, which takes no prompt: use worldline autoregressive "
            "base, or a Video2World model"
        )
    check_room(files.config, files.tokenizer_config, request)
    embedding = None
    if width is not None:
        embedding = read_prompt_embedding(flags["prompt_embeddings"], files.context_length, width)
    try:
        check_prompt(files, request, embedding)
    except CheckpointError as error:
        raise CheckpointError(
            f"{files.why_no_text}; --text_encoder_dir names another; or give --prompt_embeddings"
        ) from error
    return files


def _files_of(item: Item, flags: dict[str, Any], fields: Fields) -> dict[str, Path | None]:
    """Return the files that decide a video beside those of the world, by their role in reports."""
    if fields.prompt == "unused":
        return {"input": item.path}
    embeddings = flags["prompt_embeddings"]
    return {"input": item.path, "prompt_embeddings": Path(embeddings) if embeddings else None}


def _resolve(files: AutoregressiveFiles, flags: dict[str, Any]) -> dict[str, Any]:
    """Return what a report says of what the device and the guardrails decide."""
    from worldline.loading import choose_device, compute_dtype, text_dtype
    from worldline.world.safety import guardrail_release

    dtype = compute_dtype(choose_device(flags["device"]))
    text = None
    if files.text is not None:
        text = flags["text_encoder_dtype"] or str(text_dtype(dtype)).removeprefix("torch.")
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "text_encoder_dtype": text,
        "guardrail": guardrail_release(files, flags["disable_guardrail"] or None),
    }


def _run(
    tasks: Sequence[run.Task],
    files: AutoregressiveFiles,
    flags: dict[str, Any],
    kind: str,
    *,
    batch: bool,
    before: int,
) -> None:
    import torch

    from worldline.loading import (
        check_frames,
        choose_device,
        clips_at_once,
        compute_dtype,
        host_need,
        most_in_step,
        text_dtype,
    )
    from worldline.pipelines.autoregressive import alternates, video_of
    from worldline.world import load_files, load_guards
    from worldline.world.autoregressive import AutoregressiveWorld

    embeddings = flags["prompt_embeddings"]
    # an encoder that is not read needs no memory
    offload_flags = [name for name in files.offload_flags if embeddings is None or name != _OF_TEXT]
    given: dict[str, Any] = {"input_type": kind}
    if embeddings is not None:
        given["prompt_embeddings"] = embeddings
    frames = flags["num_video_frames"]
    at_once = min(len(tasks), flags["batch_size"] or 1)
    device = choose_device(flags["device"])
    dtype = compute_dtype(device)
    of_text = flags["text_encoder_dtype"]
    options: dict[str, Any] = {
        "text_encoder_dtype": getattr(torch, of_text) if of_text else text_dtype(dtype),
        "text": embeddings is None,
        "num_video_frames": frames,
    }
    most = most_in_step(files, device, dtype)
    if most is not None and at_once > most:
        logger.info(
            "--batch_size %d: %d are drawn in step, the most for the kernels", at_once, most
        )
        at_once = most
    if flags["batch_size"] is None and len(tasks) > 1:
        offloaded = [flag for flag in offload_flags if flags[flag]]
        at_once = clips_at_once(files, device, dtype, offloaded, len(tasks), **options)
    guarded = not (files.bundled or flags["disable_guardrail"])
    made = files.config, files.tokenizer_config, tasks[0].request
    check_frames(
        video_of(*made),
        clips=at_once if alternates(*made) else 1,
        guarded=guarded,
        beside=host_need(files, device, batch=at_once, **options),
    )

    def load() -> World:
        safety, _ = load_guards(
            files,
            flags["ar_model_dir"],
            flags["checkpoint_dir"],
            device=flags["device"],
            disable_guardrail=flags["disable_guardrail"] or None,
            guardrail_dir=flags["guardrail_dir"],
            offload_guardrail_models=flags["offload_guardrail_models"],
        )
        return load_files(
            files,
            safety=safety,
            device=flags["device"],
            text_encoder_dtype=flags["text_encoder_dtype"],
            text=embeddings is None,
            batch_size=at_once,
            num_video_frames=frames,
            **{name: flags[name] for name in offload_flags},
        )

    def stream(world: World, task: run.Task) -> Iterator[Step]:
        assert task.item.path is not None
        return world.stream(task.item.path, **vars(task.request), **given)

    def stream_group(world: World, group: Sequence[run.Task]) -> Iterator[tuple[int, Step]]:
        assert isinstance(world, AutoregressiveWorld)
        shared = {**vars(group[0].request), **given}
        del shared["prompt"]
        return world.stream_batch(
            [task.item.path for task in group if task.item.path is not None],
            [{"prompt": task.item.prompt} for task in group],
            **shared,
        )

    run.run_tasks(
        tasks,
        load,
        stream,
        flags,
        (*offload_flags, *run.guard_offload_flags(guarded)),
        batch=batch,
        before=before,
        at_once=at_once,
        stream_group=stream_group,
    )
