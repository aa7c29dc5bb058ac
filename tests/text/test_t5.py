"""The T5 encoder: length, padding and tokens, files, and transformers' own results."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny.encoders import export_t5, new_t5
from worldline.errors import CheckpointError
from worldline.text.t5 import NUM_PARAMETERS, NUM_STREAMED, ByteTokenizer, T5Encoder, T5Files
from worldline.weights.checkpoint import Checkpoint, open_checkpoint, save

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
    return T5Files.open(folder).read("cpu", dtype)


def weights(folder: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(folder / "model.safetensors")
    return {name: checkpoint.read(name).clone() for name in checkpoint.tensors}


def change(path: Path, **settings: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        T5Files.open(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


# --- the network


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
    encoder.max_length = 40
    embeddings = encoder.encode(PROMPTS)
    assert embeddings.shape == (4, 40, 64)
    assert embeddings.dtype == torch.bfloat16
    for prompt, rows in zip(PROMPTS, embeddings, strict=True):
        length = min(len(encoder.tokenizer.encode(prompt)), 40)
        assert rows[:length].any(-1).all()
        assert not rows[length:].any()


def test_a_prompt_alone_and_among_others(exported: Path) -> None:
    encoder = loaded(exported)
    together = encoder.encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        assert torch.equal(encoder.encode([prompt])[0], together[row])
    ids, mask = encoder.tokenize(PROMPTS)
    torch.testing.assert_close(encoder.embed(ids, mask), together, atol=1e-5, rtol=1e-5)


def test_a_truncated_prompt_keeps_its_end(exported: Path) -> None:
    encoder = loaded(exported)
    encoder.max_length = 4
    ids, mask = encoder.tokenize(["abcdefgh", "abc"])
    assert ids.tolist() == [[100, 101, 102, 1], [100, 101, 102, 1]]  # a byte + 3; then </s>
    assert mask.all()


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
    assert encoder.network.shared.weight is encoder.network.encoder.embed_tokens.weight


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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(exported: Path, dtype: torch.dtype) -> None:
    exact = loaded(exported).encode(PROMPTS)
    found = T5Files.open(exported).read("cuda", dtype).encode(PROMPTS)
    assert found.device.type == "cuda"
    gap = (found.cpu().float() - exact).norm() / exact.norm()
    assert gap < (1e-5 if dtype == torch.float32 else 0.03)


def test_parameters_of_the_released_encoder() -> None:
    with torch.device("meta"):
        network = T5Encoder(RELEASED, None, 1).network
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    assert sum(sizes.values()) == NUM_PARAMETERS
    assert T5Files.blocks.count(sizes) == NUM_STREAMED


# --- files


def test_a_folder_is_opened_without_transformers(exported: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from worldline.text.t5 import T5Files; "
        f"files = T5Files.open(Path({str(exported)!r})); files.tokenizer.encode('x'); "
        "assert not {'transformers', 'tokenizers', 'sentencepiece'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_opened_folder(exported: Path) -> None:
    files = T5Files.open(exported)
    assert (files.folder, files.width, files.max_length) == (exported, 64, 128)
    assert files.check() == 0
    network = loaded(exported).network
    sizes = {name: weight.numel() for name, weight in network.named_parameters()}
    assert files.num_parameters == sum(sizes.values())
    assert files.num_streamed == files.blocks.count(sizes)
    names = {path.name for path in files.files}
    assert names == {"config.json", "model.safetensors", "tokenizer_config.json"}


@pytest.mark.parametrize("limit", [int(1e30), 0, None, "512", 2048])
def test_a_senseless_length_becomes_the_released_one(own: Path, limit: object) -> None:
    change(own / "tokenizer_config.json", model_max_length=limit)
    assert T5Files.open(own).max_length == 512


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
    assert T5Files.open(own).check() == 3


def test_shards(own: Path) -> None:
    wanted = loaded(own).encode(PROMPTS)
    tensors = weights(own)
    (own / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        save({name: t for name, t in tensors.items() if places[name] == file}, own / file)
    (own / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert torch.equal(loaded(own).encode(PROMPTS), wanted)
    assert {own / name for name in places.values()} < set(T5Files.open(own).files)
    (own / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors"):
        loaded(own)


def test_tokenizer_beside_as_diffusers_saves_it(own: Path) -> None:
    (own.parent / "tokenizer").mkdir()
    (own / "tokenizer_config.json").rename(own.parent / "tokenizer" / "tokenizer_config.json")
    assert T5Files.open(own).max_length == 128
    assert len(T5Files.open(own).tokenizer.encode("abc")) == 4


def test_missing_parts(own: Path) -> None:
    assert "no config.json" in refused(own / "nowhere")
    (own / "tokenizer_config.json").rename(own / "kept")
    assert "no tokenizer.json" in refused(own)
    (own / "model.safetensors").rename(own / "tf_model.h5")
    assert "no weights (looked for model.safetensors, " in refused(own)
    (own / "pytorch_model.bin.incomplete").touch()
    assert "not finished (pytorch_model.bin.incomplete)" in refused(own)
    (own / "config.json").unlink()
    assert "no config.json" in refused(own)


def test_settings_of_another_model_and_damaged_ones(own: Path) -> None:
    path = own / "config.json"
    good = path.read_text()
    for text in ('{"model_type": "bert"}', "{}"):
        path.write_text(text)
        assert "expected t5" in refused(own)
    path.write_text("{")
    assert "cannot be read" in refused(own)
    path.write_text("[]")
    assert "holds no settings" in refused(own)
    for name, value in (("d_model", None), ("d_model", "16"), ("vocab_size", True)):
        path.write_text(good)
        change(path, **{name: value})
        assert f"{name} is {value!r}" in refused(own)
    path.write_text(good)
    change(path, feed_forward_proj=3)
    with pytest.raises(CheckpointError, match=r"config\.json .*feed_forward_proj"):
        loaded(own)
    path.write_text(good)
    (own / "tokenizer_config.json").write_text("[]")
    assert "holds no settings" in refused(own)


def test_weights_of_another_model(own: Path) -> None:
    tensors = weights(own)
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    for state, named in (
        ({**tensors, name: torch.zeros(3, 3)}, f"wrong shape: {name}"),
        ({n: t for n, t in tensors.items() if n != name}, f"1 missing: {name}"),
        ({n: t for n, t in tensors.items() if n != "shared.weight"}, r"shared\.weight"),
        ({**tensors, "encoder.block.0.lora.weight": torch.ones(2)}, r"block\.0\.lora\.weight"),
        ({"bert.embeddings.weight": torch.zeros(2)}, r"1 unknown: bert\.embeddings\.weight"),
    ):
        save(state, own / "model.safetensors")
        with pytest.raises(CheckpointError, match=named):
            loaded(own)
        with pytest.raises(CheckpointError, match=named):
            T5Files.open(own).check()
    path = own / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut short"):
        loaded(own)


def test_a_vocabulary_larger_than_the_encoders(own: Path) -> None:
    change(own / "config.json", vocab_size=200)
    with pytest.raises(CheckpointError, match=r"259 tokens, .* expects 200"):
        loaded(own)


def test_export_is_in_bfloat16(tmp_path: Path) -> None:
    encoder = new_t5(max_length=32)
    export_t5(encoder, tmp_path / "made" / "here")
    files = T5Files.open(tmp_path / "made" / "here")
    stored = files.checkpoint.tensors
    assert {info.dtype for info in stored.values()} == {torch.bfloat16}
    assert files.max_length == 32
    for name, parameter in files.read("cpu", torch.float32).named_parameters():
        assert torch.equal(parameter, encoder.get_parameter(name).bfloat16().float())
    assert "encoder.embed_tokens.weight" not in stored


# --- prompts to ids


def write_vocabulary(path: Path, *, ends: bool = True, **more: object) -> Path:
    """Write a tokenizer.json of letters, in the way of T5's."""
    pieces = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", -9.0], *([c, -1.0] for c in "▁abc")]
    after = [{"Sequence": {"id": "A", "type_id": 0}}]
    if ends:
        after.append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    settings = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": i,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, token in enumerate(("<pad>", "</s>", "<unk>"))
        ],
        "normalizer": {"type": "NFKC"},
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "always",
            "split": True,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": after,
            "pair": after,
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "model": {"type": "Unigram", "unk_id": 2, "vocab": pieces, "byte_fallback": False},
        **more,
    }
    path.write_text(json.dumps(settings))
    return path


def tokenizer_of(folder: Path) -> Any:
    checkpoint = Checkpoint(folder, "pt", {})
    path = folder / "tokenizer.json"
    files = T5Files(0, folder=folder, config={}, checkpoint=checkpoint, vocabulary=path)
    return files.tokenizer


def test_bytes() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode("aé") == [0x61 + 3, 0xC3 + 3, 0xA9 + 3, 1]
    assert tokenizer.encode("\ud800") == [ord("?") + 3, 1]
    assert max(tokenizer.encode("\U0010ffff")) < tokenizer.size


def test_a_vocabulary(tmp_path: Path) -> None:
    """Its own truncation and padding are not used."""
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    fill |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    for more in ({}, {"truncation": cut, "padding": fill}):
        write_vocabulary(tmp_path / "tokenizer.json", **more)
        tokenizer = tokenizer_of(tmp_path)
        assert tokenizer.size == 7
        assert tokenizer.encode("") == [1]
        assert tokenizer.encode("ab c") == [3, 4, 5, 3, 6, 1]
        assert tokenizer.encode("a\ud800") == [3, 4, 2, 1]


def test_damaged_and_foreign_vocabularies(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        tokenizer_of(tmp_path)
    write_vocabulary(tmp_path / "tokenizer.json", ends=False)
    with pytest.raises(CheckpointError, match="not of a T5"):
        tokenizer_of(tmp_path)
