"""`worldline doctor`: what this machine has, and which models fit."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec

import click

from worldline.cli.models import describe_all
from worldline.files import readable_size
from worldline.request import LoadOptions

_ENCODERS = {"mp4, mov, mkv": "libx264", "webm": "libvpx-vp9", "gif": "gif"}
_DECODERS = {"h264", "hevc", "vp9", "av1", "mpeg4", "gif"}


@click.command()
def doctor() -> None:
    """Report what this machine can run.

    It lists Python, torch, GPUs, attention, codecs, free memory, and the models that fit.
    """
    for topic, finding in _findings():
        click.echo(f"{topic:<12} {finding}")


def _findings() -> Iterator[tuple[str, str]]:
    import av
    import torch

    from worldline.memory import Memory, host_memory

    cuda = torch.cuda.is_available()
    yield "worldline", version("worldline")
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield "torch", f"{torch.__version__}, {built}"
    yield "cpu", f"{torch.get_num_threads()} threads, {host_memory()}"
    for index in range(torch.cuda.device_count() if cuda else 0):
        card = torch.cuda.get_device_properties(index)
        capability = f"compute capability {card.major}.{card.minor}"
        memory = Memory(*torch.cuda.mem_get_info(index))
        yield "gpu", f"{index}: {card.name}, {capability}, {memory}"
    if not cuda:
        mps = torch.backends.mps.is_available()
        yield "gpu", "Apple (mps)" if mps else "none that torch can use"
    triton = find_spec("triton") is not None
    missing = "not installed: plain modules are used, which are slower on a GPU"
    yield "triton", version("triton") if triton else missing
    kinds = ("cudnn", "flash", "mem_efficient", "math")
    enabled = (kind for kind in kinds if getattr(torch.backends.cuda, f"{kind}_sdp_enabled")())
    names = ", ".join(enabled) if cuda else "on the CPU"
    decoding = "Triton, split keys" if cuda and triton else "matrix products"
    yield "attention", f"torch SDPA ({names}) for prompts, {decoding} for decoding"
    yield "pyav", av.__version__
    known = av.codec.codecs_available
    yield "writes", ", ".join(formats for formats, codec in _ENCODERS.items() if codec in known)
    if missing := ", ".join(codec for codec in _ENCODERS.values() if codec not in known):
        yield "missing", f"{missing}; install PyAV's own wheel"
    yield "reads", ", ".join(sorted(_DECODERS & known))
    for row in describe_all(LoadOptions.parse({})):
        if row["memory"]:
            fits = "fits" if row["runs_here"].startswith("yes") else "too large"
            yield fits, f"{row['name']}: {readable_size(row['memory'])}; {row['runs_here']}"
