"""`worldline doctor`: what this machine has, and which models fit."""

import platform
import subprocess
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from itertools import combinations

import click

from worldline.cli.models import describe_all
from worldline.files import readable_size
from worldline.request import LoadOptions

_ENCODERS = {"mp4, mov, mkv": "libx264", "webm": "libvpx-vp9", "gif": "gif"}


@click.command()
def doctor() -> None:
    """Report what this machine can run.

    It lists Python, torch, GPUs, links, attention, codecs, free memory, and the models that fit.
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
    elif torch.cuda.device_count() > 1:
        yield "links", _links(torch.cuda.device_count())
    for backend, number in (("nccl", torch.cuda.nccl.version), ("gloo", lambda: ("yes",))):
        if getattr(torch.distributed, f"is_{backend}_available", bool)():
            yield backend, ".".join(map(str, number()))
    missing = "not installed: `worldline fleet` alone needs it"
    yield "ray", version("ray") if find_spec("ray") else missing
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


def _links(count: int) -> str:
    """Links between pairs of GPUs, as nvidia-smi names them: NV18 are 18 NVLinks, SYS is the CPUs'.

    Without nvidia-smi, how many pairs reach each other's memory.
    """
    import torch

    pairs = [*combinations(range(count), 2)]
    try:
        words = ["nvidia-smi", "topo", "-m"]
        text = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout
        rows = [line.split()[1:] for line in text.splitlines() if line.startswith("GPU")]
        kinds = Counter(rows[first][second] for first, second in pairs)
    except (OSError, subprocess.SubprocessError, LookupError):
        reach = torch.cuda.can_device_access_peer
        kinds = Counter("direct" if reach(*pair) else "by the host" for pair in pairs)
    return ", ".join(f"{number} x {kind}" for kind, number in kinds.items())
