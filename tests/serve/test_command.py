"""`worldline serve`: its flags, what it imports, its start and its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from worldline.cli.serve import Machine, choose_worlds, default_worlds, family_of, listen, read_keys
from worldline.errors import InputError
from worldline.serve.security import refuse_open_host

from .served import Served

COMMAND = [sys.executable, "-m", "worldline"]
NO_KEY = {name: value for name, value in os.environ.items() if name != "WORLDLINE_API_KEY"}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *words], capture_output=True, text=True, timeout=120, env=NO_KEY, check=False
    )


@pytest.mark.parametrize("words", [["--help"], ["serve", "--help"]])
def test_help_imports_neither_fastapi_nor_torch(words: list[str]) -> None:
    script = (
        "import sys\n"
        "from worldline.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as done: assert not done.code\n"
        "heavy = {'fastapi', 'starlette', 'uvicorn', 'torch', 'prometheus_client'}\n"
        "sys.exit(repr(heavy & {*sys.modules}) if heavy & {*sys.modules} else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_without_the_extra() -> None:
    script = (
        "import sys\n"
        "sys.modules['fastapi'] = None\n"
        "from worldline.cli.main import main\n"
        "main(['serve', '--port', '0'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=NO_KEY, check=False
    )
    assert done.returncode == 1
    assert 'pip install "worldline[serve]"' in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_hosts_that_need_a_key() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        assert refuse_open_host(host, (), insecure=False) is None
    for host in ("0.0.0.0", "::", "192.168.1.2", "studio.example"):
        assert "--api_key_file" in (refuse_open_host(host, (), insecure=False) or "")
        assert refuse_open_host(host, ("key",), insecure=False) is None
        assert refuse_open_host(host, (), insecure=True) is None


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLDLINE_API_KEY", raising=False)
    assert read_keys(None) == ()
    monkeypatch.setenv("WORLDLINE_API_KEY", "of-the-environment")
    assert read_keys(None) == ("of-the-environment",)
    path = tmp_path / "keys"
    path.write_text("# ours\nfirst-key\n\nsecond-key\nfirst-key\n")
    assert read_keys(path) == ("first-key", "second-key")
    for text in ("", "# none\n", "short\n", "with blank\n", "schlüssel\n"):
        path.write_text(text)
        with pytest.raises(InputError, match="keys"):
            read_keys(path)
    with pytest.raises(InputError, match="absent"):
        read_keys(tmp_path / "absent")


def test_small_answers_leave_at_once() -> None:
    # asyncio sends them at once where the listener has a protocol; else 40 ms later
    with listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_one_bundled_world_of_each_family() -> None:
    worlds = default_worlds()
    families = [family_of(world.removeprefix("tiny-")) for world in worlds]
    assert sorted(map(str, families)) == ["autoregressive", "diffusion", "predict2.5"]


def test_options_go_to_the_worlds_that_have_them() -> None:
    from worldline.cli.serve import ServeFlags, serve

    both = ["tiny-Cosmos-Predict1-4B", "tiny-Cosmos-Predict2.5-2B"]
    with serve.make_context("serve", [*both, "--device", "cpu", "--schedule", "karras"]) as context:
        flags = ServeFlags.parse({"words": tuple(both)})
        first, second = choose_worlds(flags, context)
    assert first.options == {"device": "cpu"}
    assert second.options == {"device": "cpu", "schedule": "karras"}
    flags = ServeFlags.parse({"words": tuple(both[:1])})
    context = serve.make_context("serve", [both[0], "--schedule", "karras"])
    with context, pytest.raises(InputError, match="--schedule"):
        choose_worlds(flags, context)


def test_refused_starts() -> None:
    for words, named in (
        (["--host", "0.0.0.0"], "--api_key_file"),
        (["tiny-Cosmos-Predict2.5-2B", "--num_gpus", "2"], "--gpus_per_worker"),
        (["tiny-Cosmos-Predict2.5-2B", "--context_parallel_size", "2"], "--gpus_per_worker"),
        (["tiny-Cosmos-Predict2.5-2B", "--data_parallel", "2"], "--workers"),
        (["tiny-Cosmos-Predict2.5-2B", "--min_workers", "2"], "--workers ray"),
        (["tiny-nothing"], "tiny-nothing"),
        (["--port", "99999"], "port"),
        (["--workers", "0"], "workers"),
    ):
        done = run("serve", *words)
        assert (done.returncode, named in done.stderr) == (2, True), done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_numbers_of_gpus_that_a_world_refuses() -> None:
    for words, named in (
        (["tiny-Cosmos-Predict1-4B", "--device", "cpu"], ("num_kv_heads", "(2)", "1 or 2")),
        (["tiny-Cosmos-Predict2.5-2B", "--device", "cuda:1"], ("--device cuda:1", "3 processes")),
        (["tiny-Cosmos-Predict2.5-2B", "--device", "cuda"], ("GPU", "--device cpu")),
    ):
        done = run("serve", *words, "--gpus_per_worker", "3", "--port", "0")
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1, done.stderr
        for word in ("--gpus_per_worker 3", *named):
            assert word in done.stderr


def test_flags_of_commands_alone_are_not_listed() -> None:
    lines = run("serve", "--help").stdout
    for name in ("--num_gpus", "--data_parallel", "--context_parallel_size "):
        assert f"  {name}" not in lines
    assert "  --gpus_per_worker" in lines


def test_workers_take_the_gpus_of_a_machine_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    def devices(visible: str, gpus: int, device: str | None = None) -> list[Any]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        machine = Machine(gpus, device)
        workers: list[Any] = [machine.worker("w", f"w/{place}", {}, "w") for place in range(3)]
        assert {worker.processes for worker in workers} == {max(1, gpus)}
        assert [worker.devices for worker in workers][: len(machine.groups)] == machine.groups
        return [worker.devices for worker in workers]

    assert devices("4,5,6,7", 2) == [["4", "5"], ["6", "7"], ["4", "5"]]
    assert devices("4,5,6,7", 2, "cuda") == [["4", "5"], ["6", "7"], ["4", "5"]]
    assert devices("0,1,2,3,4", 2) == [["0", "1"], ["2", "3"], ["0", "1"]]  # one is not used
    assert devices("0,1", 1) == [["0"], ["1"], ["0"]]
    assert devices("0,1", 2) == [["0", "1"]] * 3
    for nowhere in (("", 2), ("0,1", 2, "cpu"), ("0,1", 1, "cuda:1"), ("0,1", 0)):
        assert devices(*nowhere) == [None] * 3  # type: ignore[arg-type]
    options: Any = [Machine(gpus, None).worker("w", "w/0", {}, "w") for gpus in (0, 1)]
    assert [each.options for each in options] == [{"device": "cpu"}, {}]
    with pytest.raises(InputError, match=r"--gpus_per_worker 3.*2 GPUs"):
        devices("0,1", 3)


@pytest.mark.slow
def test_start_and_sigterm(tmp_path: Path) -> None:
    """The server prints its address, makes a video, keeps a job that runs, and ends with 0."""
    words = ("tiny-Cosmos-Predict2.5-2B", "--device", "cpu", "--drain_s", "0")
    server = Served(tmp_path, *words)
    server.until_ready()
    server.until(lambda: f"ready: {words[0]}\n" in (tmp_path / "server.out").read_text())
    second = run("serve", words[0], "--port", "0", "--data_dir", str(tmp_path / "data"))
    assert (second.returncode, str(server.process.pid) in second.stderr) == (2, True), second.stderr
    job = server.ask("/v1/videos", {"prompt": "a ball", "num_steps": 15})
    path = f"/v1/videos/{job['id']}"
    server.until(lambda: server.ask(path)["status"] != "queued")
    began = time.monotonic()
    assert server.stop(signal.SIGTERM) == 0
    assert time.monotonic() - began < 15
    server = Served(tmp_path, *words)
    server.until(lambda: server.ask(path)["status"] not in ("queued", "in_progress"))
    assert server.ask(path)["status"] == "completed"
    assert server.stop(signal.SIGINT) == 0
