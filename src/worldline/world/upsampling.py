"""Which prompt upsampler a world has, and what it makes of a request."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from worldline.errors import CheckpointError
from worldline.guardrails.load import find_repository
from worldline.loading import DiffusionFiles
from worldline.locate import Place
from worldline.parallel.offload import Part
from worldline.report import Recorder
from worldline.text.prompt_tokens import tokenizer_files
from worldline.text.upsampler import (
    ImageUpsampler,
    TextUpsampler,
    Upsampler,
    load_upsampler,
)
from worldline.video.read import Clip
from worldline.world.safety import BUNDLED, DISABLED

logger = logging.getLogger(__name__)

FLAG = "--disable_prompt_upsampler (in Python disable_prompt_upsampler=True)"
UPSAMPLE = "upsample"  # the stage of a recorder, and the kind of a step
_LENGTHENS = ("Cosmos-UpsamplePrompt1-12B-Text2World", "Cosmos-1.0-Prompt-Upsampler-12B-Text2World")
_PIXTRAL = "mistral-community/pixtral-12b"
_DESCRIBES = ("Pixtral-12B", _PIXTRAL)


class Upsampling:
    """The prompt upsampler of a world.

    Attributes:
        upsampler: None where none runs.
        word_limit: prompts of more words stay as they are (Text2World).
        why_off: why none runs; None where one does.
    """

    def __init__(
        self,
        upsampler: Upsampler | None = None,
        part: Part[nn.Module] | None = None,
        word_limit: int = 0,
        why_off: str | None = None,
    ) -> None:
        self.upsampler = upsampler
        self.word_limit = word_limit
        self.why_off = why_off
        self._part = part

    @property
    def offload(self) -> bool:
        return self._part is not None and self._part.offload

    @property
    def offloading(self) -> dict[str, bool]:
        """What a report says of it; nothing where none runs."""
        return {} if self.upsampler is None else {"prompt_upsampler": self.offload}

    @property
    def nbytes(self) -> int:
        """Bytes that it holds on a GPU all the time."""
        if self._part is None or self.offload:
            return 0
        return sum(w.nbytes for w in self._part.module.parameters() if w.is_cuda)

    def applies(self, prompt: str | None, *, embedded: bool) -> bool:
        """Tell whether it will write the prompt of a request; see `applies`."""
        return self.upsampler is not None and applies(
            prompt,
            describes=self.upsampler.describes,
            embedded=embedded,
            word_limit=self.word_limit,
        )

    def write(self, prompt: str | None, clip: Clip | None, seed: int, recorder: Recorder) -> str:
        """Return the prompt of a request that it applies to.

        Args:
            prompt: that is made longer (Text2World).
            clip: whose last frame is described (Video2World).
            seed: of the draws.
            recorder: is told seconds and memory.
        """
        assert self._part is not None
        with recorder.stage(UPSAMPLE), self._part.on_device():
            if isinstance(self.upsampler, ImageUpsampler):
                assert clip is not None
                return self.upsampler.describe(clip.frames[-1], seed)
            assert isinstance(self.upsampler, TextUpsampler)
            assert prompt is not None
            return self.upsampler.lengthen([prompt], seed)[0]


def applies(prompt: str | None, *, describes: bool, embedded: bool, word_limit: int) -> bool:
    """Tell whether the prompt of a request is written by an upsampler.

    A clip is described where there is no prompt for it. One that is given is used; the released
    code ignores it.

    Args:
        prompt: of the request.
        describes: the upsampler is that of Video2World.
        embedded: an embedding is given in place of the prompt.
        word_limit: prompts of more words stay as they are (Text2World).
    """
    if embedded:
        return False
    if describes:
        return prompt is None
    return prompt is not None and len(prompt.split()) <= word_limit


def load_upsampling(
    files: DiffusionFiles,
    place: Place,
    disable: bool | None,
    *,
    folder: str | Path | None,
    word_limit: int,
    recorder: Recorder,
    offload: bool,
) -> Upsampling:
    """Load the prompt upsampler of a world; before its own weights.

    Args:
        files: of the world.
        place: where it lies.
        disable: True does without, False insists, None is as released: bundled worlds have none.
        folder: another one, by a name below a root or a path.
        word_limit: of `Upsampling`.
        recorder: of the device where it runs; is told seconds and memory.
        offload: keep it in host memory while it is not used.

    Raises:
        CheckpointError: it cannot load; the flag that does without and the command that fetches it
            are named.
    """
    if files.bundled if disable is None else disable:
        return Upsampling(why_off=BUNDLED if disable is None else DISABLED)
    describes = files.config.condition_mask
    found = find_upsampler(files, place, folder)
    device = recorder.device
    with _advising(files), recorder.stage("load prompt upsampler"):
        logger.info("reading %s", found)
        upsampler = load_upsampler(
            found,
            describes=describes,
            device="cpu" if offload else device,
            tokenizer_folder=_tokenizer(found, place.roots) if describes else None,
        )
    part = Part(upsampler.network, device, offload=offload)
    return Upsampling(upsampler, part, word_limit)


def find_upsampler(files: DiffusionFiles, place: Place, folder: str | Path | None) -> Path:
    """Return the folder of a world's prompt upsampler; arguments as of `load_upsampling`.

    Raises:
        CheckpointError: there is none.
    """
    with _advising(files):
        if folder is not None:
            return place.chosen(folder, "prompt_upsampler_dir")
        names: Sequence[str] = _DESCRIBES
        if not files.config.condition_mask:
            names = _LENGTHENS[::-1] if files.generation == "1.0" else _LENGTHENS
        found = place.below(names)
        if found is None:
            raise CheckpointError(f"neither {names[0]} nor {names[1]} is in {place.searched}")
        return found


@contextmanager
def _advising(files: DiffusionFiles) -> Iterator[None]:
    """Say in an error how to fetch the upsampler, and how to do without.

    Raises:
        CheckpointError: something inside went wrong.
    """
    try:
        yield
    except (CheckpointError, OSError, ImportError) as error:
        raise CheckpointError(
            f"the prompt upsampler cannot load: {error}; `worldline checkpoints download "
            f"{files.folder.name}` fetches it; {FLAG} takes prompts as they are"
        ) from error


def _tokenizer(folder: Path, roots: Sequence[Path]) -> Path:
    """Return where the tokenizer of Pixtral is: the released conversion has none beside it."""
    return folder if tokenizer_files(folder) else find_repository(_PIXTRAL, roots)
