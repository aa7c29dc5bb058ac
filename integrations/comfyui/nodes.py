"""Nodes: load a world, or connect to one on a server; continue a prompt, a picture or a clip.

They are of ComfyUI's V3 interface. A world is cached between runs, as any output of a node is.
"""

from __future__ import annotations

import json
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import comfy.model_management as management
import folder_paths
import torch
from comfy_api.latest import ComfyAPISync, ComfyExtension, InputImpl, Types, io, ui
from PIL import Image

import worldline
from worldline.locate import locate
from worldline.opening import recognise
from worldline.step import Step, Video
from worldline.video.read import Frames

World = io.Custom("WORLD")

CATEGORY = "worldline"
LARGEST_SIDE, MOST_FRAMES, MOST_STEPS, MOST_GUIDANCE = 8192, 4096, 1000, 100.0
UNSET = "0 takes the world's own"


def default_folder() -> str:
    """Folder of the weights: ComfyUI's models/worldline."""
    return str(Path(folder_paths.models_dir, "worldline"))


class LoadWorld(io.ComfyNode):
    """A world on this machine."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WorldlineLoadWorld",
            display_name="Load World",
            category=CATEGORY,
            description="Loads a world model, and names its guardrails.",
            inputs=[
                io.String.Input(
                    "name",
                    default="tiny-Cosmos-Predict2.5-2B",
                    tooltip="tiny-… is bundled; else a folder of checkpoint_dir, or a path",
                ),
                io.String.Input(
                    "checkpoint_dir",
                    default="",
                    tooltip="folder of the weights; models/worldline where it is empty",
                ),
                io.Boolean.Input(
                    "offload",
                    default=False,
                    tooltip="keep networks in host memory while they are not in use",
                ),
                io.String.Input(
                    "load_options",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip='other load options as JSON, such as {"dtype": "float32"}',
                ),
            ],
            outputs=[World.Output(display_name="world")],
        )

    @classmethod
    def execute(
        cls, name: str, checkpoint_dir: str, offload: bool, load_options: str = ""
    ) -> io.NodeOutput:
        folder = checkpoint_dir.strip() or default_folder()
        options = {"checkpoint_dir": folder, **parse_options(load_options, "load_options")}
        if offload:
            flags = recognise(locate(name.strip(), folder)).family.options.flags().values()
            options |= {flag: True for flag in flags if flag.startswith("offload_")}
        management.unload_all_models()  # ComfyUI's own may fill the device
        management.soft_empty_cache()
        world = worldline.load(name.strip(), **options)
        off = world.guards.guardrail_off
        guardrails = f"off ({off})" if off else "on"
        text = f"{world.name} on {world.device}; guardrails: {guardrails}"
        return io.NodeOutput(world, ui=ui.PreviewText(text))


class RemoteWorld(io.ComfyNode):
    """A world on a server. A workflow is stored in what it makes, so it has no field for a key."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WorldlineRemoteWorld",
            display_name="Remote World",
            category=CATEGORY,
            description="Connects to `worldline serve`; its key is in WORLDLINE_API_KEY.",
            inputs=[
                io.String.Input("url", default="http://127.0.0.1:8000"),
                io.String.Input(
                    "model", default="", tooltip="name of the world; empty: the server's only one"
                ),
            ],
            outputs=[World.Output(display_name="world")],
        )

    @classmethod
    def execute(cls, url: str, model: str) -> io.NodeOutput:
        world = worldline.connect(url.strip(), model=model.strip() or None)
        guarded = world.facts.get("guardrails")
        guardrails = "unknown" if guarded is None else "on" if guarded else "off"
        text = f"{world.name} on {world.url}; guardrails: {guardrails}"
        return io.NodeOutput(world, ui=ui.PreviewText(text))


class GenerateWorldVideo(io.ComfyNode):
    """Video of a prompt, or of what happens next in a picture or a clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WorldlineGenerateWorldVideo",
            display_name="Generate World Video",
            category=CATEGORY,
            description="Continues a prompt, a picture or a clip. One picture is an image, several "
            "are frames of a clip.",
            inputs=[
                World.Input("world"),
                io.String.Input("prompt", default="", multiline=True),
                io.Int.Input("seed", default=0, min=0, max=2**32 - 1, control_after_generate=True),
                io.Int.Input("num_video_frames", default=0, min=0, max=MOST_FRAMES, tooltip=UNSET),
                io.Int.Input("width", default=0, min=0, max=LARGEST_SIDE, step=16, tooltip=UNSET),
                io.Int.Input("height", default=0, min=0, max=LARGEST_SIDE, step=16, tooltip=UNSET),
                io.Int.Input("num_steps", default=0, min=0, max=MOST_STEPS, tooltip=UNSET),
                io.Float.Input(
                    "guidance",
                    default=-1.0,
                    min=-1.0,
                    max=MOST_GUIDANCE,
                    step=0.1,
                    tooltip="-1 takes the world's own",
                ),
                io.Image.Input("images", optional=True),
                io.Video.Input("video", optional=True),
                io.String.Input(
                    "options",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip='other options as JSON, such as {"temperature": 0.8}',
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images"),
                io.Video.Output(display_name="video"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(
        cls,
        world: Any,
        prompt: str,
        seed: int,
        images: torch.Tensor | None = None,
        video: Any = None,
        options: str = "",
        guidance: float = -1.0,
        **numbers: int,
    ) -> io.NodeOutput:
        if images is not None and video is not None:
            raise worldline.InputError("images and video are both connected; leave one out")
        if video is not None:
            images = video.get_components().images
        stated = {"seed": seed, **{name: number for name, number in numbers.items() if number}}
        if prompt.strip():
            stated["prompt"] = prompt
        if guidance >= 0:
            stated["guidance"] = guidance
        stated |= parse_options(options, "options")
        given = None if images is None else to_frames(images)
        if given is not None and video is None and len(given) == 1:
            given = Image.fromarray(given[0])
        made = follow(world, given, stated)
        frames = made.to_torch("THWC", float=True)
        components = Types.VideoComponents(
            images=frames, frame_rate=Fraction(made.fps).limit_denominator(1001)
        )
        report = json.dumps(
            {"seed": stated["seed"], "prompt": made.prompt, **made.report}, indent=1
        )
        return io.NodeOutput(frames, InputImpl.VideoFromComponents(components), report)


def follow(world: Any, given: Frames | Image.Image | None, options: dict[str, Any]) -> Video:
    """Video of a world, with progress; an interrupt of the user ends it between two steps."""
    execution, made = ComfyAPISync().execution, None
    with closing(world.stream(given, **options)) as steps:
        for step in steps:
            management.throw_exception_if_processing_interrupted()
            execution.set_progress(
                value=step.done, max_value=max(step.total, 1), preview_image=preview_of(step)
            )
            made = step.video
    assert made is not None, "a stream ends with its video"
    return made


def preview_of(step: Step) -> Image.Image | None:
    """Last frame of what a step has; None where it has none."""
    frames = step.preview if step.frames is None else step.frames
    return None if frames is None or not len(frames) else Image.fromarray(frames[-1])


def to_frames(images: torch.Tensor) -> Frames:
    """Frames uint8 (T, H, W, 3) of an IMAGE, float (T, H, W, 3 or 4) from 0 to 1, over white."""
    pixels = images.detach().cpu().float()
    if pixels.shape[-1] == 4:
        alpha = pixels[..., 3:]
        pixels = pixels[..., :3] * alpha + 1 - alpha
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def parse_options(text: str, name: str) -> dict[str, Any]:
    """Options that a text field has as JSON."""
    try:
        options = json.loads(text) if text.strip() else {}
    except ValueError as error:
        raise worldline.InputError(f"{name} is no JSON: {error}") from None
    if not isinstance(options, dict):
        raise worldline.InputError(f'{name} is no JSON object; give {{"name": value}}')
    return options


class WorldlineExtension(ComfyExtension):
    """The pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadWorld, RemoteWorld, GenerateWorldVideo]


async def comfy_entrypoint() -> WorldlineExtension:
    return WorldlineExtension()
