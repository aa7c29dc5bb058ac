"""Requests, load options and commands of Cosmos-Predict2.5; needs no torch."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from worldline.catalog import FLOW_MODELS
from worldline.family import Command
from worldline.request import (
    ContextParallel,
    Count,
    Fps,
    GuidanceParallel,
    LoadOptions,
    Path,
    Size,
    VideoRequest,
    offload,
)
from worldline.shapes import nearest_frames

Schedule = Literal["karras", "shifted"]


def _one_plus_4k(frames: int) -> int:
    if frames and (frames - 1) % 4:
        raise ValueError(f"it is {frames}; give 1 + 4k, such as {nearest_frames(frames, 4)}")
    return frames


Frames4 = Annotated[int, AfterValidator(_one_plus_4k)]
RELEASED_CHUNK = 77  # frames; of samples that leave it out, models of shorter videos make fewer


class FlowRequest(VideoRequest):
    """One video of Predict2.5.

    Guidance is v + guidance (v - u) of the velocities with and without the prompt: one less than in
    the more usual form.
    """

    INPUT_FRAMES: ClassVar[Mapping[str, int]] = {"none": 0, "image": 1, "video": 5}

    num_input_frames: Frames4 = Field(
        0,
        ge=0,
        description="Last frames of the input that are continued; 1 + 4k.  [default: 5 of a "
        "video, 1 of an image]",
    )
    num_video_frames: Size = Field(
        93,
        description="Frames of the video, input frames included; 1 + 4k, any with chunk_size.",
    )
    fps: Fps = Field(
        16.0, description="Frames per second of the file; the network does not read it."
    )
    chunk_size: Size | None = Field(
        None, description="Frames that are kept of each chunk of a long video."
    )
    chunk_overlap: Annotated[Frames4, Field(ge=1)] = Field(
        1, description="Frames of a chunk that the next one continues; 1 + 4k."
    )

    @model_validator(mode="after")
    def _chunks(self) -> Self:
        size, overlap = self.chunk_size, self.chunk_overlap
        continued = max(overlap, self.num_input_frames)
        if size is None and overlap != 1:
            raise ValueError(f"chunk_overlap is {overlap} without chunks; give chunk_size")
        if size is not None and size <= continued:
            raise ValueError(f"chunk_size is {size}, of which {continued} are continued; give more")
        return self


class FlowOptions(LoadOptions):
    """How a model of Predict2.5 is loaded."""

    DECISIVE: ClassVar[frozenset[str]] = frozenset({"schedule"})

    context_parallel_size: Count | None = Field(
        None,
        description="GPUs that share a video; fewer than --num_gpus make groups with different "
        "videos; alone, it is --num_gpus, too.  [default: all]",
    )
    guidance_parallel: GuidanceParallel = "auto"
    context_parallel: ContextParallel = "auto"
    tokenizer_dir: Path | None = Field(
        None,
        description="Wan2.1 tokenizer: file or folder, below --checkpoint_dir or a path.  "
        "[default: beside the transformer, else that of nvidia/Cosmos-Predict2.5-2B]",
    )
    text_encoder_dir: Path | None = Field(
        None,
        description="Reason1: folder below --checkpoint_dir, or a path.  [default: "
        "nvidia/Cosmos-Reason1-7B]",
    )
    schedule: Schedule | None = Field(
        None,
        description="Noise schedule.  [default: that of the model's config.json; otherwise as it "
        "was released, or as diffusers' scheduler states, else shifted]",
    )
    disable_guardrail: bool | None = Field(
        None,
        alias="disable_guardrails",
        description="Do not check prompt and video. Bundled models have no guardrails.",
    )
    offload_guardrail_models: bool = offload("guardrails", True)
    offload_text_encoder: bool = offload("text encoder", streamed=True)
    offload_tokenizer: bool = offload("tokenizer")
    offload_diffusion_model: bool = offload("transformer", streamed=True)

    @property
    def processes(self) -> int | Literal["auto"] | None:
        return self.num_gpus or self.context_parallel_size


SIGNATURE = ("crossattn_proj.0.weight",)  # ends of tensor names
REQUEST, OPTIONS = FlowRequest, FlowOptions

COMMANDS = (
    Command(
        name="predict2.5",
        help="Make the videos of files of samples, by a model of Predict2.5.\n\n"
        "Each sample becomes NAME.mp4 in --output_dir (NAME.jpg if it has one frame); beside it "
        "the prompt (.txt) and a report (.json). Fields given here win over those of all samples. "
        "A sample that fails does not stop the others.",
        model="model",
        default_model=FLOW_MODELS[0].name,
        reads="worldline.families.predict2_5.samples:SAMPLES",
        # samples state these in other words, or not at all
        hidden=frozenset(
            {
                *("num_video_frames", "height", "width", "num_input_frames"),
                *("fps", "negative_prompt_embeddings"),
            }
        ),
        defaults={"chunk_size": RELEASED_CHUNK},
        negatable=True,
    ),
)
