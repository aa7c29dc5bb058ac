"""Limits and rules of the HTTP interface, one flag each."""

from __future__ import annotations

import hashlib
import hmac

from pydantic import Field

from worldline.request import Options

LOOPBACK = ("localhost", "127.0.0.1", "::1")
MAX_PROMPT = 8000  # characters
MAX_FIELDS, MAX_FILES, MAX_DEPTH = 64, 2, 32
MAX_COMMAS = 100_000  # of a JSON text
MAX_HEADER = 16 << 10  # bytes of all headers of a request
EVENT_COMMENT_S, RETRY_MS = 15.0, 2000
STREAMS = 64


class AppSettings(Options):
    """What a client may send, and who may."""

    max_upload_mb: float = Field(
        200.0, gt=0, le=1e6, description="Largest body of a request, in megabytes."
    )
    max_field_mb: float = Field(
        28.0, gt=0, le=1e6, description="Largest field that is no file, such as a data URL."
    )
    upload_idle_s: float = Field(
        30.0, gt=0, description="Seconds that an upload may rest before it is refused."
    )
    upload_s: float = Field(300.0, gt=0, description="Seconds that an upload may take.")
    sync_timeout_s: float = Field(
        600.0, gt=0, description="Seconds that a blocking request waits for its video."
    )
    max_frames: int | None = Field(
        None, ge=1, description="Most frames of a video.  [default: what the world can make]"
    )
    max_pixels: int | None = Field(
        None, ge=1, description="Most pixels of a frame.  [default: what the world can make]"
    )
    streams: int = Field(STREAMS, ge=1, description="Event streams that are open at once.")
    allow_url_inputs: tuple[str, ...] = Field(
        (),
        description="Fetch https inputs from these hosts, or without a value from any public one.",
        json_schema_extra={"metavar": "[HOST]..."},
    )
    cors_origin: tuple[str, ...] = Field(
        (),
        description="Origins whose pages may use the server, such as https://studio.example.",
        json_schema_extra={"metavar": "ORIGIN..."},
    )
    allowed_host: tuple[str, ...] = Field(
        (),
        description="Names in URLs of the server, beside localhost and the address bound.",
        json_schema_extra={"metavar": "HOST..."},
    )


class Access(Options):
    """Who may use the server, as it was started.

    Attributes:
        host: address that is bound.
        keys: API keys; empty where none is needed.
    """

    host: str = "127.0.0.1"
    keys: tuple[str, ...] = ()

    def owner(self, key: str) -> str | None:
        """Owner of a key's jobs; None where the key is wrong. All keys are compared."""
        typed = key.encode("utf-8", "surrogateescape")
        matches = [hmac.compare_digest(typed, each.encode()) for each in self.keys]
        return owner_of(key) if any(matches) else None


def owner_of(key: str) -> str:
    """16 hex digits of a key's hash."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:16]
