"""Batch files, samples, options, embeddings, guardrails and answers of a hub that are refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ..fake_hub import QuietServer
from ..tiny_guards import add_guardrails
from .cases import AR, DIT, FLOW, PROMPTED, Case, clip, generate, make_worlds

DEEP = "[" * 200_000 + "]" * 200_000
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)

# files of a batch, by lines or as a document
BATCHES: dict[str, bytes] = {
    "empty": b"",
    "blank lines": b"\n\n \n",
    "not JSON": b'{"prompt": "a"}\nprompt: b\n',
    "cut": b'{"prompt": "a"}\n{"prompt": "b',
    "deep": DEEP.encode(),
    "a name twice": b'{"prompt": "a", "visual_input": "clip.mp4", "prompt": "b"}\n',
    "number for text": b'{"prompt": "a", "visual_input": 5}\n',
    "list for text": b'{"prompt": ["a"], "visual_input": "clip.mp4"}\n',
    "null": b'{"prompt": null, "visual_input": null}\n',
    "lone surrogate": b'{"prompt": "a \\ud800 b", "visual_input": "clip.mp4"}\n',
    "NUL in a path": b'{"prompt": "a", "visual_input": "clip\\u0000.mp4"}\n',
    "not UTF-8": b'{"prompt": "caf\xe9", "visual_input": "clip.mp4"}\n',
    "UTF-16 cut": '{"prompt": "a"}'.encode("utf-16")[:-1],
    "zeros": bytes(3000),
    "numbers": b"[1, 2, 3]",
    "a text": b'"a prompt"',
    "absent input": b'{"prompt": "a", "visual_input": "nowhere.mp4"}\n',
    "address": b'{"prompt": "a", "visual_input": "https://example.com/a.mp4"}\n',
    "10,000 bad lines": b'{"prompt": 5, "visual_input": "nowhere.mp4"}\n' * 10_000,
    "a field of a megabyte": b'{"prompt": "a", "' + b"x" * (1 << 20) + b'": 1}\n',
    "a value of a megabyte": b'{"prompt": "a", "visual_input": "' + b"y" * (1 << 20) + b'"}\n',
}

# files of samples: suffix, content behind or around that of a good sample
SAMPLES: dict[str, tuple[str, str]] = {
    "aliases": (".yaml", BOMB),
    "alias of itself": (".yaml", "a: &a\n  b: *a\n"),
    "time": (".yaml", "seed: !!timestamp x\n"),
    "empty number": (".yaml", 'seed: !!int ""\n'),
    "Python object": (".yaml", "seed: !!python/object/apply:os.system ['touch executed']\n"),
    "tab": (".yaml", "\tseed: 5\n"),
    "deep": (".yaml", f"seed: {DEEP}"),
    "a name twice": (".yaml", "prompt: c\n"),
    "deep JSON": (".json", DEEP),
    "number too large": (".json", '{%s, "seed": 1e999}'),
    "not a number": (".json", '{%s, "guidance": NaN}'),
    "10,000 digits": (".json", f'{{%s, "seed": {"9" * 10_000}}}'),
    "seed of a text": (".json", '{%s, "seed": "x"}'),
    "lone surrogate": (".json", '{%s, "negative_prompt": "\\udfff"}'),
    "name leaves the folder": (".json", '{"name": "../../x", "prompt": "b"}'),
    "name of control characters": (".json", '{"name": "a\\u001b[2J", "prompt": "b"}'),
    "comma too many": (".json", "{%s,}"),
    "no name": (".json", '[{"prompt": "b"}, 5]'),
    "two samples of one name": (".json", "[{%s}, {%s}]"),
}
GOOD = {"name": "a", "inference_type": "text2world", "prompt": "b"}

# words behind a good command
OPTIONS: dict[str, list[str]] = {
    "odd height": ["--height", "127"],
    "no height": ["--height", "0"],
    "negative width": ["--width", "-16"],
    "height of a text": ["--height", "tall"],
    "height of 10^9": ["--height", "1000000000"],
    "frames": ["--num_video_frames", "10"],
    "frames of 10^12": ["--num_video_frames", "1000000000001"],
    "steps": ["--num_steps", "0"],
    "seed": ["--seed", "-1"],
    "seed of 2^70": ["--seed", str(1 << 70)],
    "guidance": ["--guidance", "nan"],
    "fps": ["--fps", "0"],
    "fps infinite": ["--fps", "inf"],
    "device mps": ["--device", "mps"],
    "device meta": ["--device", "meta"],
    "device cuda:9": ["--device", "cuda:9"],
    "device of a text": ["--device", "fast"],
    "dtype": ["--dtype", "int8"],
    "unknown option": ["--hight", "128"],
    "suffix": ["--output", "out/made.txt"],
    "output is a folder": ["--output", "checkpoints"],
    "output below a file": ["--output", "clip.mp4/made.mp4"],
    "output over the input": ["--output", "clip.mp4"],
    "output in /proc": ["--output", "/proc/made.mp4"],
    "name of 300 characters": ["--output", "o" * 300 + ".mp4"],
    "NUL in the output": ["--output", "a\0b.mp4"],
    "GIF of 120 frames a second": ["--output", "out/made.gif", "--fps", "120"],
}

EMBEDDINGS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "of one row": lambda: save({"prompt_embeds": torch.zeros(1)}),
    "of whole numbers": lambda: save({"prompt_embeds": torch.zeros(512, 64, dtype=torch.int32)}),
    "of another width": lambda: save({"prompt_embeds": torch.zeros(512, 3)}),
    "of NaN": lambda: save({"prompt_embeds": torch.full((512, 1024), float("nan"))}),
    "text": lambda: b"embeddings",
}

BLOCKLISTS: dict[str, Callable[[Path], object]] = {
    "no list": lambda folder: shutil.rmtree(folder / "custom"),
    "empty list": lambda folder: [path.unlink() for path in (folder / "custom").iterdir()],
    "unfinished": lambda folder: (folder / "custom/second.1234abcd.incomplete").write_text("a"),
    "empty file": lambda folder: (folder / "custom/second").write_text(""),
    "dangling link": lambda folder: (folder / "custom/second").symlink_to("../blobs/1"),
    "LFS pointer": lambda folder: (folder / "custom/second").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"
    ),
    "web page": lambda folder: (folder / "custom/second").write_text("<!DOCTYPE html><html>"),
    "subfolder": lambda folder: (folder / "custom/more").mkdir(),
    "pipe": lambda folder: os.mkfifo(folder / "custom/second"),
    "not UTF-8": lambda folder: (folder / "custom/second").write_bytes(b"caf\xe9\n"),
}


def lines(content: bytes, command: str) -> list[str]:
    """Words of a batch of a family that takes JSONL."""
    make_worlds()
    clip()
    Path("batch.jsonl").write_bytes(content)
    folder, *more = {
        "diffusion": [
            *("--diffusion_transformer_dir", DIT, "--disable_prompt_upsampler"),
            *("--num_steps", "1"),
        ],
        "autoregressive": ["--ar_model_dir", PROMPTED, "--disable_diffusion_decoder"],
    }[command]
    words = [command, "video2world", "--batch_input_path", "batch.jsonl", folder, *more]
    more = ["--checkpoint_dir", "checkpoints", "--disable_guardrail", "--video_save_folder", "out"]
    return [*words, *more]


def samples(suffix: str, content: str) -> list[str]:
    make_worlds()
    good = json.dumps(GOOD)[1:-1]
    if suffix == ".yaml":
        content = "".join(f"{name}: {value}\n" for name, value in GOOD.items()) + content
    Path(f"samples{suffix}").write_text(content.replace("%s", good))
    words = ["predict2.5", "-i", f"samples{suffix}", "-o", "out", "--model", FLOW]
    return [*words, "--checkpoint_dir", "checkpoints", "--disable_guardrails", "--num_steps", "1"]


def options(words: list[str], model: str) -> list[str]:
    make_worlds()
    return generate(model, None, *words)


def embeddings(data: Callable[[], bytes]) -> list[str]:
    make_worlds()
    Path("prompt.safetensors").write_bytes(data())
    words = generate(DIT)
    at = words.index("--prompt")
    words[at : at + 2] = ["--prompt_embeddings", "prompt.safetensors"]
    return words


def blocklist(change: Callable[[Path], object]) -> list[str]:
    """Whole guardrails but for the list of words."""
    change(add_guardrails(make_worlds(), unknown_is_safe=True) / "blocklist")
    return [word for word in generate(FLOW) if word != "--disable_guardrails"]


LISTING: dict[str, Any] = {"id": "nvidia/x", "sha": "a" * 40}
FILE = {"rfilename": "model.pt", "size": 10, "blobId": "b" * 40}


def listed(**changes: Any) -> bytes:
    return json.dumps(LISTING | {"siblings": [FILE | changes]}).encode()


ANSWERS: dict[str, tuple[int, bytes]] = {
    "page": (200, b"<html>log in to the network</html>"),
    "nothing": (200, b""),
    "cut": (200, listed()[:40]),
    "deep": (200, DEEP.encode()),
    "list": (200, b"[]"),
    "text for a size": (200, listed(size="5000")),
    "negative size": (200, listed(size=-5)),
    "null name": (200, listed(rfilename=None)),
    "NUL in a name": (200, listed(rfilename="a\0b.pt")),
    "name that leaves": (200, listed(rfilename="../../x.pt")),
    "no files": (200, json.dumps(LISTING).encode()),
    "proxy asks": (407, b"<html>who are you</html>"),
    "bad gateway": (502, b"<html>" + b"x" * 5000),
    "forbidden": (403, b"{}"),
    "gone": (410, b""),
}


@contextmanager
def serving_answers() -> Iterator[str]:
    """Address of a hub that gives an answer of ANSWERS, by its number, whatever is asked."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            status, body = list(ANSWERS.values())[int(self.path.split("/")[1])]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

    with QuietServer(("127.0.0.1", 0), Handler) as server:
        parent, child = os.getpid(), os.fork()  # before any thread: cases are forks, too
        server.timeout = 0.5
        while child == 0:
            server.handle_request()
            if os.getppid() != parent:
                os._exit(0)
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def document_cases(hub: str) -> Iterator[Case]:
    """Every bad document, option, embedding, blocklist and answer of a hub."""
    commands = cycle(("diffusion", "autoregressive"))
    for name, content in BATCHES.items():
        command = next(commands)
        yield Case(f"batch, {name}, {command}", partial(lines, content, command), ("batch.jsonl",))
    for name, (suffix, text) in SAMPLES.items():
        words = partial(samples, suffix, text)
        yield Case(f"samples, {name}", words, (f"samples{suffix}",))
    models = cycle((FLOW, DIT, AR))
    for name, more in OPTIONS.items():
        model = next(models)
        if model == AR and {"--height", "--width", "--num_steps", "--guidance", "--fps"} & {*more}:
            model = next(models)  # whose own they are
        yield Case(f"option, {name}, {model}", partial(options, more, model))
    for name, data in EMBEDDINGS.items():
        yield Case(f"embeddings, {name}", partial(embeddings, data), ("prompt.safetensors",))
    for name, change in BLOCKLISTS.items():
        yield Case(f"blocklist, {name}", partial(blocklist, change), ("blocklist",))
    words = ["checkpoints", "download", "Cosmos-Predict1-4B", "--checkpoint_dir", "checkpoints"]
    for number, name in enumerate(ANSWERS):
        address = {"HF_ENDPOINT": f"{hub}/{number}"}
        yield Case(f"hub, {name}", lambda: words, (), (1, 2), address)
