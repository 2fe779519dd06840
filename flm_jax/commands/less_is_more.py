"""Studies size, selection and mix of conversations for fine-tuning.

  flm less_is_more --config=configs/less_is_more.py --workdir=runs/less_is_more

Stopped anywhere and called again, it resumes. Afterwards see DIR/report/less_is_more.md; every
arm's own run is in DIR/arms.
"""

from __future__ import annotations

from typing import Any

from flm_jax.commands import config_files
from flm_jax.commands.answer_flags import AnswerFlags
from flm_jax.commands.command import Call, Command
from flm_jax.studies import claims, less_is_more
from flm_jax.studies.less_is_more import LessIsMoreConfig


def main(call: Call[AnswerFlags]) -> dict[str, Any]:
    settings = config_files.dataclass_of(LessIsMoreConfig, call.config)
    rows = less_is_more.run(settings, call.workdir, call.flags.unsafe)
    verdicts = claims.write(settings, rows, call.workdir)
    console = call.console()
    console.print(*map(str, verdicts), f"report: {call.workdir}/report/less_is_more.md", sep="\n")
    return {"arms": rows, "verdicts": claims.verdict_rows(verdicts)}


COMMAND = Command(main, AnswerFlags, workdir="required")
