"""The optimizer's groups against `torch.optim.AdamW`: twenty steps in float64, to 1e-10."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax.config import OptimizerConfig, StageConfig
from flm_jax.params import trees
from flm_jax.train import optim
from tests.models import MUP, SMALL, TABLE, changed, random_params

torch = pytest.importorskip("torch", reason="the oracle: extra [hf]")

STEPS = 20
BETAS, EPS, DECAY, CLIP = (0.8, 0.93), 1e-5, 0.3, 3.0
VECTOR_RATE, MATRIX_RATE = 7e-3, 2e-2
FACTORS = [min(1, (n + 1) / 4) * 0.9**n for n in range(STEPS)]  # of the learning rates
GAINS = ("final_norm", "layers/attention/norm", "layers/mlp/norm")
VECTORS = ("embedding", "head")


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def torch_adamw(
    params, base_width, *, coupled=False, decayed_gains=False, one_rate=False, unscaled_decay=False
):
    """Returns torch's AdamW with µP's three groups; the flags are mistakes.

    Args:
      params: torch's leaves by path.
      base_width: µP's base width; 0: without µP.
    """
    width = SMALL.d_model / base_width if base_width else 1.0
    rates = {"matrix": MATRIX_RATE / width, "vector": VECTOR_RATE, "gain": VECTOR_RATE}
    if one_rate:
        rates["matrix"] = VECTOR_RATE
    decays = {
        "matrix": DECAY * (1.0 if unscaled_decay else width),
        "vector": DECAY,
        "gain": DECAY if decayed_gains else 0.0,
    }
    members = {
        "matrix": [x for path, x in params.items() if path not in (*GAINS, *VECTORS)],
        "vector": [params[path] for path in VECTORS],
        "gain": [params[path] for path in GAINS],
    }
    groups = [
        {"params": members[kind], "lr": rates[kind], "peak": rates[kind], "weight_decay": decay}
        for kind, decay in decays.items()
    ]
    return (torch.optim.Adam if coupled else torch.optim.AdamW)(groups, betas=BETAS, eps=EPS)


def distance_after_training(model, clipped=True, base_width=None, **mistakes):
    """Trains with both optimizers on random gradients; every second step is clipped.

    Args:
      model: config of the model.
      clipped: whether torch's gradients are clipped too.
      base_width: of torch's groups; None: the model's.
      **mistakes: flags of `torch_adamw`.

    Returns:
      The largest difference of a parameter, divided by the parameter's largest entry.
    """
    stage = StageConfig(
        "a", model, STEPS, 1, learning_rate=VECTOR_RATE, matrix_learning_rate=MATRIX_RATE
    )
    adam = OptimizerConfig(b1=BETAS[0], b2=BETAS[1], eps=EPS, weight_decay=DECAY, clip_norm=CLIP)
    factors, params = jnp.asarray(FACTORS), random_params(model, 5)
    tx = optim.optimizer(stage, adam, lambda step: factors[step])
    state, update = tx.init(params), jax.jit(tx.update)
    theirs = {path: torch.tensor(np.array(x)) for path, x in trees.flatten(params)}
    assert theirs.keys() == TABLE.keys() and all(x.dtype == torch.float64 for x in theirs.values())
    optimizer = torch_adamw(
        theirs, model.mup_base_width if base_width is None else base_width, **mistakes
    )
    rng = np.random.default_rng(1)
    for step, factor in enumerate(FACTORS):
        grads = {path: rng.normal(size=tuple(x.shape)) for path, x in theirs.items()}
        size = math.sqrt(sum(np.square(g).sum() for g in grads.values()))
        norm = CLIP * (0.3, 4.0)[step % 2]  # below the limit, and above it
        grads = {path: g * (norm / size) for path, g in grads.items()}
        ours = trees.unflatten({path: jnp.asarray(g) for path, g in grads.items()})
        updates, state = update(ours, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        shrink = min(1.0, CLIP / norm) if clipped else 1.0
        for path, x in theirs.items():
            x.grad = torch.tensor(grads[path] * shrink)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.step()
    return max(
        float(np.abs(np.asarray(x) - theirs[path].numpy()).max() / theirs[path].abs().max())
        for path, x in trees.flatten(params)
    )


@pytest.mark.parametrize("kind", MUP)
def test_twenty_steps_equal_torchs_adamw_in_groups(kind):
    assert distance_after_training(changed(SMALL, **MUP[kind])) < 1e-10


@pytest.mark.parametrize(
    "mistake",
    [
        {"coupled": True},
        {"decayed_gains": True},
        {"one_rate": True},
        {"unscaled_decay": True},
        {"clipped": False},
        {"base_width": 7},
    ],
    ids=lambda mistake: next(iter(mistake)),
)
def test_a_wrong_group_differs_from_torch(mistake):
    """Negative controls: the comparison notices each mistake of the oracle."""
    assert distance_after_training(SMALL, **mistake) > 1e-4
