"""Several processes that run one program: how they join, agree, write once, and end together.

Each process drives its own devices and runs the same program; arrays span the devices of all. What
is written once is written by the first process. Where a decision rests on what only one process
knows (a file, a signal), that one tells the others (`once`, `largest`), since processes that take
different branches wait for each other forever. Alone, a process pays for none of this.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import importlib.util
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flm_jax.errors import DamageError, DiskError, Exit, RunStopped, UserError
from flm_jax.runtime import clusters, exhausted

T = TypeVar("T")

_CHUNK = 1 << 12  # bytes: messages are padded to a multiple, so that few programs carry them
_BETWEEN_PROCESSES = ("Gloo", "NCCL", "oordination service", "Barrier")  # in errors of JAX


@dataclasses.dataclass(frozen=True)
class Group:
    """Which processes run together. Raises UserError if the fields do not fit each other."""

    coordinator: str = ""  # HOST:PORT, where process 0 listens
    process: int | None = None  # this one's index
    processes: int | None = None  # how many there are
    distributed: bool = False  # a TPU pod, Slurm, Open MPI or Kubernetes tells all three
    join_within: int = 300  # seconds within which all processes must connect
    lost_after: int = 60  # seconds without a heartbeat after which a process counts as lost

    def __post_init__(self) -> None:
        given = {
            "coordinator": self.coordinator or None,
            "process": self.process,
            "processes": self.processes,
        }
        missing = [name for name, value in given.items() if value is None]
        present = [name for name, value in given.items() if value is not None]
        if self.distributed and present:
            raise UserError(
                f"distributed finds {', '.join(present)} itself; give one or the other",
                argument="distributed",
            )
        if present and missing:
            raise UserError(
                f"{', '.join(missing)} is missing beside {', '.join(present)}; several processes "
                "need coordinator=HOST:PORT, process=I and processes=N (or distributed alone)",
                argument=missing[0],
            )
        if self.processes is not None and self.processes < 1:
            raise UserError(f"processes={self.processes}: give 1 or more", argument="processes")
        if self.process is not None and not 0 <= self.process < (self.processes or 0):
            raise UserError(
                f"process={self.process} of processes={self.processes}: give 0 to "
                f"{(self.processes or 0) - 1}, each to one process",
                argument="process",
            )
        host, _, port = self.coordinator.rpartition(":")
        if self.coordinator and not (host and port.isdigit() and 0 < int(port) < 1 << 16):
            raise UserError(
                f"coordinator={self.coordinator}: give HOST:PORT, as node0:1234",
                argument="coordinator",
            )
        for name, seconds in (("join_within", self.join_within), ("lost_after", self.lost_after)):
            if seconds < 1:
                raise UserError(f"{name}={seconds}: give seconds, 1 or more", argument=name)

    @property
    def alone(self) -> bool:
        return not (self.coordinator or self.distributed)

    @property
    def name(self) -> str:
        return "this process" if self.distributed else f"process {self.process} of {self.processes}"


@contextlib.contextmanager
def joined(group: Group) -> Iterator[None]:
    """Runs the block as one of the group's processes. Call it before JAX does anything.

    A process that is lost ends all the others, each with one line and `Exit.LOST`: immediately if a
    connection breaks, otherwise `lost_after` seconds after its last heartbeat. An error that all
    processes raise together is raised to the caller.

    Raises:
      UserError: process 0 cannot listen, or does not answer; or no launcher tells the group.
    """
    if group.alone:
        yield
        return
    last_words = _LastWords(f"{group.name}: not all processes came within {group.join_within} s; "
                            "start all of them with the same coordinator")  # fmt: skip
    _find_each_other(group)
    # Signals are the runner's: see `largest`.
    jax.config.update("jax_enable_preemption_service", False)
    _initialize(group)
    lost = (
        f"{group.name}: another process was lost; start all of them again with the same command, "
        "and they resume from the last checkpoint"
    )
    last_words.message = lost
    try:
        yield
    except (UserError, RunStopped) as error:
        # All raise it; if some do not, JAX ends this process when they do not come either.
        last_words.message = str(error)
        last_words.status = error.status
        jax.distributed.shutdown()
        raise
    except BaseException as error:
        # Exiting without shutdown aborts the other processes.
        if any(word in str(error) for word in _BETWEEN_PROCESSES):
            last_words.message = f"{lost} ({str(error).splitlines()[0]})"
        else:
            last_words.status = Exit.INTERRUPTED
            if not isinstance(error, KeyboardInterrupt):
                traceback.print_exc()
                last_words.status = Exit.FAILED
            last_words.message = f"{group.name} ends, and with it the others"
        last_words.say()
    jax.distributed.shutdown()


class _LastWords:
    """Prints one line and sets the exit status when JAX aborts this process.

    JAX aborts a process whose group is broken, from a thread of its own in C++ and after pages of
    C++ log: no Python handler of an exception or a signal would run. This one is called by abort().
    """

    def __init__(self, message: str):
        self.message, self.status = message, int(Exit.LOST)
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
        self._handler = kind(lambda _: self.say())  # kept: C does not own it
        libc = ctypes.CDLL(None)
        libc.signal.argtypes = [ctypes.c_int, kind]
        libc.signal(int(signal.SIGABRT), self._handler)

    def say(self) -> None:
        """Ends the process at once, without waiting for threads or for the other processes."""
        sys.stdout.flush()
        os.write(2, f"{' '.join(self.message.split())}\n".encode())
        os._exit(self.status)


def _initialize(group: Group) -> None:
    """Connects to the other processes. Raises UserError if no launcher tells about them."""
    if group.distributed:
        have = importlib.util.find_spec("kubernetes") is not None
        told = clusters.group(os.environ, have)
    else:
        told = {
            "coordinator_address": group.coordinator,
            "num_processes": group.processes,
            "process_id": group.process,
        }
    try:
        jax.distributed.initialize(
            **told,
            **clusters.devices(os.environ),
            initialization_timeout=group.join_within,
            heartbeat_timeout_seconds=group.lost_after,
            shutdown_timeout_seconds=group.lost_after,
        )
    except (ValueError, RuntimeError) as error:
        # jax's detection raises these two themselves; errors of the connection are subclasses.
        if not group.distributed or type(error) not in (ValueError, RuntimeError):
            raise
        raise UserError(
            f"distributed: no group was found ({' '.join(str(error).split())}); start the "
            "processes with srun or mpirun, on a TPU pod or in a Kubernetes job, or give "
            "coordinator, process and processes",
            argument="distributed",
        ) from error


def _find_each_other(group: Group) -> None:
    """Raises UserError where JAX would abort: the address is taken, or nobody listens there."""
    if group.distributed:
        return
    host, _, port = group.coordinator.rpartition(":")
    if group.process == 0:
        try:
            with socket.create_server(("", int(port)), reuse_port=False):
                return
        except OSError as error:
            raise UserError(
                f"coordinator={group.coordinator}: process 0 cannot listen on port {port} "
                f"({error.strerror}); give another port, to all processes",
                argument="coordinator",
            ) from error
    end = time.monotonic() + group.join_within
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
                return
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"coordinator={group.coordinator}: process 0 did not answer within "
                    f"{group.join_within} s ({error.strerror or error}); start it, or fix the "
                    "address",
                    argument="coordinator",
                ) from error
        time.sleep(0.2)


def index() -> int:
    """Returns this process's index, from 0."""
    return int(jax.process_index())


def first() -> bool:
    """Whether this is the first process, which alone writes shared files."""
    return index() == 0


def once(action: Callable[[], T]) -> T:
    """Runs `action` in the first process alone; all get its result, or its UserError.

    For files: one process writes, or reads and tells the others, and all continue when it is done.

    Args:
      action: returns JSON values, or None.
    """
    if jax.process_count() == 1:
        return action()
    answer: dict[str, Any] = {}
    if first():
        try:
            answer = {"value": action()}
        except DamageError as error:
            answer = {"damage": [str(error), error.path]}
        except UserError as error:
            answer = {"error": str(error)}
        except Exception as error:
            told = exhausted.explained(error, "the run's folder")
            if told is None:
                raise
            answer = {"disk" if isinstance(told, DiskError) else "error": str(told)}
    answer = json.loads(_from_first(json.dumps(answer).encode()))
    if "damage" in answer:
        raise DamageError(*answer["damage"])
    if "disk" in answer:
        raise DiskError(answer["disk"])
    if "error" in answer:
        raise UserError(answer["error"])
    value: T = answer["value"]
    return value


def wait() -> None:
    """Returns once all processes have called it."""
    largest(0).block_until_ready()


def share(items: Sequence[T]) -> Sequence[T]:
    """Returns this process's share of what all processes have the same list of.

    The shares have equal numbers, but for one, and are spread evenly over the list.
    """
    return items[index() :: jax.process_count()]


def check_same(what: str, value: str) -> None:
    """Raises UserError in all processes if they have different values."""
    theirs = once(lambda: value)
    if int(largest(value != theirs)):
        raise UserError(
            f"{what} is not the same in all processes ({value[:16]} here, {theirs[:16]} in process "
            "0); give all of them the same"
        )


def check_devices() -> None:
    """Raises UserError, in all processes, if some see fewer devices than others."""
    if difference := uneven(device_counts()):
        raise UserError(f"{difference}; flm doctor shows the devices of each process")


def device_counts() -> dict[int, int]:
    """Returns the number of devices of each process."""
    return dict(Counter(device.process_index for device in jax.devices()))


def uneven(counts: Mapping[int, int]) -> str:
    """Says which processes have fewer devices than others; "" if all have the same number.

    >>> uneven({0: 8, 1: 8, 2: 7})
    'process 2 sees 7 devices, but process 0 sees 8'
    """
    most = max(counts, key=lambda process: counts[process])
    fewer = [process for process, count in counts.items() if count < counts[most]]
    if not fewer:
        return ""
    who = ", ".join(str(process) for process in fewer[:4]) + (", ..." if len(fewer) > 4 else "")
    verb = "process {} sees" if len(fewer) == 1 else "processes {} see"
    seen = "/".join(str(n) for n in sorted({counts[process] for process in fewer}))
    return f"{verb.format(who)} {seen} devices, but process {most} sees {counts[most]}"


def everyone(value: T) -> list[T]:
    """Returns the values of all processes, in their order. They need equally many devices each.

    Args:
      value: JSON values.
    """
    if jax.process_count() == 1:
        return [value]
    message = json.dumps(value).encode()
    size = int(largest(len(message)))
    padded = np.full(-(-size // _CHUNK) * _CHUNK, ord(" "), np.uint8)
    padded[: len(message)] = np.frombuffer(message, np.uint8)
    gathered: np.ndarray = multihost_utils.process_allgather(padded)
    return [json.loads(row.tobytes()) for row in gathered]


def _from_first(message: bytes) -> bytes:
    """Returns the first process's message in every process."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    padded = np.zeros(-(-size // _CHUNK) * _CHUNK, np.uint8)
    if first():
        padded[:size] = np.frombuffer(message, np.uint8)
    received: np.ndarray = multihost_utils.broadcast_one_to_all(padded)
    return received[:size].tobytes()


def largest(value: int) -> jax.Array:
    """Returns the largest of all processes' values, an int32 scalar.

    The call does not wait: reading the result does.
    """
    if jax.process_count() == 1:
        return jnp.asarray(value, jnp.int32)
    everywhere, maximum = _maximum()
    values = jax.make_array_from_callback(
        (jax.device_count(),),
        NamedSharding(everywhere, PartitionSpec("all")),
        lambda _: np.array([value], np.int32),
    )
    with jax.set_mesh(everywhere):  # a run's mesh may have the devices in another order
        found: jax.Array = maximum(values)
    return found


@functools.cache
def _maximum() -> tuple[Mesh, Callable[[jax.Array], jax.Array]]:
    everywhere = Mesh(np.array(jax.devices()), "all")
    return everywhere, jax.jit(jnp.max, out_shardings=NamedSharding(everywhere, PartitionSpec()))
