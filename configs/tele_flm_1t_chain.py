r"""52B -> 102B -> 1T: the chain of arXiv 2407.02783, 2.3 trillion tokens.

  python -m experiments.describe --config=configs/tele_flm_1t_chain.py --json

Each stage fits the topology below, which its compiler says (docs/scaling.md):

  52b   v5p:4x4x4  fsdp=16,tensor=4   batch 16   or  h100:8x8    fsdp=8,tensor=8    batch 8
  102b  v5p:4x4x8  fsdp=32,tensor=4   batch 32   or  h100:16x8   fsdp=16,tensor=8   batch 16
  1t    v5p:8x8x8  fsdp=32,tensor=16  batch 32   or  h100:128x8  fsdp=64,tensor=16  batch 64

  python -m experiments.compile_ahead --config=configs/tele_flm_1t_chain.py --stage=2 \
    --topology=v5p:8x8x8 --mesh=fsdp=32,tensor=16 --batch=32 --what=train_masked

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
