"""Counts what XLA compiles."""

import collections
import contextlib
import re

from jax import monitoring


@contextlib.contextmanager
def counted():
    """Yields a Counter: name of a jitted function -> programs that were compiled for it inside."""
    found = collections.Counter()

    def listen(event, seconds, **about):
        del seconds
        if event == "/jax/core/compile/backend_compile_duration":
            found[re.sub(r"^jit\((.*)\)$", r"\1", about["fun_name"])] += 1

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        monitoring.unregister_event_duration_listener(listen)
