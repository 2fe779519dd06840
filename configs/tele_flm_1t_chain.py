r"""52B -> 102B -> 1T: the chain of arXiv 2407.02783, 2.3 trillion tokens.

  flm describe --config=configs/tele_flm_1t_chain.py --json

Each stage has layouts that fit in memory, as reported by the accelerators' compilers
(docs/scaling.md). This compiles every program of the whole chain for 512 TPUs, or for 1,024 GPUs,
with the extras `[tpu]` and `[gpu-aot]`:

  flm preflight --config=configs/tele_flm_1t_chain.py --topology=v5p:8x8x8
  flm preflight --config=configs/tele_flm_1t_chain.py --topology=h100:128x8

The authors used 896 A800 GPUs. It was not trained here. Each stage has its own config file. The
learning rate follows the 52B's cosine schedule through both growths.
"""

import ml_collections

from flm_jax.commands import config_files
from flm_jax.config import ExperimentConfig

tele_flm_1t = config_files.shipped("tele_flm_1t")
tele_flm_52b = config_files.shipped("tele_flm_52b")
tele_flm_102b = config_files.shipped("tele_flm_102b")


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config_files.no_variant(variant)
    t = tele_flm_52b
    stages = (tele_flm_52b.stage(), tele_flm_102b.stage(), tele_flm_1t.stage())
    return config_files.to_config_dict(
        ExperimentConfig(stages, t.DATA, t.OPTIMIZER, t.SCHEDULE, t.EVAL, t.CHECKPOINT)
    )
