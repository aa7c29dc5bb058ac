"""`checkpoints download` against a hub on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import worldline.downloads
from worldline.catalog import FLOW_MODELS
from worldline.locate import locate
from worldline.opening import open_world
from worldline.text.reason1 import RELEASED

from ..fake_hub import COMMIT, FakeHub, serving
from .conftest import Run

NAMES = ("Cosmos-Predict1-4B", "Cosmos-Tokenize1-DV8x16x16-720p", "Cosmos-Guardrail1")
MODEL = f"nvidia/{NAMES[0]}"


def made_up() -> dict[str, dict[str, bytes]]:
    guardrail = (
        "blocklist/custom/words",
        "face_blur_filter/Resnet50_Final.pth",
        "video_content_safety_filter/safety_filter.pt",
    )
    files = {
        "Cosmos-Predict1-4B": ("model.pt", "config.json", "README.md"),
        "Cosmos-Tokenize1-DV8x16x16-720p": ("encoder.jit", "decoder.jit", "autoencoder.jit"),
        "Cosmos-Tokenize1-CV8x8x8-720p": ("encoder.jit", "decoder.jit", "mean_std.pt"),
        "Cosmos-Predict1-7B-Decoder-DV8x16x16ToCV8x8x8-720p": ("model.pt", "aux_vars.pt"),
        "Cosmos-Guardrail1": guardrail,
    }
    return {
        f"nvidia/{folder}": {name: f"{folder} {name}".encode() * 100 for name in names}
        for folder, names in files.items()
    }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    monkeypatch.setattr(worldline.downloads, "PAUSE", 0.0)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving(FakeHub(made_up())) as found:
        monkeypatch.setenv("HF_ENDPOINT", found.address)
        yield found


def test_a_model_and_its_parts(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    result = run("checkpoints", "download", "--model_sizes", "4B", "--checkpoint_dir", root)
    assert result.exit_code == 0, result.stderr
    assert "12 files" in result.stdout
    assert (root / "Cosmos-Predict1-4B" / "model.pt").read_bytes() == (
        hub.repositories[MODEL]["model.pt"]
    )
    assert not (root / "Cosmos-Predict1-4B" / "README.md").exists()
    assert not (root / "Cosmos-Tokenize1-DV8x16x16-720p" / "autoencoder.jit").exists()
    assert (root / "nvidia" / "Cosmos-Guardrail1" / "blocklist" / "custom" / "words").is_file()
    hub.asked.clear()
    again = run("checkpoints", "download", NAMES[0], "--checkpoint_dir", root)
    assert again.exit_code == 0, again.stderr
    assert not [name for method, name, _ in hub.asked if method == "GET"]
    assert again.stderr.count("verified") == 12


def test_predict2_5(run: Run, hub: FakeHub, tiny_predict2_5: Path, tmp_path: Path) -> None:
    """What was fetched is found, both models of a repository and what they share."""
    post, pre = FLOW_MODELS[:2]
    folders = {post.repository: post.repository.split("/")[1], RELEASED: RELEASED}
    for repository, folder in folders.items():
        there = tiny_predict2_5 / folder
        files = (path for path in there.rglob("*") if path.is_file())
        hub.repositories[repository] = {
            path.relative_to(there).as_posix(): path.read_bytes() for path in files
        }
    hub.repositories[post.repository]["LICENSE"] = b"of both"
    for name in ("config.json", "model.safetensors"):
        hub.repositories.setdefault("Qwen/Qwen3Guard-Gen-0.6B", {})[name] = name.encode()
    words = (post.name, f"{post.repository}/pre-trained", "--checkpoint_dir", tmp_path)
    result = run("checkpoints", "download", *words)
    assert result.exit_code == 0, result.stderr
    for model in (post, pre):
        opened = open_world(locate(model.name, tmp_path), {})
        assert opened.name == model.name
        assert "text" in opened.parts
    for name in ("nvidia/Cosmos-Guardrail1", "Qwen/Qwen3Guard-Gen-0.6B"):
        assert (tmp_path / name).is_dir()
    assert result.stderr.count("LICENSE") == 1
    again = run("checkpoints", "download", *words, "--disable-guardrails", "--dry-run")
    assert again.exit_code == 0, again.stderr
    assert "uardrail1" not in again.stdout
    assert again.stdout.rstrip().endswith("; 0 B to fetch")


def test_what_is_whole_in_the_hubs_cache_is_not_fetched(
    run: Run, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in NAMES[:2]:
        snapshot = tmp_path / "hub" / f"models--nvidia--{name}" / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        for file, content in hub.repositories[f"nvidia/{name}"].items():
            (snapshot / file).write_bytes(content)
    (snapshot / "encoder.jit").unlink()
    words = ("checkpoints", "download", NAMES[0], "--checkpoint_dir", tmp_path / "own")
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    assert f"{NAMES[0]} is in the hub's cache: {tmp_path / 'hub'}" in result.stderr
    assert not (tmp_path / "own" / NAMES[0]).exists()
    assert (tmp_path / "own" / NAMES[1] / "encoder.jit").is_file()
    assert result.stderr.count("verified") == 12


def test_without_parts(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    words = ("--disable-guardrail", "--disable-diffusion-decoder", "--checkpoint-dir", tmp_path)
    result = run("checkpoints", "download", NAMES[0], *words)
    assert result.exit_code == 0, result.stderr
    assert not (tmp_path / "nvidia").exists()
    assert {path.name for path in tmp_path.iterdir()} >= {NAMES[0], NAMES[1]}


def test_dry_run(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / NAMES[0]).mkdir()
    content = hub.repositories[MODEL]["model.pt"]
    (tmp_path / NAMES[0] / "model.pt").write_bytes(content)
    result = run("checkpoints", "download", NAMES[0], "--dry-run", "--checkpoint_dir", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert f"2.7 kB  {tmp_path / NAMES[0] / 'model.pt'}  (present)" in result.stdout
    assert f"3.0 kB  {tmp_path / NAMES[0] / 'config.json'}\n" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("12 files, ")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["model.pt"]


def test_dry_run_without_a_hub(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    result = run("checkpoints", "download", NAMES[0], "--dry_run", "--checkpoint_dir", tmp_path)
    assert result.exit_code == 1
    assert result.stdout == ""  # no sum of nothing
    assert f"{MODEL}: http://127.0.0.1:9 cannot be reached" in result.stderr


def test_a_web_page_is_one_line(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    hub.raw[""] = (200, {"Content-Type": "text/html"}, b"<html>log in</html>")
    result = run("checkpoints", "download", NAMES[0], "--checkpoint_dir", tmp_path)
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    assert f"{MODEL}: {hub.address}/" in line
    assert "web page" in line


def test_what_is_refused_is_named_at_once(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    hub.refused["nvidia/Cosmos-Guardrail1"] = (401, "GatedRepo")
    del hub.repositories["nvidia/Cosmos-Tokenize1-DV8x16x16-720p"]
    result = run("checkpoints", "download", NAMES[0], "--checkpoint_dir", tmp_path)
    assert result.exit_code == 1
    for part in (
        "nothing was fetched",
        "accept its licence on https://huggingface.co/nvidia/Cosmos-Guardrail1",
        "HF_TOKEN",
        "nvidia/Cosmos-Tokenize1-DV8x16x16-720p: ",
    ):
        assert part in result.stderr
    assert not [*tmp_path.iterdir()]


def test_a_damaged_file_is_not_left(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    hub.damaged["model.pt"] = 9
    result = run("checkpoints", "download", NAMES[0], "--checkpoint_dir", tmp_path)
    assert result.exit_code == 1
    assert "came damaged" in result.stderr
    assert not (tmp_path / NAMES[0] / "model.pt").exists()


def test_a_full_disk_is_named_first(
    run: Run, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    result = run("checkpoints", "download", NAMES[0], "--checkpoint_dir", tmp_path)
    assert result.exit_code == 1
    assert "has room for 10 B" in result.stderr
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing is named"),
        (["--model_sizes", "3B"], "'3B' is not one of"),
        (["--model_sizes", "4B", "--model_types", "Text2World"], "is of 4B and Text2World"),
        (["Cosmos-Predict1-4C"], "did you mean"),
    ],
)
def test_wrong_words(words: list[str], message: str, run: Run, tmp_path: Path) -> None:
    result = run("checkpoints", "download", *words, "--checkpoint_dir", tmp_path)
    assert result.exit_code == 2
    assert message in result.stderr


def test_it_imports_no_torch(hub: FakeHub, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom worldline.cli.main import main\n"
        f"words = {json.dumps(['checkpoints', 'download', NAMES[0], '--checkpoint_dir', '.'])}\n"
        "try: main(words)\nexcept SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, capture_output=True)
    assert (tmp_path / NAMES[0] / "model.pt").is_file()


def test_a_data_set(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    name = "someone/Clips-of.robots"
    clips = {f"{folder}{n}.mp4": bytes([n]) * 999 for n, folder in enumerate(("", "a/", "a/b/"))}
    hub.repositories[f"datasets/{name}"] = {**clips, "README.md": b"#", "a/meta.json": b"{}"}
    hub.damaged["a/1.mp4"] = 1
    words = ("checkpoints", "download", "--dataset", name, "--include", "*.mp4*", "--local-dir")
    listed = run(*words, tmp_path / "data", "--dry_run")
    assert listed.stdout.count(".mp4") == 3
    assert "README" not in listed.stdout
    assert not (tmp_path / "data").exists()
    result = run(*words, tmp_path / "data")
    assert result.exit_code == 0, result.stderr
    assert "3 files" in result.stdout
    for file, content in clips.items():
        assert (tmp_path / "data" / file).read_bytes() == content
    hub.asked.clear()
    (tmp_path / "data" / "0.mp4").unlink()
    result = run("checkpoints", "download", "--dataset", name, "--local_dir", tmp_path / "data")
    assert result.exit_code == 0, result.stderr
    fetched = {file for method, file, _ in hub.asked if method == "GET"}
    assert fetched == {"0.mp4", "README.md", "a/meta.json"}


@pytest.mark.parametrize(
    ("words", "status", "part"),
    [
        (("--dataset", "Clips"), 2, "OWNER/NAME"),
        (("--dataset", "a/b/c"), 2, "OWNER/NAME"),
        (("--dataset", "a/b", NAMES[0]), 2, NAMES[0]),
        (("--include", "*.mp4", NAMES[0]), 2, "--dataset"),
        (("--local_dir", "x", NAMES[0]), 2, "--dataset"),
        (("--dataset", "a/absent"), 1, "datasets/a/absent"),
        (("--dataset", "a/b", "--include", "*.mov"), 1, "*.mov"),
    ],
)
def test_a_data_set_that_cannot_be_had(
    run: Run, hub: FakeHub, tmp_path: Path, words: tuple[str, ...], status: int, part: str
) -> None:
    hub.repositories["datasets/a/b"] = {"x.mp4": b"x"}
    result = run("checkpoints", "download", *words)
    assert result.exit_code == status, result.stderr
    assert part in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_gated_data_set(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    hub.repositories["datasets/a/b"] = {"x.mp4": b"x"}
    hub.refused["datasets/a/b"] = 403, "GatedRepo"
    result = run("checkpoints", "download", "--dataset", "a/b", "--local_dir", tmp_path / "x")
    assert result.exit_code == 1
    assert "huggingface.co/datasets/a/b" in result.stderr
    assert not (tmp_path / "x").exists()
