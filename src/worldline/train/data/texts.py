"""Captions of videos, and embeddings in place of them, in the layouts of the released trainers."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

from worldline.documents import parse_json, read_entries, read_text
from worldline.errors import InputError, brief, strerror
from worldline.text.embeddings import PROMPT, read_embedding_file, read_embeddings

log = logging.getLogger(__name__)

Text: TypeAlias = str | Path  # a caption, or the file of an embedding

_NO_TEXT = re.compile(r"[\0\ud800-\udfff]")  # characters of bytes that are none
_FILE_FIELDS, _CAPTION_FIELDS = ("file", "video", "file_name"), ("caption", "prompt", "text")


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Where the texts of videos come from.

    Attributes:
        source: "text" for `metas/{stem}.txt`, "json" for `captions/{stem}.json`, "beside" for
            `{stem}.txt` beside the videos, "auto" for the second where there is one, and the third
            where there is no folder `metas`; "embeddings" for `t5_xxl/{stem}.pickle`; or a file of
            JSON lines with a video and a caption each; or the captions by their videos.
        caption: of all videos, in place of a source.
        prompt_type: which of the captions of a JSON file, such as "long"; by default the first.
        width: numbers in a row of an embedding.
        rows: of an embedding, shorter ones are filled with zeros.
        empty: take an empty caption for one that is missing or cannot be read.
    """

    source: str | Path | Mapping[Path, str] = "auto"
    caption: str | None = None
    prompt_type: str | None = None
    width: int = 1024
    rows: int = 512
    empty: bool = False

    def find(self, folder: Path, videos: Sequence[Path]) -> dict[Path, Text]:
        """Text of each video.

        Args:
            folder: that holds `metas`, `captions` or `t5_xxl`.
            videos: files.

        Raises:
            InputError: some are missing, or cannot be read.
        """
        if self.caption is not None:
            return dict.fromkeys(videos, self.caption)
        source = self.source
        if source == "auto":
            beside = any(video.with_suffix(".txt").is_file() for video in videos)
            source = "beside" if beside and not (folder / "metas").is_dir() else "text"
            source = "json" if any((folder / "captions").glob("*.json")) else source
        if self.prompt_type is not None and source != "json":
            log.warning(
                "data.prompt_type is %s, without effect: captions of %s are no JSON; leave it out",
                *(self.prompt_type, folder),
            )
        if source == "beside":
            folder = videos[0].parent
        others: list[Path] = []  # files without the text that was asked for
        places: dict[str | Path, tuple[str, Callable[[Path], Text]]] = {
            "text": ("metas/{}.txt", lambda path: read_text(path).strip()),
            "beside": ("{}.txt", lambda path: read_text(path).strip()),
            "json": ("captions/{}.json", partial(self._read_json, others)),
            "embeddings": ("t5_xxl/{}.pickle", lambda path: path.resolve(strict=True)),
        }
        found, problems = dict[Path, Text](), dict[Path, str]()
        where: str | Path = folder if isinstance(source, Mapping) else source
        if isinstance(source, Mapping):
            found |= {video: source[video] for video in videos if video in source}
        elif source in places:
            name, read = places[source]
            where = folder / name.format("NAME")
            for video in videos:
                try:
                    found[video] = read(folder / name.format(video.stem))
                except (OSError, ValueError) as error:
                    problems[video] = strerror(error)
        else:
            found |= _read_lines(Path(source), videos)
        if others:
            log.warning(
                "data.prompt_type is %s, which %d of %d captions lack, such as %s, so that their "
                "first is taken; give one that they have",
                *(self.prompt_type, len(others), len(videos), others[0]),
            )
        for video, text in [*found.items()]:
            if isinstance(text, str) and _NO_TEXT.search(text):
                problems[video] = f"it is no text, but {brief(found.pop(video), 40)}"
        missing = [f"{v.name}: {problems.get(v, 'none')}" for v in videos if not found.get(v)]
        if missing:
            number = f"{len(missing)} of {len(videos)} videos"
            line = f"{where}: {number} have no text ({'; '.join(missing[:3])})"
            if source == "embeddings" or not self.empty:
                raise InputError(f"{line}; add it, or give one for all (--caption, data.caption)")
            log.warning("%s; theirs is empty", line)
        if source == "embeddings":
            self.read(found[videos[0]])  # one of another width is of another encoder, as all are
        return {video: found.get(video, "") for video in videos}

    def read(self, text: Text) -> dict[str, Any]:
        """What a sample has of its text: `ai_caption`, or `t5_text_embeddings` and its mask."""
        if isinstance(text, str):
            return {"ai_caption": text}
        [embedding] = read_embeddings(text, width=self.width, rows=self.rows)[PROMPT]
        length = read_embedding_file(text, text.stat().st_mtime_ns)[PROMPT].shape[-2]
        mask = (torch.arange(self.rows) < length).to(torch.int64)
        return {"t5_text_embeddings": embedding, "t5_text_mask": mask}

    def _read_json(self, others: list[Path], path: Path) -> str:
        """Caption of {model: {"long": …, "medium": …, "short": …}}, whose braces may be absent.

        A file without the text that was asked for gives its first, and is added to `others`.
        """
        text = read_text(path).strip()
        try:
            document = parse_json(text)
        except ValueError:
            document = parse_json(f"{{{text.rstrip(',')}}}")
        captions = next(iter(document.values()), "") if isinstance(document, dict) else document
        if isinstance(captions, dict) and captions:
            kind = self.prompt_type if self.prompt_type in captions else next(iter(captions))
            if self.prompt_type not in (None, kind):
                others.append(path)
            captions = captions[kind]
        if not isinstance(captions, str):
            raise ValueError("it holds no caption")
        return captions.strip()


def _read_lines(path: Path, videos: Sequence[Path]) -> dict[Path, str]:
    """Captions of a file of JSON lines, by the names of videos, with or without suffix."""
    names = {name: video for video in videos for name in (video.stem, video.name)}
    found: dict[Path, str] = {}
    others, where = 0, str(path)
    try:
        for kind, number, row in read_entries(path):
            where = f"{path}, {kind} {number}" if kind else str(path)
            if isinstance(row, ValueError):
                raise row
            row = row if isinstance(row, dict) else {}
            file, caption = (
                next((row[field] for field in fields if field in row), None)
                for fields in (_FILE_FIELDS, _CAPTION_FIELDS)
            )
            if not isinstance(file, str) or not isinstance(caption, str):
                raise ValueError("it needs a file and a caption, both text")
            video = names.get(Path(file).name)
            if video in found:
                raise ValueError(f"{Path(file).name} has a caption already")
            if video:
                found[video] = caption.strip()
            others += video is None
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: {strerror(error)}") from None
    if others:
        log.warning("%s: %d captions are of videos that are not used", path, others)
    return found
