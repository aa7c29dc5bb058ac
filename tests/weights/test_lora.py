"""Adapters in files of every form, on networks of every family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import adapters
from tests.conftest import SMALL_TRANSFORMER
from tests.parallel.test_tensor import released
from tests.tiny_predict2_5 import write_transformer
from worldline.errors import CheckpointError
from worldline.families.autoregressive import weights as autoregressive
from worldline.families.predict2_5 import weights as flow
from worldline.parallel.mesh import Axis
from worldline.train import lora as writers
from worldline.train.lora import Halves
from worldline.weights import lora
from worldline.weights.checkpoint import MergedTensor, content_digest, cut, open_checkpoint, save
from worldline.weights.keymap import KeyMap
from worldline.weights.networks import (
    Network,
    adapter_folder,
    open_adapter,
    shapes_of,
    weights_file,
)

RANK, SCALE = 3, 0.75
NAMES = "base_model.model.", (".lora_A.weight", ".lora_B.weight")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Network[Any]:
    file = tmp_path_factory.mktemp("flow") / "model.pt"
    write_transformer(file)
    return flow.open_network(file, {})


def draw(network: Network[Any], *patterns: str, rank: int = RANK, seed: int = 0) -> Halves:
    return adapters.draw(network, patterns, rank, seed)


def read(network: Network[Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return dict(network.read("cpu", dtype).named_parameters())


def merged(network: Network[Any], path: Path, weight: float = 1.0) -> Network[Any]:
    return network.adapted(network.match_adapter(open_adapter(path), weight))


def peft(halves: Halves, folder: Path, **settings: Any) -> Path:
    writers.save_peft(halves, SCALE, flow.KEYS, folder)
    stated = json.loads((folder / lora.CONFIG).read_text())
    (folder / lora.CONFIG).write_text(json.dumps({**stated, **settings}))
    return folder


def named(halves: Halves, down: str, up: str, keys: KeyMap = flow.KEYS) -> dict[str, Tensor]:
    return writers.named_halves(halves, keys, (down, up), "")


def kohya(halves: Halves, keys: KeyMap) -> dict[str, Tensor]:
    tensors = named(halves, "|.lora_down.weight", "|.lora_up.weight", keys)
    tensors |= {name.split("|")[0] + "|.alpha": torch.tensor(SCALE * RANK) for name in tensors}
    split = {name: name.split("|") for name in tensors}
    return {
        f"lora_unet_{split[n][0].replace('.', '_')}{split[n][1]}": t for n, t in tensors.items()
    }


def stated(halves: Halves) -> dict[str, str]:
    return {lora.METADATA: json.dumps(writers.settings(halves, SCALE, flow.KEYS))}


# form -> writer of a file, and the factor that it does not state
FORMS: dict[str, tuple[Callable[[Halves, Path], object], float]] = {
    "peft": (lambda h, p: peft(h, p / "a"), 1),
    "bin": (
        lambda h, p: (
            peft(h, p / "a").joinpath("adapter_model.safetensors").unlink(),
            torch.save(
                writers.named_halves(h, flow.KEYS, NAMES[1], NAMES[0]), p / "a/adapter_model.bin"
            ),
        ),
        1,
    ),
    "diffusers": (
        lambda h, p: writers.save_diffusers(h, SCALE, flow.DIFFUSERS_KEYS, p / "x.safetensors"),
        1,
    ),
    "diffusers of a transformer": (
        lambda h, p: writers.save_diffusers(
            h, SCALE, flow.DIFFUSERS_KEYS, p / "x.safetensors", pipeline=False
        ),
        1,
    ),
    "kohya": (lambda h, p: save(kohya(h, flow.KEYS), p / "my lora.safetensors"), 1),
    "kohya by diffusers' names": (
        lambda h, p: save(kohya(h, flow.DIFFUSERS_KEYS), p / "x.safetensors"),
        1,
    ),
    "ComfyUI": (
        lambda h, p: save(
            {f"diffusion_model.{n}": t for n, t in named(h, *NAMES[1]).items()},
            p / "x.safetensors",
            stated(h),
        ),
        1,
    ),
    "older diffusers": (
        lambda h, p: save(named(h, ".lora.down.weight", ".lora.up.weight"), p / "x.safetensors"),
        SCALE,
    ),
    "reference": (
        lambda h, p: adapters.save_inside(base(), h, flow, p / "iter_000000004_model.pt"),
        SCALE,
    ),
    "averaged": (
        lambda h, p: torch.save(
            {
                **{f"net.{n}": torch.zeros_like(t) for n, t in named(h, *NAMES[1]).items()},
                **{f"net_ema.{n}": t for n, t in named(h, *NAMES[1]).items()},
            },
            p / "x.pt",
        ),
        SCALE,
    ),
    "of two trainers": (
        lambda h, p: torch.save(
            {
                "model": {f"net.{n}": 0 * t for n, t in named(h, *NAMES[1]).items()},
                "ema": {n.replace(".", "-"): t for n, t in named(h, *NAMES[1]).items()},
            },
            p / "x.pt",
        ),
        SCALE,
    ),
    "compiled": (
        lambda h, p: torch.save(
            {f"_orig_mod.net.{n}": t for n, t in named(h, *NAMES[1]).items()}, p / "x.ckpt"
        ),
        SCALE,
    ),
}


def base() -> dict[str, Tensor]:
    model = shapes_of(*small())
    return {flow.KEYS.released(name): torch.zeros(shape) for name, shape in model.items()}


def small() -> tuple[Any, Any]:
    from tests.tiny_predict2_5 import CONFIG
    from worldline.families.predict2_5.model import FlowDiT

    return FlowDiT, CONFIG


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_sum(form: str, network: Network[Any], tmp_path: Path) -> None:
    halves = draw(network, "blocks.*attention.body.*.weight", "blocks.1.feed_forward.body.*.weight")
    write, factor = FORMS[form]
    write(halves, tmp_path)
    [place] = tmp_path.iterdir()
    for path in {place, tmp_path} if place.is_file() else {place}:
        adapter = network.match_adapter(open_adapter(path), factor)
        assert adapter.factors == [SCALE]
        assert adapter.updates.keys() == halves.keys()
        assert adapter.report()["ranks"] == [RANK]
        assert ("states no scale" in " ".join(adapter.notes)) == (factor != 1)
    before, after = read(network), read(network.adapted(adapter))
    for name, weight in before.items():
        if name in halves:
            down, up = halves[name]
            torch.testing.assert_close(after[name], weight + SCALE * up @ down)
            assert not torch.equal(after[name], weight)
        else:
            assert torch.equal(after[name], weight)


def test_sums_are_rounded_once(network: Network[Any], tmp_path: Path) -> None:
    first, second = (draw(network, "*.q.weight", seed=seed, rank=5) for seed in (1, 2))
    both = merged(merged(network, peft(first, tmp_path / "1"), 0.5), peft(second, tmp_path / "2"))
    rounded, whole = read(both, torch.bfloat16), read(both)
    for name in first:
        (a, b), (c, d) = first[name], second[name]
        sum_of_all = read(network)[name] + 0.5 * SCALE * b @ a + SCALE * d @ c
        torch.testing.assert_close(whole[name], sum_of_all)
        assert torch.equal(rounded[name], whole[name].bfloat16())
    assert len(both.notes) == 2
    assert [file.name for file in both.files[-4:]].count(lora.CONFIG) == 2


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float16, torch.float64])
def test_weights_of_any_kind(stored: torch.dtype, network: Network[Any], tmp_path: Path) -> None:
    """Narrow ones become wide before the sum; transposed matrices are read in order."""
    tensors = {n: network.source.read(n) for n in network.source.entries}
    name = "net.blocks.1.mlp.layer1.weight"
    tensors[name] = tensors[name].to(stored).t().contiguous().t()
    torch.save(tensors, tmp_path / "model.pt")
    halves = draw(network, "blocks.1.feed_forward.body.*.weight")
    after = read(merged(flow.open_network(tmp_path, {}), peft(halves, tmp_path / "a")), stored)
    [(down, up), _] = halves.values()
    wide = torch.float64 if stored == torch.float64 else torch.float32
    expected = tensors[name].to(wide) + SCALE * up.to(wide) @ down.to(wide)
    assert after["blocks.1.feed_forward.body.up.weight"].dtype == stored
    tolerance = (
        {"rtol": 0.2, "atol": 0.05} if stored.itemsize == 1 else {"rtol": 1e-3, "atol": 1e-4}
    )
    torch.testing.assert_close(
        after["blocks.1.feed_forward.body.up.weight"].to(wide), expected, **tolerance
    )


@pytest.mark.gpu
def test_merged_on_a_gpu(network: Network[Any], tmp_path: Path) -> None:
    adapted = merged(network, peft(draw(network, *flow.LORA.targets), tmp_path / "a"))
    for dtype in (torch.float32, torch.bfloat16):
        there = dict(adapted.read("cuda", dtype).named_parameters())
        for name, weight in read(adapted, dtype).items():
            torch.testing.assert_close(there[name].cpu(), weight)


def test_scale_0_and_none(network: Network[Any], tmp_path: Path) -> None:
    path = peft(draw(network, "*.v.weight"), tmp_path / "a")
    same = merged(network, path, 0.0)
    assert not any(isinstance(entry, MergedTensor) for entry in same.source.entries.values())
    assert same.adapters[0].digest != merged(network, path).adapters[0].digest


@pytest.mark.parametrize("count", [2, 3])
def test_parts_of_a_merged_matrix(count: int, network: Network[Any], tmp_path: Path) -> None:
    network = merged(network, peft(draw(network, "blocks.*.body.*.weight"), tmp_path / "a"))
    for entry in network.source.entries.values():
        if isinstance(entry, MergedTensor):
            whole = entry.read()
            for dim, size in enumerate(whole.shape):
                spans = [
                    (size * rank // count, size * (rank + 1) // count) for rank in range(count)
                ]
                parts = [entry.cut(dim, start, end - start).read() for start, end in spans]
                torch.testing.assert_close(torch.cat(parts, dim), whole)


@pytest.mark.parametrize("shards", [1, 2])
def test_tensor_parallel_slices(shards: int, tmp_path: Path) -> None:
    """Of whole files and of shards, each process reads its part of what one process has."""
    tensors = released(SMALL_TRANSFORMER)
    (tmp_path / "config.json").write_text("{}")
    if shards == 1:
        save(tensors, tmp_path / "model.safetensors")
    else:
        from tests.parallel.test_tensor import shards as cut_up

        for rank, shard in enumerate(cut_up(tensors, shards)):
            torch.save(shard, tmp_path / f"model_model_mp_{rank}.pt")
    network = autoregressive.open_network(tmp_path, {})
    halves = draw(network, *autoregressive.LORA.targets, "head.weight")
    writers.save_peft(halves, 2.0, autoregressive.KEYS, tmp_path / "a")
    names = open_adapter(tmp_path / "a").entries
    assert "base_model.model.layers.0.attention.wq.lora_A.weight" in names
    network = merged(network, tmp_path / "a")
    whole = {name: entry.read() for name, entry in network.source.entries.items()}
    for rank in range(2):
        part = cut(network.source, Axis(rank, 2))
        for name, entry in part.entries.items():
            axis = [
                dim for dim, size in enumerate(entry.meta.shape) if size < whole[name].shape[dim]
            ]
            expected = whole[name].chunk(2, axis[0])[rank] if axis else whole[name]
            torch.testing.assert_close(entry.read().float(), expected.float())


def test_scales_of_patterns(network: Network[Any], tmp_path: Path) -> None:
    """Of layers of two ranks, and by the square root of the rank."""
    deep, flat = draw(network, "blocks.1.*.down.weight", rank=7), draw(network, "blocks.*.q.weight")
    folder = peft(flat, tmp_path / "a", lora_alpha=6, rank_pattern={"layer2": 7})
    halves = writers.named_halves({**deep, **flat}, flow.KEYS, NAMES[1], NAMES[0])
    save(halves, folder / "adapter_model.safetensors")
    assert {*network.match_adapter(open_adapter(folder)).factors} == {2, 6 / 7}
    stated = json.loads((folder / lora.CONFIG).read_text())
    stated |= {"alpha_pattern": {r"blocks\.\d+\.self_attn": 5, "layer2": 3.5}, "use_rslora": True}
    (folder / lora.CONFIG).write_text(json.dumps(stated))
    updates = network.match_adapter(open_adapter(folder)).updates
    assert updates["blocks.1.feed_forward.body.down.weight"].scale == pytest.approx(3.5 / 7**0.5)
    assert updates["blocks.0.attention.body.q.weight"].scale == pytest.approx(6 / 3**0.5)


@pytest.mark.parametrize("within", ["", "checkpoints/"])
def test_a_training_gives_its_newest_adapter(
    network: Network[Any], within: str, tmp_path: Path
) -> None:
    for step in (90, 100, 20):
        peft(draw(network, "*.q.weight"), tmp_path / "run" / f"{within}iter_{step:09}_adapter")
    newest = tmp_path / "run" / f"{within}iter_000000100_adapter"
    assert open_adapter(tmp_path / "run").path == open_adapter(newest).path


def test_digests_are_of_numbers_and_scales(network: Network[Any], tmp_path: Path) -> None:
    halves = draw(network, "*.q.weight")
    one = peft(halves, tmp_path / "a")
    writers.save_diffusers(halves, SCALE, flow.DIFFUSERS_KEYS, tmp_path / "x.safetensors")
    digests = [
        network.match_adapter(open_adapter(path), weight).digest
        for path in (one, tmp_path / "x.safetensors")
        for weight in (1.0, 0.5)
    ]
    assert digests[:2] == digests[2:]
    assert digests[0] != digests[1]
    other = {name: (down + 1, up) for name, (down, up) in halves.items()}
    assert network.match_adapter(open_adapter(peft(other, tmp_path / "b"))).digest not in digests
    assert content_digest({}) not in digests


def spoil(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Tensors of an adapter that is wrong in one way."""
    first, second = list(tensors)[:2]
    outer = "base_model.model.blocks.40.self_attn.q_proj"
    changes: dict[str, dict[str, Tensor]] = {
        "block": {
            f"{outer}.lora_A.weight": tensors[first],
            f"{outer}.lora_B.weight": tensors[second],
        },
        "bias": {"base_model.model.final_layer.linear.weight": torch.ones(4, 4)},
        "rank": {first: torch.ones(RANK + 2, tensors[first].shape[1])},
        "size": {first: torch.ones(RANK, 33), second: torch.ones(77, RANK)},
        "integers": {first: tensors[first].to(torch.int8)},
        "convolution": {first: tensors[first][..., None, None]},
        "magnitude": {first.replace("lora_A", "lora_magnitude_vector"): torch.ones(4)},
        "twice": {first.replace("lora_A", "lora_A.other"): tensors[first]},
        "half": {},
        "nothing": {},
    }
    changed = {**tensors, **changes[name]}
    if name == "half":
        del changed[second]
    if name == "nothing":
        changed = {f"text_encoder.{key}": tensor for key, tensor in tensors.items()}
    return {key: tensor.contiguous() for key, tensor in changed.items()}


@pytest.mark.parametrize(
    ("wrong", "message"),
    {
        "block": r"2 match nothing: \S+blocks\.40\.self_attn\.q_proj\.lora_A",
        "bias": r"1 match nothing: base_model\.model\.final_layer\.linear\.weight",
        "rank": r"1 are of two ranks: \S+lora_A\.weight has 5, \S+lora_B\.weight 3",
        "size": r"1 are of another size of model: \S+ is for \[77, 33\], not \[48, (48|16)\]",
        "integers": r"1 are no matrices of floats: \S+lora_A\.weight is torch\.int8 \[3, \d+\]",
        "convolution": r"1 are no matrices of floats: \S+ is \S+ \[3, \d+, 1, 1\]",
        "magnitude": r"DoRA \(\S+lora_magnitude_vector\.weight\)",
        "twice": r"1 stand twice: \S+lora_A\S*\.weight",
        "half": r"1 lack their other half: \S+lora_A\.weight",
        "nothing": r"none of its 8 tensors belongs to \S+model\.pt, such as text_encoder\.base",
    }.items(),
)
def test_refused_tensors(wrong: str, message: str, network: Network[Any], tmp_path: Path) -> None:
    folder = peft(draw(network, "*.q.weight"), tmp_path / "a")
    file = folder / "adapter_model.safetensors"
    source = open_checkpoint(file)
    save(spoil({n: source.read(n) for n in sorted(source.entries)}, wrong), file)
    with pytest.raises(CheckpointError, match=message) as error:
        network.match_adapter(open_adapter(folder))
    assert str(error.value).startswith(str(file))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "with use_dora"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"peft_type": "LOKR"}, "peft_type LOKR"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights pissa_niter_16"),
        ({"r": 9}, "q_proj has rank 3, adapter_config.json states 9"),
        ({"lora_alpha": "much"}, "lora_alpha is 'much'"),
        ({"lora_alpha": float("nan")}, "nan|NaN"),
        ({"alpha_pattern": {"(": 4}}, "pattern"),
    ],
)
def test_refused_settings(
    settings: dict[str, Any], message: str, network: Network[Any], tmp_path: Path
) -> None:
    folder = peft(draw(network, "*.q.weight"), tmp_path / "a", **settings)
    with pytest.raises(CheckpointError, match=message) as error:
        network.match_adapter(open_adapter(folder))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_numbers_that_are_not_finite(number: float, network: Network[Any], tmp_path: Path) -> None:
    halves = draw(network, "*.out.weight")
    up = halves["blocks.1.attention.body.out.weight"][1]
    up[3, 1] = number
    adapted = merged(network, peft(halves, tmp_path / "a"))
    with pytest.raises(CheckpointError, match=r"adapter_model.*1\.self_attn\.output_proj.lora_B"):
        read(adapted)


def test_files_that_are_no_adapters(network: Network[Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no LoRA adapter"):
        open_adapter(tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"model\.pt: it holds no LoRA adapter"):
        network.match_adapter(open_adapter(network.path))
    run = tmp_path / "run" / "checkpoints"
    peft(draw(network, "*.q.weight"), run / "iter_000000007_adapter")
    for folder in (run / "iter_000000007_adapter", run, run.parent):
        with pytest.raises(CheckpointError, match=r"holds no model\.pt.*adapter.*--lora"):
            weights_file(folder, ("q_proj.weight",))
        assert adapter_folder(folder) == run / "iter_000000007_adapter"
    (run / "iter_000000007_model.pt").touch()  # which holds both
    assert adapter_folder(run.parent) is None
    alone = peft(draw(network, "*.q.weight"), tmp_path / "alone")
    (alone / lora.CONFIG).unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json, which states its scale"):
        network.match_adapter(open_adapter(alone))
    peft(draw(network, "*.q.weight"), tmp_path / "cut")
    file = tmp_path / "cut" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut short"):
        open_adapter(tmp_path / "cut")


def test_checkpoints_with_an_adapter_inside(network: Network[Any], tmp_path: Path) -> None:
    halves = draw(network, *flow.LORA.targets)
    source = network.source
    weights = {f"net.{name.removeprefix('net.')}": source.read(name) for name in source.entries}
    adapters.save_inside(weights, halves, flow, tmp_path / "model.pt")
    inside = flow.open_network(tmp_path, {})
    assert inside.adapters[0].updates.keys() == halves.keys()
    assert "states no scale; 1 is taken" in inside.notes[-1]
    before, after = read(network), read(inside)
    for name, (down, up) in halves.items():
        expected = before[name] + up.bfloat16().float() @ down.bfloat16().float()
        torch.testing.assert_close(after[name], expected)
    (tmp_path / lora.CONFIG).write_text(json.dumps({"r": RANK, "lora_alpha": 4 * RANK}))
    assert flow.open_network(tmp_path, {}).adapters[0].factors == [4]
