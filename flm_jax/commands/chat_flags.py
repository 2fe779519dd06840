"""The flags that say how files of conversations are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from flm_jax import mapping
from flm_jax.commands.command import flag
from flm_jax.errors import UserError
from flm_jax.sft import chats
from flm_jax.sft.chats import BadRows, Sample
from flm_jax.sft.config import FieldsConfig


@dataclasses.dataclass(frozen=True)
class ChatFlags:
    """How files of conversations are read."""

    field: tuple[str, ...] = flag(
        (), "Name of a field in these files, as content:text; see FieldsConfig; repeatable."
    )
    bad_rows: int = flag(0, "Most bad rows that are left out and counted.", lower=0)

    def read(self, paths: Sequence[str], bad: BadRows) -> list[Sample]:
        """Reads conversations.

        Args:
          paths: files or folders; see `chats.read`.
          bad: counts the malformed rows.
        """
        return chats.read(paths, self._fields(), bad)

    def _fields(self) -> FieldsConfig:
        values: dict[str, Any] = {"roles": [text for text in self.field if "=" in text]}
        for text in self.field:
            name, colon, own = text.partition(":")
            if "=" not in text:
                if not (colon and own):
                    raise UserError(
                        f"--field={text}: write FIELD:NAME, as content:text, or a role as "
                        "agent=assistant"
                    )
                values[name] = own
        return mapping.from_mapping(FieldsConfig, values, "--field")
