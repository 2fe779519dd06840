"""52B -> 102B -> 1T: the chain of arXiv 2407.02783, 2.3 trillion tokens.

  python -m experiments.describe --config=configs/tele_flm_1t_chain.py --json

The authors used 896 A800 GPUs. It was not trained here. Each stage is described in its own file;
the learning rate stays on the 52B's cosine through both growths.
"""

import ml_collections

from configs import common, tele_flm_1t, tele_flm_52b, tele_flm_102b
from flm_jax.config import ExperimentConfig


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    common.no_variant(variant)
    t = tele_flm_52b
    stages = (tele_flm_52b.stage(), tele_flm_102b.stage(), tele_flm_1t.stage())
    return common.to_config_dict(
        ExperimentConfig(stages, t.DATA, t.OPTIMIZER, t.SCHEDULE, t.EVAL, t.CHECKPOINT)
    )
