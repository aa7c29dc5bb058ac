"""The autoregressive transformer against the reference: every tensor of every base case."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, cases, watched
from torch import Tensor

from tests.ranks import Together
from tests.threads import in_threads, tensor_parallel
from worldline.families.autoregressive.model import (
    PRESETS,
    RELEASED_GRID,
    ARTransformer,
    Positions,
    make_positions,
)
from worldline.families.autoregressive.step import PlainDecoder
from worldline.families.autoregressive.weights import KEYS, open_network, read_config
from worldline.family import Compute
from worldline.nn.rope import axis_sizes as rope_axis_sizes
from worldline.nn.rope import inverse_frequencies, rotate, rotation_3d, sincos_3d
from worldline.parallel.mesh import Axis
from worldline.sampling.solvers import finish
from worldline.sampling.tokens import Sampling, decode, draw, draw_noise, probabilities
from worldline.weights.checkpoint import (
    Checkpoint,
    find_shards,
    open_checkpoint,
    open_shards,
)
from worldline.weights.stream import load_into

BASE = [*cases("ar_base_tiny"), *cases("ar_12b_like_tiny")]
VIDEO2WORLD = [*cases("ar_v2w_tiny"), *cases("ar_13b_like_tiny")]
TRANSFORMERS = [*BASE, *VIDEO2WORLD]
SHARDED = cases("ar_tp_shards")
# drawn tokens are optional in the cases: torch draws exponentials by MKL where it is built with it
SAME_RANDOM_NUMBERS = torch.backends.mkl.is_available()


def build(checkpoint: Checkpoint, settings: dict[str, Any]) -> ARTransformer:
    config = read_config(checkpoint, settings)
    with torch.device("meta"):
        model = ARTransformer(config)
    load_into(model, checkpoint, KEYS, device="cpu", dtype=torch.float32)
    return model.requires_grad_(False).eval()


@cache
def loaded(case: Case) -> ARTransformer:
    path = case.path / case.spec["checkpoint"]["file"]
    return build(open_checkpoint(path), json.loads((case.path / "config.json").read_text()))


def positions_of(model: ARTransformer) -> Positions:
    return make_positions(model.config, "cpu", torch.float32)


def context_of(case: Case, rows: int | None = None) -> Tensor | None:
    """The text of the first `rows` clips; None for a base model."""
    return case.tensor("context")[:rows] if "context" in case else None


def encoded_context(case: Case, model: ARTransformer) -> Any:
    text = context_of(case)
    return None if text is None else model.encode_context(text)


@pytest.mark.parametrize("case", TRANSFORMERS, ids=str)
def test_configuration_is_read_from_the_checkpoint(case: Case) -> None:
    config, stated = loaded(case).config, case.spec["hyper_parameters"]
    assert config.depth == stated["n_layers"]
    assert config.width == stated["dim"]
    assert (config.num_heads, config.num_kv_heads) == (stated["n_heads"], stated["n_kv_heads"])
    assert config.hidden == stated["ffn_hidden_size"]
    assert config.vocabulary == stated["vocab_size"]
    assert [config.grid.frames, config.grid.height, config.grid.width] == stated["latent_shape"]
    assert (config.yarn is None) == (stated["yarn"] is None)
    assert config.begin_token == case.spec["special_tokens"]["begin_of_video"]
    if stated.get("v2w"):
        assert config.context_width == stated["context_dim"]
        assert config.context_every == stated.get("every_k", 1)
        assert config.embedding_rows == case.spec["embedding_rows"]
        assert config.leading_tokens == 1


@pytest.mark.parametrize("case", TRANSFORMERS, ids=str)
def test_full_forward_and_intermediates(case: Case) -> None:
    model = loaded(case)
    config, positions = model.config, positions_of(model)
    tokens, context = case.tensor("tokens"), encoded_context(case, model)
    outputs = watched(model, lambda: model(tokens, positions, context=context))
    case.compare("logits_full", outputs[""])
    case.compare("embed", outputs["embedding"])
    if "logits_full_t5_masked" in case:
        mask = case.tensor("t5_mask").bool()[:, None, None]
        masked = model(tokens, positions, context=context, context_mask=mask)
        case.compare("logits_full_t5_masked", masked)
    table = positions.rows(0, tokens.shape[1]).table
    rotation = positions.rotation.rows(0, tokens.shape[1])
    for name in case.names("layer*"):
        layer, what = re.fullmatch(r"layer(\d+)_(\w+)", name).groups()  # type: ignore[union-attr]
        attention = f"layers.{layer}.attention"
        ours = {
            "in": lambda number=layer: entering(int(number)),
            "q_normed": lambda a=attention: outputs[f"{a}.q_norm"],
            "k_normed": lambda a=attention: outputs[f"{a}.k_norm"],
            "q_rope": lambda a=attention: turned(outputs[f"{a}.q_norm"]),
            "k_rope": lambda a=attention: turned(outputs[f"{a}.k_norm"]),
            "attn": lambda a=attention: outputs[a],
            "cross_attn": lambda number=layer: outputs[f"layers.{number}.cross_attention"],
            "ffn": lambda number=layer: outputs[f"layers.{number}.feed_forward"],
            "out": lambda number=layer: outputs[f"layers.{number}"],
        }

        def entering(number: int) -> Tensor:
            """What a layer works on: its input, and the table that is added before it."""
            x = outputs[f"layers.{number - 1}"] if number else outputs["embedding"]
            return x if table is None else x + table

        def turned(x: Tensor) -> Tensor:  # (B, L, heads, K), as the reference keeps it
            return rotate(x.transpose(1, 2), rotation).transpose(1, 2)

        case.compare(name, ours[what]())
    case.compare("final_norm", outputs["norm"])
    rows = case.spec["max_seq_len"]
    for name, cached, beyond in (
        ("rope_cos", positions.rotation.cos, 1.0),  # rows beyond the clip have angle 0
        ("rope_sin", positions.rotation.sin, 0.0),
    ):
        padded = torch.full((rows, cached.shape[1]), beyond)
        padded[: config.length] = cached
        case.compare(name, padded)
    if "abs_pos_emb" in case:
        assert positions.table is not None
        padded = torch.zeros(rows, config.width)
        padded[: config.length] = positions.table
        case.compare("abs_pos_emb", padded)


@pytest.mark.parametrize("case", TRANSFORMERS, ids=str)
def test_cached_steps(case: Case) -> None:
    model = loaded(case)
    positions, tokens = positions_of(model), case.tensor("tokens")
    cache_, context = model.new_cache(tokens.shape[0]), encoded_context(case, model)
    found = re.search(r"first (\d+) tokens", case.spec["tensors"]["logits_cached"])
    assert found is not None
    prompt = int(found[1])
    logits = [model(tokens[:, :prompt], positions, cache=cache_, context=context)]
    for at in range(prompt, tokens.shape[1]):
        token = tokens[:, at : at + 1]
        logits.append(model(token, positions, cache=cache_, start=at, context=context))
    case.compare("logits_cached", torch.cat(logits, dim=1))
    for letter, ours in (("k", cache_.keys), ("v", cache_.values)):
        for name in case.names(f"cache_{letter}_layer*"):
            layer = int(name.rsplit("layer", 1)[1])
            stored = case.tensor(name)
            padded = torch.zeros_like(stored)  # the reference rounds the length up
            padded[:, :, : ours.shape[3]] = ours[layer]
            case.compare(name, padded)


@pytest.mark.parametrize("case", TRANSFORMERS, ids=str)
def test_greedy_and_sampled_continuations(case: Case) -> None:
    model = loaded(case)
    tokens = case.tensor("tokens")
    per_frame = model.config.grid.tokens_per_frame
    for name in [*case.names("greedy_*"), *case.names("sampled_*")]:
        line = case.spec["tensors"][name]
        given = re.search(r"tokens\[0, *:(\d+)\]", line)
        frames = 1 if name.endswith("_image") else 2
        leading = model.config.leading_tokens
        prompt = tokens[:1, : int(given[1]) if given else leading + frames * per_frame]
        sampling, noise = Sampling(temperature=0), None
        count = case.tensor(name).shape[1] - prompt.shape[1]
        if name.startswith("sampled_"):
            numbers = re.search(r"temperature ([\d.]+), top_p ([\d.]+)", line)
            seed = re.search(r"seeded (\d+)", line)
            assert numbers is not None
            assert seed is not None
            sampling = Sampling(temperature=float(numbers[1]), top_p=float(numbers[2]))
            vocabulary = model.config.vocabulary
            noise = draw_noise([int(seed[1])], vocabulary, count, torch.device("cpu"))
        decoder = PlainDecoder(model, sampling, [context_of(case, 1)])
        drawn = finish(decode(decoder, prompt, count, noise))
        if name.startswith("greedy_") or SAME_RANDOM_NUMBERS:
            case.compare(name, drawn)


@pytest.mark.parametrize("case", TRANSFORMERS, ids=str)
def test_filters(case: Case) -> None:
    logits = case.tensor("topp_logits")
    for name in [*case.names("topp_probs_*"), *case.names("topk_probs_*")]:
        temperature = re.search(r"_t([\d.]+)", name)
        top_p, top_k = re.search(r"_p([\d.]+)$", name), re.search(r"_k(\d+)$", name)
        sampling = Sampling(
            temperature=float(temperature[1]) if temperature else 1.0,
            top_p=float(top_p[1]) if top_p else 1.0,
            top_k=int(top_k[1]) if top_k else None,
        )
        probs, ids = probabilities(logits, sampling)
        case.compare(name, torch.zeros_like(logits).scatter(1, ids, probs))
    for name in case.names("topp_token_*"):
        temperature, top_p = re.search(r"_t([\d.]+)_p([\d.]+)$", name).groups()  # type: ignore[union-attr]
        seed = re.search(r"manual_seed\((\d+)\)", case.spec["tensors"][name])
        assert seed is not None
        generator = torch.Generator().manual_seed(int(seed[1]))
        noise = torch.empty_like(logits).exponential_(1, generator=generator)
        rule = Sampling(temperature=float(temperature), top_p=float(top_p))
        if SAME_RANDOM_NUMBERS:
            case.compare(name, draw(logits, rule, noise)[:, None])


@pytest.mark.parametrize("case", BASE, ids=str)
def test_position_tables_at_released_size(case: Case) -> None:
    """Numbers of the released models that the case holds: theirs, not those of the tiny model."""
    if not case.names("real_*"):
        return
    rows = case.tensor("real_rows")
    for model in ("4b", "12b"):
        if not case.names(f"real_{model}_*"):
            continue
        released = PRESETS[model.upper()]
        theta, yarn = released.rope_theta, released.yarn
        time, space, _ = rope_axis_sizes(released.head_size)
        original = (0, 0) if yarn is None else yarn.original
        case.compare(
            f"real_{model}_temporal_inv_freq", inverse_frequencies(time, theta, yarn, original[0])
        )
        case.compare(
            f"real_{model}_spatial_inv_freq", inverse_frequencies(space, theta, yarn, original[1])
        )
        rotation = rotation_3d(released.grid, released.head_size, theta, yarn)
        case.compare(f"real_{model}_rope_cos", rotation.cos[rows])
        case.compare(f"real_{model}_rope_sin", rotation.sin[rows])
    for name in case.names("real_*_abs_pos_emb"):
        listed = re.search(r"positions \[([\d, ]+)\]", case.spec["tensors"][name])
        assert listed is not None
        chosen = [int(number) for number in listed[1].split(",")]
        width = case.tensor(name).shape[1]
        table = sincos_3d(RELEASED_GRID, width, leading=1)  # row 0 is the begin-of-video token's
        case.compare(name, table[1:][chosen])


def sharded_folders(case: Case) -> Iterator[tuple[str, Path]]:
    for folder in sorted(path for path in case.path.iterdir() if path.is_dir()):
        if list(folder.glob("*_mp_*.pt")):
            yield folder.name, folder


def settings_of_shards(case: Case) -> dict[str, Any]:
    stated = case.spec["hyper_parameters"]
    settings = {key: value for key, value in stated.items() if value is not None}
    settings |= {"video_latent_shape": settings.pop("latent_shape")}
    yarn = settings.pop("yarn", None)  # its presence says that it is applied
    return settings | (yarn or {}) | {"apply_yarn": yarn is not None}


@pytest.mark.parametrize("case", SHARDED, ids=str)
def test_shards_make_one_model(case: Case) -> None:
    compared = set()
    for name, folder in sharded_folders(case):
        model = build(open_shards(find_shards(folder)), settings_of_shards(case))
        logits = model(case.tensor("tokens"), positions_of(model))
        case.compare(f"logits_full_{name}", logits)
        compared.add(f"logits_full_{name}")
    assert compared == set(case.names("logits_full_*"))


def part_logits(axis: Axis, case: Case, folder: Path) -> Tensor:
    """Logits that a process of several computes with the others, of its part of the weights."""
    mesh = tensor_parallel(axis)
    compute = Compute(torch.device("cpu"), torch.float32, torch.float32, False, mesh=mesh)
    network = open_network(find_shards(folder)[0], settings_of_shards(case))
    model = network.load(compute, offload=False).module
    logits: Tensor = model(case.tensor("tokens"), positions_of(model))
    return logits


@pytest.mark.parametrize("case", SHARDED, ids=str)
def test_processes_share_one_model(case: Case) -> None:
    """As many as there are shards, whose logits are compared, and other numbers of them."""
    for name, folder in sharded_folders(case):
        for count in {len(find_shards(folder)), *divisors(case, 2, 4)}:
            for logits in in_threads(count, part_logits, case, folder):
                case.compare(f"logits_full_{name}", logits)


def divisors(case: Case, *counts: int) -> list[int]:
    """Numbers of processes that can share the model of a case."""
    stated = case.spec["hyper_parameters"]
    sizes = [stated[name] for name in ("n_heads", "n_kv_heads", "ffn_hidden_size", "vocab_size")]
    return [count for count in counts if not any(size % count for size in sizes)]


@pytest.mark.slow
@pytest.mark.parametrize("case", SHARDED, ids=str)
def test_two_processes_share_one_model(case: Case, two: Together) -> None:
    for name, folder in sharded_folders(case) if divisors(case, 2) else ():
        for logits in two(part_logits, case, folder):
            case.compare(f"logits_full_{name}", logits)


@pytest.mark.parametrize("case", [*TRANSFORMERS, *SHARDED], ids=str)
def test_every_tensor_is_used(case: Case) -> None:
    assert case.unused() == []
