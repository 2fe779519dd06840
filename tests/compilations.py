"""Counts what XLA compiles."""

import collections
import contextlib
import re

from jax import monitoring


@contextlib.contextmanager
def counted():
    """Yields a Counter: name of a jitted function -> programs compiled for it in this context."""
    programs = collections.Counter()

    def listen(event, seconds, **details):
        del seconds
        if event == "/jax/core/compile/backend_compile_duration":
            programs[re.sub(r"^jit\((.*)\)$", r"\1", details["fun_name"])] += 1

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield programs
    finally:
        monitoring.unregister_event_duration_listener(listen)
