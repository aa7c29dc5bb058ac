"""Names that requests and loading choose from, and the released negative prompt; needs no torch.

Limits and defaults of numbers are in `worldline.pipelines.requests`.
"""

from __future__ import annotations

from typing import Literal

Generation = Literal["1.0", "Predict1"]
GENERATIONS: tuple[Generation, ...] = ("1.0", "Predict1")

Reinsertion = Literal["corrected", "march_2025"]  # of given frames, at every step of a sampler
SAMPLERS = ("edm_euler", "res_2ab", "res_1euler", "res_2mid")
ROTARY_PRECISIONS = ("bfloat16", "float32")
ScheduleName = Literal["karras", "shifted"]  # of noise levels, for rectified flows
MAX_SEED = 2**32 - 1  # numpy's RandomState takes no more

Seam = Literal["corrected", "as_released"]  # between windows of the diffusion decoder
SEAMS: tuple[Seam, ...] = ("corrected", "as_released")
Rollout = Literal["tokens", "pixels"]  # beyond the window of an autoregressive model
ROLLOUTS: tuple[Rollout, ...] = ("tokens", "pixels")
INPUT_FRAMES = (1, 9)  # that models of Cosmos 1.0 and Predict1 are given: of an image, of a video
CARRIED = 2  # latent frames of a window that the next one is given, by way of pixels

# cheapest first, of a world that has all parts
AUTOREGRESSIVE_OFFLOAD_FLAGS = (
    "offload_text_encoder_model",
    "offload_tokenizer",
    "offload_diffusion_decoder",
    "offload_ar_model",
)
# the text encoder is used once, the transformer is what takes the time
DIFFUSION_OFFLOAD_FLAGS = (
    "offload_text_encoder_model",
    "offload_tokenizer",
    "offload_diffusion_transformer",
)
FLOW_OFFLOAD_FLAGS = ("offload_text_encoder", "offload_tokenizer", "offload_diffusion_model")

NEGATIVE_PROMPT = (
    "The video captures a series of frames showing ugly scenes, static with no motion, motion "
    "blur, over-saturation, shaky footage, low resolution, grainy texture, pixelated images, "
    "poorly lit areas, underexposed and overexposed scenes, poor color balance, washed out "
    "colors, choppy sequences, jerky movements, low frame rate, artifacting, color banding, "
    "unnatural transitions, outdated special effects, fake elements, unconvincing visuals, poorly "
    "edited content, jump cuts, visual noise, and flickering. Overall, the video is of poor "
    "quality."
)
