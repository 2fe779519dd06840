"""What a chain's numbers say before it trains: too little memory, and a schedule that misses steps.

A chain that cannot fit is refused; numbers that are allowed, but rarely meant, give a remark.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.filesize import decimal

from flm_jax.config import ExperimentConfig
from flm_jax.errors import UserError
from flm_jax.params import counts
from flm_jax.runtime import host

_BATCH_ARRAYS = 5  # arrays [batch, length] of 4 bytes in a batch: tokens, targets, weights, ..


def check_memory(config: ExperimentConfig, devices: Sequence[Any]) -> None:
    """Checks that each stage's largest arrays fit the memory of all devices together.

    Raises:
      UserError: a stage does not fit, by a lower bound; names the stage, its tokens and both sizes.
    """
    memory = _memory(devices)
    for index, stage in enumerate(config.stages):
        rows = {"eval.batch_size": config.eval.batch_size}
        if index:
            rows["growth.calibration_sequences"] = stage.growth.calibration_sequences
        needed = {"batch_size": (stage.batch_size, least_bytes(config, index))}
        needed |= {name: (n, measured_bytes(config, index, n)) for name, n in rows.items()}
        length = config.data_of(index).sequence_length
        for name, (sequences, size) in needed.items():
            if memory and size > memory:
                raise UserError(
                    f"stage {stage.name}: {name} {sequences} with sequence_length {length} and "
                    f"{counts.params(stage.model):,} parameters takes at least {decimal(size)}, "
                    f"and there are {decimal(memory)} of memory; lower sequence_length or {name}, "
                    "raise accumulate, or take a smaller model"
                )


def least_bytes(config: ExperimentConfig, index: int) -> int:
    """A lower bound of the bytes that one step of a stage needs, on all devices together.

    It counts parameters, Adam's moments, a batch, the input of each layer, which the backward pass
    needs under every remat policy, and the logits, if they exist at once.
    """
    stage, length = config.stages[index], config.data_of(index).sequence_length
    model, tokens = stage.model, stage.batch_size // stage.accumulate * length
    moments = 2 * (2 if config.optimizer.moment_dtype else 4)
    state = (counts.MASTER_BYTES + moments) * counts.params(model)
    layers = tokens * model.num_layers * model.d_model * jnp.dtype(model.dtype).itemsize
    logits = 0 if model.loss_chunks else 4 * tokens * model.vocab_size
    return state + layers + logits + 4 * _BATCH_ARRAYS * stage.batch_size * length


def measured_bytes(config: ExperimentConfig, index: int, sequences: int) -> int:
    """A lower bound of the bytes that measuring a stage on so many sequences at once needs."""
    stage, length = config.stages[index], config.data_of(index).sequence_length
    logits = 0 if stage.model.loss_chunks else 4 * stage.model.vocab_size
    return sequences * length * (logits + 4 * _BATCH_ARRAYS)


def _memory(devices: Sequence[Any]) -> int:
    """Bytes of memory of all devices together; 0: not known."""
    if devices[0].platform == "cpu":  # they share the memory of their process's host
        return host.memory_bytes() * int(jax.process_count())
    # Only a process's own devices tell their memory.
    stats: dict[str, int] = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", 0) * len(devices)


def remarks(config: ExperimentConfig) -> list[str]:
    """What a chain's schedule will do that its author may not expect; [] if nothing.

    Each is one line with both numbers.
    """
    schedule, steps, found = config.schedule, config.total_steps, []
    total = schedule.total_steps or steps
    if schedule.kind != "constant" and 0 < schedule.total_steps < steps:
        found.append(
            f"schedule.total_steps is {total} and the stages have {steps} steps: from step {total} "
            f"on the learning rate stays at {schedule.final_ratio:g} of its peak; give 0 (the sum)"
        )
    if schedule.warmup_steps > min(total, steps) > 0:
        found.append(
            f"schedule.warmup_steps is {schedule.warmup_steps} and the stages have {steps} steps: "
            f"the learning rate only reaches {steps / schedule.warmup_steps:.2g} of its peak; "
            "make it shorter"
        )
    if schedule.decay_steps and schedule.kind != "wsd":
        found.append(
            f"schedule.decay_steps is {schedule.decay_steps} without effect: kind is "
            f"{schedule.kind!r}, and only 'wsd' has it"
        )
    for stage in config.stages[1:]:
        if stage.growth.rewarmup_steps > stage.steps > 0:
            found.append(
                f"stage {stage.name}: growth.rewarmup_steps is {stage.growth.rewarmup_steps} and "
                f"steps is {stage.steps}: the learning rate does not reach its peak again"
            )
    return found
