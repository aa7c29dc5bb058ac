"""Requests, load options and commands of the diffusion models; needs no torch."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from worldline.catalog import Generation
from worldline.family import Command
from worldline.request import (
    FIT,
    ContextParallel,
    Fps,
    GuidanceParallel,
    Path,
    Size,
    T5Options,
    VideoRequest,
    offload,
)
from worldline.shapes import Fit

Sampler = Literal["edm_euler", "res_2ab", "res_1euler", "res_2mid"]
Reinsertion = Literal["corrected", "march_2025"]
Precision = Literal["bfloat16", "float32"]
_CONDITIONING = ("reinsertion", "augment_sigma")


class DiffusionRequest(VideoRequest):
    """One video of Cosmos 1.0 or Predict1."""

    num_input_frames: Literal[0, 1, 9] = Field(
        0, description="Last frames of the input that are continued: 1 or 9.  [default: 1]"
    )
    num_video_frames: Size = Field(
        121, description="Frames of the video, input frames included; 1 + 8k."
    )
    fps: Fps = Field(24.0, description="Frames per second of the motion, and of the file.")
    fit: Fit = Field("stretch", description=FIT)
    sampler: Sampler | None = Field(
        None, description="[default: edm_euler; res_2ab of a 1.0 model]"
    )
    reinsertion: Reinsertion = Field(
        "corrected",
        description="Input frames in each step; march_2025 repeats a fault of the first release.",
    )
    augment_sigma: Annotated[float, Field(ge=0)] = Field(
        0.001, description="Noise level of the input frames."
    )
    rotary_precision: Precision | None = Field(
        None, description="Precision of the rotary angles.  [default: bfloat16, as released]"
    )

    def unused(self) -> dict[str, str]:
        num_frames = self.num_input_frames
        conditioning = {} if num_frames else dict.fromkeys(_CONDITIONING, "there is no input")
        return super().unused() | conditioning


class DiffusionOptions(T5Options):
    """How a diffusion model is loaded."""

    DECISIVE: ClassVar[frozenset[str]] = frozenset({"generation"})

    guidance_parallel: GuidanceParallel = "auto"
    context_parallel: ContextParallel = "auto"
    tokenizer_dir: Path | None = Field(
        None,
        description="Folder below --checkpoint_dir, or a path.  [default: "
        "Cosmos-Tokenize1-CV8x8x8-720p; Cosmos-1.0-Tokenizer-CV8x8x8 of a 1.0 model]",
    )
    generation: Generation | None = Field(
        None,
        description="Model generation; overrides the folder name.  [default: by that name, else "
        "Predict1]",
    )
    offload_diffusion_transformer: bool = offload("transformer", streamed=True)
    disable_prompt_upsampler: bool | None = Field(
        None, description="Use prompts as they are. Bundled models have no upsampler."
    )
    prompt_upsampler_dir: Path | None = Field(
        None,
        description="Folder below --checkpoint_dir, or a path.  [default: "
        "Cosmos-UpsamplePrompt1-12B-Text2World, or Pixtral-12B of a Video2World model]",
    )
    offload_prompt_upsampler: bool = offload("prompt upsampler")
    word_limit_to_skip_upsampler: Annotated[int, Field(ge=0)] = Field(
        250, description="Prompts of more words are used as they are (Text2World)."
    )


SIGNATURE = ("x_embedder.proj.1.weight", "patch_embed.proj.weight")  # ends of tensor names
REQUEST, OPTIONS = DiffusionRequest, DiffusionOptions
HELP = (
    "Run the diffusion models: 7B and 14B, Text2World and Video2World, of Cosmos 1.0 and Predict1."
)
_OUTPUTS = (
    "A single video is written to --video_save_folder/--video_save_name.mp4, those of a batch to "
    "0.mp4, 1.mp4, … by the 0-based line of the JSONL; beside each the prompt (.txt) and a report "
    "(.json)."
)

COMMANDS = (
    Command(
        name="diffusion text2world",
        help=f"Make a video of a prompt.\n\n{_OUTPUTS}",
        model="diffusion_transformer_dir",
        default_model="Cosmos-Predict1-7B-Text2World",
        reads="worldline.cli.inputs:PROMPTS",
        hidden=frozenset(
            {
                "num_input_frames",
                "fit",
                "reinsertion",
                "augment_sigma",
                "negative_prompt_embeddings",
                "dtype",
            }
        ),
    ),
    Command(
        name="diffusion video2world",
        help=f"Continue an image or a video, by a prompt.\n\n{_OUTPUTS}",
        model="diffusion_transformer_dir",
        default_model="Cosmos-Predict1-7B-Video2World",
        reads="worldline.cli.inputs:MEDIA",
        hidden=frozenset(
            {"augment_sigma", "negative_prompt_embeddings", "dtype", "word_limit_to_skip_upsampler"}
        ),
        defaults={"num_input_frames": 1},
    ),
)
