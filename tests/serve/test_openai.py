"""The official client against a server with a tiny world."""

from __future__ import annotations

import asyncio
import base64
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from worldline.serve.workers import LocalWorker
from worldline.video.read import read_video
from worldline.video.write import write_video

from .running import Running, running

WORLD = "tiny-Cosmos-Predict2.5-2B"
QUICK = {"num_steps": 1, "num_video_frames": 5}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    def make(world: str, name: str) -> LocalWorker:
        return LocalWorker(world, name, {"device": "cpu"})

    folder = tmp_path_factory.mktemp("serve") / "data"
    with running(folder, lambda: {WORLD: [make(WORLD, f"{WORLD}/0")]}, make) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            yield client


@pytest.fixture(scope="module")
def picture() -> bytes:
    data = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (128, 192, 3), np.uint8)
    Image.fromarray(noise).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    frames = np.random.default_rng(0).integers(0, 255, (9, 128, 192, 3), np.uint8)
    write_video(frames, tmp_path / "clip.mp4", 25)
    return tmp_path / "clip.mp4"


def make(client: openai.OpenAI, **fields: Any) -> Any:
    extra = {**QUICK, **fields.pop("extra_body", {})}
    return client.videos.create(prompt="a ball rolls", extra_body=extra, **fields)


def test_create_retrieve_download_delete(client: openai.OpenAI, tmp_path: Path) -> None:
    video = client.videos.create_and_poll(
        prompt="a ball rolls", model=WORLD, size="192x128", extra_body=QUICK
    )
    assert (video.status, video.progress, video.size, video.seconds) == (
        "completed",
        100,
        "192x128",
        "0.2",
    )
    assert video._request_id
    for variant, start in (
        ("video", b""),
        ("thumbnail", b"\xff\xd8"),
        ("spritesheet", b"\xff\xd8"),
    ):
        data = client.videos.download_content(video.id, variant=variant).read()
        assert data.startswith(start)
        if variant == "video":
            (tmp_path / "video.mp4").write_bytes(data)
    assert read_video(tmp_path / "video.mp4").frames.shape == (5, 128, 192, 3)
    deleted = client.videos.delete(video.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (video.id, True, "video.deleted")
    with pytest.raises(openai.NotFoundError) as caught:
        client.videos.retrieve(video.id)
    assert caught.value.code == "video_not_found"


@pytest.mark.parametrize("form", ["file", "bytes", "tuple", "clip"])
def test_inputs(client: openai.OpenAI, picture: bytes, clip: Path, form: str) -> None:
    source: Any = {
        "file": clip.with_name("a.png"),
        "bytes": picture,
        "tuple": ("no name of ours/../x.mp4", picture, "video/mp4"),
        "clip": clip,
    }[form]
    if form == "file":
        source.write_bytes(picture)
    job = make(client, input_reference=source, extra_body={"num_video_frames": 9})
    video: Any = client.videos.poll(job.id)
    assert video.status == "completed", video
    assert video.request["num_input_frames"] == (5 if form == "clip" else 1)
    assert video.request["input_reference"] == {"input_of": video.id}
    kept = client.get(
        f"/videos/{video.id}/content?variant=input", cast_to=openai.HttpxBinaryResponseContent
    )
    assert kept.read() == (clip.read_bytes() if form == "clip" else picture)


def test_one_seed_makes_one_video(client: openai.OpenAI) -> None:
    jobs: list[Any] = [
        make(client, extra_body={"seed": 7, "extra_params": {"guidance": 2}}) for _ in "ab"
    ]
    videos: list[Any] = [client.videos.poll(job.id) for job in jobs]
    first, second = (client.videos.download_content(v.id).read() for v in videos)
    assert first == second
    assert videos[0].request["guidance"] == 2
    again: Any = client.post("/videos", body=videos[0].request, cast_to=openai.types.Video)
    assert client.videos.poll(again.id).status == "completed"
    assert client.videos.download_content(again.id).read() == first


def test_data_url_of_5_mb(client: openai.OpenAI) -> None:
    data, noise = io.BytesIO(), np.random.default_rng(0).integers(0, 255, (1100, 1100, 3), np.uint8)
    Image.fromarray(noise).save(data, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    assert len(url) > 4_500_000
    video = make(client, extra_body={"input_reference": {"image_url": url}})
    assert client.videos.poll(video.id).status == "completed"


def test_remix_and_extension(client: openai.OpenAI) -> None:
    first: Any = client.videos.poll(make(client, extra_body={"seed": 3}).id)
    remix: Any = client.videos.remix(first.id, prompt="a cube falls")
    assert (remix.remixed_from_video_id, remix.seed, remix.prompt) == (first.id, 3, "a cube falls")
    assert client.videos.poll(remix.id).status == "completed"
    body = {"video": {"id": first.id}, "prompt": "it goes on", "num_steps": 1, "num_frames": 9}
    longer: Any = client.post("/videos/extensions", body=body, cast_to=openai.types.Video)
    assert longer.remixed_from_video_id == first.id
    assert client.videos.poll(longer.id).status == "completed"
    del body["prompt"]  # that of the first goes on
    same: Any = client.post("/videos/extensions", body=body, cast_to=openai.types.Video)
    assert same.prompt == first.prompt
    assert client.videos.poll(same.id).status == "completed"


def test_wrong_requests(client: openai.OpenAI) -> None:
    for extra, code, param in (
        ({"sede": 1}, "unknown_parameter", "sede"),
        ({"seed": "x"}, "invalid_value", "seed"),
        ({"num_video_frames": 6}, "invalid_value", "num_video_frames"),
        ({"temperature": 1}, "unknown_parameter", "temperature"),
        ({"seconds": 3}, "conflicting_parameters", "seconds"),
        ({"input_reference": {"image_url": "https://a.example/x.png"}}, "url_refused", None),
        ({"prompt_embeddings": "/etc/passwd"}, "unknown_parameter", "prompt_embeddings"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            make(client, extra_body=extra)
        assert caught.value.code == code, caught.value
        assert caught.value.type == "invalid_request_error"
        assert param in (None, caught.value.param)
    with pytest.raises(openai.BadRequestError) as caught:
        client.videos.create(prompt="a ball", input_reference=b"#EXTM3U\n/etc/passwd")
    assert caught.value.code == "unreadable_media"
    with pytest.raises(openai.NotFoundError) as missing:
        client.videos.create(prompt="a ball", model="tiny-Cosmos-Predict2.5-3B")
    assert missing.value.code == "model_not_found"
    assert WORLD in str(missing.value)


def bomb() -> bytes:
    """PNG of 60,000 x 60,000 pixels in a few bytes."""
    data = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", data), (b"IDAT", zlib.compress(bytes(1 << 20))), (b"IEND", b"")
    packed = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_damaged_media(client: openai.OpenAI, server: Running, clip: Path, picture: bytes) -> None:
    whole = clip.read_bytes()
    for name, data in {
        "truncated MP4": whole[: len(whole) // 2],
        "head of an MP4": whole[:64],
        "bomb": bomb(),
        "truncated PNG": picture[: len(picture) // 2],
        "playlist behind a head": whole[:32] + b"#EXTM3U\nfile:///etc/passwd\n",
        "short WEBP": b"RIFF\x10\0\0\0WEBPVP8 \0\0\0\0",
        "GIF head": b"GIF89a\x01\0\x01\0",
        "MKV head": b"\x1a\x45\xdf\xa3" + bytes(60),
    }.items():
        with pytest.raises(openai.BadRequestError) as caught:
            make(client, input_reference=("a.mp4", data), extra_body={"num_video_frames": 9})
        assert (caught.value.code, caught.value.param) == ("unreadable_media", "input_reference"), (
            name
        )
        assert str(server.store.path) not in str(caught.value)
    assert server.incoming() == []


def test_asynchronous_client(server: Running) -> None:
    async def use() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            video = await client.videos.create_and_poll(prompt="a ball", extra_body=QUICK)
            assert video.status == "completed"
            content = await client.videos.download_content(video.id)
            assert b"ftyp" in content.read()[:16]
            ids = [each.id async for each in client.videos.list(limit=1)]
            assert video.id in ids

    asyncio.run(use())


def test_images_and_nim(client: openai.OpenAI, picture: bytes) -> None:
    images = client.images.generate(prompt="a ball", n=2, extra_body={"num_steps": 1, "seed": 5})
    assert images.data is not None
    for image in images.data:
        assert Image.open(io.BytesIO(base64.b64decode(image.b64_json or ""))).size == (192, 128)
    body = {
        "prompt": "a ball",
        "prompt_upsampling": True,
        "seed": 4,
        "guidance_scale": 7.0,
        "steps": 1,
        "video_params": {"height": 128, "width": 192, "frames_count": 5, "frames_per_sec": 24},
        "image": base64.b64encode(picture).decode(),
    }
    answer: Any = client.post("/infer", body=body, cast_to=object)
    assert base64.b64decode(answer["b64_video"])[4:8] == b"ftyp"
    assert (answer["upsampled_prompt"], answer["seed"]) == ("a ball", 4)


def test_nothing_stays_in_incoming(server: Running) -> None:
    assert server.incoming() == []
