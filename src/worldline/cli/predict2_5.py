"""`worldline predict2.5`: files of samples into videos, by the models of Cosmos-Predict2.5.

Flags, names and defaults are those of cosmos-predict2.5 `examples/inference.py`, of its releases
since 13 October 2025, and the two plain arguments of the one a week earlier.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from worldline.catalog import FLOW_MODELS, find_flow_model
from worldline.choices import FLOW_OFFLOAD_FLAGS, MAX_SEED, ScheduleName
from worldline.cli import run
from worldline.errors import CheckpointError, InputError, InsufficientMemoryError

if TYPE_CHECKING:
    from worldline.cli.samples import Sample
    from worldline.loading import FlowFiles
    from worldline.pipelines.exchange import Embeddings
    from worldline.pipelines.requests import FlowRequest
    from worldline.world import Step

logger = logging.getLogger(__name__)

_OVERRIDES = (
    "inference_type",
    "prompt",
    "prompt_path",
    "negative_prompt",
    "input_path",
    "seed",
    "guidance",
    "resolution",
    "num_output_frames",
    "num_steps",
    "enable_autoregressive",
    "chunk_size",
    "chunk_overlap",
)
# what a world's own configuration decides unless a sample does
_OWN = ("negative_prompt", "guidance", "num_steps")
_RUNS: dict[str, ScheduleName] = {model.experiment: model.schedule for model in FLOW_MODELS}
LONG_VIDEO = 77  # frames
_PATHS = (
    *("model", "checkpoint_path", "tokenizer_dir", "text_encoder_dir", "prompt_embeddings"),
    "guardrail_dir",
)
# Python that the released command builds its network from; these make what every file says itself
_CONFIG_FILES = ("", "cosmos_predict2/_src/predict2/configs/video2world/config.py")
_WITHOUT_EFFECT = {
    "config_file": "the file of weights says how the network is built",
}


class _ManyFiles(click.Command):
    """Takes several values after one -i, as shells make them of a pattern."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _with_flags(args, ctx))


def _with_flags(words: Sequence[str], context: click.Context) -> list[str]:
    """Return the words of a command line with -i before each of its values.

    Raises:
        click.UsageError: it has none.
    """
    found: list[str] = []
    waiting = taking = False
    for position, word in enumerate((*words, "--")):
        if len(word) > 1 and word.startswith("-"):
            if waiting:
                raise click.UsageError("-i needs a file of samples", context)
            if word == "--":
                return [*found, *words[position:]]
            name, _, value = word.replace("-", "_").partition("=")
            taking = name in ("_i", "__input_files")
            waiting = taking and not value
            if waiting:
                continue
        elif taking:
            found.append("-i")
            waiting = False
        found.append(word)
    return found


def _override(name: str, told: str, **settings: Any) -> run.Option:
    return click.option(f"--{name}", help=f"Of every sample: {told}", **settings)


def _pair(name: str, told: str, default: bool = False) -> run.Option:
    return click.option(f"--{name}/--no_{name}", default=default, help=told)


_OPTIONS: tuple[run.Option, ...] = (
    click.argument("earlier", nargs=-1, metavar="[PARAMS_FILE OUTPUT_DIR]"),
    click.option(
        "-i",
        "--input_files",
        multiple=True,
        metavar="FILE...",
        help="Samples: .json, .jsonl, .yaml or .yml, one or more, or quoted patterns of names.",
    ),
    click.option(
        "-o", "--output_dir", help="Where the videos go; made if it is not there.", metavar="DIR"
    ),
    click.option(
        "--model",
        default=FLOW_MODELS[0].name,
        show_default=True,
        help=f"{', '.join(model.name for model in FLOW_MODELS)}; tiny-… for a bundled one, or a "
        "folder.",
    ),
    click.option(
        "--checkpoint_path", help="File or folder of a transformer, in place of the model's."
    ),
    click.option(
        "--experiment",
        help="Name of the released training run that the transformer comes from; decides the "
        "schedule.",
    ),
    click.option("--config_file", default="", help="Has no effect: no configuration is needed."),
    click.option(
        "--schedule",
        type=click.Choice(get_args(ScheduleName)),
        help="Of the noise levels.  [default: as the model was released; of other files what "
        "config.json beside them says, else shifted]",
    ),
    click.option(
        "--checkpoint_dir",
        default="checkpoints",
        show_default=True,
        help="Holds the folders of models.",
    ),
    click.option(
        "--tokenizer_dir",
        help="The Wan2.1 tokenizer: file or folder, below --checkpoint_dir or a path.  [default: "
        "that of nvidia/Cosmos-Predict2.5-2B]",
    ),
    click.option(
        "--text_encoder_dir",
        help="Reason1: folder below --checkpoint_dir, or a path.  [default: "
        "nvidia/Cosmos-Reason1-7B]",
    ),
    click.option(
        "--prompt_embeddings",
        help="A safetensors file of embeddings, in place of the text encoder.",
    ),
    _override(
        "inference_type",
        "text2world begins with the prompt, image2world with an image or the last frame of a "
        "video, video2world with the last 5 frames.",
        type=click.Choice(["text2world", "image2world", "video2world"]),
    ),
    _override("prompt", "what the video shows, in a paragraph."),
    _override("prompt_path", "a text file with the prompt."),
    _override("negative_prompt", "what the video must not show."),
    _override("input_path", "image or video to continue."),
    _override("seed", f"of the noise, 0 to {MAX_SEED}; 1 where a file says nothing.", type=int),
    _override(
        "guidance",
        "how far to go from the negative prompt beyond the prompt; 0 does without. 7 where a file "
        "says nothing.",
        type=float,
    ),
    _override("resolution", 'height and width, "H,W", or "none" for 704,1280.'),
    _override(
        "num_output_frames",
        "1 + 4k frames. 93 where a file says nothing, and 77 of a long video.",
        type=int,
    ),
    _override("num_steps", "steps of denoising. 35 where a file says nothing.", type=int),
    _override(
        "enable_autoregressive",
        "true makes a long video, chunk after chunk.",
        type=bool,
        is_flag=False,
        flag_value="true",
    ),
    _override(
        "chunk_size", "frames of a chunk of a long video. 77 where a file says nothing.", type=int
    ),
    _override(
        "chunk_overlap",
        "frames of a chunk that the next one continues, 1 + 4k. 1 where a file says nothing.",
        type=int,
    ),
    click.option(
        "--resume", is_flag=True, help="Keep videos that an earlier run made in the same way."
    ),
    click.option(
        "--preview_every",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Steps between early looks, in NAME.preview.mp4 until the video is there; 0 shows "
        "none.",
    ),
    _pair(
        "keep_going",
        "Go on with the next sample when one fails or is refused; on by default.",
        True,
    ),
    _pair(
        "disable_guardrails",
        "Do not check prompt and video. Bundled models have no guardrails.",
    ),
    run.offload_option("offload_guardrail_models", negatable=True, default=True),
    run.guardrail_dir_option(),
    *(run.offload_option(name, negatable=True) for name in FLOW_OFFLOAD_FLAGS),
    _pair("profile", "Not in this version: reports tell seconds and memory of each stage."),
    click.option(
        "--context_parallel_size",
        type=int,
        help="GPUs that share a video; 1 alone in this version.",
    ),
    click.option("--device", help=run.DEVICE_HELP),
)


@click.command("predict2.5", cls=_ManyFiles)
@run.with_options(_OPTIONS)
@click.pass_context
def predict2_5(context: click.Context, /, **flags: Any) -> None:
    """Make the videos of files of samples, by a model of Predict2.5.

    Each sample becomes NAME.mp4 in --output_dir (NAME.jpg if it has one frame); beside it the
    prompt (.txt) and a report (.json). Fields given here win over those of all samples. A sample
    that fails does not stop the others.
    """
    given = run.given_flags(context)
    files, folder = _named_files(flags)
    _refuse_absent_parts(flags)
    overrides = {name: flags[name] for name in _OVERRIDES if name in given}
    samples = _read(files, overrides)
    requests = _check_words(samples, overrides)
    outputs = _choose_outputs(samples, files, folder, flags)
    _check_media(samples, overrides)
    _log_notes(samples, flags, given)
    world = _find_files(flags, given)
    embeddings = flags["prompt_embeddings"]
    asked = _make_requests(samples, requests, world, flags)
    held = _check(world, samples, asked, embeddings, overrides)
    from worldline.pipelines.predict2_5 import to_encode  # slow: not before wrong words are told

    tasks = [
        run.Task(
            _item(number, sample),
            request,
            output,
            {
                "input": sample.continued,
                "prompt_embeddings": Path(embeddings) if embeddings else None,
            },
            _resolve(world, flags, given) if flags["resume"] else {},
            request.fps / world.tokenizer_config.temporal,
            run.undeciding(
                request.guidance, encodes=embeddings is None or bool(to_encode(request, held))
            ),
        )
        for number, (sample, request, output) in enumerate(
            zip(samples, asked, outputs, strict=True)
        )
    ]
    if left := run.left_to_do(tasks, flags, world.identity):
        stated = dict(zip(outputs, samples, strict=True))
        _run(left, stated, world, flags, given, held)


def _refuse_absent_parts(flags: dict[str, Any]) -> None:
    """Refuse what this version cannot do."""
    run.refuse_empty(flags, _PATHS)
    if flags["prompt"] is not None and flags["prompt_path"] is not None:
        raise InputError("--prompt and --prompt_path exclude each other: give one")
    size = flags["context_parallel_size"]
    run.refuse_several_gpus(1 if size is None else size, "context_parallel_size")
    if flags["profile"]:
        raise InputError(
            "--profile: this version does not profile; the report beside each video tells seconds "
            "and memory of each stage"
        )
    if flags["config_file"] not in _CONFIG_FILES:
        raise InputError(
            f"--config_file {flags['config_file']}: worldline runs no configuration in Python; the "
            "file of weights says how the network is built, and --schedule how it is sampled"
        )
    run.refuse_absent(flags, "prompt_embeddings")


def _named_files(flags: dict[str, Any]) -> tuple[list[Path], Path]:
    """Return the files of samples, patterns expanded, and the folder for the videos."""
    earlier, inputs, output = flags["earlier"], flags["input_files"], flags["output_dir"]
    if earlier and not inputs and output is None:
        if len(earlier) != 2:
            plural = "s" * (len(earlier) != 1)
            raise InputError(
                f"{len(earlier)} plain argument{plural}; give PARAMS_FILE and OUTPUT_DIR"
            )
        inputs, output = earlier[:1], earlier[1]
    elif earlier:
        raise InputError(
            f"{earlier[0]} stands alone: files of samples follow -i, and -o names the output folder"
        )
    if not inputs:
        raise InputError("no samples: give -i FILE")
    if not output:
        raise InputError("no output folder: give -o DIR")
    if not all(inputs):
        raise InputError(f"{'PARAMS_FILE' if earlier else '-i'} is empty; name a file of samples")
    return [path for name in inputs for path in _expanded(name)], Path(output)


def _expanded(name: str) -> list[Path]:
    """Return the files that a name or a pattern stands for, in order."""
    if Path(name).exists() or not glob.has_magic(name):
        return [Path(name)]
    found = sorted(Path(path) for path in glob.glob(name, recursive=True))
    if not found:
        raise InputError(f"-i {name}: no file has such a name")
    return found


def _read(files: Sequence[Path], overrides: Mapping[str, Any]) -> list[Sample]:
    from worldline.cli.samples import read_samples

    return read_samples(files, overrides)


def _check_media(samples: Sequence[Sample], overrides: Collection[str]) -> None:
    from worldline.cli.samples import check_media

    check_media(samples, overrides)


def _check_words(samples: Sequence[Sample], overrides: Collection[str]) -> list[dict[str, Any]]:
    """Return what each sample says of its request, checked as far as no world is needed."""
    from worldline.cli.samples import refuse
    from worldline.pipelines.requests import FlowRequest

    requests, wrong = [], []
    for sample in samples:
        request = _options_of(sample)
        try:
            FlowRequest(**request)
        except InputError as error:
            wrong.append((sample.place, _by_its_fields(error, sample)))
        requests.append(request)
    refuse(wrong, len(samples), overrides)
    return requests


def _by_its_fields(error: InputError, sample: Sample) -> str:
    """Return what is wrong with a request, by the names that a sample has for it."""
    given = sample.num_input_frames
    told = str(error).replace("num_video_frames", "num_output_frames")
    told = told.replace("chunk_size makes longer", "enable_autoregressive makes longer")
    return told.replace(
        f"num_input_frames is {given}", f"{sample.inference_type} is given {given} of them"
    )


def _options_of(sample: Sample) -> dict[str, Any]:
    """Return the fields of a request that a sample decides, defaults included."""
    found: dict[str, Any] = {
        "prompt": sample.prompt,
        "seed": sample.seed,
        "num_input_frames": sample.num_input_frames,
        **{name: getattr(sample, name) for name in _OWN},
    }
    if sample.size is not None:
        found["height"], found["width"] = sample.size
    if sample.num_output_frames is not None:
        found["num_video_frames"] = sample.num_output_frames
    if sample.enable_autoregressive:
        found["chunk_size"], found["chunk_overlap"] = sample.chunk_size, sample.chunk_overlap
        found.setdefault("num_video_frames", LONG_VIDEO)
    return found


def _choose_outputs(
    samples: Sequence[Sample], files: Sequence[Path], folder: Path, flags: dict[str, Any]
) -> list[Path]:
    """Name the videos, and make sure that they can be written and overwrite no input."""
    from worldline.video.write import check_destination

    outputs = [
        folder / f"{sample.name}.{'jpg' if sample.num_output_frames == 1 else 'mp4'}"
        for sample in samples
    ]
    for output in outputs:
        check_destination(output)
    run.check_folder(folder, "--output_dir")
    read: list[Path | None] = [*files]
    for sample in samples:
        read += [sample.input_path, sample.prompt_path]
    if flags["prompt_embeddings"]:
        read.append(Path(flags["prompt_embeddings"]))
    run.refuse_overwriting(outputs, read, flags, "--output_dir")
    return outputs


def _log_notes(samples: Sequence[Sample], flags: dict[str, Any], given: set[str]) -> None:
    """Say what was asked for and has no effect, and what to expect of the model."""
    for sample in samples:
        for name, reason in sample.without_effect.items():
            logger.info("%s: %s has no effect: %s", sample.place, name, reason)
        if sample.continues_a_still:
            logger.info("%s: of the video, image2world continues the last frame", sample.place)
    if flags["checkpoint_path"] is None:
        run.log_bundled(flags["model"], given)
    run.log_guardrails(_named(flags), flags, given, "disable_guardrails")
    run.log_without_effect(given, _WITHOUT_EFFECT)
    if flags["experiment"] not in (None, *_RUNS) and flags["schedule"] is None:
        logger.info(
            "--experiment %s is no released run: taken for one that began with 2B/pre-trained",
            flags["experiment"],
        )
    if flags["prompt_embeddings"] is not None:
        unread = ("text_encoder_dir", "offload_text_encoder")
        run.log_without_effect(given, dict.fromkeys(unread, "embeddings are given"))
        logger.info("prompts are written down alone: the embeddings decide")


def _named(flags: dict[str, Any]) -> str:
    """Return what names the transformer."""
    name: str = flags["checkpoint_path"] or flags["model"]
    return name


def _find_files(flags: dict[str, Any], given: set[str]) -> FlowFiles:
    from worldline.locate import locate

    # told before torch is imported
    place = locate(_named(flags), flags["checkpoint_dir"])
    for name in ("tokenizer_dir", "text_encoder_dir"):
        if flags[name] is not None:
            place.chosen(flags[name], name)
    from worldline.loading import open_predict2_5

    return open_predict2_5(
        place,
        tokenizer_dir=flags["tokenizer_dir"],
        text_encoder_dir=flags["text_encoder_dir"],
        schedule=_schedule(flags, given),
    )


def _schedule(flags: dict[str, Any], given: set[str]) -> ScheduleName | None:
    """Return the schedule that the command line decides; None leaves it to the files.

    A transformer of one's own is sampled as the model or the training run that is named with it.
    """
    asked: ScheduleName | None = flags["schedule"]
    if asked is not None:
        return asked
    if flags["experiment"] is not None:
        # those of post-training begin with 2B/pre-trained
        return _RUNS.get(flags["experiment"], "shifted")
    if flags["checkpoint_path"] is not None and "model" in given:
        model = find_flow_model(flags["model"])
        if model is None:
            raise InputError(
                f"--model {flags['model']} says how --checkpoint_path is sampled; it must be one "
                f"of {', '.join(one.name for one in FLOW_MODELS)}"
            )
        return model.schedule
    return None


def _make_requests(
    samples: Sequence[Sample],
    options: Sequence[dict[str, Any]],
    files: FlowFiles,
    flags: dict[str, Any],
) -> list[FlowRequest]:
    """Return the requests, with what the world's own configuration says unless a sample does."""
    from worldline.pipelines.predict2_5 import make_request

    requests = []
    for sample, chosen in zip(samples, options, strict=True):
        left = {name for name in _OWN if name not in sample.model_fields_set}
        stated = {name: value for name, value in chosen.items() if name not in left}
        if "chunk_size" in stated and "chunk_size" not in sample.model_fields_set:
            stated["chunk_size"] = min(stated["chunk_size"], files.defaults.num_video_frames)
        requests.append(make_request(files, **stated, preview_every=flags["preview_every"]))
    return requests


def _check(
    files: FlowFiles,
    samples: Sequence[Sample],
    requests: Sequence[FlowRequest],
    embeddings: str | None,
    overrides: Collection[str],
) -> Embeddings:
    """Refuse what this world cannot do; return the embeddings that are given.

    Raises:
        InputError: it cannot; all samples of which this is so are told.
        CheckpointError: there is no text encoder, and one is needed.
    """
    from worldline.cli.samples import refuse
    from worldline.pipelines.predict2_5 import check_request, check_text, read_embeddings

    wrong = []
    for sample, request in zip(samples, requests, strict=True):
        try:
            check_request(files, request)
        except InputError as error:
            wrong.append((sample.place, _by_its_fields(error, sample)))
    refuse(wrong, len(samples), overrides)
    given = read_embeddings(embeddings)
    try:
        for request in requests:
            check_text(files, request, given)
    except CheckpointError as error:
        ways = "--text_encoder_dir names another; or give --prompt_embeddings"
        if given.prompt is not None:
            ways = f"{embeddings} has no negative_prompt: add its embedding, or give --guidance 0"
        raise CheckpointError(f"{files.why_no_text}; {ways}") from error
    return given


def _item(number: int, sample: Sample) -> Any:
    from worldline.cli.inputs import Item

    return Item(number, sample.continued, sample.prompt, sample.name)


def _disabled(flags: dict[str, Any], given: set[str]) -> bool | None:
    """Return whether the guardrails are off; None leaves it to the world."""
    return flags["disable_guardrails"] if "disable_guardrails" in given else None


def _resolve(files: FlowFiles, flags: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """Return what a report says of what requests leave to the world and to the device."""
    from worldline.loading import choose_device, compute_dtype, text_dtype
    from worldline.world.safety import guardrail_release

    dtype = compute_dtype(choose_device(flags["device"]))
    text = None
    if files.text is not None:
        text = str(text_dtype(dtype)).removeprefix("torch.")
    return {
        "schedule": files.rules.schedule,
        "known_timestep": files.rules.known_timestep,
        "dtype": str(dtype).removeprefix("torch."),
        "text_encoder_dtype": text,
        "guardrail": guardrail_release(files, _disabled(flags, given)),
    }


def _check_frames(
    tasks: Sequence[run.Task],
    samples: Mapping[Path, Sample],
    files: FlowFiles,
    flags: dict[str, Any],
    *,
    text: bool,
    guarded: bool,
) -> None:
    """Refuse videos whose frames find no room in host memory, before anything is loaded.

    Raises:
        InsufficientMemoryError: all samples of which this is so are told.
    """
    from worldline.loading import check_frames, choose_device, host_need
    from worldline.pipelines.predict2_5 import window_of

    device = choose_device(flags["device"])
    wrong = []
    for task in tasks:
        beside = host_need(files, device, video=window_of(files, task.request), text=text)
        try:
            check_frames(task.request.video, guarded=guarded, beside=beside)
        except InsufficientMemoryError as error:
            sample = samples[task.output]
            wrong.append(f"{sample.place}: {_by_its_fields(error, sample)}")
    if wrong:
        raise InsufficientMemoryError("\n".join(wrong))


def _cure(request: FlowRequest) -> str:
    """Return what of a request lowers the memory that it is denoised in, by a sample's names."""
    size = f"resolution ({request.height},{request.width})"
    # of a long video as many frames as ever are made at once
    if request.num_video_frames == 1 or request.chunk_size is not None:
        return f"a lower {size} needs less"
    return f"a lower {size} or num_output_frames ({request.num_video_frames}) needs less"


def _run(
    tasks: Sequence[run.Task],
    samples: Mapping[Path, Sample],
    files: FlowFiles,
    flags: dict[str, Any],
    given: set[str],
    held: Embeddings,
) -> None:
    from worldline.loading import choose_device, dearest
    from worldline.pipelines.predict2_5 import to_encode, window_of
    from worldline.world import load_files, load_guards
    from worldline.world.safety import guardrail_release

    embedded = flags["prompt_embeddings"]
    disabled = _disabled(flags, given)
    text = any(to_encode(task.request, held) for task in tasks)
    guarding = guardrail_release(files, disabled) is not None
    _check_frames(tasks, samples, files, flags, text=text, guarded=guarding)

    def load() -> Any:
        safety, _ = load_guards(
            files,
            _named(flags),
            flags["checkpoint_dir"],
            device=flags["device"],
            disable_guardrail=disabled,
            guardrail_dir=flags["guardrail_dir"],
            offload_guardrail_models=flags["offload_guardrail_models"],
        )
        offloaded = [flag for flag in FLOW_OFFLOAD_FLAGS if flags[flag]]
        windows = [window_of(files, task.request) for task in tasks]
        largest = dearest(files, windows, choose_device(flags["device"]), offloaded)
        try:
            return load_files(
                files,
                safety=safety,
                device=flags["device"],
                video=(largest.frames, largest.height, largest.width),
                text=text,
                **{name: flags[name] for name in FLOW_OFFLOAD_FLAGS},
            )
        except InsufficientMemoryError as error:
            task = tasks[windows.index(largest)]
            most = f"{samples[task.output].place}{' needs most' if len(tasks) > 1 else ''}"
            raise InsufficientMemoryError(f"{most}: {error}; {_cure(task.request)}") from error

    def stream(world: Any, task: run.Task) -> Iterator[Step]:
        steps = world.stream(task.item.path, prompt_embeddings=embedded, **vars(task.request))
        for step in steps:
            if step.video is not None:
                # what it leaves to the world is told by the request, not by a sample's defaults
                step.video.report["sample"] = samples[task.output].model_dump(
                    mode="json", exclude_none=True, exclude_unset=True
                )
            yield step

    # on unless told otherwise, which needs no word
    told = "offload_guardrail_models" in given
    offloads = (*FLOW_OFFLOAD_FLAGS, *run.guard_offload_flags(told and guarding))
    batch = len(samples) > 1 and flags["keep_going"]
    before = len(samples) - len(tasks)
    run.run_tasks(tasks, load, stream, flags, offloads, batch=batch, before=before)
