"""Contents decide which file of a folder is the model, not names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor

from worldline.errors import CheckpointError
from worldline.locate import locate
from worldline.weights import networks
from worldline.weights.checkpoint import open_set
from worldline.weights.networks import (
    distributed_files,
    find_files,
    open_weights,
    training_files,
    weights_in,
)

ANCHORS = ("embed.weight",)
MODEL = {"net.embed.weight": torch.arange(6.0).view(2, 3), "net.head.weight": torch.ones(3)}
OTHER = {"encoder.conv.weight": torch.zeros(4)}


def put(path: Path, tensors: dict[str, Tensor] = MODEL) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pickled = path.name.endswith((".pt", ".pth", ".bin", ".ckpt", "optimizer"))
    torch.save(tensors, path) if pickled else save_file(tensors, path)
    return path


def put_index(index: Path, names: tuple[str, str]) -> list[Path]:
    """Write the model in two files, and an index of them."""
    index.parent.mkdir(parents=True, exist_ok=True)
    places = dict(zip(MODEL, names, strict=True))
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return [put(index.with_name(file), {name: MODEL[name]}) for name, file in places.items()]


def assert_model(path: Path) -> None:
    source = open_weights(path, ANCHORS)
    assert source.tensors.keys() == MODEL.keys()
    for name, tensor in MODEL.items():
        assert torch.equal(source.read(name), tensor)


@pytest.mark.parametrize(
    "name",
    [
        "my_world-fp16.safetensors",
        "step=500.ckpt",
        "weights.pth",
        "pytorch_model.bin",
        "weights.data",
        "5f3e",
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "transformer/diffusion_pytorch_model.bin",
        "transformer/mine.safetensors",
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_the_only_weights(name: str, beside: bool, tmp_path: Path) -> None:
    path = put(tmp_path / name)
    (tmp_path / "notes.txt").write_text("of the training")
    (path.parent / "config.json").write_text("{}")
    if beside:
        put(path.parent / "mean_std.pt", OTHER)
        put(path.parent / "optimizer", {f"state.{n}.exp_avg": torch.ones(2) for n in range(2)})
        (path.parent / "old.safetensors.incomplete").write_bytes(path.read_bytes())
    assert_model(tmp_path)
    assert_model(path)


def test_several_are_listed(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.pt"):
        put(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"a\.safetensors, b\.pt"):
        open_weights(tmp_path, ANCHORS)
    put(tmp_path / "model.pt")  # a released name decides
    assert_model(tmp_path)


def test_what_is_of_another_kind(tmp_path: Path) -> None:
    put(tmp_path / "vae.safetensors", OTHER)
    with pytest.raises(CheckpointError, match=r"no tokenizer .*vae\.safetensors"):
        find_files(tmp_path, ["tokenizer.pth"], "tokenizer", ANCHORS)
    (tmp_path / "vae.safetensors").write_bytes(b"<!doctype html>")
    with pytest.raises(CheckpointError, match="web page"):
        open_weights(tmp_path, ANCHORS)


INDEXES = [
    ("model.safetensors.index.json", ("model-00001-of-00002.safetensors", "b.safetensors")),
    (
        "transformer/diffusion_pytorch_model.safetensors.index.fp16.json",
        (
            "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
            "diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
        ),
    ),
    ("pytorch_model.bin.index.json", ("one.bin", "two.bin")),
]


@pytest.mark.parametrize(("name", "files"), INDEXES)
def test_an_index_stands_for_its_files(name: str, files: tuple[str, str], tmp_path: Path) -> None:
    paths = put_index(tmp_path / name, files)
    for path in (tmp_path, tmp_path / name, *paths):
        assert_model(path)
    assert weights_in(paths[0].parent) == [tmp_path / name]
    paths[1].unlink()
    for path in (tmp_path / name, paths[0]):
        with pytest.raises(CheckpointError, match=files[1]):
            open_weights(path, ANCHORS)


def test_parts_without_an_index(tmp_path: Path) -> None:
    parts = [tmp_path / f"own-{number:05}-of-00002.safetensors" for number in (1, 2)]
    for path, (name, tensor) in zip(parts, MODEL.items(), strict=True):
        put(path, {name: tensor})
    for path in (tmp_path, *parts):
        assert_model(path)
    parts[0].unlink()
    with pytest.raises(CheckpointError, match=f"part of a model.*{parts[0].name}"):
        open_weights(parts[1])
    with pytest.raises(CheckpointError, match=r"holds no model\.pt"):
        open_weights(tmp_path)


def test_files_of_a_training(tmp_path: Path) -> None:
    newest = [f"iter_000000010{end}.pt" for end in ("_ema_model", "_reg_model", "_model", "")]
    beside = [f"iter_000000010{end}.pt" for end in ("_optim", "_scheduler", "_RANK1_ema_model")]
    older = ["iter_000000009_ema_model.pt", "iter_000000002.pt"]
    for name in (*newest, *beside, *older):
        (tmp_path / name).touch()
    assert training_files(tmp_path) == [*newest, *older]


def test_the_iteration_that_a_training_calls_its_latest(tmp_path: Path) -> None:
    """A newer file may be half of one; a file of nothing but state stands for its iteration."""
    run = tmp_path / "checkpoints"
    put(run / "iter_000000020_ema_model.pt")
    put(run / "iter_000000020_reg_model.pt", OTHER)
    torch.save({"iteration": 20}, run / "iter_000000020.pt")
    put(run / "model_model_mp_0.pt", OTHER)  # what the training began with
    (run / "iter_000000030_ema_model.pt").write_bytes(b"half")
    (run / "latest_checkpoint.txt").write_text("iter_000000020.pt\n")
    for path in (tmp_path, run, run / "iter_000000020.pt"):
        assert_model(path)
    (run / "latest_checkpoint.txt").write_text("iter_000000010.pt\n")
    for path in (tmp_path, run):
        with pytest.raises(CheckpointError, match=r"latest_checkpoint\.txt names iteration 10"):
            open_weights(path, ANCHORS)
    (run / "latest_checkpoint.txt").write_text("")
    (run / "iter_000000030_ema_model.pt").unlink()
    assert_model(tmp_path)


@pytest.mark.parametrize("stem", ["iter_000000007", "iter_000000012"])
def test_parts_of_a_training(stem: str, tmp_path: Path) -> None:
    for other in ("model", "iter_000000003", stem):
        for rank in range(2):
            part = {"model.output.weight": torch.full((1, 2), 1.0 if other == stem else 0.0)}
            put(tmp_path / f"{other}_model_mp_{rank}.pt", part)
        torch.save({"iteration": 1}, tmp_path / f"{other}.pt") if other != "model" else None
    for path in (tmp_path, tmp_path / f"{stem}.pt", tmp_path / f"{stem}_model_mp_1.pt"):
        source = open_weights(path, ("output.weight",))
        assert torch.equal(source.read("model.output.weight"), torch.ones(2, 2))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_distributed_checkpoints_of_a_training(tmp_path: Path) -> None:
    run = tmp_path / "checkpoints"
    for number in (9, 10):
        for kind in ("model", "optim"):
            tensors = {name: tensor + (number == 9) for name, tensor in MODEL.items()}
            dcp.save(tensors, checkpoint_id=str(run / f"iter_{number:09}" / kind), no_dist=True)
    (run / "iter_000000011" / "model").mkdir(parents=True)  # was interrupted
    newest = run / "iter_000000010"
    for path in (tmp_path, run, newest, newest / "model", newest / "model" / ".metadata"):
        assert_model(path)
    (run / "latest_checkpoint.txt").write_text("iter_000000009")
    with pytest.raises(AssertionError):
        assert_model(tmp_path)
    (run / "latest_checkpoint.txt").write_text("iter_000000001")
    with pytest.raises(CheckpointError, match="iteration 1"):
        open_weights(run)
    (run / "latest_checkpoint.txt").unlink()
    dcp.save(MODEL, checkpoint_id=str(tmp_path / "other" / "iter_5"), no_dist=True)
    with pytest.raises(CheckpointError, match="several runs"):
        open_weights(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_whole_files_of_a_training(tmp_path: Path) -> None:
    """Averages of the newest step; states beside them are none."""
    run = tmp_path / "checkpoints"
    for number in (3, 12):
        put(run / f"iter_{number:09}" / "model.pt", {n: t + number for n, t in MODEL.items()})
        dcp.save(MODEL, checkpoint_id=str(run / f"iter_{number:09}.state"), no_dist=True)
    put(run / "iter_000000012" / "model_ema_bf16.pt")
    (run / "latest_checkpoint.txt").write_text("iter_000000012\n")
    for path in (tmp_path, run, run / "iter_000000012"):
        assert_model(path)
    (run / "latest_checkpoint.txt").write_text("iter_000000003\n")
    for path in (tmp_path, run):
        assert torch.equal(open_weights(path).read("net.head.weight"), torch.full((3,), 4.0))
    dcp.save(MODEL, checkpoint_id=str(run / "iter_000000002" / "model"), no_dist=True)
    for path in (tmp_path, run):  # beside one of before
        assert torch.equal(open_weights(path).read("net.head.weight"), torch.full((3,), 4.0))


def test_nemo_is_named(tmp_path: Path) -> None:
    for mark in ("weights/metadata.json", "context/io.json"):
        (tmp_path / mark).parent.mkdir()
        (tmp_path / mark).write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(CheckpointError, match="NeMo"):
        open_weights(tmp_path)


def test_a_folder_of_very_many_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    for place in ("a", "a/b", "a/b/c"):
        path = tmp_path / place / ".metadata"
        path.touch()
        assert distributed_files(tmp_path) == [f"{place}/.metadata"]
        path.unlink()
    (tmp_path / "b").mkdir()
    monkeypatch.setattr(networks, "_MOST_FOLDERS", 1)
    for place in ("a", "b"):
        (tmp_path / place / ".metadata").touch()
    assert len(distributed_files(tmp_path)) == 1


@pytest.mark.parametrize(
    ("head", "kind"),
    [(b"GGUF\3\0", "GGUF"), (b"\x89HDF\r\n\x1a\n", "HDF5"), (b"\x1f\x8b\x08", "gzip")],
)
def test_other_formats_are_named(head: bytes, kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "readme.txt").write_text("GGUF")
    with pytest.raises(CheckpointError) as refusal:
        open_weights(tmp_path)
    assert "a.png" not in str(refusal.value)
    (tmp_path / "model-Q8.x").write_bytes(head + bytes(600))
    with pytest.raises(CheckpointError, match=rf"model\.pt.*model-Q8\.x is .*{kind}"):
        open_weights(tmp_path)


def test_a_snapshot_of_a_hub_cache(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    assert locate(str(repository.parent), "nowhere").named == repository.parent
    blob = put(repository / "blobs" / "5f3e")
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    link = snapshot / "model.safetensors"
    link.symlink_to("../../blobs/5f3e")
    for path in (snapshot, link, blob, locate(repository, tmp_path).named):
        assert_model(path)
    blob.unlink()
    for path in (snapshot, link):
        with pytest.raises(CheckpointError, match=r"model\.safetensors.*blobs/5f3e"):
            open_set(path) if path == link else open_weights(path)
