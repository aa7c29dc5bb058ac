"""The doctor reports, whatever the memory has."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from worldline import memory, opening
from worldline.cli import doctor
from worldline.files import GIGABYTE

from .conftest import Run


def test_on_a_cpu(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    free = memory.Memory(int(30 * GIGABYTE), int(32 * GIGABYTE))
    monkeypatch.setattr(memory, "host_memory", lambda: free)
    result = run("doctor")
    assert result.exit_code == 0, result.stderr
    for part in (
        f"torch        {torch.__version__}",
        "30.0 of 32.0 GB are free",
        "none that torch can use",
        "gloo         yes",
        "ray          ",
        "torch SDPA for prompts, matrix products for decoding",
        "writes       mp4, mov, mkv, webm, gif",
        "fits         Cosmos-Predict1-4B",
        "too large    Cosmos-Predict1-12B",
        "too large    Cosmos-Predict1-7B-Text2World",
    ):
        assert part in result.stdout


def test_a_small_gpu_needs_flags(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="Small", major=8, minor=0)
    free, total = int(24 * GIGABYTE), int(32 * GIGABYTE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, total))
    monkeypatch.setattr(opening, "choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(opening, "fused", lambda _: True)  # whether Triton is here or not
    result = run("doctor")
    assert result.exit_code == 0, result.stderr
    assert "0: Small, compute capability 8.0, 24.0 of 32.0 GB are free" in result.stdout
    assert "fits         Cosmos-Predict1-4B" in result.stdout
    diffusion = [line for line in result.stdout.splitlines() if "7B-Text2World" in line]
    assert diffusion[0].startswith("fits")
    assert "; yes --offload_text_encoder_model" in diffusion[0]
    lines = [line for line in result.stdout.splitlines() if "12B" in line]
    assert lines[0].startswith("too large")


TOPOLOGY = """\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-31
GPU1\tNV18\t X \tSYS\tSYS\t0-31
GPU2\tSYS\tSYS\t X \tSYS\t32-63
NIC0\tPIX\tSYS\tSYS\t X \t
"""


@pytest.mark.parametrize(
    ("text", "links"),
    [(TOPOLOGY, "1 x NV18, 2 x SYS"), (None, "3 x by the host"), ("No devices", "3 x by the host")],
)
def test_links_of_gpus(text: str | None, links: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*_: object, **__: object) -> SimpleNamespace:
        if text is None:
            raise FileNotFoundError
        return SimpleNamespace(stdout=text)

    monkeypatch.setattr("subprocess.run", answer)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *_: False)
    assert doctor._links(3) == links


def test_host_memory() -> None:
    found = memory.host_memory()
    assert 0 < found.free <= found.total
