"""Batches on a Ray cluster."""

from collections.abc import Iterator
from contextlib import contextmanager

from worldline.errors import Error


@contextmanager
def needing_ray(purpose: str) -> Iterator[None]:
    """Name the extra where an import inside fails for want of Ray.

    Raises:
        Error: Ray is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise Error(f'{purpose}: Ray is not installed; `pip install "worldline[ray]"`') from None
