"""`worldline doctor`: what this machine has, and which models fit."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec

import click

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

    yield "worldline", version("worldline")
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield "torch", f"{torch.__version__}, {built}"
    yield from _devices()
    triton = find_spec("triton") is not None
    missing = "not installed: plain modules are used, which are slower on a GPU"
    yield "triton", version("triton") if triton else missing
    yield "attention", ", ".join(_attention(triton))
    yield "pyav", av.__version__
    known = av.codec.codecs_available
    yield "writes", ", ".join(formats for formats, codec in _ENCODERS.items() if codec in known)
    if missing := ", ".join(codec for codec in _ENCODERS.values() if codec not in known):
        yield "missing", f"{missing}; install PyAV's own wheel"
    yield "reads", ", ".join(sorted(_DECODERS & known))
    yield from _fits()


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    from worldline.memory import Memory, host_memory

    memory = host_memory()
    yield "cpu", f"{torch.get_num_threads()} threads{f', {memory}' if memory else ''}"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            capability = f"compute capability {found.major}.{found.minor}"
            memory = Memory(*torch.cuda.mem_get_info(index))
            yield "gpu", f"{index}: {found.name}, {capability}, {memory}"
    elif torch.backends.mps.is_available():
        yield "gpu", "Apple (mps)"
    else:
        yield "gpu", "none that torch can use"


def _attention(triton: bool) -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return ["torch SDPA on the CPU (prompt), matrix products (decoding)"]
    backends = torch.backends.cuda
    enabled = {
        "cuDNN": backends.cudnn_sdp_enabled(),
        "flash": backends.flash_sdp_enabled(),
        "memory-efficient": backends.mem_efficient_sdp_enabled(),
        "math": backends.math_sdp_enabled(),
    }
    names = ", ".join(name for name, on in enabled.items() if on)
    decoding = "Triton, split keys" if triton else "matrix products"
    return [f"{decoding} (decoding)", f"torch SDPA ({names})"]


def _fits() -> Iterator[tuple[str, str]]:
    from worldline.catalog import ENTRIES
    from worldline.locate import bundled_names
    from worldline.memory import device_memory
    from worldline.opening import choose_compute, fit_released

    for name in bundled_names():
        yield "fits", f"{name} (bundled)"
    compute = choose_compute(LoadOptions.parse({}))
    memory = device_memory(compute.device)
    for entry in ENTRIES:
        if (fit := fit_released(entry, compute, memory)) is None:
            continue
        need = f"{entry.name}: {readable_size(fit.need)} of {compute.device.type} memory"
        flags = " ".join([" with", *(f"--{flag}" for flag in fit.flags)]) if fit.flags else ""
        if fit.fits is False:
            yield "too large", f"{need}{flags}, {memory}"
        else:
            yield "fits", f"{need}{flags}"
