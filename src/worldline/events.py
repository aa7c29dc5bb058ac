"""Events of a run, for --log_json: log records of a level of their own, which are not printed."""

import logging
from typing import Any

EVENT = 15  # between DEBUG and INFO

logger = logging.getLogger(__name__)


def report_event(kind: str, message: str, **facts: Any) -> None:
    """Log an event; `facts` are values for JSON."""
    logger.log(EVENT, "%s", message, extra={"event": {"event": kind, **facts}})
