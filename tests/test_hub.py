"""Files come whole and verified, or not at all, whatever the hub does."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import worldline.hub
from worldline.errors import DownloadError
from worldline.hub import RemoteFile, check_access, fetch, fetch_all, list_files, matching

from .fake_hub import COMMIT, FakeHub, serving

REPOSITORY = "someone/something"
CONTENT = random.Random(0).randbytes(3_000_000)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    files = {"model.pt": CONTENT, "config.json": b"{}\n", "deep/er/words": b"a\nb"}
    made = FakeHub({REPOSITORY: files}, small={"config.json"})
    monkeypatch.setattr(worldline.hub, "PAUSE", 0.0)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving(made):
        monkeypatch.setenv("HF_ENDPOINT", made.address)
        yield made


def find(name: str) -> RemoteFile:
    return next(file for file in list_files(REPOSITORY) if file.name == name)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.incomplete"))


def test_the_list(hub: FakeHub) -> None:
    files = {file.name: file for file in list_files(REPOSITORY)}
    assert files.keys() == hub.repositories[REPOSITORY].keys()
    assert files["model.pt"].nbytes == len(CONTENT)
    assert files["model.pt"].commit == COMMIT
    assert (files["model.pt"].is_git, files["config.json"].is_git) == (False, True)
    found = [*files.values()]
    assert [file.name for file in matching(found, ["*"])] == ["model.pt", "config.json"]
    assert [file.name for file in matching(found, ["deep/*"])] == ["deep/er/words"]


def test_all_files(hub: FakeHub, tmp_path: Path) -> None:
    files = list_files(REPOSITORY)
    counts: list[int] = []
    done: set[str] = set()
    wanted = [(file, tmp_path / file.name) for file in files]
    fetch_all(wanted, counts.append, lambda file, _: done.add(file.name))
    for name, content in hub.repositories[REPOSITORY].items():
        assert (tmp_path / name).read_bytes() == content
    assert sum(counts) == sum(map(len, hub.repositories[REPOSITORY].values()))
    assert done == hub.repositories[REPOSITORY].keys()
    hub.asked.clear()
    fetch_all(wanted, counts.append, lambda *_: None)
    assert not hub.asked  # all are there, and verified


def test_dropped_connections_go_on(hub: FakeHub, tmp_path: Path) -> None:
    hub.drops["model.pt"] = [1_000_000, 0, 700_000]
    hub.fails["model.pt"] = 2
    fetch(find("model.pt"), tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == CONTENT
    assert [span for span in hub.fetched("model.pt") if span][-1] == "bytes=1700000-"
    assert not leftovers(tmp_path)


def test_the_next_run_goes_on(hub: FakeHub, tmp_path: Path) -> None:
    hub.drops["model.pt"] = [1_000_000, *[0] * worldline.hub.TRIES]
    with pytest.raises(DownloadError, match=r"cannot be fetched: .*run it again"):
        fetch(find("model.pt"), tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()
    assert len(leftovers(tmp_path)) == 1
    hub.asked.clear()
    fetch(find("model.pt"), tmp_path / "model.pt")
    assert hub.fetched("model.pt") == ["bytes=1000000-"]
    assert (tmp_path / "model.pt").read_bytes() == CONTENT
    assert not leftovers(tmp_path)


def test_a_server_without_ranges_begins_anew(hub: FakeHub, tmp_path: Path) -> None:
    hub.ranges = False
    hub.drops["model.pt"] = [1_000_000]
    counts: list[int] = []
    fetch(find("model.pt"), tmp_path / "model.pt", counts.append)
    assert (tmp_path / "model.pt").read_bytes() == CONTENT
    assert sum(counts) == len(CONTENT)


@pytest.mark.parametrize("name", ["model.pt", "config.json"])
def test_a_damaged_file_is_fetched_anew(name: str, hub: FakeHub, tmp_path: Path) -> None:
    hub.damaged[name] = 1
    fetch(find(name), tmp_path / name)
    assert (tmp_path / name).read_bytes() == hub.repositories[REPOSITORY][name]
    assert len(hub.fetched(name)) == 2


@pytest.mark.parametrize("name", ["model.pt", "config.json"])
def test_a_file_that_stays_damaged_is_refused(name: str, hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"old")
    hub.damaged[name] = 2
    with pytest.raises(DownloadError, match=f"{name} of {REPOSITORY} came damaged.*twice"):
        fetch(find(name), tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"old"
    assert not leftovers(tmp_path)
    assert len(hub.fetched(name)) == 2


def test_damage_of_an_earlier_run_is_found(hub: FakeHub, tmp_path: Path) -> None:
    file = find("model.pt")
    part = tmp_path / f"model.pt.{file.digest[:8]}.incomplete"
    part.write_bytes(b"x" * 1000)
    fetch(file, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == CONTENT
    (tmp_path / "model.pt").write_bytes(b"x" + CONTENT[1:])  # of the right size
    assert not file.is_at(tmp_path / "model.pt")
    fetch_all([(file, tmp_path / "model.pt")], lambda _: None, lambda *_: None)
    assert file.is_at(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [
        (401, "GatedRepo", r"gated: accept.*https://huggingface.co/someone/something.*hf auth log"),
        (401, "RepoNotFound", r"not there, or is not public.*hf auth login"),
        (403, "GatedRepo", r"gated: accept.*https://huggingface.co/someone/something.*hf auth log"),
        (404, "EntryNotFound", r"has no someone/something"),
    ],
)
def test_refusals_are_explained(status: int, code: str, told: str, hub: FakeHub) -> None:
    hub.refused[REPOSITORY] = (status, code)
    with pytest.raises(DownloadError, match=told):
        check_access(find("model.pt"))


def test_a_licence_that_the_account_lacks(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    hub.refused[REPOSITORY] = (403, "GatedRepo")
    with pytest.raises(DownloadError, match=r"accept its licence on .* with the account of your"):
        check_access(find("model.pt"))


def test_no_repository_and_no_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DownloadError, match="has no no/body"):
        list_files("no/body")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        DownloadError, match=rf"{REPOSITORY}: .*127.0.0.1:9 cannot be reached.*HF_ENDPOINT"
    ):
        list_files(REPOSITORY)


def test_a_name_that_leads_out_of_the_folder(hub: FakeHub) -> None:
    hub.repositories[REPOSITORY]["../outside"] = b"x"
    with pytest.raises(DownloadError, match="no name of a file"):
        list_files(REPOSITORY)


def test_what_cannot_be_written_is_told(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = find("model.pt")
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

    file = find("model.pt")
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
        fetch(find("model.pt"), tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == CONTENT
    assert hub.logins == ["Bearer hf_x"]
    assert other.logins == [None]
