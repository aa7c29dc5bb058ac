"""Client of a server of worlds: `worldline.connect`; the standard library's HTTP, no torch."""

from worldline.client.world import RemoteWorld, connect

__all__ = ["RemoteWorld", "connect"]
