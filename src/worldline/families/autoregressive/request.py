"""Requests, load options and commands of the autoregressive models; needs no torch."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from worldline.family import Command
from worldline.request import (
    ContextParallel,
    Name,
    Request,
    Seed,
    Size,
    StepCache,
    T5Options,
    offload,
)

Seam = Literal["corrected", "as_released"]
Rollout = Literal["tokens", "pixels"]
FPS = 25.0  # of every video, whatever the input's


class ARRequest(Request):
    """One clip to continue by an autoregressive model of Cosmos 1.0 or Predict1."""

    INPUT_FRAMES: ClassVar[Mapping[str, int]] = {"image": 1, "video": 9}

    num_input_frames: Literal[1, 9] = Field(
        9,
        description="Last frames of the input that are continued: 1 or 9.  [default: 9, 1 "
        "of an image]",
    )
    num_video_frames: Size | None = Field(
        None,
        description="Frames of the video, input frames included; 1 + 8k, beyond the model's own "
        "by --rollout.  [default: the model's own, 33]",
    )
    temperature: Annotated[float, Field(ge=0)] = Field(
        1.0, description="Sampling temperature; 0 is greedy."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        0.8, description="Nucleus sampling: total probability of the tokens that may be drawn."
    )
    seed: Seed = 0
    rollout: Rollout = Field(
        "tokens",
        description="Beyond the model's own length: draw on behind the last tokens, or encode the "
        "last frames again, window after window.",
    )
    decoder_seam: Seam = Field(
        "corrected",
        description="Join of the diffusion decoder's windows in a clip of more than 57 frames; "
        "as_released repeats a fault of the released code.",
    )

    step_cache: StepCache = "off"  # of the diffusion decoder

    @classmethod
    def make(
        cls,
        stated: Mapping[str, Any],
        defaults: Mapping[str, Any],
        kind: str | None,
        name: Name = str,
    ) -> Self:
        """A request; that of an image continues 1 frame, whatever is stated, as released."""
        one = {"num_input_frames": 1} if kind == "image" else {}
        return super().make({**stated, **one}, defaults, kind, name)

    @property
    def fps(self) -> float:
        return FPS


class AROptions(T5Options):
    """How an autoregressive model is loaded."""

    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=1000, strict=False)] = Field(
        "auto",
        description="Inputs of a batch that are drawn in step, each as it would be alone; auto: as "
        "many as fit into the memory, where that saves time.",
    )
    context_parallel: ContextParallel = "auto"
    disable_diffusion_decoder: bool | None = Field(
        None, description="Decode by the tokenizer alone."
    )
    offload_diffusion_decoder: bool = offload("diffusion decoder", streamed=True)
    offload_ar_model: bool = offload("transformer")
    offload_prompt_upsampler: bool = Field(
        False, description="Has no effect: these models have no prompt upsampler."
    )


SIGNATURE = ("tok_embeddings.weight",)  # ends of tensor names
REQUEST, OPTIONS = ARRequest, AROptions
HELP = (
    "Run the autoregressive models: 4B and 12B, which take no prompt, and 5B and 13B Video2World, "
    "which need one; of Cosmos 1.0 and Predict1."
)
_TEXT = frozenset(
    {
        "prompt",
        "prompt_embeddings",
        "text_encoder_dir",
        "text_encoder_dtype",
        "offload_text_encoder_model",
    }
)
_OUTPUTS = (
    "A single video is written to --video_save_folder/--video_save_name.mp4, those of a batch to "
    "0.mp4, 1.mp4, … by the 0-based line of the JSONL; beside each a report "
    "(.json) and its prompt (.txt), if it has one."
)

COMMANDS = (
    Command(
        name="autoregressive base",
        help=f"Continue videos or images to 33 frames, or more, without a prompt.\n\n{_OUTPUTS}",
        model="ar_model_dir",
        default_model="Cosmos-Predict1-4B",
        reads="worldline.cli.inputs:TYPED_MEDIA",
        hidden=frozenset({*_TEXT, "dtype"}),
    ),
    Command(
        name="autoregressive video2world",
        help=f"Continue videos or images to 33 frames, or more, by a prompt.\n\n{_OUTPUTS}",
        model="ar_model_dir",
        default_model="Cosmos-Predict1-5B-Video2World",
        reads="worldline.cli.inputs:TYPED_TEXT_MEDIA",
        hidden=frozenset({"dtype"}),
    ),
)
