"""`worldline doctor`: what this machine has, and which models fit."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import click

from worldline.files import GIGABYTE

_ENCODERS = {"mp4, mov, mkv": "libx264", "webm": "libvpx-vp9", "gif": "gif"}
_DECODERS = ("h264", "hevc", "vp9", "av1", "mpeg4", "gif")


@click.command()
def doctor() -> None:
    """Report what this machine can run.

    It lists Python, torch, GPUs, attention, codecs, free memory, and the models that fit.
    """
    for topic, finding in _findings():
        click.echo(f"{topic:<12} {finding}")


def _findings() -> Iterator[tuple[str, str]]:
    import torch

    yield "worldline", version("worldline")
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield "torch", f"{torch.__version__}, {built}"
    yield from _devices()
    yield "triton", _installed("triton", "plain modules are used, which are slower on a GPU")
    yield "attention", ", ".join(_attention())
    yield from _codecs()
    yield from _fits()


def _installed(package: str, otherwise: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return f"not installed: {otherwise}"


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    from worldline.memory import host_memory

    host = host_memory()
    free = f", {_gigabytes(host.free)} of {_gigabytes(host.total)} free" if host else ""
    yield "cpu", f"{torch.get_num_threads()} threads{free}"
    if torch.backends.mps.is_available():
        yield "gpu", "Apple (mps)"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        found = torch.cuda.get_device_properties(index)
        available, total = torch.cuda.mem_get_info(index)
        yield (
            "gpu",
            f"{index}: {found.name}, compute capability {found.major}.{found.minor}, "
            f"{_gigabytes(available)} of {_gigabytes(total)} free",
        )
    if not count and not torch.backends.mps.is_available():
        yield "gpu", "none that torch can use"


def _attention() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return ["torch SDPA on the CPU (prompt), matrix products (decoding)"]
    backends = torch.backends.cuda
    found = [
        name
        for name, enabled in (
            ("cuDNN", backends.cudnn_sdp_enabled()),
            ("flash", backends.flash_sdp_enabled()),
            ("memory-efficient", backends.mem_efficient_sdp_enabled()),
            ("math", backends.math_sdp_enabled()),
        )
        if enabled
    ]
    decoding = [
        "Triton, split keys (decoding)" if find_spec("triton") else "matrix products (decoding)"
    ]
    return [*decoding, f"torch SDPA ({', '.join(found)})"]


def _codecs() -> Iterator[tuple[str, str]]:
    import av
    import av.codec

    yield "pyav", av.__version__
    missing = [
        f"{formats} cannot be written ({encoder} is missing)"
        for formats, encoder in _ENCODERS.items()
        if encoder not in av.codec.codecs_available
    ]
    written = [f for f, encoder in _ENCODERS.items() if encoder in av.codec.codecs_available]
    yield "writes", "; ".join([", ".join(written), *missing])
    readable = []
    for name in _DECODERS:
        try:
            av.codec.Codec(name, "r")
        except ValueError:  # PyAV's own error of an unknown codec is one
            continue
        readable.append(name)
    yield "reads", ", ".join(readable)


def _fits() -> Iterator[tuple[str, str]]:
    from worldline.catalog import ENTRIES
    from worldline.locate import bundled_names
    from worldline.memory import device_memory
    from worldline.opening import choose_compute, fit_released
    from worldline.request import LoadOptions

    for name in bundled_names():
        yield "fits", f"{name} (bundled)"
    compute = choose_compute(LoadOptions.parse({}))
    device, memory = compute.device, device_memory(compute.device)
    for entry in ENTRIES:
        fit = fit_released(entry, compute, memory)
        if fit is None:
            continue
        need = f"about {_gigabytes(fit.need)} of {device.type} memory"
        flags = "".join(f" with --{flag}" for flag in fit.flags)
        if fit.fits is False:
            yield "too large", f"{entry.name}: needs {need}{flags}, {memory}"
        else:
            yield "fits", f"{entry.name}: {need}{flags}"


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / GIGABYTE:.1f} GB"
