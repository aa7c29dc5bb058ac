"""Numbers of a request: NumPy's are accepted too, and become Python's, which a report can hold."""

from __future__ import annotations

from numbers import Integral, Real

from worldline.errors import InputError


def whole_number(name: str, value: object) -> int:
    """Return `value` as an int.

    Raises:
        InputError: it is none; `name` starts the message.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError(f"{name} is {value!r}; it must be a whole number")
    return int(value)


def real_number(name: str, value: object) -> float:
    """Return `value` as a float.

    Raises:
        InputError: it is none; `name` starts the message.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"{name} is {value!r}; it must be a number")
    return float(value)
