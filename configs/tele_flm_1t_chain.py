r"""52B -> 102B -> 1T: the chain of arXiv 2407.02783, 2.3 trillion tokens.

  flm describe --config=configs/tele_flm_1t_chain.py --json

LAYOUTS has, for each stage, topologies, meshes and batch sizes that fit in memory, as reported by
the accelerators' compilers (docs/scaling.md). To compile them takes ten minutes on two CPU cores,
with the extras `[tpu]` and `[gpu-aot]`:

  flm compile --config=configs/tele_flm_1t_chain.py

The authors used 896 A800 GPUs. It was not trained here. Each stage has its own config file. The
learning rate follows the 52B's cosine schedule through both growths.
"""

import ml_collections

from flm_jax.commands import config_files
from flm_jax.config import ExperimentConfig, LayoutConfig

tele_flm_1t = config_files.shipped("tele_flm_1t")
tele_flm_52b = config_files.shipped("tele_flm_52b")
tele_flm_102b = config_files.shipped("tele_flm_102b")

LAYOUTS = (
    LayoutConfig("52b", "v5p:4x4x4", batch_size=16, fsdp=16, tensor=4),
    LayoutConfig("52b", "h100:8x8", batch_size=8, fsdp=8, tensor=8),
    LayoutConfig("102b", "v5p:4x4x8", batch_size=32, fsdp=32, tensor=4),
    LayoutConfig("102b", "h100:16x8", batch_size=16, fsdp=16, tensor=8),
    LayoutConfig("1t", "v5p:8x8x8", batch_size=32, fsdp=32, tensor=16),
    LayoutConfig("1t", "h100:128x8", batch_size=64, fsdp=64, tensor=16),
)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config_files.no_variant(variant)
    t = tele_flm_52b
    stages = (tele_flm_52b.stage(), tele_flm_102b.stage(), tele_flm_1t.stage())
    return config_files.to_config_dict(
        ExperimentConfig(
            stages, t.DATA, t.OPTIMIZER, t.SCHEDULE, t.EVAL, t.CHECKPOINT, layouts=LAYOUTS
        )
    )
