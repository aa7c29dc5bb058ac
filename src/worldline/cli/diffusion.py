"""`worldline diffusion text2world` and `video2world`: a prompt, an image or a clip into a video.

Flags, names and defaults are those of cosmos-predict1 `diffusion/inference/text2world.py` and
`video2world.py`; what they parse and ignore works here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from worldline.choices import (
    DIFFUSION_OFFLOAD_FLAGS,
    GENERATIONS,
    MAX_SEED,
    NEGATIVE_PROMPT,
    ROTARY_PRECISIONS,
    SAMPLERS,
    Reinsertion,
)
from worldline.cli import run
from worldline.errors import CheckpointError, InputError
from worldline.files import read_json

if TYPE_CHECKING:
    from worldline.cli.inputs import Fields, Item
    from worldline.loading import DiffusionFiles
    from worldline.pipelines.exchange import Embeddings
    from worldline.pipelines.requests import DiffusionRequest
    from worldline.world import Step

logger = logging.getLogger(__name__)

_OF_UPSAMPLER = ("offload_prompt_upsampler", "prompt_upsampler_dir", "word_limit_to_skip_upsampler")
_PATHS = (
    *("diffusion_transformer_dir", "tokenizer_dir", "text_encoder_dir", "prompt_embeddings"),
    *("prompt_upsampler_dir", "guardrail_dir"),
)
_GIF_FPS = 100  # its delays are whole 1/100 s
# what a world's own configuration decides unless the command line does
_OWN = ("num_steps", "guidance", "num_video_frames", "height", "width", "fps", "negative_prompt")


def _default(name: str, released: object) -> str:
    """Return the end of a help text: the default of released worlds, and of bundled ones."""
    own = [settings[name] for settings in _bundled_settings() if name in settings]
    told = " or ".join(dict.fromkeys(str(value) or "empty" for value in own))
    return f"  [default: {released}; bundled {told}]" if told else f"  [default: {released}]"


@cache
def _bundled_settings() -> tuple[dict[str, Any], ...]:
    """Return what each config.json says; a damaged one counts once its world is asked for."""
    from worldline.locate import bundled_configs

    found = []
    for path in bundled_configs("diffusion").values():
        with suppress(CheckpointError):
            found.append(read_json(path))
    return tuple(found)


def _options(model: str, upsampler: str, told: str, without: str) -> run.Option:
    """Return what adds the options that both commands have."""
    options: tuple[run.Option, ...] = (
        click.option(
            "--checkpoint_dir",
            default="checkpoints",
            show_default=True,
            help="Holds the model folders.",
        ),
        click.option(
            "--diffusion_transformer_dir",
            default=model,
            show_default=True,
            help="Folder of the model below --checkpoint_dir, a path, or tiny-… for a bundled one; "
            "`worldline models` lists them.",
        ),
        click.option(
            "--tokenizer_dir",
            default="Cosmos-Tokenize1-CV8x8x8-720p",
            help="Folder below --checkpoint_dir, or a path.  [default: "
            "Cosmos-Tokenize1-CV8x8x8-720p; of a 1.0 model Cosmos-1.0-Tokenizer-CV8x8x8]",
        ),
        click.option(
            "--text_encoder_dir",
            help="T5: folder below --checkpoint_dir, or a path.  [default: google-t5/t5-11b]",
        ),
        click.option(
            "--prompt_upsampler_dir",
            default=upsampler,
            help=f"Folder below --checkpoint_dir, or a path.  [default: {upsampler}; of a 1.0 "
            "model the one of its name]",
        ),
        click.option("--prompt", help=told),
        click.option(
            "--negative_prompt",
            default=NEGATIVE_PROMPT,
            help="What it must not show; empty for none."
            + _default("negative_prompt", "that of the release"),
        ),
        click.option(
            "--prompt_embeddings",
            help="A safetensors file of embeddings, in place of the text encoder; --prompt may "
            "then be left out.",
        ),
        click.option(
            "--num_steps",
            type=int,
            default=35,
            help="Steps of denoising; fewer are faster." + _default("num_steps", 35),
        ),
        click.option(
            "--guidance",
            type=float,
            default=7.0,
            help="How far to go from the negative prompt towards the prompt; 0 does without."
            + _default("guidance", 7.0),
        ),
        click.option(
            "--num_video_frames",
            type=int,
            default=121,
            help="Of the video, given ones included: 1 + 8k, such as 25 or 33."
            + _default("num_video_frames", 121),
        ),
        *(
            click.option(
                f"--{side}",
                type=int,
                default=pixels,
                help="Of the video, in pixels: a multiple of 16." + _default(side, pixels),
            )
            for side, pixels in (("height", 704), ("width", 1280))
        ),
        click.option(
            "--fps",
            type=int,
            default=24,
            help="Frames a second of the motion, and of the file, 1 to 240." + _default("fps", 24),
        ),
        click.option(
            "--seed",
            type=int,
            default=1,
            show_default=True,
            help=f"Of the noise, 0 to {MAX_SEED}; another seed gives another video.",
        ),
        click.option(
            "--sampler",
            type=click.Choice(SAMPLERS),
            help="[default: edm_euler; of a 1.0 model res_2ab]",
        ),
        click.option(
            "--generation",
            type=click.Choice(GENERATIONS),
            help="Of the model, whatever the name of its folder.  [default: by that name, else "
            "Predict1]",
        ),
        click.option(
            "--rotary_precision",
            type=click.Choice(ROTARY_PRECISIONS),
            help="Of the angles of position."
            + _default("rotary_precision", "bfloat16, as released"),
        ),
        click.option(
            "--text_encoder_dtype",
            type=click.Choice(["bfloat16", "float32"]),
            help="Of the weights of T5.  [default: bfloat16 on a GPU, else float32]",
        ),
        *run.output_options(),
        click.option(
            "--preview_every",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            help="Steps between early looks, in NAME.preview.mp4 until the video is there; 0 "
            "shows none.",
        ),
        click.option(
            "--disable_prompt_upsampler",
            is_flag=True,
            help=f"{without} Bundled models have no upsampler.",
        ),
        *map(run.offload_option, DIFFUSION_OFFLOAD_FLAGS),
        run.offload_option("offload_prompt_upsampler"),
        *run.guardrail_options("prompt and video"),
        *run.machine_options(),
    )
    return run.with_options(options)


@click.group()
def diffusion() -> None:
    """Run the diffusion models.

    These are 7B and 14B, Text2World and Video2World, of Cosmos 1.0 and of Predict1.
    """


@diffusion.command()
@click.option("--batch_input_path", help='Many prompts: a JSONL with a "prompt" a line.')
@_options(
    "Cosmos-Predict1-7B-Text2World",
    "Cosmos-UpsamplePrompt1-12B-Text2World",
    "What the video shows; the prompt upsampler makes a paragraph of it.",
    "Use the prompt as it is.",
)
@click.option(
    "--word_limit_to_skip_upsampler",
    type=int,
    default=250,
    show_default=True,
    help="Prompts of more words are used as they are.",
)
@click.option("--input_image_or_video_path", hidden=True)
@click.pass_context
def text2world(context: click.Context, /, **flags: Any) -> None:
    """Make a video of a prompt.

    A single video is written to --video_save_folder/--video_save_name.mp4, those of a batch to
    0.mp4, 1.mp4, … by the 0-based line of the JSONL; beside each the prompt (.txt) and a report
    (.json). A model that worldline trained has its own defaults, in its config.json.
    """
    if flags["input_image_or_video_path"] is not None:
        raise InputError(
            "--input_image_or_video_path: text2world begins with a prompt alone; "
            "`worldline diffusion video2world` continues an image or a video"
        )
    from worldline.cli.inputs import Fields

    run.refuse_several_gpus(flags["num_gpus"])
    embedded = flags["prompt_embeddings"] is not None
    batch = False
    if not embedded or flags["prompt"] is not None or flags["batch_input_path"] is not None:
        source = run.choose_one(
            flags,
            ("prompt", "batch_input_path"),
            "no prompt: give --prompt, --batch_input_path or --prompt_embeddings",
        )
        batch = source == "batch_input_path"
    if batch and embedded:
        raise InputError(
            "--prompt_embeddings and --batch_input_path exclude each other: every line would give "
            "the same video"
        )
    fields = Fields(
        None,
        prompt="optional" if embedded else "required",
        model="Text2World model",
        example="assets/diffusion/batch_inputs/text2world.jsonl",
    )
    _make_videos(context, flags, fields, None, num_input_frames=0, batch=batch)


@diffusion.command()
@click.option("--input_image_or_video_path", help="One input: mp4, mov, mkv, webm, gif, png, jpg…")
@click.option(
    "--batch_input_path",
    help='Many inputs: a JSONL with a "visual_input" and a "prompt" a line.',
)
@click.option(
    "--num_input_frames",
    type=click.Choice(["1", "9"]),
    default="1",
    callback=lambda context, parameter, value: int(value),
    show_default=True,
    help="How many of the input's last frames are continued; an image has 1.",
)
@_options(
    "Cosmos-Predict1-7B-Video2World",
    "Pixtral-12B",
    "What the video shows, in a paragraph; without it the prompt upsampler describes the input.",
    "Write no prompt: each input needs its own.",
)
@click.option(
    "--reinsertion",
    type=click.Choice(get_args(Reinsertion)),
    default="corrected",
    show_default=True,
    help="Of the given frames at every step; march_2025 repeats a fault of the first release.",
)
@click.pass_context
def video2world(context: click.Context, /, **flags: Any) -> None:
    """Continue an image or a video, by a prompt.

    A single video is written to --video_save_folder/--video_save_name.mp4, those of a batch to
    0.mp4, 1.mp4, … by the 0-based line of the JSONL; beside each the prompt (.txt) and a report
    (.json). The video has the size of --height and --width, whatever the input's. A model that
    worldline trained has its own defaults, in its config.json.
    """
    from worldline.cli.inputs import Fields

    run.refuse_several_gpus(flags["num_gpus"])
    source = run.choose_one(
        flags,
        ("input_image_or_video_path", "batch_input_path"),
        "no input: give --input_image_or_video_path or --batch_input_path",
    )
    batch = source == "batch_input_path"
    if batch and flags["prompt"] is not None:
        raise InputError(
            "--prompt and --batch_input_path exclude each other: the lines hold the prompts"
        )
    fields = Fields(
        "either",
        flags["num_input_frames"],
        prompt="optional" if flags["prompt_embeddings"] or _upsamples(flags) else "required",
        model="Video2World model",
        example="assets/diffusion/batch_inputs/video2world_wo_ps.jsonl",
    )
    path = None if batch else flags["input_image_or_video_path"]
    frames = flags["num_input_frames"]
    _make_videos(context, flags, fields, path, num_input_frames=frames, batch=batch)


def _make_videos(
    context: click.Context,
    flags: dict[str, Any],
    fields: Fields,
    path: str | None,
    *,
    num_input_frames: int,
    batch: bool,
) -> None:
    """Check everything, then make what is asked for."""
    from worldline.cli.inputs import read_batch, read_single

    given = run.given_flags(context)
    run.refuse_empty(flags, _PATHS)
    embeddings = flags["prompt_embeddings"]
    run.refuse_absent(flags, "prompt_embeddings")
    if batch:
        items = read_batch(flags["batch_input_path"], fields)
    else:
        items = [read_single(path, fields, flags["prompt"])]
    options = [_options_of(item, flags, num_input_frames) for item in items]
    _check_words(options)
    _log_notes(items, flags, given, fields, batch=batch)
    read = [Path(name) for name in (flags["batch_input_path"], embeddings) if name]
    outputs = run.choose_outputs(items, flags, batch=batch, read=read)
    files = _find_files(flags, given)
    requests = _make_requests(options, files, given)
    # a prompt that will be written stands in for none
    written = [replace(r, prompt="…") if _upsampled(r, flags) else r for r in requests]
    held = _check(files, written, embeddings)
    from worldline.pipelines.diffusion import to_encode  # slow: not before wrong words are told

    _check_rates(requests, outputs)
    tasks = [
        run.Task(
            item,
            request,
            output,
            _files_of(item, flags),
            _resolve(files, request, flags) if flags["resume"] else {},
            request.fps / files.tokenizer_config.temporal,
            run.undeciding(
                request.guidance, encodes=embeddings is None or bool(to_encode(request, held))
            ),
        )
        for item, request, output in zip(items, requests, outputs, strict=True)
    ]
    if left := run.left_to_do(tasks, flags, files.identity):
        _run(left, files, flags, given, held, batch=batch, before=len(tasks) - len(left))


def _upsamples(flags: dict[str, Any]) -> bool:
    """Tell whether prompts are to be written or made longer, where one needs it."""
    from worldline.catalog import is_bundled

    bundled = is_bundled(flags["diffusion_transformer_dir"])
    return not (bundled or flags["disable_prompt_upsampler"])


def _upsampled(request: DiffusionRequest, flags: dict[str, Any]) -> bool:
    """Tell whether the upsampler writes the prompt of this request."""
    from worldline.world.upsampling import applies

    return _upsamples(flags) and applies(
        request.prompt,
        describes=bool(request.num_input_frames),
        embedded=flags["prompt_embeddings"] is not None,
        word_limit=flags.get("word_limit_to_skip_upsampler", 0),
    )


def _options_of(item: Item, flags: dict[str, Any], num_input_frames: int) -> dict[str, Any]:
    """Return the fields of a request that the command line decides, defaults included."""
    plain = (*_OWN, "seed", "sampler", "rotary_precision", "preview_every")
    chosen = {name: flags[name] for name in plain}
    if num_input_frames:
        chosen["reinsertion"] = flags["reinsertion"]
    return {"prompt": item.prompt, "num_input_frames": num_input_frames, **chosen}


def _check_words(options: Sequence[dict[str, Any]]) -> None:
    """Refuse what no world can do, before one is looked for; sizes are a world's own matter."""
    from worldline.pipelines.requests import DiffusionRequest

    for chosen in options:
        DiffusionRequest(**chosen)


def _make_requests(
    options: Sequence[dict[str, Any]], files: DiffusionFiles, given: set[str]
) -> list[DiffusionRequest]:
    """Return the requests, with what the world's own configuration says unless a flag does."""
    from worldline.pipelines.diffusion import make_request

    left = [name for name in _OWN if name not in given]
    return [
        make_request(files.defaults, **{n: v for n, v in chosen.items() if n not in left})
        for chosen in options
    ]


def _log_notes(
    items: Sequence[Item], flags: dict[str, Any], given: set[str], fields: Fields, *, batch: bool
) -> None:
    """Say what was asked for and has no effect, and what to expect of the model."""
    run.log_bundled(flags["diffusion_transformer_dir"], given)
    run.log_guardrails(flags["diffusion_transformer_dir"], flags, given)
    if not _upsamples(flags):
        run.log_without_effect(given, dict.fromkeys(_OF_UPSAMPLER, "no prompt upsampler runs"))
    elif fields.visual and any(item.prompt is not None for item in items):
        logger.info("prompts are used as they are: the prompt upsampler writes those that lack")
    if batch:
        run.log_without_effect(given, run.NUMBERED)
    if flags["guidance"] == 0:
        run.log_without_effect(given, {"negative_prompt": "guidance 0 looks at the prompt alone"})
    if flags["prompt_embeddings"] is not None:
        unread = ("text_encoder_dir", "text_encoder_dtype", "offload_text_encoder_model")
        run.log_without_effect(given, dict.fromkeys(unread, "embeddings are given"))
        if any(item.prompt is not None for item in items):
            logger.info("prompts are written down alone: the embeddings decide")


def _find_files(flags: dict[str, Any], given: set[str]) -> DiffusionFiles:
    from worldline.locate import locate

    # told before torch is imported
    place = locate(flags["diffusion_transformer_dir"], flags["checkpoint_dir"])
    named = ["tokenizer_dir", "text_encoder_dir"]
    if _upsamples(flags):
        named.append("prompt_upsampler_dir")
    for name in named:
        if name in given:
            place.chosen(flags[name], name)
    from worldline.loading import open_diffusion

    return open_diffusion(
        place,
        tokenizer_dir=flags["tokenizer_dir"] if "tokenizer_dir" in given else None,
        text_encoder_dir=flags["text_encoder_dir"],
        generation=flags["generation"],
    )


def _check(
    files: DiffusionFiles, requests: Sequence[DiffusionRequest], embeddings: str | None
) -> Embeddings:
    """Refuse what this world cannot do; return the embeddings that are given.

    Raises:
        InputError: it cannot.
        CheckpointError: there is no text encoder, and one is needed.
    """
    from worldline.pipelines.diffusion import check_request, check_text, read_embeddings

    for request in requests:
        check_request(files, request)
    given = read_embeddings(files, embeddings)
    try:
        for request in requests:
            check_text(files, request, given)
    except CheckpointError as error:
        ways = "--text_encoder_dir names another; or give --prompt_embeddings"
        if given.prompt is not None:
            ways = (
                f"{embeddings} has no negative_prompt: add its embedding, or give --guidance 0 or "
                "an empty --negative_prompt"
            )
        raise CheckpointError(f"{files.why_no_text}; {ways}") from error
    return given


def _check_rates(requests: Sequence[DiffusionRequest], outputs: Sequence[Path]) -> None:
    """Refuse a rate that the format of a video cannot store."""
    for request, output in zip(requests, outputs, strict=True):
        if output.suffix.lower() == ".gif" and request.fps > _GIF_FPS:
            raise InputError(
                f"fps is {request.fps:g}, but a GIF shows {_GIF_FPS} frames a second at most; "
                "choose another format by --video_save_name"
            )


def _files_of(item: Item, flags: dict[str, Any]) -> dict[str, Path | None]:
    """Return the files that decide a video beside those of the world, by their role in reports."""
    embeddings = flags["prompt_embeddings"]
    return {"input": item.path, "prompt_embeddings": Path(embeddings) if embeddings else None}


def _resolve(
    files: DiffusionFiles, request: DiffusionRequest, flags: dict[str, Any]
) -> dict[str, Any]:
    """Return what a report says of what requests leave to the world and to the device."""
    from worldline.loading import choose_device, compute_dtype, text_dtype
    from worldline.pipelines.diffusion import rotary_precision_of, sampler_of
    from worldline.world.safety import guardrail_release

    dtype = compute_dtype(choose_device(flags["device"]))
    text = None
    if files.text is not None:
        text = flags["text_encoder_dtype"] or str(text_dtype(dtype)).removeprefix("torch.")
    return {
        "generation": files.generation,
        "sampler": sampler_of(files, request),
        "rotary_precision": rotary_precision_of(files, request),
        "dtype": str(dtype).removeprefix("torch."),
        "text_encoder_dtype": text,
        "prompt_upsampler_ran": _upsampled(request, flags),
        "guardrail": guardrail_release(files, flags["disable_guardrail"] or None),
    }


def _run(
    tasks: Sequence[run.Task],
    files: DiffusionFiles,
    flags: dict[str, Any],
    given: set[str],
    held: Embeddings,
    *,
    batch: bool,
    before: int,
) -> None:
    from worldline.loading import choose_device, dearest
    from worldline.pipelines.diffusion import to_encode
    from worldline.world import load_files, load_guards

    upsamples = any(_upsampled(task.request, flags) for task in tasks)
    own = "prompt_upsampler_dir" in given

    def load() -> Any:
        safety, upsampling = load_guards(
            files,
            flags["diffusion_transformer_dir"],
            flags["checkpoint_dir"],
            device=flags["device"],
            disable_guardrail=flags["disable_guardrail"] or None,
            # it is not read where every prompt is used as it is
            disable_prompt_upsampler=None if upsamples else True,
            guardrail_dir=flags["guardrail_dir"],
            prompt_upsampler_dir=flags["prompt_upsampler_dir"] if own else None,
            word_limit_to_skip_upsampler=flags.get("word_limit_to_skip_upsampler", 0),
            offload_guardrail_models=flags["offload_guardrail_models"],
            offload_prompt_upsampler=flags["offload_prompt_upsampler"],
        )
        offload = {name: flags[name] for name in DIFFUSION_OFFLOAD_FLAGS}
        offloaded = [flag for flag in offload if offload[flag]]
        videos = [task.request.video for task in tasks]
        largest = dearest(files, videos, choose_device(flags["device"]), offloaded)
        return load_files(
            files,
            safety=safety,
            upsampling=upsampling,
            device=flags["device"],
            text_encoder_dtype=flags["text_encoder_dtype"],
            video=(largest.frames, largest.height, largest.width),
            text=upsamples or any(to_encode(task.request, held) for task in tasks),
            **offload,
        )

    def stream(world: Any, task: run.Task) -> Iterator[Step]:
        return world.stream(
            task.item.path, prompt_embeddings=flags["prompt_embeddings"], **vars(task.request)
        )

    guarded = not (files.bundled or flags["disable_guardrail"])
    offloads = (*DIFFUSION_OFFLOAD_FLAGS, *run.guard_offload_flags(guarded, upsamples))
    run.run_tasks(tasks, load, stream, flags, offloads, batch=batch, before=before)
