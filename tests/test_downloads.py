"""What a model needs is listed once; files come whole and verified, whatever the hub does."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import worldline.downloads
from worldline.catalog import ENTRIES, FLOW_MODELS, FLOW_TOKENIZER, Entry, find
from worldline.downloads import (
    TRIES,
    RemoteFile,
    choose,
    fetch,
    fetch_all,
    find_files,
    list_files,
    matching,
    select,
    sources,
)
from worldline.errors import DownloadError, InputError

from .fake_hub import COMMIT, FakeHub, serving

REPOSITORY = "someone/something"
CONTENT = random.Random(0).randbytes(3_000_000)
OPTIONAL = ("guardrail", "prompt upsampler", "diffusion decoder")


def repositories(*models: str, **options: object) -> set[str]:
    found = sources(models, **options)  # type: ignore[arg-type]
    assert len(found) == len(set(found))
    return {source.repository for source in found}


def listed(*names: str) -> list[RemoteFile]:
    return [RemoteFile("a/b", "c", name, 1, "d") for name in names]


def test_every_entry_has_a_source_and_parts() -> None:
    for entry in ENTRIES:
        assert "/" in entry.repository
        for name in entry.needs:
            assert find(name) is not None
    assert set(OPTIONAL) <= {entry.family for entry in ENTRIES}


def test_a_base_model() -> None:
    parts = {
        "nvidia/Cosmos-Tokenize1-DV8x16x16-720p",
        "nvidia/Cosmos-Predict1-7B-Decoder-DV8x16x16ToCV8x8x8-720p",
        "nvidia/Cosmos-Tokenize1-CV8x8x8-720p",
        "nvidia/Cosmos-Guardrail1",  # takes no prompt: no Llama Guard, no T5
    }
    assert repositories("Cosmos-Predict1-4B") == {"nvidia/Cosmos-Predict1-4B", *parts}
    bare = repositories("Cosmos-Predict1-4B", without=OPTIONAL)
    assert bare == {
        "nvidia/Cosmos-Predict1-4B",
        "nvidia/Cosmos-Tokenize1-DV8x16x16-720p",
        "nvidia/Cosmos-Tokenize1-CV8x8x8-720p",
    }


def test_models_that_take_prompts() -> None:
    found = repositories("Cosmos-Predict1-7B-Video2World", "Cosmos-Predict1-5B-Video2World")
    for name in ("google-t5/t5-11b", "meta-llama/Llama-Guard-3-8B"):
        assert name in found
    assert "mistral-community/pixtral-12b" in found
    assert "mistral-community/pixtral-12b" not in repositories("Cosmos-Predict1-7B-Text2World")


def test_cosmos_1_0() -> None:
    found = repositories("Cosmos-1.0-Diffusion-7B-Text2World")
    assert found == repositories("Cosmos-Predict1-7B-Text2World", generation="1.0")
    assert found == {
        "nvidia/Cosmos-1.0-Diffusion-7B-Text2World",
        "nvidia/Cosmos-1.0-Tokenizer-CV8x8x8",
        "google-t5/t5-11b",
        "nvidia/Cosmos-1.0-Prompt-Upsampler-12B-Text2World",
        "nvidia/Cosmos-1.0-Guardrail",
    }


def test_predict2_5() -> None:
    for model in FLOW_MODELS:
        found = sources([model.name])
        assert {source.repository for source in found} == {
            model.repository,
            FLOW_TOKENIZER[0],
            "nvidia/Cosmos-Reason1-7B",
            "nvidia/Cosmos-Guardrail1",
            "Qwen/Qwen3Guard-Gen-0.6B",
        }
        published = listed(model.file, "base/other/x_ema_bf16.pt", "tokenizer.pth", "LICENSE")
        own, tokenizer = (each for each in found if each.name.startswith("Cosmos-Predict2.5"))
        names = [[file.name for file in choose(each, published)] for each in (own, tokenizer)]
        assert names == [[model.file, "LICENSE"], ["tokenizer.pth"]]
        assert [own.revision, tokenizer.revision] == [model.revision, FLOW_TOKENIZER[1]]
        kind = model.name.partition("/")[2]
        for name in (f"{model.repository}/{kind}", f"{model.repository}/{kind}"[len("nvidia/") :]):
            assert sources([name]) == found
    first, large = FLOW_MODELS[0], FLOW_MODELS[2]
    assert sources([first.repository]) == sources([first.name])
    assert sources(["Cosmos-Predict2.5-14B"]) == sources([large.name])
    assert "nvidia/Cosmos-Guardrail1" not in repositories(first.name, without=["guardrail"])
    with pytest.raises(InputError, match="did you mean 2B/post-trained"):
        sources(["2B/posttrained"])


@pytest.mark.parametrize(
    ("model", "there", "fetched"),
    [
        (
            "Cosmos-Predict1-4B",
            ["README.md", "model.pt", "config.json", "nemo/x.ckpt", "guardrail/a"],
            ["model.pt", "config.json"],
        ),
        (
            "Cosmos-Tokenize1-CV8x8x8-720p",
            ["autoencoder.jit", "encoder.jit", "decoder.jit", "model.pt", "mean_std.pt"],
            ["encoder.jit", "decoder.jit", "mean_std.pt"],
        ),
        ("Cosmos-Tokenize1-CI8x8-360p", ["autoencoder.jit", "x"], ["autoencoder.jit"]),
        (
            "google-t5/t5-11b",
            ["pytorch_model.bin", "tf_model.h5", "spiece.model", "config.json"],
            ["pytorch_model.bin", "spiece.model", "config.json"],
        ),
        (
            "Llama-Guard-3-8B",
            ["model-1.safetensors", "original/consolidated.00.pth", "original/params.json"],
            ["model-1.safetensors"],
        ),
        (
            "Cosmos-Guardrail1",
            [
                "README.md",
                "blocklist/custom/a",
                "face_blur_filter/Resnet50_Final.pth",
                "video_content_safety_filter/models--a--b/blobs/0",
                "video_content_safety_filter/models--a--b/snapshots/0/config.json",
            ],
            [
                "blocklist/custom/a",
                "face_blur_filter/Resnet50_Final.pth",
                "video_content_safety_filter/models--a--b/snapshots/0/config.json",
            ],
        ),
    ],
)
def test_only_files_that_are_read(model: str, there: list[str], fetched: list[str]) -> None:
    (source, *_) = sources([model])
    assert [file.name for file in choose(source, listed(*there))] == fetched


def test_a_repository_without_what_is_needed() -> None:
    (source, *_) = sources(["Cosmos-Tokenize1-DV8x16x16-720p"])
    with pytest.raises(DownloadError, match="no encoder"):
        choose(source, listed("encoder.jit"))


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (([], ["4B", "5B"], [], []), ["Cosmos-Predict1-4B", "Cosmos-Predict1-5B-Video2World"]),
        (([], ["7B"], ["Video2World"], []), ["Cosmos-Predict1-7B-Video2World"]),
        (
            ([], ["14B"], [], []),
            ["Cosmos-Predict1-14B-Text2World", "Cosmos-Predict1-14B-Video2World"],
        ),
        (([], [], [], ["CI8x8-360p"]), ["Cosmos-Tokenize1-CI8x8-360p"]),
        ((["Cosmos-1.0-Guardrail"], [], [], []), ["Cosmos-1.0-Guardrail"]),
        (
            (["guardrails"], [], [], []),
            ["Cosmos-Guardrail1", "Llama-Guard-3-8B", "Qwen3Guard-Gen-0.6B"],
        ),
        (
            ([], [], ["Text2World-Sample-AV-Multiview"], []),
            ["Cosmos-Predict1-7B-Text2World-Sample-AV-Multiview"],
        ),
    ],
)
def test_flags_of_the_released_scripts(
    asked: tuple[list[str], list[str], list[str], list[str]], found: list[str]
) -> None:
    assert select(*asked) == found


def test_groups_are_the_scripts_defaults() -> None:
    assert len(select(["autoregressive"])) == 4
    assert len(select(["diffusion"])) == 4
    assert len(select(["tokenizers"])) == 8
    assert select(["guardrails"], generation="1.0") == ["Cosmos-Guardrail1"]
    assert select(["predict2.5"]) == [model.name for model in FLOW_MODELS]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (([], [], [], []), "nothing is named"),
        (([], ["4B"], ["Text2World"], []), "no released model is of 4B and Text2World"),
        (([], ["14B"], ["SingleToMultiView-Sample-AV"], []), "14B and SingleTo"),
    ],
)
def test_what_goes_with_nothing(
    asked: tuple[list[str], list[str], list[str], list[str]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        select(*asked)


def test_an_unknown_name() -> None:
    with pytest.raises(InputError, match="did you mean Cosmos-Predict1-4B"):
        sources(["Cosmos-Predict1-4b"])
    with pytest.raises(InputError, match="is not released"):
        sources(["Cosmos-Predict1-4B_post-trained"])
    with pytest.raises(InputError, match="no model Cosmos-Predict1-4B/pre-trained"):
        sources(["Cosmos-Predict1-4B/pre-trained"])
    with pytest.raises(InputError, match="come with the package"):
        sources(["tiny-Cosmos-Predict1-4B"])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    files = {"model.pt": CONTENT, "config.json": b"{}\n", "deep/er/words": b"a\nb"}
    made = FakeHub({REPOSITORY: files}, small={"config.json"})
    monkeypatch.setattr(worldline.downloads, "PAUSE", 0.0)
    monkeypatch.setattr(worldline.downloads, "_TIMEOUT", 2.0)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving(made):
        monkeypatch.setenv("HF_ENDPOINT", made.address)
        yield made


def entry_of(repository: str = REPOSITORY) -> Entry:
    names = dict.fromkeys(("name", "family", "destination"), "x")
    return Entry(**names, repository=repository, folders=(), files=(), layouts=())


def remote(name: str) -> RemoteFile:
    return next(file for file in list_files(REPOSITORY) if file.name == name)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.incomplete"))


def test_the_list(hub: FakeHub) -> None:
    files = {file.name: file for file in list_files(REPOSITORY)}
    assert files.keys() == hub.repositories[REPOSITORY].keys()
    assert files["model.pt"].nbytes == len(CONTENT)
    assert files["model.pt"].commit == COMMIT
    assert [len(files[name].digest) for name in ("model.pt", "config.json")] == [64, 40]
    found = [*files.values()]
    assert [file.name for file in matching(found, ["*"])] == ["model.pt", "config.json"]
    assert [file.name for file in matching(found, ["deep/*"])] == ["deep/er/words"]


def test_all_files(hub: FakeHub, tmp_path: Path) -> None:
    files = list_files(REPOSITORY)
    counts: list[int] = []
    wanted = {tmp_path / file.name: file for file in files}
    assert set(fetch_all(wanted, counts.append)) == wanted.keys()
    for name, content in hub.repositories[REPOSITORY].items():
        assert (tmp_path / name).read_bytes() == content
    assert sum(counts) == sum(map(len, hub.repositories[REPOSITORY].values()))
    hub.asked.clear()
    assert len([*fetch_all(wanted, counts.append)]) == len(files)
    assert not hub.asked  # all are there, and verified


def test_dropped_connections_go_on(hub: FakeHub, tmp_path: Path) -> None:
    hub.drops["model.pt"] = [1_000_000, 0, 700_000]
    hub.fails["model.pt"] = 2
    fetch(remote("model.pt"), tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == CONTENT
    assert [span for span in hub.fetched("model.pt") if span][-1] == "bytes=1700000-"
    assert not leftovers(tmp_path)


def test_the_next_run_goes_on(hub: FakeHub, tmp_path: Path) -> None:
    hub.drops["model.pt"] = [1_000_000, *[0] * TRIES]
    with pytest.raises(DownloadError, match=r"cannot be fetched: .*run it again"):
        fetch(remote("model.pt"), tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()
    assert len(leftovers(tmp_path)) == 1
    hub.asked.clear()
    fetch(remote("model.pt"), tmp_path / "model.pt")
    assert hub.fetched("model.pt") == ["bytes=1000000-"]
    assert (tmp_path / "model.pt").read_bytes() == CONTENT
    assert not leftovers(tmp_path)


def test_a_server_without_ranges_begins_anew(hub: FakeHub, tmp_path: Path) -> None:
    hub.ranges = False
    hub.drops["model.pt"] = [1_000_000]
    counts: list[int] = []
    fetch(remote("model.pt"), tmp_path / "model.pt", counts.append)
    assert (tmp_path / "model.pt").read_bytes() == CONTENT
    assert sum(counts) == len(CONTENT)


@pytest.mark.parametrize("name", ["model.pt", "config.json"])
def test_a_damaged_file_is_fetched_anew(name: str, hub: FakeHub, tmp_path: Path) -> None:
    hub.damaged[name] = 1
    fetch(remote(name), tmp_path / name)
    assert (tmp_path / name).read_bytes() == hub.repositories[REPOSITORY][name]
    assert len(hub.fetched(name)) == 2


@pytest.mark.parametrize("name", ["model.pt", "config.json"])
def test_a_file_that_stays_damaged_is_refused(name: str, hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"old")
    hub.damaged[name] = 2
    with pytest.raises(DownloadError, match=f"{name} of {REPOSITORY} came damaged.*twice"):
        fetch(remote(name), tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"old"
    assert not leftovers(tmp_path)
    assert len(hub.fetched(name)) == 2


def test_damage_of_an_earlier_run_is_found(hub: FakeHub, tmp_path: Path) -> None:
    file = remote("model.pt")
    part = tmp_path / f"model.pt.{file.digest[:8]}.incomplete"
    part.write_bytes(b"x" * 1000)
    fetch(file, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == CONTENT
    (tmp_path / "model.pt").write_bytes(b"x" + CONTENT[1:])  # of the right size
    assert not file.is_at(tmp_path / "model.pt")
    assert [*fetch_all({tmp_path / "model.pt": file}, lambda _: None)]
    assert file.is_at(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "GatedRepo", r"gated; accept.*https://huggingface.co/someone/something.*hf auth log"),
        (401, "RepoNotFound", r"not there, or not public.*hf auth login"),
        (403, "GatedRepo", r"gated; accept.*https://huggingface.co/someone/something.*hf auth log"),
        (404, "EntryNotFound", r"someone/something: .*has no"),
    ],
)
def test_refusals_are_explained(status: int, code: str, message: str, hub: FakeHub) -> None:
    hub.refused[REPOSITORY] = (status, code)
    with pytest.raises(DownloadError, match=message):
        find_files(entry_of())


def test_no_repository_and_no_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DownloadError, match=r"no/body: .* has no"):
        find_files(entry_of("no/body"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        DownloadError, match=rf"{REPOSITORY}: .*127.0.0.1:9 cannot be reached.*HF_ENDPOINT"
    ):
        find_files(entry_of())


HTML = {"Content-Type": "text/html; charset=utf-8"}


@pytest.mark.parametrize(
    ("status", "headers", "body", "message"),
    [
        (200, HTML, b"<html>log in</html>", "/api/models/someone/something.* web page"),
        (200, {}, b"<html>log in</html>", "<html>log in"),
        (302, {"Location": "/api/models/again"}, b"", "redirects"),
        (407, HTML, b"<html>", "proxy"),
        (502, HTML, b"<html>" * 10**6, "502"),
        (429, {"Retry-After": "77"}, b"", "429.*77 s"),
        (200, {}, b"", "no list"),
        (200, {}, b'{"sha": "0123', "no list"),
        (200, {}, b'{"sha": "0123"}', "siblings"),
        (200, {}, b"[" * 10**6, "no list"),
        (200, {}, b"7", "no list"),
        (200, {"Content-Encoding": "gzip"}, b"rubbish", "cannot be reached.*[dD]ecod"),
        (200, {"Content-Length": "99"}, b"{", "cannot be reached"),
    ],
)
def test_answers_that_are_no_list(
    status: int, headers: dict[str, str], body: bytes, message: str, hub: FakeHub
) -> None:
    hub.raw[""] = (status, headers, body)
    with pytest.raises(DownloadError, match=message) as caught:
        find_files(entry_of())
    assert str(caught.value).startswith(f"{REPOSITORY}: ")
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["ftp://x", "hub", "http://a:b", "http://ä..b", "https:"])
def test_an_address_that_is_none(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(DownloadError, match=f"HF_ENDPOINT is '{address}'"):
        find_files(entry_of())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"size": "5000"}, "siblings.0.size"),
        ({"size": None}, "siblings.0.size"),
        ({"size": -1}, "siblings.0.size"),
        ({"rfilename": None}, "siblings.0.rfilename"),
        ({"lfs": {}}, "siblings.0.lfs.sha256"),
        ({"lfs": {"sha256": "../../x"}}, "siblings.0.lfs.sha256"),
        ({"lfs": None, "blobId": None}, "without a hash"),
        ({"rfilename": "config.json"}, "config.json twice"),
        *(
            ({"rfilename": name}, "no name of a file")
            for name in ("a\0b", "../a", "/a", "a//b", "", "a/../../b", "\x1b[2J")
        ),
    ],
)
def test_lists_that_are_wrong(entry: dict[str, object], message: str, hub: FakeHub) -> None:
    hub.listed["model.pt"] = entry
    with pytest.raises(DownloadError, match=message) as caught:
        list_files(REPOSITORY)
    assert hub.address in str(caught.value)


def test_an_endless_list(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worldline.downloads, "MAX_TEXT", 10**5)
    hub.raw[""] = (200, {}, b"{" + b" " * 10**7)
    with pytest.raises(DownloadError, match="without an end"):
        list_files(REPOSITORY)


def test_a_file_stops_at_its_listed_size(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def is_at(file: RemoteFile, path: Path) -> bool:
        sizes.append(path.stat().st_size)
        return False

    hub.endless["model.pt"] = 20
    hub.listed["model.pt"] = {"size": 1000}
    file = remote("model.pt")
    monkeypatch.setattr(RemoteFile, "is_at", is_at)
    counts: list[int] = []
    with pytest.raises(DownloadError, match="damaged"):
        fetch(file, tmp_path / "model.pt", counts.append)
    assert sizes == [1000, 1000]
    assert sum(counts) == 0
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, HTML, b"<html>log in"), "web page"),
        ((416, {}, b""), "416"),
        ((429, {"Retry-After": "3600"}, b""), "3600 s"),
        ((302, {"Location": "/x/y/resolve/z/model.pt"}, b""), "redirects"),
    ],
)
def test_answers_that_are_no_file(
    answer: tuple[int, dict[str, str], bytes], message: str, hub: FakeHub, tmp_path: Path
) -> None:
    hub.raw["model.pt"] = answer
    with pytest.raises(DownloadError, match=message):
        fetch(remote("model.pt"), tmp_path / "model.pt")
    assert not [path for path in tmp_path.iterdir() if path.stat().st_size]


def test_a_slow_hub(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = remote("model.pt")
    monkeypatch.setattr(worldline.downloads, "_PATIENCE", 0.0)
    monkeypatch.setattr(worldline.downloads, "_LEAST", 10**9)
    with pytest.raises(DownloadError, match="too slow"):
        fetch(file, tmp_path / "model.pt")
    with pytest.raises(DownloadError, match="too slowly"):
        list_files(REPOSITORY)


@pytest.mark.parametrize("length", [len(CONTENT) + 7, len(CONTENT), 10])
def test_a_part_of_another_length(length: int, hub: FakeHub, tmp_path: Path) -> None:
    hub.raw["config.json"] = (416, {}, b"")
    file = remote("model.pt")
    file.part(tmp_path / "model.pt").write_bytes((CONTENT + b"x" * 99)[:length])
    fetch(file, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == CONTENT
    # the hub knows of no such range
    short = RemoteFile(REPOSITORY, COMMIT, "deep/er/words", 9, file.digest)
    short.part(tmp_path / "words").write_bytes(b"12345678")
    with pytest.raises(DownloadError, match="deep/er/words"):
        fetch(short, tmp_path / "words")
    assert hub.fetched("deep/er/words")[:2] == ["bytes=8-", "bytes=0-"]


def test_a_part_that_is_no_file(hub: FakeHub, tmp_path: Path) -> None:
    file, victim = remote("model.pt"), tmp_path / "victim"
    victim.write_bytes(b"precious")
    part = file.part(tmp_path / "model.pt")
    for make in (part.mkdir, lambda: part.symlink_to(victim), lambda: os.mkfifo(part)):
        make()
        with pytest.raises(DownloadError, match="not a regular file"):
            fetch(file, tmp_path / "model.pt")
        part.rmdir() if part.is_dir() else part.unlink()
    assert victim.read_bytes() == b"precious"


def test_names_that_begin_alike_and_two_revisions(hub: FakeHub, tmp_path: Path) -> None:
    hub.repositories[REPOSITORY]["model.pt.index.json"] = b"{}" * 999
    files = {tmp_path / file.name: file for file in list_files(REPOSITORY)}
    hub.repositories[REPOSITORY]["model.pt"] = CONTENT[::-1]
    other = {tmp_path / "other" / file.name: file for file in list_files(REPOSITORY)}
    parts = {file.part(tmp_path / file.name) for file in (*files.values(), *other.values())}
    assert len(parts) == len(files) + 1
    for file in other.values():
        file.part(tmp_path / file.name).parent.mkdir(parents=True, exist_ok=True)
        file.part(tmp_path / file.name).write_bytes(b"x")
    kept = other[tmp_path / "other" / "model.pt"].part(tmp_path / "model.pt")
    hub.repositories[REPOSITORY]["model.pt"] = CONTENT
    assert len([*fetch_all(files, lambda _: None)]) == len(files)
    assert kept.read_bytes() == b"x"


def test_what_cannot_be_written_is_named(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = remote("model.pt")
    (tmp_path / "model.pt").mkdir()
    with pytest.raises(DownloadError, match=r"model\.pt cannot be written: a folder has its name"):
        fetch(file, tmp_path / "model.pt")
    (tmp_path / "taken").touch()
    with pytest.raises(DownloadError, match=r"taken/model\.pt cannot be written"):
        fetch(file, tmp_path / "taken" / "model.pt")
    assert not hub.fetched("model.pt")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DownloadError, match=r"a\.pt cannot be written: No space left"):
        fetch(file, tmp_path / "a.pt")
    monkeypatch.undo()
    assert len(leftovers(tmp_path)) == 1  # of which the next run makes use


def test_two_downloads_of_one_file(hub: FakeHub, tmp_path: Path) -> None:
    import fcntl

    file = remote("model.pt")
    with (tmp_path / f"model.pt.{file.digest[:8]}.incomplete").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DownloadError, match="by another download"):
            fetch(file, tmp_path / "model.pt")


def test_a_login_is_for_the_hub_alone(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with serving(FakeHub(hub.repositories)) as other:
        hub.files_at = other.address
        fetch(remote("model.pt"), tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == CONTENT
    assert hub.logins == ["Bearer hf_x"]
    assert other.logins == [None]
