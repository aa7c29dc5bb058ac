"""The text encoder's files, its rules about length and padding, and transformers' own results."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from worldline.errors import CheckpointError, InputError
from worldline.text.t5 import (
    KEYS,
    T5Encoder,
    export_t5,
    find_t5,
    load_t5,
    new_t5,
    t5_folders,
    tensor_shapes,
)
from worldline.weights.keymap import match
from worldline.weights.source import TensorInfo
from worldline.weights.write import save

# config.json of google-t5/t5-11b, as far as it is about the encoder
RELEASED: dict[str, Any] = {
    "model_type": "t5",
    "d_ff": 65536,
    "d_kv": 128,
    "d_model": 1024,
    "num_heads": 128,
    "num_layers": 24,
    "relative_attention_num_buckets": 32,
    "vocab_size": 32128,
}
PROMPTS = ["A ball rolls off a table.", "", "Größe ✓ 日本", "x" * 300]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of bytes, in float32; copy it before changing it."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("text") / "google-t5" / "t5-11b"
    export_t5(new_t5({"num_layers": 3, "d_ff": 96}), folder, dtype=None)
    return folder


@pytest.fixture
def own(exported: Path, tmp_path: Path) -> Path:
    """A copy of `exported` that a test may break."""
    return Path(shutil.copytree(exported, tmp_path / "encoder"))


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> T5Encoder:
    return load_t5(find_t5(folder), "cpu", dtype)


def weights(folder: Path) -> dict[str, Tensor]:
    checkpoint = find_t5(folder).checkpoint
    return {name: checkpoint.read(name).clone() for name in checkpoint.tensors}


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        find_t5(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


# --- the network ---


def test_transformers_reads_what_is_exported_and_agrees(exported: Path) -> None:
    from transformers import AutoTokenizer, T5EncoderModel

    encoder = loaded(exported)
    ids, mask = encoder.tokenize(PROMPTS)
    theirs = AutoTokenizer.from_pretrained(exported)(
        PROMPTS, padding="max_length", truncation=True, max_length=128, return_tensors="pt"
    )
    assert torch.equal(theirs["input_ids"], ids)
    assert torch.equal(theirs["attention_mask"], mask)
    hidden = T5EncoderModel.from_pretrained(exported)(**theirs).last_hidden_state
    torch.testing.assert_close(encoder.hidden(ids, mask), hidden, atol=1e-5, rtol=1e-5)
    kept = torch.where(mask[..., None] != 0, hidden, 0.0)
    torch.testing.assert_close(encoder.encode(PROMPTS), kept, atol=1e-5, rtol=1e-5)


def test_rows_past_the_end_are_exactly_zero_and_others_are_not(exported: Path) -> None:
    encoder = loaded(exported, torch.bfloat16)
    embeddings = encoder.encode(PROMPTS, 40)
    assert embeddings.shape == (4, 40, 64)
    assert embeddings.dtype == torch.bfloat16
    for prompt, rows in zip(PROMPTS, embeddings, strict=True):
        length = min(encoder.count_tokens(prompt), 40)
        assert rows[:length].any(-1).all()
        assert not rows[length:].any()


def test_a_prompt_alone_and_among_others(exported: Path) -> None:
    encoder = loaded(exported)
    together = encoder.encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        assert torch.equal(encoder.encode([prompt])[0], together[row])
    ids, mask = encoder.tokenize(PROMPTS)
    torch.testing.assert_close(encoder.embed(ids, mask), together, atol=1e-5, rtol=1e-5)


def test_no_prompts_and_one_string(exported: Path) -> None:
    encoder = loaded(exported)
    assert encoder.encode([], 7).shape == (0, 7, 64)
    with pytest.raises(ValueError, match="list of prompts"):
        encoder.encode("a ball")
    with pytest.raises(ValueError, match="max_length is 0"):
        encoder.encode(["a ball"], 0)


def test_a_cut_prompt_keeps_its_end_and_is_told(
    exported: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = loaded(exported)
    with caplog.at_level(logging.WARNING, "worldline"):
        ids, mask = encoder.tokenize(["abcdefgh", "abc"], 4)
    assert ids.tolist() == [[100, 101, 102, 1], [100, 101, 102, 1]]  # a byte + 3; then </s>
    assert mask.all()
    [record] = caplog.records
    assert "8 tokens" in record.message
    assert "after 3" in record.message


def test_embed_is_differentiable_in_every_parameter() -> None:
    encoder = new_t5()
    embeddings = encoder.embed(*encoder.tokenize(["a ball rolls", "b"]))
    (embeddings * torch.randn_like(embeddings)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_inference_leaves_no_gradient(exported: Path) -> None:
    encoder = loaded(exported)
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not new_t5().encode(["a"]).requires_grad


def test_the_shared_matrix_is_one(exported: Path) -> None:
    network = loaded(exported).network
    assert network.shared.weight is network.encoder.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8])
def test_dtypes_that_t5_cannot_have(exported: Path, dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match="bfloat16 or float32"):
        loaded(exported, dtype)


def test_bfloat16_is_near_float32(exported: Path) -> None:
    exact = loaded(exported).encode(PROMPTS)
    rough = loaded(exported, torch.bfloat16)
    assert {parameter.dtype for parameter in rough.parameters()} == {torch.bfloat16}
    gap = (rough.encode(PROMPTS).float() - exact).norm() / exact.norm()
    assert gap < 0.03


def test_new_weights_follow_the_seed() -> None:
    torch.manual_seed(7)
    first = new_t5().encode(["a ball"])
    torch.manual_seed(7)
    assert torch.equal(new_t5().encode(["a ball"]), first)
    with pytest.raises(ValueError, match="bytes need 259"):
        new_t5({"vocab_size": 100})
    with pytest.raises(ValueError, match="num_layers is 0"):
        new_t5({"num_layers": 0})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(exported: Path, dtype: torch.dtype) -> None:
    exact = loaded(exported).encode(PROMPTS)
    encoder = load_t5(find_t5(exported), "cuda", dtype)
    found = encoder.encode(PROMPTS)
    assert found.device.type == "cuda"
    gap = (found.cpu().float() - exact).norm() / exact.norm()
    assert gap < (1e-5 if dtype == torch.float32 else 0.03)


# --- T5-11B, without its weights ---


def test_released_names_and_shapes() -> None:
    shapes = tensor_shapes(RELEASED)
    with torch.device("meta"):
        network = T5Encoder(RELEASED, new_t5().tokenizer, 512).network
    state = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert state == shapes
    assert shapes["encoder.block.23.layer.1.DenseReluDense.wi.weight"] == (65536, 1024)
    assert all(KEYS.ours(KEYS.released(name)) == name for name in shapes)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert 4.7e9 < count < 4.9e9


@pytest.mark.parametrize("lacking", ["shared.weight", "encoder.embed_tokens.weight"])
def test_the_released_file_has_a_decoder_that_is_not_read(lacking: str) -> None:
    shapes = tensor_shapes(RELEASED)
    held = {name: TensorInfo(torch.float32, shape) for name, shape in shapes.items()}
    for name in list(held):
        if name.startswith("encoder."):
            held[f"de{name[2:]}"] = held[name]
    held["decoder.block.3.layer.1.EncDecAttention.q.weight"] = held["shared.weight"]
    held["lm_head.weight"] = held["shared.weight"]
    del held[lacking]
    pairs = match(held, shapes, KEYS, "file", [lacking])
    assert set(pairs) == set(shapes) - {lacking}


@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
def test_shapes_of_both_feed_forwards(kind: str) -> None:
    encoder = new_t5({"feed_forward_proj": kind})
    state = {name: tuple(t.shape) for name, t in encoder.network.state_dict().items()}
    assert state == tensor_shapes(encoder.config)


# --- files ---


def test_a_folder_is_checked_without_transformers(exported: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from worldline.text.t5 import find_t5; "
        f"files = find_t5(Path({str(exported)!r})); files.identity(); "
        "assert not {'transformers', 'tokenizers', 'sentencepiece'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_found(exported: Path) -> None:
    files = find_t5(exported)
    assert (files.folder, files.width, files.max_length) == (exported, 64, 128)
    assert files.num_parameters == sum(p.numel() for p in loaded(exported).parameters())
    assert {Path(item["path"]).name for item in files.identity()} == {
        "config.json",
        "model.safetensors",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize("limit", [int(1e30), 0, None, "512", 2048])
def test_a_senseless_length_becomes_the_released_one(own: Path, limit: object) -> None:
    path = own / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": limit}))
    assert find_t5(own).max_length == 512


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["shared.weight", "encoder.embed_tokens.weight"])
def test_a_pickle_with_the_decoder(own: Path, legacy: bool, name: str) -> None:
    wanted = loaded(own).encode(PROMPTS)
    tensors = weights(own)
    tensors[name] = tensors.pop("shared.weight")
    tensors |= {f"decoder.{n}": torch.zeros(2) for n in ("final_layer_norm.weight", "x")}
    tensors["lm_head.weight"] = tensors[name]
    (own / "model.safetensors").unlink()
    path = own / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
    assert torch.equal(loaded(own).encode(PROMPTS), wanted)
    entry = next(iter(find_t5(own).checkpoint.entries.values()))
    assert type(entry).__name__ == "FileTensor"  # not read whole, whatever the format


def test_shards(own: Path) -> None:
    wanted = loaded(own).encode(PROMPTS)
    tensors = weights(own)
    (own / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        save({name: t for name, t in tensors.items() if places[name] == file}, own / file)
    (own / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert torch.equal(loaded(own).encode(PROMPTS), wanted)
    (own / "model-00002-of-00002.safetensors").unlink()
    assert "incomplete" in refused(own)


def test_tokenizer_beside_as_diffusers_saves_it(own: Path) -> None:
    (own.parent / "tokenizer").mkdir()
    (own / "tokenizer_config.json").rename(own.parent / "tokenizer" / "tokenizer_config.json")
    assert find_t5(own).max_length == 128
    assert loaded(own).count_tokens("abc") == 4


def test_missing_parts(own: Path) -> None:
    assert "no text encoder folder" in refused(own / "nowhere")
    (own / "tokenizer_config.json").rename(own / "kept")
    assert "no tokenizer (tokenizer.json or spiece.model)" in refused(own)
    (own / "kept").rename(own / "tokenizer_config.json")
    (own / "model.safetensors").rename(own / "tf_model.h5")
    message = refused(own)
    assert "no weights (model.safetensors or pytorch_model.bin)" in message
    assert "tf_model.h5 cannot be read" in message
    (own / "config.json").unlink()
    assert "no config.json" in refused(own)


def test_unfinished_downloads(own: Path) -> None:
    (own / "model.safetensors").unlink()
    (own / "pytorch_model.bin").symlink_to(own / "gone")
    assert "not finished (pytorch_model.bin)" in refused(own)
    (own / "pytorch_model.bin").unlink()
    nested = own / ".cache" / "download"
    nested.mkdir(parents=True)
    (nested / "x.incomplete").touch()
    assert "not finished (x.incomplete)" in refused(own)


def test_a_weights_file_cut_short(own: Path) -> None:
    path = own / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "cut short" in refused(own)


def test_a_file_that_vanished(own: Path) -> None:
    files = find_t5(own)
    (own / "config.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be read any more"):
        files.identity()


@pytest.mark.parametrize("config", ['{"model_type": "bert"}', "{}"])
def test_another_model(own: Path, config: str) -> None:
    (own / "config.json").write_text(config)
    assert "not of a T5 encoder" in refused(own)


def test_damaged_settings(own: Path) -> None:
    path = own / "config.json"
    good = json.loads(path.read_text())
    path.write_text("{")
    assert "cannot be read" in refused(own)
    path.write_text("[]")
    assert "holds no settings" in refused(own)
    for name, value in (("d_model", None), ("num_layers", -1), ("d_kv", "16"), ("d_ff", True)):
        path.write_text(json.dumps({**good, name: value}))
        assert f"{name} is {value!r}" in refused(own)
    path.write_text(json.dumps(good))
    (own / "tokenizer_config.json").write_text("[]")
    assert "holds no settings" in refused(own)


def test_weights_of_another_model(own: Path) -> None:
    tensors = weights(own)
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    save({**tensors, name: torch.zeros(3, 3)}, own / "model.safetensors")
    assert f"wrong shape: {name}" in refused(own)
    save({n: t for n, t in tensors.items() if n != name}, own / "model.safetensors")
    assert f"1 missing: {name}" in refused(own)
    save({n: t for n, t in tensors.items() if n != "shared.weight"}, own / "model.safetensors")
    assert "1 missing: shared.weight" in refused(own)
    save({"bert.embeddings.weight": torch.zeros(2)}, own / "model.safetensors")
    assert "another model" in refused(own)


def test_a_vocabulary_larger_than_the_encoders(own: Path) -> None:
    path = own / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 200}))
    tensors = weights_of_any(own)
    save({**tensors, "shared.weight": tensors["shared.weight"][:200]}, own / "model.safetensors")
    with pytest.raises(CheckpointError, match="do not belong together"):
        loaded(own)


def weights_of_any(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_without_transformers(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from worldline.errors import Error

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(Error, match="pip install 'transformers>=5'"):
        loaded(exported)


def test_where_released_worlds_keep_it(tmp_path: Path) -> None:
    assert t5_folders(tmp_path) == []
    cache = tmp_path / "models--google-t5--t5-11b"
    for revision in ("aaa", "bbb"):
        (cache / "snapshots" / revision).mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("aaa\n")
    plain, short = tmp_path / "google-t5" / "t5-11b", tmp_path / "t5-11b"
    for folder in (plain, short):
        folder.mkdir(parents=True)
    snapshots = [cache / "snapshots" / revision for revision in ("aaa", "bbb")]
    assert t5_folders(tmp_path) == [plain, *snapshots, short]


def test_only_an_encoder_of_bytes_is_exported(tmp_path: Path) -> None:
    encoder = new_t5()
    encoder.tokenizer = object()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="vocabulary"):
        export_t5(encoder, tmp_path)


def test_export_is_in_bfloat16(tmp_path: Path) -> None:
    encoder = new_t5(max_length=32)
    export_t5(encoder, tmp_path / "made" / "here")
    files = find_t5(tmp_path / "made" / "here")
    assert {info.dtype for info in files.checkpoint.tensors.values()} == {torch.bfloat16}
    assert files.max_length == 32
    for name, parameter in load_t5(files, "cpu", torch.float32).named_parameters():
        assert torch.equal(parameter, encoder.get_parameter(name).bfloat16().float())
    assert not any(fnmatchcase(name, "*embed_tokens*") for name in files.checkpoint.tensors)
