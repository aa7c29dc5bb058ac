"""`worldline doctor`: what this machine has, and which models fit."""

import platform
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec

import click

from worldline.cli.models import describe_all
from worldline.files import readable_size
from worldline.request import LoadOptions

_ENCODERS = {"mp4, mov, mkv": "libx264", "webm": "libvpx-vp9", "gif": "gif"}


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
    yield "torch", torch.__version__
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
    decoding = "Triton, split keys" if cuda and triton else "matrix products"
    yield "attention", f"torch SDPA for prompts, {decoding} for decoding"
    yield "pyav", av.__version__
    known = av.codec.codecs_available
    yield "writes", ", ".join(formats for formats, codec in _ENCODERS.items() if codec in known)
    for row in describe_all(LoadOptions.parse({})):
        if row["memory"]:
            fits = "fits" if row["runs_here"].startswith("yes") else "too large"
            yield fits, f"{row['name']}: {readable_size(row['memory'])}; {row['runs_here']}"
