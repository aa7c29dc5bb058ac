"""`checkpoints shard`, `merge` and `convert`: the same numbers, or one line and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor

from tiny.export import dit_settings, stored_tensors
from worldline.cli import convert
from worldline.families.autoregressive.model import PRESETS, ARTransformer
from worldline.families.autoregressive.weights import KEYS, settings_of
from worldline.families.diffusion.model import DiT
from worldline.families.diffusion.weights import KEYS as DIT_KEYS
from worldline.files import readable_size
from worldline.locate import BUNDLED
from worldline.tokenizers.wan.model import WanTokenizer
from worldline.tokenizers.wan.weights import key_map
from worldline.weights import write
from worldline.weights.checkpoint import open_checkpoint, save
from worldline.weights.networks import Network

from ..conftest import SMALL_TRANSFORMER
from ..tiny_diffusion import config as dit_config
from ..tiny_diffusion import fill
from ..tiny_predict2_5 import CONFIG, TOKENIZER, write_transformer
from .conftest import Run

# of numbers of heads of which one, two, three and six processes hold a part
SIXFOLD = replace(
    SMALL_TRANSFORMER, num_heads=12, num_kv_heads=6, vocabulary=66, embedding_rows=66, width=48
)
CROSSED = replace(
    SIXFOLD, embedding_rows=72, context_width=20, context_every=2, absolute_positions=True
)


def read(path: Path) -> dict[str, Tensor]:
    source = open_checkpoint(path)
    return {name: source.read(name) for name in source.tensors}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def tensors_of(config: Any, seed: int = 3) -> dict[str, Tensor]:
    model = ARTransformer(config)
    fill(model, 0.3, seed)
    return {name: t.bfloat16() for name, t in stored_tensors(model, KEYS).items()}


def refused(run: Run, *words: object, status: int = 2) -> str:
    """The one line with which a command refuses."""
    result = run("checkpoints", *words)
    assert result.exit_code == status, result.stderr
    [line] = [line for line in result.stderr.splitlines() if "reading" not in line]
    return line


# --- shard and merge


@pytest.mark.parametrize("config", [SIXFOLD, CROSSED], ids=["base", "with cross-attention"])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_parts_of_any_number(run: Run, tmp_path: Path, config: Any, count: int) -> None:
    tensors = tensors_of(config)
    path, merged = tmp_path / "own.safetensors", tmp_path / "merged" / "model.pt"
    save(tensors, path)
    (tmp_path / "config.json").write_text(json.dumps(settings_of(config)))
    assert run("checkpoints", "shard", "-c", path, "-t", count).exit_code == 0
    parts = [tmp_path / f"own_model_mp_{rank}.pt" for rank in range(count)]
    for name, tensor in tensors.items():
        found = [torch.load(part, mmap=True)[name] for part in parts]
        if "norm" in name:
            assert all(torch.equal(each, tensor) for each in found)
        else:
            axis = int(name.endswith(("wo.weight", "w2.weight")))
            assert torch.equal(torch.cat(found, axis), tensor)
            assert len({each.shape for each in found}) == 1
    for words in (("-c", tmp_path / "own.pt"), ("-c", parts[-1])):
        result = run("checkpoints", "merge", *words, "-t", count, "-o", merged)
        assert result.exit_code == 0, result.stderr
        assert_same(read(merged), tensors)
    assert json.loads((merged.parent / "config.json").read_text())  # for the shape of a clip
    assert not [*tmp_path.rglob("*.tmp")]


@pytest.mark.parametrize("config", [SIXFOLD, CROSSED], ids=["base", "with cross-attention"])
def test_transformer_engine_and_trainings(run: Run, tmp_path: Path, config: Any) -> None:
    """A training's file with names of Transformer Engine, in parts of either naming, and back."""
    tensors, path = tensors_of(config), tmp_path / "iter_000000007.pt"
    (tmp_path / "config.json").write_text(json.dumps(settings_of(config)))
    torch.save({"model": tensors, "optimizer": {"state": {0: {"exp_avg": torch.ones(9)}}}}, path)
    for backend in ("transformer_engine", "pytorch"):
        words = ("-c", path, "-t", 3, "--target_backend", backend, "--model-family", "cosmos")
        assert run("checkpoints", "shard", *words).exit_code == 0
        names = torch.load(tmp_path / "iter_000000007_model_mp_1.pt").keys()
        engine = {name for name in names if "layernorm_" in name}
        assert bool(engine) == (backend != "pytorch")
        merged = tmp_path / "merged.pt"
        result = run("checkpoints", "merge", "-c", path, "-t", 3, "-o", merged)
        assert result.exit_code == 0, result.stderr
        assert_same(read(merged), tensors)
    run("checkpoints", "shard", "-c", merged, "-t", 1, "-b", "transformer_engine")
    whole = tmp_path / "merged_model_mp_0.pt"
    state = {**torch.load(whole), "model.layers.0.self_attention._extra_state": torch.ones(5)}
    torch.save(state, tmp_path / "engine.pt")
    assert_same(read(tmp_path / "engine.pt"), tensors)
    assert run("checkpoints", "shard", "-c", tmp_path / "engine.pt", "-t", 2).exit_code == 0
    assert "model.layers.1.attention.wq.weight" in torch.load(tmp_path / "engine_model_mp_1.pt")


def test_norms_are_averaged_in_their_own_precision(run: Run, tmp_path: Path) -> None:
    tensors = tensors_of(SIXFOLD)
    save(tensors, tmp_path / "model.pt")
    run("checkpoints", "shard", "-c", tmp_path / "model.pt", "-t", 3)
    parts = [tmp_path / f"model_model_mp_{rank}.pt" for rank in range(3)]
    for rank, part in enumerate(parts):
        stored = torch.load(part)
        stored["model.norm.weight"] = stored["model.norm.weight"] + 0.01 * rank
        torch.save(stored, part)
    words = ("merge", "-c", tmp_path / "model.pt", "-t", 3, "-o", tmp_path / "merged.pt")
    assert run("checkpoints", *words).exit_code == 0
    each = torch.stack([torch.load(part)["model.norm.weight"] for part in parts])
    assert torch.equal(torch.load(tmp_path / "merged.pt")["model.norm.weight"], each.mean(0))
    stored["model.norm.weight"] += 9
    torch.save(stored, parts[2])
    before = (tmp_path / "merged.pt").read_bytes()
    assert "norm.weight" in refused(run, *words)
    assert (tmp_path / "merged.pt").read_bytes() == before


def test_parts_that_do_not_fit(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    save(tensors_of(SIXFOLD), path)
    line = refused(run, "shard", "-c", path, "-t", 4)
    assert "1, 2, 3, 6" in line
    for absent in (tmp_path, tmp_path / "absent.pt"):
        assert f"--checkpoint_path {absent}" in refused(run, "shard", "-c", absent, "-t", 2)
    assert "missing" in refused(run, "shard", "-t", 2)
    assert "llama" in refused(run, "shard", "-c", path, "-t", 2, "-f", "llama")
    assert "jax" in refused(run, "shard", "-c", path, "-t", 2, "-b", "jax")
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]
    run("checkpoints", "shard", "-c", path, "-t", 3)
    merge = ("merge", "-c", path, "-o", tmp_path / "out" / "model.pt", "-t")
    assert "model_model_mp_3.pt" in refused(run, *merge, 4)
    assert "model_model_mp_2.pt" in refused(run, *merge, 2)  # would be two thirds of a model
    assert "input" in refused(run, *merge[:3], "-o", tmp_path / "model_model_mp_1.pt", "-t", 3)
    assert "merged.txt" in refused(run, *merge[:3], "-o", tmp_path / "merged.txt", "-t", 3)
    assert "checkpoints merge" in refused(
        run, "shard", "-c", tmp_path / "model_model_mp_0.pt", "-t", 2
    )
    wider = tmp_path / "wider.pt"
    save(tensors_of(replace(SIXFOLD, width=96)), wider)
    run("checkpoints", "shard", "-c", wider, "-t", 3)
    shutil.copy(tmp_path / "wider_model_mp_1.pt", tmp_path / "model_model_mp_1.pt")
    assert "model_model_mp_1.pt" in refused(run, *merge, 3)
    (tmp_path / "model_model_mp_1.pt").unlink()
    assert "model_model_mp_1.pt" in refused(run, *merge, 3)
    assert not (tmp_path / "out").exists()


def test_another_size_than_the_stated_one(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(ARTransformer, PRESETS["12B"])
    for stated in ("12b", "12B", None):
        convert.check_size(network, stated)
    with pytest.raises(Exception, match="is of 12b"):
        convert.check_size(network, "4b")
    with pytest.raises(Exception, match="4b, 5b, 12b, 13b"):
        convert.check_size(network, "7b")
    cut_short = Network(ARTransformer, replace(PRESETS["4B"], depth=15))
    with pytest.raises(Exception, match="no released size"):
        convert.check_size(cut_short, "4b")
    convert.check_size(Network(ARTransformer, SMALL_TRANSFORMER), "4b")  # a small one


# --- convert


def put(folder: Path, kind: str) -> Path:
    """Weights of a kind in a folder of their own."""
    folder.mkdir()
    if kind == "flow":
        write_transformer(folder / "model.pt", seed=5)
        (folder / "config.json").write_text(json.dumps(dit_settings(CONFIG)))
    elif kind in ("text2world", "video2world"):
        model = DiT(dit_config(condition_mask=kind == "video2world"))
        fill(model, 0.2, 6)
        save(stored_tensors(model, DIT_KEYS), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(dit_settings(model.config)))
    elif kind == "wan":
        model = WanTokenizer(TOKENIZER)  # type: ignore[assignment]
        fill(model, 0.2, 7)
        save(stored_tensors(model, key_map(TOKENIZER)), folder / "tokenizer.pth")
    elif kind == "autoregressive":
        save(tensors_of(CROSSED), folder / "model.pt")
        (folder / "config.json").write_text(json.dumps(settings_of(CROSSED)))
    else:
        shutil.copytree(BUNDLED / kind, folder, dirs_exist_ok=True)
    return folder


FORMS = ("diffusers", "dcp", "safetensors", "nvidia", "diffusers", "safetensors")


@pytest.mark.parametrize(
    "kind", ["flow", "text2world", "video2world", "wan", "Cosmos-Tokenize1-CV8x8x8-720p"]
)
def test_round_trips(run: Run, tmp_path: Path, kind: str) -> None:
    path = put(tmp_path / kind, kind)
    first = opened(path)
    tensors = {first.keys.ours(n): first.source.read(n) for n in first.source.tensors}
    tensors.pop(None, None)  # what no network reads
    for number, form in enumerate(FORMS):
        target = tmp_path / f"{number}-{kind}"
        result = run("checkpoints", "convert", path, target, "--to", form)
        assert result.exit_code == 0, result.stderr
        again = opened(path := target)
        # diffusers computes the taps of wavelets exactly
        inexact = {"tap": first.config.tap} if hasattr(first.config, "tap") else {}
        assert replace(again.config, **inexact) == first.config
        found = {again.keys.ours(n): again.source.read(n) for n in again.source.tensors}
        found.pop(None, None)
        assert_same(found, tensors)
        if statistics := getattr(first, "statistics", None):
            assert torch.equal(again.statistics.mean, statistics.mean)
            assert torch.equal(again.statistics.std, statistics.std)


def opened(path: Path) -> Any:
    network, _ = convert.network_of(convert.open_any(path), path)
    return network


@pytest.mark.parametrize("kind", ["autoregressive", "Cosmos-Tokenize1-DV8x16x16-720p"])
def test_without_a_layout_of_diffusers(run: Run, tmp_path: Path, kind: str) -> None:
    path = put(tmp_path / kind, kind)
    expected = opened(path)
    half = path / "encoder.safetensors"  # stands for both
    for form in ("nvidia", "safetensors", "dcp"):
        target = tmp_path / f"{form}-{kind}"
        path = half if form == "nvidia" and half.is_file() else path
        assert run("checkpoints", "convert", path, target, "--to", form).exit_code == 0
        found = opened(target)
        assert found.config == expected.config
        assert found.source.tensors.keys() == expected.source.tensors.keys()
        for name in expected.source.tensors:
            assert torch.equal(found.source.read(name), expected.source.read(name))
    assert kind in refused(run, "convert", path, tmp_path / "x", "--to", "diffusers")
    assert not (tmp_path / "x").exists()


def test_diffusers_has_a_place_for_every_tensor(run: Run, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    for kind in ("flow", "video2world", "wan", "Cosmos-Tokenize1-CV8x8x8-720p"):
        path, target = put(tmp_path / kind, kind), tmp_path / f"{kind}-diffusers"
        assert run("checkpoints", "convert", path, target, "--to", "diffusers").exit_code == 0
        settings = json.loads((target / "config.json").read_text())
        network = getattr(diffusers, settings["_class_name"]).from_config(settings)
        network.load_state_dict(load_file(target / "diffusion_pytorch_model.safetensors"))


def test_precision_and_averages(run: Run, tmp_path: Path) -> None:
    """A training's distributed checkpoint: one network in another precision, or its files."""
    write_transformer(tmp_path / "a.pt", seed=1)
    plain = torch.load(tmp_path / "a.pt")
    (tmp_path / "job" / "checkpoints").mkdir(parents=True)
    (tmp_path / "job" / "config.json").write_text(json.dumps(dit_settings(CONFIG)))
    average = {n.replace("net.", "net_ema."): t.float() * 1.001 for n, t in plain.items()}
    for number in (9, 10, 11):
        folder = tmp_path / "job" / "checkpoints" / f"iter_{number:09}" / "model"
        state = {n: t * (number - 9) for n, t in {**plain, **average}.items()}
        with pytest.warns(UserWarning, match="single process"):
            dcp.save(state, checkpoint_id=str(folder), no_dist=True)
    (folder.parent.parent / "latest_checkpoint.txt").write_text("iter_000000010\n")
    target = tmp_path / "converted"
    assert run("checkpoints", "convert", tmp_path / "job", target, "--to", "nvidia").exit_code == 0
    assert_same(read(target / "model.pt"), {**plain, **average})
    named = {n.replace("net_ema.", "net."): t for n, t in average.items()}
    assert_same(read(target / "model_ema_fp32.pt"), named)
    half = {name: tensor.bfloat16() for name, tensor in named.items()}
    assert_same(read(target / "model_ema_bf16.pt"), half)
    single = tmp_path / "single.safetensors"
    result = run("checkpoints", "convert", tmp_path / "job", single, "--dtype", "float16")
    assert result.exit_code == 0, result.stderr
    assert_same(read(single), {name: tensor.half() for name, tensor in named.items()})
    assert "net_ema." in result.stderr
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(plain, checkpoint_id=str(tmp_path / "plain" / "model"), no_dist=True)
    words = ("convert", tmp_path / "plain", tmp_path / "bare", "--to", "nvidia", "--no_ema")
    assert run("checkpoints", *words).exit_code == 0  # as the released script needs it then
    assert_same(read(tmp_path / "bare" / "model.pt"), plain)
    assert "--no_ema" in refused(run, "convert", single, tmp_path / "x.pt", "--no_ema")


def test_what_cannot_be_converted(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = put(tmp_path / "own", "video2world"), tmp_path / "out"
    model = path / "model.safetensors"
    assert "--to" in refused(run, "convert", path, out)
    assert ".pt" in refused(run, "convert", path, out / "a.safetensors", "--to", "nvidia")
    assert "folder" in refused(run, "convert", path, out / "a.pt", "--to", "diffusers")
    assert "absent" in refused(run, "convert", tmp_path / "absent", out, "--to", "dcp")
    assert "input" in refused(run, "convert", path, model, "--to", "safetensors")
    assert "input" in refused(run, "convert", path, path, "--to", "safetensors")
    (tmp_path / "text.pt").write_text("hello")
    assert "text.pt" in refused(run, "convert", tmp_path / "text.pt", out, "--to", "dcp")
    save({"encoder.weight": torch.ones(2)}, tmp_path / "other.pt")
    assert "encoder.weight" in refused(run, "convert", tmp_path / "other.pt", out, "--to", "dcp")
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**settings, "base_fps": 12.0}))
    assert "base_fps is 12.0" in refused(run, "convert", path, out, "--to", "diffusers")
    (tmp_path / "config.json").write_text("{}")
    assert "config.json" in refused(run, "convert", path, tmp_path / "beside.pt")
    usage = SimpleNamespace(free=12_345)
    monkeypatch.setattr(write.shutil, "disk_usage", lambda _: usage)
    line = refused(run, "convert", path, out, "--to", "nvidia")
    assert readable_size(usage.free) in line
    monkeypatch.undo()
    assert not out.exists()
    assert not (tmp_path / "beside.pt").exists()


@pytest.mark.parametrize("form", ["nvidia", "safetensors", "dcp"])
def test_numbers_that_are_not_finite_leave_nothing(run: Run, tmp_path: Path, form: str) -> None:
    path = put(tmp_path / "own", "flow")
    state = torch.load(path / "model.pt")
    state["net.blocks.1.mlp.layer2.weight"][0, 0] = float("nan")
    torch.save(state, path / "model.pt")
    target = tmp_path / "out"
    assert "mlp.layer2.weight" in refused(run, "convert", path, target, "--to", form)
    assert not [*target.rglob("*.*")]


def test_replacing(run: Run, tmp_path: Path) -> None:
    path, target = put(tmp_path / "own", "flow"), tmp_path / "out"
    words = ("checkpoints", "convert", path, target, "--to")
    for form in ("safetensors", "safetensors", "dcp"):
        assert run(*words, form).exit_code == 0
    assert "model.safetensors" in run(*words, "safetensors").stderr
    assert "model.safetensors" in refused(run, *words[1:], "safetensors", "--no_overwrite")
    assert "folder" in refused(run, *words[1:], "dcp")
    (target / "a.pt").mkdir()
    assert "folder" in refused(run, *words[1:3], target / "a.pt")
