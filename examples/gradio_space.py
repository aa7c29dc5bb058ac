"""A Space in front of a server of worlds: Gradio over the HTTP client (`pip install gradio`).

WORLDLINE_URL=http://127.0.0.1:8000 python examples/gradio_space.py
"""

import os
from contextlib import closing
from pathlib import Path
from tempfile import mkdtemp

import gradio

import worldline


def main() -> None:
    world = worldline.connect(os.environ.get("WORLDLINE_URL", "http://127.0.0.1:8000"))

    def generate(prompt, image, seed, progress=gradio.Progress()):  # noqa: B008
        options = {"prompt": prompt} if prompt else {}
        try:
            with closing(world.stream(image, seed=int(seed), **options)) as steps:
                for step in steps:
                    progress((step.done, step.total), desc=step.kind)
        except worldline.Error as error:  # a refusal, a wrong size: in words, not as a trace
            raise gradio.Error(str(error)) from None
        return str(step.video.save(Path(mkdtemp(), "video.mp4")))

    inputs = [
        gradio.Textbox(label="What the video shows", lines=3),
        gradio.Image(type="pil", label="First frame"),
        gradio.Number(0, precision=0, minimum=0, maximum=2**32 - 1, label="Seed"),
    ]
    gradio.Interface(generate, inputs, gradio.Video(label="Video"), title=world.name).launch()


if __name__ == "__main__":
    main()
