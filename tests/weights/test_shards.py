"""Shards of any number of ranks are the model that they were cut from, bit for bit."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from worldline.errors import CheckpointError
from worldline.weights.checkpoint import find_shards, open_checkpoint, open_shards
from worldline.weights.keymap import KeyMap
from worldline.weights.stream import load_into

WHOLE = {
    "model.output.weight": torch.randn(8, 6, generator=torch.Generator().manual_seed(2)),
    "model.layers.0.attention.wo.weight": torch.arange(48.0).view(6, 8),
    "model.norm.weight": torch.ones(6),
}


def cut(folder: Path, ranks: int, stem: str = "model", clone: bool = True) -> list[Path]:
    paths = []
    for rank in range(ranks):
        shard: dict[str, Tensor] = {
            "model.output.weight": WHOLE["model.output.weight"].chunk(ranks, 0)[rank],
            "model.layers.0.attention.wo.weight": WHOLE["model.layers.0.attention.wo.weight"].chunk(
                ranks, 1
            )[rank],
            "model.norm.weight": WHOLE["model.norm.weight"],
        }
        if clone:
            shard = {name: tensor.clone() for name, tensor in shard.items()}
        paths.append(folder / f"{stem}_model_mp_{rank}.pt")
        torch.save(shard, paths[-1])
    return paths


@pytest.mark.parametrize("clone", [True, False], ids=["compact", "views of the whole"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_merged_equals_the_source(tmp_path: Path, ranks: int, clone: bool) -> None:
    cut(tmp_path, ranks, clone=clone)
    merged = open_shards(find_shards(tmp_path, "model"))
    assert merged.kind == "tensor-parallel shards"
    assert {name: info.shape for name, info in merged.tensors.items()} == {
        name: tensor.shape for name, tensor in WHOLE.items()
    }
    for name, tensor in WHOLE.items():
        assert torch.equal(merged.read(name), tensor)


@pytest.mark.parametrize("clone", [True, False], ids=["compact", "views of the whole"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_equals_the_source(
    tmp_path: Path, clone: bool, device: str, dtype: torch.dtype
) -> None:
    with torch.device("meta"):
        module = nn.ModuleDict(
            {"out": nn.Linear(6, 8, bias=False), "wo": nn.Linear(8, 6, bias=False)}
        )
        module["norm"] = nn.RMSNorm(6)
    keys = KeyMap(
        {
            "output.weight": "out.weight",
            "layers.0.attention.wo.weight": "wo.weight",
            "norm.weight": "norm.weight",
        },
        prefixes=("model.",),
    )
    shards = open_shards(cut(tmp_path, 2, clone=clone))
    load_into(module, shards, keys, device=device, dtype=dtype)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor.cpu(), WHOLE[keys.released(name)].to(dtype))


def test_golden_shards(golden: Path) -> None:
    source = golden / "ar_base_tiny" / "model.pt"
    sets = sorted((golden / "ar_tp_shards").glob("tp*"))
    if sets:  # a reduced copy may lack them; the tests above hold without
        whole = open_checkpoint(source)
        for folder in sets:
            merged = open_shards(find_shards(folder))
            assert merged.tensors.keys() == whole.tensors.keys()
            for name in whole.tensors:
                assert torch.equal(merged.read(name), whole.read(name)), name


def test_golden_replicas_are_averaged(golden: Path) -> None:
    folder = golden / "ar_ckpt_layouts" / "uneven_tp4"
    if folder.is_dir():
        merged = open_shards(find_shards(folder))
        expected = open_checkpoint(folder / "merged.pt")
        assert merged.tensors.keys() == expected.tensors.keys()
        for name in expected.tensors:
            assert torch.equal(merged.read(name), expected.read(name)), name


def test_replicas(tmp_path: Path) -> None:
    for rank, value in enumerate((1.0, 1.0625)):
        torch.save({"norm.weight": torch.full((3,), value)}, tmp_path / f"model_model_mp_{rank}.pt")
    shards = open_shards(find_shards(tmp_path))
    assert shards.read("norm.weight").tolist() == [1.03125] * 3
    torch.save({"norm.weight": torch.full((3,), 9.0)}, tmp_path / "model_model_mp_1.pt")
    with pytest.raises(CheckpointError, match=r"norm\.weight is copied on every rank, yet rank 0"):
        open_shards(find_shards(tmp_path)).read("norm.weight")


def test_find_shards(tmp_path: Path) -> None:
    assert find_shards(tmp_path) == []
    paths = cut(tmp_path, 4)
    assert find_shards(tmp_path) == paths
    shutil.copy(paths[0], tmp_path / "iter_000000002_model_mp_0.pt")
    with pytest.raises(CheckpointError, match="several sets"):
        find_shards(tmp_path)
    assert find_shards(tmp_path, "model") == paths
    assert find_shards(tmp_path, "other") == []
    paths[3].unlink()
    paths[0].unlink()
    with pytest.raises(
        CheckpointError, match=r"2 of 4 .*missing: model_model_mp_0\.pt, model_model_mp_3\.pt"
    ):
        find_shards(tmp_path, "model")


def test_shards_of_different_models(tmp_path: Path) -> None:
    paths = cut(tmp_path, 2)
    torch.save({"model.norm.weight": torch.ones(6)}, paths[1])
    with pytest.raises(CheckpointError, match=r"mp_1\.pt: model\.layers\.0"):
        open_shards(paths)
    cut(tmp_path, 2)
    wide = {name: torch.ones(9, 9) for name in WHOLE}
    torch.save(wide, paths[1])
    with pytest.raises(CheckpointError, match=r"mp_1\.pt: model\..* is not as in"):
        open_shards(paths)
    for path in paths:
        torch.save({"conv.weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"conv\.weight, and how ranks share it"):
        open_shards(paths)
