"""One description of a request: Python keywords, flags, sample files and reports; needs no torch.

A family describes its requests, and how its models are loaded, by one class each. A field's line
holds its type, range, default and help text; everything else is derived from it.
"""

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from math import inf
from os import PathLike, fspath
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WrapValidator,
    model_validator,
)
from pydantic.fields import FieldInfo

from worldline.errors import InputError, UnknownOptionError, brief, did_you_mean, option
from worldline.files import check_path, is_dataset
from worldline.shapes import Fit, VideoShape

NEGATIVE_PROMPT = (
    "The video captures a series of frames showing ugly scenes, static with no motion, motion "
    "blur, over-saturation, shaky footage, low resolution, grainy texture, pixelated images, "
    "poorly lit areas, underexposed and overexposed scenes, poor color balance, washed out "
    "colors, choppy sequences, jerky movements, low frame rate, artifacting, color banding, "
    "unnatural transitions, outdated special effects, fake elements, unconvincing visuals, poorly "
    "edited content, jump cuts, visual noise, and flickering. Overall, the video is of poor "
    "quality."
)

_MOST_PROBLEMS = 20  # that are named of one request
FIT = "Input of another aspect: stretched, cropped, or padded with black."

# a field -> what the user wrote in its place, for messages
Name = Callable[[str], str]


def _not_blank(value: Any) -> Any:
    if isinstance(value, str) and not value.strip():
        raise ValueError("it is empty")
    return value


# with a constraint, pydantic refuses invalid Unicode; encoders read some hundred words
Text = Annotated[str, Field(max_length=100_000)]
Prompt = Annotated[Text, AfterValidator(_not_blank)]
Path = Annotated[str, AfterValidator(_not_blank), AfterValidator(check_path)]
# a file or a folder, or the name of a data set with its parameters
Source = Annotated[
    Path, WrapValidator(lambda value, check: value if is_dataset(value) else check(value))
]
Seed = Annotated[
    int, Field(ge=0, lt=2**32, description="Random seed; gives the same noise on any machine.")
]
Steps = Annotated[int, Field(ge=1, le=1000, description="Denoising steps; fewer are faster.")]
Size = Annotated[int, Field(ge=1, le=1 << 20)]  # each model has smaller limits
Guidance = Annotated[
    float, Field(ge=0, le=100, description="Classifier-free guidance scale; 0 turns it off.")
]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Fps = Annotated[float, Field(ge=1, le=240, description="Frames per second.")]
PreviewEvery = Annotated[
    int,
    Field(ge=0, le=1000, description="Steps between previews (NAME.preview.mp4); 0 makes none."),
]


def _number_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _step_cache(rule: str) -> str:
    if rule in ("off", "auto") or re.fullmatch(_STEPS, rule, re.ASCII):
        return rule
    with suppress(ValueError):
        if 0 <= (threshold := float(rule)) < inf:
            return str(threshold)
    raise ValueError(
        f"it is {brief(rule)}; give auto, off, a threshold of 0 or more, or the steps that are "
        "computed, such as steps:0-3,5,8-34"
    )


_STEPS = r"steps:\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*"
StepCache = Annotated[
    str,
    BeforeValidator(_number_as_text),
    AfterValidator(_step_cache),
    Field(
        description="Skip the network's blocks in steps whose input changed by less than a "
        "threshold, such as 0.3; steps: lists those computed.",
        json_schema_extra={"metavar": "THRESHOLD|auto|steps:0-3,5,…|off"},
    ),
]
# a file, or a tensor or array (S, E) or (1, S, E); not checked before the model is known
Embedding = Annotated[
    Any,
    AfterValidator(_not_blank),
    AfterValidator(check_path),
    Field(description="File of embeddings, in place of the text encoder."),
]


class Options(BaseModel):
    """Named values of one command or call: checked when made, then trusted."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        populate_by_name=True,
        arbitrary_types_allowed=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _normalise(cls, stated: Any) -> Any:
        """Accept NumPy scalars, paths, torch dtypes and devices as plain values."""
        return {name: _plain(value) for name, value in stated.items()}

    @classmethod
    def parse(cls, stated: Mapping[str, Any], name: Name = option) -> Self:
        """Checked options.

        Args:
            stated: values by field name.
            name: what an error calls a field.

        Raises:
            InputError: one line for each problem.
        """
        try:
            return cls.model_validate(dict(stated))
        except ValidationError as error:
            unknown = any(problem["type"] == "extra_forbidden" for problem in error.errors())
            kind = UnknownOptionError if unknown else InputError
            # a choice of types, such as auto or a number, has a problem with each
            lines: dict[str, list[str]] = {}
            for line in cls.problems(error, name):
                where, _, advice = line.partition("; it must ")
                lines.setdefault(where, []).append(advice)
            joined = (
                "; it must ".join(filter(None, (w, " or ".join(a)))) for w, a in lines.items()
            )
            raise kind("\n".join(joined)) from None

    @classmethod
    def problems(cls, error: ValidationError, name: Name) -> Iterator[str]:
        """One line for each problem, `WHERE: WHAT IS WRONG; WHAT TO DO`."""
        for problem in islice(error.errors(), _MOST_PROBLEMS):
            field = str(problem["loc"][0]) if problem["loc"] else ""
            value, kind = problem["input"], problem["type"]
            if kind == "extra_forbidden":
                known = [*cls.flags().values()]
                close = did_you_mean(field.strip().lower().replace("-", "_"), known, 0.7)
                yield f"{name(field)}: no such option{close or '; there are: ' + ', '.join(known)}"
            elif kind == "missing":
                yield f"{name(field)}: it is missing"
            elif kind == "value_error":
                message = problem["msg"].removeprefix("Value error, ")
                yield f"{name(field)}: {message}" if field else message
            else:
                advice = problem["msg"].replace("Input should", "it must")
                yield f"{name(field)} is {brief(value)}; {advice}"

    @classmethod
    def describe(cls) -> Iterator[str]:
        """One line for each field, for help: name, description, default."""
        for name, field in cls.model_fields.items():
            yield f"{field.alias or name}: {help_of(field, field.default)}".replace("--", "")

    @classmethod
    def flags(cls) -> dict[str, str]:
        """Field -> its flag and keyword: the alias where it has one."""
        return {name: field.alias or name for name, field in cls.model_fields.items()}


def help_of(field: FieldInfo, default: Any) -> str:
    """Help text, the default last in brackets."""
    text = field.description or ""
    if field.is_required():
        return f"{text}  [required]"
    stated = "[default:" in text and default == field.default
    if stated or default is False or default in (None, (), "", NEGATIVE_PROMPT):
        return text
    described, _, _ = text.partition("[default:")
    return f"{described.rstrip()}  [default: {str(default).removesuffix('.0')}]"


def _plain(value: Any) -> Any:
    kind = type(value)
    if kind.__module__ == "numpy" and kind.__name__ != "ndarray" and hasattr(value, "item"):
        return value.item()  # not by isinstance: --help must not wait for NumPy either
    if isinstance(value, PathLike):
        return fspath(value)
    if kind.__module__ == "torch" and kind.__name__ in ("dtype", "device"):
        return str(value).removeprefix("torch.")
    return tuple(value) if isinstance(value, list) else value


class OutputFlags(Options):
    """Flags of commands that write files."""

    no_overwrite: bool = Field(
        False, description="Refuse, before any work, to replace files of an earlier run."
    )


class VideoFlags(OutputFlags):
    """Flags of commands that make videos."""

    resume: bool = Field(False, description="Keep videos that an earlier run made in the same way.")
    dry_run: bool = Field(
        False, description="Check everything, print the memory plan, and make nothing."
    )
    crf: int | None = Field(
        None,
        ge=0,
        le=63,
        description="Quality of the file; smaller is better.  [default: 18 of H.264, to 51; 24 of "
        "VP9, to 63]",
    )
    lossless: bool = Field(
        False, description="Keep every bit of the frames; fewer players show such a file."
    )

    @property
    def quality(self) -> dict[str, Any]:
        """Keywords of `Video.save`."""
        return {"crf": self.crf, "lossless": self.lossless}


class BatchFlags(Options):
    """Flags of commands that take many inputs."""

    shard: str | None = Field(
        None,
        description="Take every N-th input from the I-th on, counted from 0, before --resume "
        "leaves any out; auto takes I and N from Slurm, I alone from a Kubernetes Indexed Job.",
        json_schema_extra={"metavar": "I/N|auto"},
    )
    shard_count: int | None = Field(
        None, ge=1, description="N of --shard auto, where JOB_COMPLETION_INDEX is I."
    )

    @property
    def part(self) -> tuple[int, int]:
        """Index of the shard and number of shards; 0 and 1 for all inputs."""
        environment, count = os.environ, self.shard_count
        text = "0/1" if self.shard is None else self.shard
        called = option("shard", text)
        if count is not None and self.shard != "auto":
            raise ValueError(f"{option('shard_count', count)} belongs to {option('shard', 'auto')}")
        if text == "auto":
            names = ("SLURM_PROCID", "SLURM_NTASKS")
            pairs = [environment.get("JOB_COMPLETION_INDEX"), count], [*map(environment.get, names)]
            text = next((f"{i}/{n}" for i, n in pairs if i is not None and n is not None), "")
            if not text:
                raise ValueError(
                    f"{called}: neither {' and '.join(names)} nor JOB_COMPLETION_INDEX and "
                    f"{option('shard_count')} are set; give I/N"
                )
            called += f" ({text})"
        if not re.fullmatch(r"\d{1,9}/[1-9]\d{0,8}", text, re.ASCII):
            raise ValueError(f"{called}: it is no I/N, such as 0/8, nor auto")
        index, count = map(int, text.split("/"))
        if index >= count:
            raise ValueError(f"{called}: of {count} shards the last is {count - 1}/{count}")
        return index, count

    @model_validator(mode="after")
    def _check_part(self) -> Self:
        assert self.part
        return self


class Request(Options):
    """One video to make.

    Attributes:
        NO_EFFECT: fields that never change the frames.
        INPUT_FRAMES: kind of input -> frames that are continued by default.
    """

    NO_EFFECT: ClassVar[frozenset[str]] = frozenset({"preview_every"})
    INPUT_FRAMES: ClassVar[Mapping[str, int]] = {"none": 0, "image": 1, "video": 1}

    prompt: Prompt | None = Field(None, description="What the video shows, in a paragraph.")
    prompt_embeddings: Embedding = None
    seed: Seed = 1
    num_input_frames: int = 0
    fit: Fit = Field("crop", description=FIT)

    @classmethod
    def make(
        cls,
        stated: Mapping[str, Any],
        defaults: Mapping[str, Any],
        kind: str | None,
        name: Name = option,
    ) -> Self:
        """A request: what is stated, else the model's default, else the class's.

        Args:
            stated: fields by name.
            defaults: of the model.
            kind: of the input, "image" or "video".
            name: what an error calls a field.

        Raises:
            InputError: one line for each problem.
        """
        frames = cls.INPUT_FRAMES.get(kind or "none")
        if frames is None:
            raise InputError("no input; give an image or a video to continue")
        request = cls.parse({"num_input_frames": frames, **defaults, **stated}, name)
        num_frames, called = request.num_input_frames, name("num_input_frames")
        if (kind is None) == bool(num_frames):
            there = "no input; give one" if num_frames else "an input; give 1 or more"
            raise InputError(f"{called} is {num_frames}, but there is {there}")
        if kind == "image" and num_frames > 1:
            raise InputError(f"{called} is {num_frames}, but an image has 1 frame; leave it out")
        return request

    def unused(self) -> dict[str, str]:
        """Fields without effect beside the others -> why."""
        return {}

    def effective(self, unused: Collection[str]) -> dict[str, Any]:
        """The values that decide the frames: what --resume compares."""
        return {n: value for n, value in self if n not in unused and n not in self.NO_EFFECT}


class VideoRequest(Request):
    """One video of a given size, denoised from noise."""

    negative_prompt: Text | None = Field(
        NEGATIVE_PROMPT, description="What the video does not show; empty for none."
    )
    negative_prompt_embeddings: Embedding = None
    num_steps: Steps = 35
    guidance: Guidance = 7.0
    num_video_frames: Size = Field(93, description="Frames of the video, input frames included.")
    height: Size = Field(704, description="Height in pixels; a multiple of 16.")
    width: Size = Field(1280, description="Width in pixels; a multiple of 16.")
    fps: Fps = 16.0
    step_cache: StepCache = "off"
    preview_every: PreviewEvery = 0

    @property
    def video(self) -> VideoShape:
        return VideoShape(self.num_video_frames, self.height, self.width)

    def unused(self) -> dict[str, str]:
        unused = "negative_prompt", "negative_prompt_embeddings"
        return {} if self.guidance else dict.fromkeys(unused, "guidance is 0")


Count = Annotated[int, Field(ge=1, le=65536)]


GuidanceParallel = Annotated[
    Literal["auto", "on", "off"],
    Field(
        description="Two halves of the GPUs compute the branches with the prompt and without; "
        "auto: where their number is even. Without effect at guidance 0."
    ),
]
ContextParallel = Annotated[
    Literal["auto", "ulysses", "ring"],
    Field(
        description="How GPUs share the attention of a video: each with some of the heads, or keys "
        "and values passed round; auto: heads where their number divides."
    ),
]


def offload(subject: str, default: bool = False, *, streamed: bool = False) -> Any:
    """Field of a flag that keeps a part in host memory while it is not used.

    A `streamed` one has two blocks on the GPU while it is used.
    """
    use = "; in use, its blocks come to the GPU one by one." if streamed else " while not in use."
    return Field(default, description=f"Keep the {subject} in host memory{use}")


def _listed(value: Any) -> Any:
    """None, one value or several, paths too, as a tuple of texts."""
    values = value if isinstance(value, list | tuple) else () if value is None else (value,)
    return tuple(fspath(each) if isinstance(each, PathLike) else each for each in values)


class LoadOptions(Options):
    """How a model is loaded: where its parts are, on what it runs, what runs around it.

    Attributes:
        DECISIVE: options that change the frames.
    """

    DECISIVE: ClassVar[frozenset[str]] = frozenset()

    checkpoint_dir: Path = Field(
        "checkpoints", description="Folder of the model folders, before the hub's cache."
    )
    lora: Annotated[tuple[Path, ...], BeforeValidator(_listed)] = Field(
        (),
        description="LoRA adapter of the transformer, and perhaps a factor: FILE:0.5; PEFT, "
        "diffusers, kohya, NVIDIA's trainers. May be repeated: adapters add up.",
        json_schema_extra={"single": True, "metavar": "FILE[:SCALE]"},
    )
    device: str | None = Field(
        None, description="cuda, cuda:1, cpu, mps.  [default: the GPU, if there is one]"
    )
    dtype: Literal["bfloat16", "float16", "float32", "float64"] | None = Field(
        None, description="Precision of the networks.  [default: bfloat16 on a GPU, else float32]"
    )
    num_gpus: Count | Literal["auto"] | None = Field(
        None,
        description="GPUs to run on, or auto for all of this machine; processes where there is "
        "none.  [default: the processes of torchrun, else 1]",
    )
    data_parallel: Count | Literal["auto"] = Field(
        1, description="Groups of GPUs that make different videos of a batch; auto: as many as fit."
    )
    fsdp: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Spread a denoiser's weights over the GPUs that make a video, gathered a block "
        "at a time; auto: where they do not fit whole.",
    )
    disable_guardrail: bool | None = Field(
        None, description="Do not check prompt and video. Bundled models have no guardrails."
    )
    guardrail_dir: Path | None = Field(
        None,
        description="Folder of blocklist, video_content_safety_filter and face_blur_filter.  "
        "[default: the released places below --checkpoint_dir]",
    )
    offload_guardrail_models: bool = offload("guardrails")

    @property
    def processes(self) -> int | Literal["auto"] | None:
        """Processes that are asked for; None where it is not stated."""
        return self.num_gpus

    @property
    def offloaded(self) -> frozenset[str]:
        """Offload flags that are set."""
        return frozenset(name for name, value in self if name.startswith("offload_") and value)


class T5Options(LoadOptions):
    """Load options of models that read T5 embeddings."""

    text_encoder_dir: Path | None = Field(
        None,
        description="T5: folder below --checkpoint_dir, or a path.  [default: google-t5/t5-11b]",
    )
    text_encoder_dtype: Literal["bfloat16", "float32"] | None = Field(
        None, description="Precision of T5.  [default: bfloat16 on a GPU, else float32]"
    )
    offload_text_encoder_model: bool = offload("text encoder", streamed=True)
    offload_tokenizer: bool = offload("tokenizer")
