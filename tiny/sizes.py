"""Sizes of the small worlds, and of the clips they are trained on."""

from __future__ import annotations

from dataclasses import replace

from tiny import encoders
from tiny.motion import FPS
from worldline.families.autoregressive.model import ARTransformerConfig
from worldline.families.diffusion.model import DiTConfig
from worldline.families.predict2_5.model import FlowDiTConfig
from worldline.nn.dit import LARGEST_GRID
from worldline.shapes import LatentShape, VideoShape
from worldline.tokenizers.cosmos.model import CosmosTokenizerConfig
from worldline.tokenizers.wan.model import WanTokenizerConfig

SHAPE = VideoShape(33, 128, 192)
GRID = LatentShape(5, 8, 12)
TOKENIZER = CosmosTokenizerConfig(
    channels=16,
    level_channels=(32, 64, 80),
    spatial=16,
    latent_channels=6,
    levels=(4, 4, 4, 4, 4, 4),
)
CONTINUOUS = CosmosTokenizerConfig(channels=24, level_channels=(48, 40, 40))
# whole eights wherever there are many pixels, in the halves that enlarging makes too
WAN = WanTokenizerConfig(channels=8, multipliers=(1, 4, 4, 4), num_blocks=1)
# Its cost is that of its first level, which has all pixels: quarters of more pictures teach more.
WAN_PIECE = VideoShape(33, 64, 96)
AUTOREGRESSIVE = ARTransformerConfig(
    depth=7,
    width=160,
    num_heads=6,
    num_kv_heads=2,
    head_size=32,
    hidden=448,
    vocabulary=4096,
    embedding_rows=4096,
    grid=GRID,
)
VIDEO2WORLD = replace(
    AUTOREGRESSIVE,
    depth=6,
    width=128,
    num_heads=4,
    hidden=384,
    embedding_rows=4160,  # and the id that begins a video, in whole 64s
    context_width=64,
    absolute_positions=True,
)
DIFFUSION = DiTConfig(
    depth=6,
    width=160,
    num_heads=5,
    head_size=32,
    hidden=512,
    context_width=64,
    lora_rank=16,
    condition_mask=True,
    max_grid=GRID,
    rope_ratio=(1.0, 1.0, 1.0),
    base_fps=FPS,
)
DECODER = replace(
    DIFFUSION,
    depth=5,
    width=128,
    num_heads=4,
    hidden=384,
    condition_mask=False,
    max_grid=LARGEST_GRID,
    base_fps=24.0,
    learned_positions=False,
    vocabulary=4096,
    id_width=8,
)
REASON1 = {**encoders.REASON1, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4}
FLOW = FlowDiTConfig(
    depth=6,
    width=128,
    num_heads=4,
    head_size=32,
    hidden=320,
    context_width=64,
    lora_rank=12,
    feature_width=REASON1["hidden_size"] * REASON1["num_hidden_layers"],
    rope_ratio=(1.0, 1.0, 1.0),
)
TEXT = {"d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 192, "num_layers": 5}
TEXT_LENGTH = 128  # bytes; captions have up to 120
ROTARY_PRECISION = "float32"  # of the angles of position, in training too
_REQUEST = {
    "num_video_frames": SHAPE.frames,
    "height": SHAPE.height,
    "width": SHAPE.width,
    "fps": int(FPS),
    "guidance": 1.0,
    "num_steps": 20,
    "negative_prompt": "",
}
WORLD_SETTINGS = {**_REQUEST, "rotary_precision": ROTARY_PRECISION, "text2world": True}
FLOW_SETTINGS = {**_REQUEST, "schedule": "shifted"}
HELD_OUT = 900_000  # seeds from here to 999,999 steer training; evaluation starts at 1,000,000
