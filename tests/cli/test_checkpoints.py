"""`checkpoints inspect` recognises files and folders, and names what does not fit."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tiny.encoders import REASON1
from worldline import locate
from worldline.errors import CheckpointError
from worldline.families.diffusion.model import DiT
from worldline.families.predict2_5.model import FlowDiT
from worldline.text import reason1, t5
from worldline.text.encoder import EncoderFiles
from worldline.weights.checkpoint import open_checkpoint, save

from ..conftest import MODEL, TOKENIZER
from ..diffusers_layout import diffusers_config, diffusers_tensors
from ..families.worlds import open_named
from ..tiny_decoder import DECODER
from ..tiny_diffusion import TEXT2WORLD, VIDEO2WORLD
from ..tiny_diffusion import config as diffusion_config
from ..tiny_predict2_5 import CONFIG as FLOW_CONFIG
from ..tiny_predict2_5 import POST, PRE
from .conftest import Run


def read_all(path: Path) -> dict[str, torch.Tensor]:
    source = open_checkpoint(path)
    return {name: source.read(name).clone() for name in source.tensors}


def test_a_folder_of_models(run: Run, small_world: Path) -> None:
    result = run("checkpoints", "inspect", small_world)
    assert result.exit_code == 0, result.stderr
    for part in (
        str(small_world / MODEL),
        "Cosmos autoregressive model",
        "depth 2, width 64",
        str(small_world / TOKENIZER),
        "Cosmos discrete video tokenizer",
        "spatial 16, temporal 8",
    ):
        assert part in result.stdout
    assert result.stdout.count("complete: every tensor fits") == 2


@pytest.mark.parametrize(
    ("path", "part"),
    [
        (f"{MODEL}/model.pt", "format      pt"),
        (f"{MODEL}", "Cosmos autoregressive model"),
        (f"{TOKENIZER}/encoder.safetensors", "Cosmos discrete video tokenizer"),
        (f"{TOKENIZER}/decoder.safetensors", "Cosmos discrete video tokenizer"),
        (f"{TOKENIZER}", "values: bfloat16"),
    ],
)
def test_one(path: str, part: str, run: Run, small_world: Path) -> None:
    result = run("checkpoints", "inspect", small_world / path)
    assert result.exit_code == 0, result.stderr
    assert part in result.stdout
    assert "complete: every tensor fits" in result.stdout


def test_diffusion_models(run: Run, whole_world: Path, tiny_diffusion: Path) -> None:
    for folder, part in (
        (tiny_diffusion / TEXT2WORLD, "Cosmos diffusion model"),
        (tiny_diffusion / VIDEO2WORLD / "model.pt", "condition_mask True"),
        (whole_world / DECODER, "vocabulary 64"),
    ):
        result = run("checkpoints", "inspect", folder)
        assert result.exit_code == 0, result.stderr
        assert part in result.stdout
        assert "complete: every tensor fits" in result.stdout


def test_a_repository_of_predict2_5(run: Run, tiny_predict2_5: Path) -> None:
    """Its transformers lie below its tokenizer; so they do where there are several repositories."""
    folder = tiny_predict2_5 / Path(POST.repository).name
    for path in (folder, tiny_predict2_5):
        result = run("checkpoints", "inspect", path)
        assert result.exit_code == 0, result.stderr
        for model in (POST, PRE):
            assert f"{(folder / model.file).parent}\n" in result.stdout
        assert result.stdout.count("Cosmos predict2.5 model") == 2
        assert result.stdout.count("Wan video tokenizer") == 1
        # beside the repository stands the text encoder
        encoders = int(path != folder)
        assert result.stdout.count("Reason1 encoder (Qwen2.5-VL)") == encoders
        assert result.stdout.count("complete: every tensor fits") == 3 + encoders


@pytest.mark.parametrize("flow", [False, True])
def test_diffusers_folders(flow: bool, run: Run, tmp_path: Path) -> None:
    config = FLOW_CONFIG if flow else diffusion_config(condition_mask=True)
    model = FlowDiT(config) if flow else DiT(config)  # type: ignore[arg-type]
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    file.parent.mkdir()
    save(diffusers_tensors(model), file)
    settings = file.parent / "config.json"
    settings.write_text(json.dumps(diffusers_config(config)))
    for path in (tmp_path, file.parent, file):
        result = run("checkpoints", "inspect", path)
        assert result.exit_code == 0, result.stderr
        assert f"Cosmos {'predict2.5' if flow else 'diffusion'} model" in result.stdout
        assert "complete: every tensor fits" in result.stdout
    settings.unlink()
    assert "has no rope_scale" in run("checkpoints", "inspect", file).stdout


def test_a_flow_model_that_lacks_a_tensor(run: Run, own_predict2_5: Path) -> None:
    path = own_predict2_5 / Path(POST.repository).name / POST.file
    tensors = read_all(path)
    del tensors["net.crossattn_proj.0.bias"]
    save(tensors, path)
    result = run("checkpoints", "inspect", path)
    assert result.exit_code == 1
    assert "1 missing: net.crossattn_proj.0.bias" in result.stdout


def test_inside_a_training_checkpoint(run: Run, small_world: Path, tmp_path: Path) -> None:
    tensors = read_all(small_world / MODEL / "model.pt")
    torch.save({"model": tensors, "optimizer": {}, "iteration": 3}, tmp_path / "iter_000000003.pt")
    result = run("checkpoints", "inspect", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert 'inside ["model"]' in result.stdout
    assert "optimizer" in result.stdout


def test_missing_and_too_much(run: Run, own_world: Path) -> None:
    path = own_world / MODEL / "model.pt"
    tensors = read_all(path)
    del tensors["model.layers.0.attention.wq.weight"]
    tensors["model.layers.0.attention.wq.bias"] = torch.zeros(2)
    tensors["model.layers.0.attention.wq.weight"] = torch.zeros(64, 64)
    del tensors["model.norm.weight"]
    save(tensors, path)
    result = run("checkpoints", "inspect", path)
    assert result.exit_code == 1
    assert "1 missing: model.norm.weight" in result.stdout
    assert "1 unknown: model.layers.0.attention.wq.bias" in result.stdout


def write_header(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write a file of bf16 tensors as large as its header says, which takes no room on a disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)


def write_shards(folder: Path, shapes: Mapping[str, tuple[int, ...]], count: int) -> list[Path]:
    """Write them in several files and an index, as Hugging Face does; the last holds one tensor."""
    names, most = list(shapes), len(shapes) // (count - 1)
    parts = [names[at * most : (at + 1) * most] for at in range(count - 1)] + [names[-1:]]
    parts[-2] = names[(count - 2) * most : -1]
    files = [folder / f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    for file, part in zip(files, parts, strict=True):
        write_header(file, {name: shapes[name] for name in part})
    places = {n: file.name for file, part in zip(files, parts, strict=True) for n in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return files


def encoder_shapes(
    files: type[EncoderFiles], config: dict[str, object]
) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = files.encoder(config, None, 1).network.state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("count", [1, 4])
def test_the_released_t5(count: int, run: Run, tmp_path: Path) -> None:
    folder = Path(
        shutil.copytree(locate.BUNDLED / t5.T5Files.released, tmp_path / t5.T5Files.released)
    )
    sizes = {"d_model": 1024, "d_kv": 128, "d_ff": 65_536, "num_layers": 24, "num_heads": 128}
    config = {"model_type": "t5", "vocab_size": 32_128, **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = encoder_shapes(t5.T5Files, config)
    shapes["decoder.final_layer_norm.weight"] = (1024,)
    files = [folder / "model.safetensors"]
    if count == 1:
        write_header(files[0], shapes)
    else:
        files[0].unlink()
        files = write_shards(folder, shapes, count)
    for path in (tmp_path, folder, *files):
        result = run("checkpoints", "inspect", path)
        assert result.exit_code == 0, result.stderr
        for part in (
            "family      T5 encoder\n",
            "sizes       text width 1,024\n",
            f"parameters  {t5.NUM_PARAMETERS:,}\n",
            "complete: every tensor fits; 1 more, which are not read; values not read\n",
        ):
            assert part in result.stdout


@pytest.mark.parametrize("nested", [False, True])
def test_the_released_reason1(nested: bool, run: Run, tmp_path: Path) -> None:
    """As it was released, and as transformers saves it since."""
    folder = Path(shutil.copytree(locate.BUNDLED / reason1.RELEASED, tmp_path / reason1.RELEASED))
    (folder / "model.safetensors").unlink()
    sizes = (152_064, 3584, 18_944, 28, 28, 4)
    config: dict[str, object] = dict(zip(REASON1, sizes, strict=True))
    stated = {"model_type": "qwen2_5_vl", **({"text_config": config} if nested else config)}
    (folder / "config.json").write_text(json.dumps(stated))
    prefix = "model.language_model." if nested else "model."
    shapes: dict[str, tuple[int, ...]] = {"visual.merger.ln_q.weight": (1280,)}
    ours = encoder_shapes(reason1.Reason1Files, config)
    shapes |= {prefix + name: shape for name, shape in ours.items()}
    shapes["lm_head.weight"] = shapes[f"{prefix}embed_tokens.weight"]
    files = write_shards(folder, shapes, 4)
    for path in (tmp_path, folder, *files):
        result = run("checkpoints", "inspect", path)
        assert result.exit_code == 0, result.stderr
        for part in (
            "family      Reason1 encoder (Qwen2.5-VL)\n",
            "sizes       text width 100,352\n",
            f"parameters  {reason1.NUM_PARAMETERS:,}\n",
            "verdict     complete: every tensor fits; 2 more",
        ):
            assert part in result.stdout
    (folder / "tokenizer.json").unlink()
    verdict = f"verdict     {folder} holds no tokenizer"
    assert verdict in run("checkpoints", "inspect", folder).stdout


@pytest.mark.parametrize("encoder", [t5.T5Files.released, reason1.RELEASED])
def test_bundled_text_encoders(encoder: str, run: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(locate.BUNDLED / encoder, tmp_path / "encoder"))
    for path in (folder, folder / "model.safetensors"):
        result = run("checkpoints", "inspect", path)
        assert result.exit_code == 0, result.stderr
        verdict = "verdict     complete: every tensor fits; values not read\n"
        assert result.stdout.endswith(verdict)
    assert str(locate.BUNDLED / encoder) in run("checkpoints", "inspect", locate.BUNDLED).stdout
    tensors = read_all(folder / "model.safetensors")
    lacking = next(name for name in tensors if name.endswith("norm.weight"))
    save({name: t for name, t in tensors.items() if name != lacking}, folder / "model.safetensors")
    for path in (folder, folder / "model.safetensors"):
        assert f"1 missing: {lacking}" in run("checkpoints", "inspect", path).stdout


@pytest.mark.parametrize(
    ("encoder", "kind"),
    [(t5.T5Files.released, "umt5"), (t5.T5Files.released, None), (reason1.RELEASED, "qwen2")],
)
def test_other_language_models_are_none_of_ours(
    encoder: str, kind: str | None, run: Run, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(locate.BUNDLED / encoder, tmp_path / "other"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    for path in (folder, folder / "model.safetensors"):
        result = run("checkpoints", "inspect", path)
        assert result.exit_code == 1
        assert f"family      a {'T5' if encoder == t5.T5Files.released else 'l'}" in result.stdout


def test_verdict_is_that_of_a_run(run: Run, own_world: Path) -> None:
    path = own_world / MODEL / "model.pt"
    tensors = read_all(path)
    name = "model.layers.1.feed_forward.w2.weight"
    tensors[name][3, 2] = torch.nan
    save(tensors, path)
    result = run("checkpoints", "inspect", path.parent)
    assert result.exit_code == 0
    assert "complete: every tensor fits; values not read" in result.stdout
    result = run("checkpoints", "inspect", path.parent, "--values")
    assert result.exit_code == 1
    assert f"{name} (NaN)" in result.stdout
    assert "a second; 1 tensors" in result.stdout
    assert "1 of 1 checkpoints" in result.stderr
    save({**tensors, name: tensors[name].char()}, path)
    result = run("checkpoints", "inspect", path)
    assert result.exit_code == 1
    assert f"{name} is torch.int8" in result.stdout
    with pytest.raises(CheckpointError) as refusal:
        open_named(MODEL, own_world)
    assert str(refusal.value).startswith(result.stdout.partition("verdict     ")[2].strip())


@pytest.mark.parametrize(
    "place",
    [
        "Cosmos-Tokenize1-CV8x8x8-720p/mean_std.safetensors",
        "Cosmos-Predict1-7B-Decoder-DV8x16x16ToCV8x8x8-720p/aux_vars.safetensors",
    ],
)
def test_values_beside_the_weights(place: str, run: Run, tmp_path: Path) -> None:
    source = locate.BUNDLED / place
    path = shutil.copytree(source.parent, tmp_path / source.parent.name) / source.name
    assert run("checkpoints", "inspect", path.parent, "--values").exit_code == 0
    tensors = read_all(path)
    name = min(tensors)
    tensors[name].view(-1)[-1] = torch.inf
    save(tensors, path)
    result = run("checkpoints", "inspect", path.parent, "--values")
    assert result.exit_code == 1
    assert f"{name} (Inf)" in result.stdout


def test_notes_and_values_of_a_trainers_file(run: Run, own_world: Path) -> None:
    path = own_world / MODEL / "model.pt"
    tensors = {f"module.{name}": tensor for name, tensor in read_all(path).items()}
    bad = {name: tensor * torch.nan for name, tensor in tensors.items()}  # which no run reads
    torch.save({"net": bad, "net_ema": tensors, "scheduler": {"x": 1}}, path)
    result = run("checkpoints", "inspect", MODEL, "--checkpoint_dir", own_world, "--values")
    assert result.exit_code == 0, result.stdout
    for part in ("beside      scheduler", "module", "'net_ema.model.' taken", "0 tensors with NaN"):
        assert part in result.stdout
    assert result.stdout.endswith("verdict     complete: every tensor fits\n")


@pytest.mark.parametrize(
    ("names", "targets"),
    [
        ("net.blocks.{}.self_attn.q_proj.lora_{}.default.weight", "q_proj"),
        ("transformer.blocks.{}.attn.to_k.lora_{}.weight", "to_k"),
        ("base_model.model.blocks.block{}.blocks.0.block.attn.to_v.0.lora_{}.weight", "to_v"),
        ("lora_unet_blocks_{}_attn_to_v.lora_{}.weight", "attn_to_v"),
    ],
)
def test_adapters(names: str, targets: str, run: Run, tmp_path: Path) -> None:
    halves = {"A": (5, 32), "B": (48, 5)} if "unet" not in names else {"down": (5, 9), "up": (9, 5)}
    save(
        {names.format(n, half): torch.ones(s) for n in (0, 1) for half, s in halves.items()},
        tmp_path / "adapter_model.safetensors",
    )
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        result = run("checkpoints", "inspect", path)
        assert result.exit_code == 1
        for part in ("LoRA adapters", "rank        5", f"targets     {targets}\n", "4 tensors of"):
            assert part in result.stdout


def test_unknown(run: Run, tmp_path: Path) -> None:
    save({"unet.conv.weight": torch.zeros(2, 3)}, tmp_path / "x.safetensors")
    for path in (tmp_path, tmp_path / "x.safetensors"):
        result = run("checkpoints", "inspect", path)
        assert result.exit_code == 1
        assert "family      unknown (tensors such as unet.conv.weight)" in result.stdout
        assert "not recognised" in result.stdout


def test_no_checkpoint(run: Run, own_world: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    text = tmp_path / "text.pt"
    text.write_text("hello")
    cut = own_world / MODEL / "model.pt"
    os.truncate(cut, 1000)
    for path in (tmp_path / "nowhere", tmp_path / "empty", text, cut):
        result = run("checkpoints", "inspect", path)
        assert result.exit_code == 2, path
        assert str(path) in result.stderr
    # the good ones beside a damaged one are still listed
    result = run("checkpoints", "inspect", own_world)
    assert result.exit_code == 2
    assert "damaged" in result.stdout
    assert "complete: every tensor fits" in result.stdout
    assert "1 of 2 checkpoints cannot be read" in result.stderr
