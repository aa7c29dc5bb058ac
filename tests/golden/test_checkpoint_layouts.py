"""Files of trainings, parts and layouts as the reference writes them: read, made and converted."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, cases
from flow_networks import load as load_flow
from networks import load_dit
from torch import Tensor

from tests.cli.conftest import run_words
from worldline.families.autoregressive.model import ARTransformer, make_positions
from worldline.families.autoregressive.weights import open_network
from worldline.families.diffusion.weights import open_network as open_dit
from worldline.families.predict2_5.weights import open_network as open_flow
from worldline.shapes import LatentShape
from worldline.weights.checkpoint import SHARD, open_checkpoint
from worldline.weights.networks import Network, open_weights
from worldline.weights.trainings import open_state

AUTOREGRESSIVE, TRAININGS = cases("ar_ckpt_layouts"), cases("train_ckpt_layouts")


def contents(path: Path) -> dict[str, Tensor]:
    """Tensors of a file as PyTorch reads them; of a training, those of the model."""
    stored = torch.load(path, weights_only=True, map_location="cpu")
    return {n: t for n, t in stored.get("model", stored).items() if isinstance(t, Tensor)}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def done(*words: object) -> str:
    result = run_words(("checkpoints", *words))
    assert result.exit_code == 0, result.stderr
    return result.stdout


def sets(case: Case) -> dict[Path, list[Path]]:
    """File that stands for the parts of a set -> the parts, in order."""
    found: dict[Path, dict[int, Path]] = {}
    for path in case.path.rglob("*_model_mp_*.pt"):
        part = SHARD.fullmatch(path.name)
        assert part is not None
        found.setdefault(path.with_name(f"{part['stem']}.pt"), {})[int(part["rank"])] = path
    return {stem: [parts[rank] for rank in sorted(parts)] for stem, parts in found.items()}


def whole_of(case: Case, stem: Path) -> Path:
    """File of the whole model that parts were cut from, or were merged to."""
    if "train" in stem.relative_to(case.path).parts:
        return case.path / "merged" / "model.pt"
    beside = stem.with_name("merged.pt")
    return beside if beside.is_file() else case.path / "official" / "model.pt"


@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=str)
def test_shard_writes_the_released_parts(case: Case, tmp_path: Path) -> None:
    official = case.path / "official" / "model.pt"
    made = 0
    for stem, parts in sets(case).items():
        if whole_of(case, stem) != official:
            continue
        engine = any("layernorm_qkv" in name for name in contents(parts[0]))
        for source in (official, *case.path.glob("te/model*.pt")):
            copy = tmp_path / stem.parent.name / source.name
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(source, copy)
            backend = ("-b", "transformer_engine") if engine else ()
            done("shard", "-c", copy, "-t", len(parts), *backend)
            for rank, part in enumerate(parts):
                found = copy.with_name(f"{copy.stem}_model_mp_{rank}.pt")
                assert_same(contents(found), contents(part))
                # not of the size of the whole, as the released script's
                assert found.stat().st_size < official.stat().st_size * 0.75
                made += 1
    assert made > 4


@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=str)
def test_merge_joins_every_set(case: Case, tmp_path: Path) -> None:
    found = sets(case)
    assert len(found) > 2
    for number, (stem, parts) in enumerate(found.items()):
        target = tmp_path / str(number) / "model.pt"
        done("merge", "-c", stem, "-t", len(parts), "-o", target)
        assert_same(contents(target), contents(whole_of(case, stem)))
        assert_same(
            contents(target), {n: open_weights(parts[-1]).read(n) for n in contents(target)}
        )


@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=str)
def test_names_of_transformer_engine(case: Case) -> None:
    official = contents(case.path / "official" / "model.pt")
    source = open_checkpoint(case.path / "te" / "model_te.pt")
    assert_same({name: source.read(name) for name in source.tensors}, official)
    stated = case.spec["model"]
    size = stated.get("head_dim", stated["dim"] // stated["n_heads"])
    # of the first rotary layout, which no Cosmos model has: rows in another order
    for path in case.path.glob("te/*rope_v1.pt"):
        for name, permuted in contents(path).items():
            layer, kind = re.search(r"(layers\.\d+)\..*(query|key)_weight", name).groups()  # type: ignore[union-attr]
            plain = official[f"model.{layer}.attention.w{kind[0]}.weight"]
            rows = plain.view(-1, size // 2, 2, plain.shape[1]).transpose(1, 2)
            assert torch.equal(rows.reshape(plain.shape), permuted)


@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=str)
def test_logits_of_every_file(case: Case, tmp_path: Path) -> None:
    tokens, stated = case.tensor("tokens"), case.spec["model"]
    height, width = (stated[f"video_{side}"] // 16 for side in ("height", "width"))
    grid = [tokens.shape[1] // (height * width), height, width]
    assert grid[0] * height * width == tokens.shape[1]

    def logits(path: Path) -> Tensor:
        network = open_network(path, {"video_latent_shape": grid, "norm_eps": stated["norm_eps"]})
        model: ARTransformer = network.read("cpu", torch.float32)
        return model(tokens, make_positions(model.config, "cpu", torch.float32))

    jobs = sorted(path.parent for path in case.path.rglob("checkpoints"))
    [one] = [job for job in jobs if not [*job.glob("checkpoints/*_mp_*")]]
    [parts] = [job for job in jobs if job != one]
    [state] = (file for file in parts.rglob("*.pt") if re.fullmatch(r"iter_\d+.pt", file.name))
    post_trained = tmp_path / "Cosmos-Predict1-4B-Base_post-trained" / "model.pt"
    post_trained.parent.mkdir()
    shutil.copy(next(one.rglob("iter_*.pt")), post_trained)
    files = {
        "official": [case.path / "official" / "model.pt", case.path / "te" / "model_te.pt"],
        "merged_after_training": [case.path / "merged", parts, parts / "checkpoints", state],
        "uneven_merged": [whole_of(case, stem) for stem in sets(case) if "uneven" in str(stem)],
        "train_tp1": [one, one / "checkpoints", post_trained.parent, post_trained],
    }
    for name, paths in files.items():
        for path in paths:
            case.compare(f"logits.{name}", logits(path))
    assert case.unused() == []


def job_of(case: Case, beginning: str, lora: bool = False) -> Path:
    """Job folder of a training of a model whose folders begin so: of all weights, or of LoRA."""
    [folder] = {
        path.parent
        for path in case.path.glob(f"{beginning}/**/checkpoints")
        if ("lora" in str(path.relative_to(case.path))) == lora
    }
    return folder


def p1_output(case: Case, path: Path) -> Tensor:
    stated = case.spec["p1_model"]
    time, rows, columns = (stated[f"rope_{axis}_extrapolation_ratio"] for axis in "thw")
    return p1_run(case, load_dit(path, (time, rows, columns), stated["base_fps"]))


def p1_run(case: Case, model: Any) -> Tensor:
    x, mask = case.tensor("p1.in.x"), "p1.in.condition_video_input_mask"
    positions = model.make_positions(
        LatentShape(*x.shape[2:]), case.tensor("p1.in.fps")[0].item(), rotary_dtype=torch.float32
    )
    return model(
        x,
        case.tensor("p1.in.timesteps"),
        model.encode_context(case.tensor("p1.in.crossattn_emb")),
        positions,
        condition_mask=case.tensor(mask) if mask in case else None,
        padding_mask=case.tensor("p1.in.padding_mask"),
    )


@pytest.mark.parametrize("case", TRAININGS, ids=str)
def test_files_of_predict1(case: Case, tmp_path: Path) -> None:
    job = job_of(case, "p1")
    [regular] = job.rglob("*_reg_model.pt")
    [average] = job.rglob("*[0-9]_ema_model.pt")
    case.compare("p1.y.reg", p1_output(case, regular))
    state = regular.with_name(regular.name.replace("_reg_model", ""))
    post_trained = tmp_path / "Cosmos-Predict1-7B-Video2World_post-trained-4gpu_80gb"
    replica = tmp_path / average.name.replace("_ema", "_RANK1_ema")
    post_trained.mkdir()
    shutil.copy(average, post_trained / "model.pt")
    shutil.copy(average, replica)
    for path in (average, state, job, job / "checkpoints", post_trained, replica):
        case.compare("p1.y.ema", p1_output(case, path))
    stored = open_state(regular, [])
    for name in case.names("p1.optim.*"):
        kind, _, inner = name.removeprefix("p1.optim.").partition(".")
        case.compare(name, stored.read(kind, inner))


def flow_of(case: Case, source: Any) -> Network[Any]:
    stated = case.spec["p25_model"]
    settings = {
        "rope_ratio": [stated[f"rope_{axis}_extrapolation_ratio"] for axis in "thw"],
        "timestep_scale": stated["timestep_scale"],
    }
    return open_flow(source, settings)


def flow_output(case: Case, network: Network[Any]) -> Tensor:
    model = load_flow(network)
    x = case.tensor("p25.in.x_B_C_T_H_W")
    return model(
        x,
        case.tensor("p25.in.timesteps_B_T"),
        model.encode_context(case.tensor("p25.in.crossattn_emb")),
        model.make_positions(LatentShape(*x.shape[2:])),
        condition_mask=case.tensor("p25.in.condition_video_input_mask_B_C_T_H_W"),
        padding_mask=case.tensor("p25.in.padding_mask"),
    )


def chosen(network: Network[Any], prefix: str, scale: float) -> Network[Any]:
    """The network with the adapter of one set in its file, of those that have one beside."""
    source = network.source
    kept = {n: entry for n, entry in source.adapters.items() if n.startswith(prefix)}
    one = network.match_adapter(replace(source, adapters=kept or source.adapters), scale)
    return network.bare().adapted(one)


@pytest.mark.parametrize("case", TRAININGS, ids=str)
def test_files_of_adapters(case: Case) -> None:
    """Base, adapter and averaged adapter in the files of both trainers."""
    [file] = job_of(case, "p1", lora=True).rglob("*[0-9]_model.pt")
    stated = case.spec["p1_model"]
    ratio = [stated[f"rope_{axis}_extrapolation_ratio"] for axis in "thw"]
    found = open_dit(file, {"rope_ratio": ratio, "base_fps": stated["base_fps"]})
    scale = case.spec["facts"]["p1_lora"]["scale"]
    for name, prefix in (("p1.y.lora_model", "model."), ("p1.y.lora_ema", "ema.")):
        if name in case:  # a training may keep no averages
            model = chosen(found, prefix, scale).read("cpu", torch.float32)
            case.compare(name, p1_run(case, model))
    case.compare("p1.y.lora_base_only", p1_run(case, found.bare().read("cpu", torch.float32)))

    [metadata] = job_of(case, "p25", lora=True).rglob("model/.metadata")
    scale = case.spec["p25_lora"]["alpha"] / case.spec["p25_lora"]["rank"]
    [converted] = metadata.parents[1].glob("model_ema_bf16.pt")
    average = flow_of(case, converted)
    case.compare("p25.y.lora_ema_bf16", flow_output(case, chosen(average, "", scale)))
    source = open_weights(metadata.parent)
    plain = {
        kind: {n: entry for n, entry in each.items() if n.startswith("net.")}
        for kind, each in (("entries", source.entries), ("adapters", source.adapters))
    }
    found = flow_of(case, replace(source, **plain))
    case.compare("p25.y.lora_dcp_net", flow_output(case, chosen(found, "", scale)))
    case.compare("p25.y.lora_base_only", flow_output(case, found.bare()))


@pytest.mark.parametrize("case", TRAININGS, ids=str)
def test_files_of_predict2_5(case: Case) -> None:
    job = job_of(case, "p25")

    def output(source: Any) -> Tensor:
        return flow_output(case, flow_of(case, source))

    assert case.tensor("p25.in.fps").isfinite().all()  # the network reads none
    [converted] = job.rglob("model_ema_bf16.pt")
    for path in (converted, converted.parent):
        case.compare("p25.y.full_ema_bf16", output(path))
    [metadata] = job.rglob("model/.metadata")
    source = open_weights(metadata.parent)
    plain = {name: entry for name, entry in source.entries.items() if name.startswith("net.")}
    case.compare("p25.y.full_dcp_net", output(replace(source, entries=plain)))
    average = output(metadata.parent)
    for path in (job, job / "checkpoints"):
        assert torch.equal(output(path), average)
    ema = {name: entry for name, entry in source.entries.items() if name.startswith("net_ema.")}
    assert torch.equal(output(replace(source, entries=ema)), average)


@pytest.mark.parametrize("case", TRAININGS, ids=str)
def test_distributed_checkpoints_become_the_released_files(case: Case, tmp_path: Path) -> None:
    for number, converted in enumerate(sorted(case.path.rglob("model_ema_bf16.pt"))):
        source = open_checkpoint(converted.parent / "model")
        target = tmp_path / str(number)
        done("convert", converted.parent / "model", target)
        assert_same(contents(target / converted.name), contents(converted))
        everything = {name: source.read(name) for name in source.tensors}
        assert_same(contents(target / "model.pt"), everything)
        average = {n.replace("net_ema.", "net."): t for n, t in everything.items() if "_ema." in n}
        assert_same(contents(target / "model_ema_fp32.pt"), average)
        done("convert", converted.parent / "model", target / "bare", "--to", "nvidia", "--no_ema")
        assert [path.name for path in (target / "bare").iterdir()] == ["model.pt"]


def seeds(case: Case) -> list[int]:
    stated = case.spec["seed"]
    return stated if isinstance(stated, list) else [stated]


# kind in diffusers' layout -> kind with the same weights in NVIDIA's, perhaps in another precision
PAIRS = {
    "dit_diffusers_layout": "dit_v2w_tiny",
    "dit25_diffusers_layout": "dit25_tiny",
    "tok_cv_diffusers_layout": "tok_cv_tiny",
}


@pytest.mark.parametrize("case", [case for kind in PAIRS for case in cases(kind)], ids=str)
def test_layouts_of_diffusers(case: Case, tmp_path: Path) -> None:
    """There and back, and from the same weights in NVIDIA's layout, every number is the same."""
    kind = PAIRS[case.kind]
    for path in case.path.rglob("diffusion_pytorch_model.safetensors"):
        theirs, back = open_checkpoint(path), tmp_path / path.parent.name
        expected = {name: theirs.read(name) for name in theirs.tensors}
        [dtype] = {str(tensor.dtype).removeprefix("torch.") for tensor in expected.values()}
        settings = json.loads(path.with_name("config.json").read_text())
        sources = [path.parent]
        for form in ("nvidia", "dcp", "safetensors"):
            done("convert", sources[0], back / form, "--to", form)
            sources.append(back / form)
        for other in cases(kind) if path.parent.name != "vae" or kind.startswith("tok") else ():
            if seeds(other)[0] == seeds(case)[0]:
                [weights] = {
                    file.parent for end in ("pt", "jit") for file in other.path.rglob(f"*.{end}")
                }
                shutil.copytree(weights, copy := back / weights.name)
                if "rope_scale" in settings:
                    ours = {"rope_ratio": settings["rope_scale"]}
                    (copy / "config.json").write_text(json.dumps(ours))
                sources.append(copy)
        for number, source in enumerate(sources):
            target = back / str(number)
            done("convert", source, target, "--to", "diffusers", "--dtype", dtype)
            found = open_checkpoint(target / path.name)
            assert_same({name: found.read(name) for name in found.tensors}, expected)
            stated = json.loads((target / "config.json").read_text())
            assert stated == {name: settings[name] for name in stated}


@pytest.mark.parametrize("case", TRAININGS, ids=str)
def test_every_tensor_is_used(case: Case) -> None:
    assert case.unused() == []
