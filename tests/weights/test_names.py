"""Names of tensors as trainers leave them: wrappers, sets, averaged weights, scales."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from worldline.errors import CheckpointError
from worldline.weights.checkpoint import Checkpoint, open_checkpoint, take_network
from worldline.weights.keymap import KeyMap, match
from worldline.weights.names import is_adapter
from worldline.weights.stream import load_into

ANCHOR = ("stem.proj.weight",)
PREFIXES = ("net.", "")
NETWORK = {
    "stem.proj.weight": torch.randn(6, 4, generator=torch.Generator().manual_seed(3)),
    "blocks.0.mix.weight": torch.randn(4, 4, generator=torch.Generator().manual_seed(4)).bfloat16(),
    "blocks.1.mix.bias": torch.arange(4.0),
}
LAST = {name: tensor + 1 for name, tensor in NETWORK.items()}  # of the last step


def under(prefix: str, tensors: Mapping[str, Tensor] = NETWORK) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def taken(path: Path, value: Any) -> Checkpoint:
    """Saved, opened and reduced to the network."""
    torch.save(value, path / "model.pt")
    source = take_network(open_checkpoint(path / "model.pt"), ANCHOR, PREFIXES)
    bare = {name.removeprefix("net."): name for name in source.entries}
    assert bare.keys() >= NETWORK.keys()
    for name, tensor in NETWORK.items():
        assert torch.equal(source.read(bare[name]), tensor), name
    return source


@pytest.mark.parametrize(
    ("before", "inside"),
    [
        ("module.", ""),
        ("module.module.net.", ""),
        ("_orig_mod.module.", "_orig_mod."),
        ("net._fsdp_wrapped_module.", "_fsdp_wrapped_module."),
        ("state_dict.model.net.", "_checkpoint_wrapped_module."),
        ("model.diffusion_model.", "_fsdp_wrapped_module._checkpoint_wrapped_module."),
        ("student.net._forward_module.", "module."),
    ],
)
def test_wrappers_before_and_inside_names(before: str, inside: str, tmp_path: Path) -> None:
    wrapped = {
        before + name.replace("mix.", f"{inside}mix.{inside}"): t for name, t in NETWORK.items()
    }
    source = taken(tmp_path, wrapped)
    assert source.entries.keys() <= {*under("net."), *under("")}
    words = {word for word in before.split(".") if word not in ("", "net")}
    for word in words | {w for w in inside.split(".") if w}:
        assert word in " ".join(source.notes)


def test_names_that_become_one(tmp_path: Path) -> None:
    torch.save({"a.w": torch.ones(2), "a.module.w": torch.ones(2)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"a\.w and a\.module\.w"):
        open_checkpoint(tmp_path / "x.pt")


STATE = {
    "optimizer": {"state": {0: {"exp_avg": torch.ones(9), "step": torch.tensor(3.0)}}},
    "lr_schedulers": [{"last": 3, "base": torch.ones(2)}],
    "iteration": 5,
}


@pytest.mark.parametrize(
    ("value", "note"),
    [
        ({"ema": under("net."), **STATE}, "ema"),
        ({"generator": {"net": NETWORK, "name": "x"}, **STATE}, "generator.net"),
        (
            {"generator": under("net.", LAST), "generator_ema": under("module.net.")},
            "generator_ema",
        ),
        ({"model": LAST, "ema_model": {"module": under("net.")}, **STATE}, "ema_model"),
        (
            {"state_dict": under("net.", LAST) | under("net_ema.") | {"n": torch.ones(())}},
            "net_ema",
        ),
        (under("online_model.", LAST) | under("ema_model.") | {"step": torch.ones(1)}, "ema_model"),
        (under("net.", LAST) | under("model_ema.net."), "model_ema"),
        ({"n_averaged": torch.tensor(7), **under("module.")}, "module"),
        # moments of an optimizer are no average of weights
        ({"model": under("net."), "exp_avg": LAST, "max_exp_avg_sq": LAST}, "model"),
        ({"weights": NETWORK, "momentum_buffer": LAST}, "weights"),
        (under("net.") | under("app.optim.state.exp_avg.net.", LAST), ""),
        (under("app.model.") | {"app.optim.state.w.exp_avg": torch.ones(3)}, "app.model"),
        # averages that are not of these names, or of no names at all
        ({"model": under("net."), "ema": {"net-stem-proj-weight": torch.ones(6, 4)}}, "not read"),
        (
            {"model": NETWORK, "ema": {"shadow_params": [torch.ones(6, 4)], "decay": 0.9}},
            "not read",
        ),
        (under("net.") | {"model_ema.decay": torch.ones(()), "ema.x": torch.ones(3)}, "not read"),
    ],
)
def test_the_averaged_set_is_found(value: Any, note: str, tmp_path: Path) -> None:
    assert note in " ".join(taken(tmp_path, value).notes)


def test_what_is_not_of_a_set_stays_unknown(tmp_path: Path) -> None:
    source = taken(tmp_path, under("net.") | {"extra.weight": torch.ones(3)})
    assert source.entries.keys() - under("net.") == {"extra.weight"}
    source = taken(tmp_path, under("module.net.") | {"module.extra": torch.ones(1)})
    assert source.entries.keys() - under("net.") == {"extra"}
    source = taken(tmp_path, under("dit.net.") | {"dit.log.freqs": torch.ones(3)})
    assert source.entries.keys() - under("net.") == {"log.freqs"}


def load(tensors: Mapping[str, Tensor], path: Path, bare: tuple[str, ...] = ()) -> nn.Module:
    """Saved, opened and read into a network."""
    torch.save(tensors, path / "x.pt")
    source = take_network(open_checkpoint(path / "x.pt"), ANCHOR, PREFIXES)
    module = nn.Module()
    with torch.device("meta"):
        for name, tensor in NETWORK.items():
            module.register_parameter(name.replace(".", "_"), nn.Parameter(tensor.to("meta")))
    ours = {name: name.replace(".", "_") for name in NETWORK}
    keys = KeyMap(ours, prefixes=PREFIXES, bare=bare)
    load_into(module, source, keys, device="cpu", dtype=torch.float32)
    return module


SETS = ("", "net.", "model.", "module.net_ema.", "ema.net.", "wrap.model.", "a.b.", "b.", "x.net.")


def test_half_an_average_is_not_filled_up(tmp_path: Path) -> None:
    part = dict(list(under("net_ema.").items())[:2])
    with pytest.raises(CheckpointError, match=r"net_ema\..*1 missing: net\.blocks\.1\.mix\.bias"):
        load(under("net.", LAST) | part, tmp_path)


@pytest.mark.parametrize(("prefix", "beside"), [*permutations(SETS, 2)])
def test_tensors_of_two_sets_are_no_network(prefix: str, beside: str, tmp_path: Path) -> None:
    for size in (1, 2):  # the anchor is the first
        half = dict(list(under(prefix).items())[:size])
        rest = dict(list(under(beside, LAST).items())[size:])
        for tensors in (half | rest, rest | half):
            with pytest.raises(CheckpointError, match=r"[12] (of another set|missing|unknown): "):
                load(tensors, tmp_path)
    other = {f"{beside}blocks.1.mix.bias": torch.zeros(4)}
    for tensors in (under(prefix) | other, other | under(prefix)):
        if "ema" in beside and prefix:  # left out, with a note
            bias = load(tensors, tmp_path).state_dict()["blocks_1_mix_bias"]
            assert torch.equal(bias, NETWORK["blocks.1.mix.bias"])
            continue
        with pytest.raises(CheckpointError, match=r"(twice|unknown): .*blocks\.1\.mix\.bias"):
            load(tensors, tmp_path)


def test_prefixes_of_which_one_begins_another() -> None:
    tensors = {"a.x": torch.empty(1), "a.b.y": torch.empty(1)}
    keys = KeyMap({"x": "x", "y": "y"}, prefixes=("a.", "a.b."))
    with pytest.raises(CheckpointError, match=r"another set: a\.b\.y"):
        match(tensors, {"x": (1,), "y": (1,)}, keys, "x.pt")


def test_names_that_never_have_a_prefix(tmp_path: Path) -> None:
    for before in ("net.", "ema.net."):
        stem = {f"{before.removesuffix('net.')}{ANCHOR[0]}": NETWORK[ANCHOR[0]]}
        rest = {name: tensor for name, tensor in under(before).items() if ".blocks." in name}
        source = rest | stem
        torch.save(source, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match="another set"):
            load(source, tmp_path)
        load(source, tmp_path, bare=("stem.*",))


def test_several_sets_without_an_average(tmp_path: Path) -> None:
    torch.save({"student": NETWORK, "teacher": LAST}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"student\., teacher\."):
        take_network(open_checkpoint(tmp_path / "x.pt"), ANCHOR, PREFIXES)
    assert "'net.' taken" in taken(tmp_path, under("net.") | under("net_teacher.", LAST)).notes[0]


FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize(
    ("scale_name", "grid", "shape"),
    [
        ("scale_weight", (), (6, 4)),
        ("weight_scale", (1,), (6, 4)),
        ("weight_scale", (6,), (6, 4)),
        ("weight_scale", (6, 1), (6, 4)),
        ("weight_scale_inv", (2, 3), (200, 300)),
        ("weight_scale", (6, 2), (6, 64)),
    ],
)
def test_weights_of_8_bit_floats(
    dtype: torch.dtype, scale_name: str, grid: tuple[int, ...], shape: tuple[int, int], tmp_path
) -> None:
    weight, scale = torch.randn(shape).to(dtype), torch.rand(grid) + 0.5
    tensors = {"x.weight": weight, f"x.{scale_name}": scale, "x.input_scale": torch.ones(1)}
    tensors |= {"scaled_fp8": torch.empty(0, dtype=dtype), "x.bias": torch.ones(shape[0])}
    save_file(tensors, tmp_path / "x.safetensors")
    source = open_checkpoint(tmp_path / "x.safetensors")
    assert source.entries.keys() == {"x.weight", "x.bias"}
    assert any("fp8" in note for note in source.notes)
    whole = scale.reshape(*grid, *[1] * (2 - len(grid)))
    if grid == (2, 3):
        rows, columns = (torch.arange(n) // 128 for n in shape)
        whole = scale[rows][:, columns]
    elif grid == (6, 2):
        whole = scale.repeat_interleave(32, 1)
    expected = weight.float() * whole
    assert torch.equal(source.read("x.weight"), expected)
    with torch.device("meta"):
        module = nn.Linear(shape[1], shape[0])
    keys = KeyMap({"x.weight": "weight", "x.bias": "bias"})
    load_into(module, source, keys, device="cpu", dtype=torch.bfloat16)
    assert torch.equal(module.weight, expected.bfloat16())


@pytest.mark.parametrize(
    "beside",
    [
        {"y.weight_scale": torch.ones(1), "y.weight": torch.ones(4, 4).to(FP8[0])},  # x has none
        {"scaled_fp8": torch.empty(0, dtype=FP8[0])},
        {"x.weight_scale": torch.ones(3, 3)},
        {"x.weight_scale": torch.ones(4, dtype=torch.uint8)},
    ],
)
def test_scales_that_are_absent_or_unknown(beside: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"x.weight": torch.ones(4, 4).to(FP8[0]), **beside}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"fp8 with scales.* x\.weight"):
        open_checkpoint(tmp_path / "x.pt")


def test_8_bit_floats_alone_are_weights(tmp_path: Path) -> None:
    torch.save({"x.weight": torch.ones(4, 4).to(FP8[1])}, tmp_path / "x.pt")
    source = open_checkpoint(tmp_path / "x.pt")
    assert source.notes == ()
    assert source.read("x.weight").dtype == FP8[1]


def test_names_of_adapters() -> None:
    for name in (
        "net.blocks.0.q_proj.lora_A.default.weight",
        "attn.to_q_lora.net.0.weight",
        "lora_unet_blocks_3_attn_to_q.lora_down.weight",
        "transformer.blocks.0.attn.to_q.lora.up.weight",
        "x.hada_w1_a",
        "x.lokr_w1",
    ):
        assert is_adapter(name), name
    for name in ("net.blocks.0.adaln_modulation_self_attn.1.weight", "explora.weight"):
        assert not is_adapter(name), name
