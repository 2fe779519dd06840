"""Runs a chain of growths beside an independent model (`chain_oracle.py`) and compares every step.

A chain trains a tiny decoder, grows it, and trains after each growth. It is data: it can be printed
as JSON, run again and made smaller (`random_chains.py`).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flm_jax import growth, mapping
from flm_jax.checks import require
from flm_jax.config import (
    GrowthConfig,
    MeshConfig,
    OptimizerConfig,
    RulesConfig,
    StageConfig,
    TransformerConfig,
)
from flm_jax.errors import UserError
from flm_jax.growth import Plan
from flm_jax.growth.operators import choose
from flm_jax.mapping import Checked
from flm_jax.params import axes, mup, sharding, trees
from flm_jax.studies import chain_oracle as oracle
from flm_jax.studies import decoder_oracle as decoder
from flm_jax.studies.chain_oracle import Mismatch, require_close
from flm_jax.train import optim, schedules, train_step
from flm_jax.train.train_step import TrainState

ROWS, LENGTH = 2, 7
LOCK_STEPS = 6  # after so many steps, copies that can separate have done so
MESH_BITS = 1e-12  # what noise and means may differ by on a mesh; all else has the same bits
# Both are float32 numbers, and so are most of their quotients by a width.
LEARNING_RATE, MATRIX_LEARNING_RATE = 2.0**-6, 945 / 2**16
TRAJECTORY = 1e-8  # learning rates are rounded to float32
UNCLIPPED = 1e9  # a norm that no gradient reaches
DEVICES = 8


@dataclasses.dataclass(frozen=True)
class ChainGrowth(Checked):
    """One growth of a chain, and the steps after it.

    Attributes:
      operators: by axis that grows.
      sizes: their targets, by axis.
      moments, rates, noise_db: see `growth.Plan`.
      ramp_steps: steps in which masks rise, and multipliers fade with rates "ramp".
      added_rate: learning rate of added slots over that of old ones, reached after two steps.
      input_mult, output_mult: of the target; 0: as before.
      steps: training steps after the growth.
      meshes: shape of the mesh before and after, six numbers; empty: one device alone.
      split_queries: whether meshes split the queries of a key/value head, not the heads.
    """

    operators: Mapping[str, str]
    sizes: Mapping[str, int]
    moments: str = "asym"
    rates: str = "target"
    noise_db: float = 0.0
    ramp_steps: int = 2
    added_rate: float = 1.0
    input_mult: float = 0.0
    output_mult: float = 0.0
    steps: int = 0
    meshes: tuple[int, ...] = ()
    split_queries: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        halves = (self.meshes[:3], self.meshes[3:])
        require(
            not self.meshes or [math.prod(half) for half in halves] == [DEVICES] * 2,
            f"ChainGrowth.meshes is {self.meshes}; give two shapes (data, fsdp, tensor) of "
            f"{DEVICES} devices, or none",
        )

    @property
    def recipe(self) -> str:
        """The recipe for `growth.plan`."""
        return ",".join(f"{axis}={name}" for axis, name in self.operators.items()) or "none"

    def target(self, small: TransformerConfig) -> TransformerConfig:
        """The config to grow to."""
        size = axes.axis_sizes(small) | dict(self.sizes)
        return dataclasses.replace(
            small,
            vocab_size=size["vocab"],
            num_layers=size["layers"],
            d_model=size["embed"],
            d_ff=size["mlp"],
            num_kv_heads=size["kv_heads"],
            num_heads=size["kv_heads"] * size["q_per_kv"],
            input_mult=self.input_mult or small.input_mult,
            output_mult=self.output_mult or small.output_mult,
        )


@dataclasses.dataclass(frozen=True)
class Chain(Checked):
    """A chain of growths.

    Attributes:
      seed: of parameters, moments, batches and the growths' keys.
      model: the first model.
      updates: updates that the first optimizer state claims to have seen, with random moments and
        ages; 0: it never stepped.
      steps: training steps before the first growth.
      optimizer: Adam's settings.
      model_checks: whether the project's decoder and gradients are compared too.
      growths: the growths.
    """

    seed: int
    model: TransformerConfig
    updates: int
    steps: int
    optimizer: OptimizerConfig
    model_checks: bool
    growths: tuple[ChainGrowth, ...]

    def to_json(self) -> str:
        """The chain as one line of JSON."""
        return json.dumps(mapping.to_dict(self))

    @classmethod
    def from_json(cls, text: str) -> Chain:
        """Reads a chain from `to_json`'s text.

        Raises:
          UserError: it is not a chain.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise UserError(f"chain: not JSON ({error}); give the text that fuzz printed") from None
        require(isinstance(values, dict), f"chain is {text}; give the object that fuzz printed")
        return mapping.from_mapping(cls, values, "chain")


@dataclasses.dataclass
class Counts:
    """What was run and compared.

    Attributes:
      growths: growths run.
      exact: growths whose plans claim to be exact.
      mesh: growths that also ran on meshes.
      operators: growths by operator.
      checks: arrays compared, by kind of check.
    """

    growths: int = 0
    exact: int = 0
    mesh: int = 0
    operators: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    checks: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


# Random growths often deserve them. Whether a lock is real is checked.
_EXPECTED = (
    growth.LockedCopiesWarning,
    growth.UnfinishedRampWarning,
    growth.UselessNoiseWarning,
)


@contextlib.contextmanager
def _no_failure(what: str) -> Iterator[None]:
    """Turns the project's exceptions into mismatches."""
    try:
        yield
    except Mismatch:
        raise
    except UserError as error:
        raise Mismatch("refused", f"{what}: {error}") from error
    except Exception as error:
        raise Mismatch("crash", f"{what}: {type(error).__name__}: {error}") from error


_grow = jax.jit(growth.grow, static_argnums=1)
_gradients = jax.jit(train_step.gradients, static_argnums=2)
_logits_of = jax.jit(train_step.logits_of, static_argnums=0)

Tamper = Callable[[Plan, TrainState, TrainState], TrainState]


def check(chain: Chain, counts: Counts | None = None, tamper: Tamper | None = None) -> None:
    """Runs a chain and compares everything with the independent model.

    Args:
      chain: the chain.
      counts: counts what was compared; None: not counted.
      tamper: changes grown states, from (plan, state before, grown state), for negative controls.

    Raises:
      Mismatch: the first disagreement. Also if the project raises an error.
    """
    with jax.enable_x64(True), warnings.catch_warnings():
        for category in _EXPECTED:
            warnings.simplefilter("ignore", category)
        _Run(chain, counts or Counts(), tamper).run()


def _flat(tree: Any) -> decoder.Tree:
    return {path: np.asarray(leaf) for path, leaf in trees.flatten(tree)}


def adam_of(state: TrainState) -> optim.SlotAdamState:
    """Adam's part of a train state."""
    return next(s for s in state.opt_state if isinstance(s, optim.SlotAdamState))


def with_adam(state: TrainState, adam: optim.SlotAdamState) -> TrainState:
    """The train state with another Adam state."""
    opt_state = tuple(adam if isinstance(s, optim.SlotAdamState) else s for s in state.opt_state)
    return dataclasses.replace(state, opt_state=opt_state)


class _Run:
    """The project's train state and the independent one, side by side."""

    def __init__(self, chain: Chain, counts: Counts, tamper: Tamper | None):
        self.chain, self.counts, self.tamper = chain, counts, tamper
        self.model = chain.model
        self.after: ChainGrowth | None = None  # the last growth
        self.maps: oracle.Growth | None = None
        self._start()

    def _rng(self, *label: int) -> np.random.Generator:
        return np.random.default_rng([self.chain.seed, *label])

    @property
    def config(self) -> decoder.Config:
        """The model's config as the independent model reads it."""
        return mapping.to_dict(self.model)

    @property
    def settings(self) -> oracle.Settings:
        """The optimizer's settings, for the independent model."""
        o, g = self.chain.optimizer, self._growth_config()
        return oracle.Settings(
            o.b1, o.b2, o.eps, o.weight_decay, o.clip_norm, LEARNING_RATE, MATRIX_LEARNING_RATE,
            g.added_rate, g.added_rate_steps,
        )  # fmt: skip

    def _growth_config(self) -> GrowthConfig:
        g = self.after
        if g is None:
            return GrowthConfig()
        return GrowthConfig(
            recipe=g.recipe, moments=g.moments, rates=g.rates, noise_db=g.noise_db,
            added_rate=g.added_rate, added_rate_steps=2, ramp_steps=g.ramp_steps,
        )  # fmt: skip

    def _optimizer(self, grown_at: int | None) -> optax.GradientTransformation:
        stage = StageConfig(
            "a", self.model, 1, ROWS, LEARNING_RATE, MATRIX_LEARNING_RATE,
            growth=self._growth_config(),
        )  # fmt: skip
        return optim.optimizer(stage, self.chain.optimizer, schedules.steady, grown_at)

    def _start(self) -> None:
        """Random parameters and gains; random moments and ages unless the optimizer is new."""
        rng, config, done = self._rng(0), self.config, self.chain.updates
        value, mu, nu, born = {}, {}, {}, {}
        spec = mup.spec(self.model)
        born_on = {kind: rng.integers(0, max(done, 1), spec.count(kind)) for kind in spec.slots}
        for path in decoder.PARAMS:
            shape, std = decoder.shape_of(path, config), decoder.std(path, config)
            value[path] = rng.normal(0, std, shape) if std else rng.uniform(0.5, 1.5, shape)
            mu[path] = rng.normal(0, 0.1 * bool(done), shape)
            nu[path] = rng.uniform(0, 0.02 * bool(done), shape) + mu[path] ** 2
            born[path] = _youngest(born_on, path, self.model)
        ones = {path: np.ones_like(x) for path, x in value.items()}
        self.state = oracle.State(done, value, mu, nu, born, ones, ones)
        self.tx = self._optimizer(None)
        params = trees.unflatten(value)
        opt_state = jax.jit(self.tx.init)(params)
        state = TrainState(jnp.int32(done), params, opt_state)
        adam = adam_of(state)
        steps = jnp.asarray(done, adam.steps.dtype)
        ages = {kind: jnp.asarray(slots, jnp.int32) for kind, slots in born_on.items()}
        self.project = with_adam(
            state,
            adam._replace(steps=steps, mu=trees.unflatten(mu), nu=trees.unflatten(nu), born=ages),
        )
        self.update = self._jitted()

    def _jitted(self) -> Callable[[Any, TrainState], TrainState]:
        tx = self.tx

        @jax.jit
        def update(grads: Any, state: TrainState) -> TrainState:
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            return TrainState(state.step + 1, params, opt_state)

        return update

    def run(self) -> None:
        """Runs the chain."""
        self._train(0, self.chain.steps)
        for number, g in enumerate(self.chain.growths, 1):
            followed = self._grow(number, g)
            self._train(number, g.steps)
            if followed is not None:
                self._compare("trajectory", self.project.params, followed, TRAJECTORY)

    # Training.

    def _batch(self, *label: int) -> decoder.Batch:
        """Random tokens; each row holds two documents and a padded end."""
        rng, first = self._rng(1, *label), LENGTH // 2
        tokens = rng.integers(0, self.model.vocab_size, (ROWS, LENGTH + 1))
        segments = np.array([1] * first + [2] * (LENGTH - first - 1) + [0])
        positions = np.concatenate([np.arange(first), np.arange(LENGTH - first - 1), [0]])
        weights = (segments > 0) * rng.integers(1, 3, (ROWS, LENGTH))
        return {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segment_ids": np.tile(segments, (ROWS, 1)),
            "positions": np.tile(positions, (ROWS, 1)),
            "weights": weights.astype(float),
        }

    def _masks(self, steps_done: int) -> dict[str, np.ndarray] | None:
        """Masks rise over the ramp."""
        if self.maps is None or self.after is None or not self.maps.masked:
            return None
        value = steps_done / self.after.ramp_steps
        return self.maps.masks(value) if value < 1 else None

    def _train(self, stage: int, steps: int) -> None:
        for n in range(steps):
            batch, masks = self._batch(stage, n), self._masks(n)
            _, grads = decoder.gradient(self.config, self.state.value, batch, masks)
            given = grads
            if self.chain.model_checks:
                given = self._project_gradient(batch, masks)
                for path, g in grads.items():
                    require_close("model", f"gradient of {path}", given[path], g)
                    self.counts.checks["model"] += 1
            self.state = oracle.adamw(self.state, given, self.config, self.settings)
            with _no_failure("optimizer"):
                self.project = self.update(trees.unflatten(given), self.project)
            self._compare("step", self.project.params, self.state.value)

    def _project_gradient(
        self, batch: decoder.Batch, masks: dict[str, np.ndarray] | None
    ) -> decoder.Tree:
        """The gradient as the project computes it."""
        with _no_failure("gradients"):
            _, grads, _ = _gradients(
                self.project.params, _device_batch(batch), self.model, _device_masks(masks)
            )
        return _flat(grads)

    def _compare(
        self, kind: str, got: Any, want: decoder.Tree, tolerance: float = oracle.TOLERANCE
    ) -> None:
        for path, leaf in _flat(got).items():
            require_close(kind, path, leaf, want[path], tolerance)
            self.counts.checks[kind] += 1

    # Growing.

    def _grow(self, number: int, g: ChainGrowth) -> decoder.Tree | None:
        """Grows both; returns the parameters after the next steps if the small model gives them."""
        distances = self._rng(2, number).random(self.model.num_layers).round(3).tolist()
        with _no_failure("plan"):
            plan = growth.plan(
                self.model, g.target(self.model), g.recipe, moments=g.moments, rates=g.rates,
                noise_db=g.noise_db, layer_distances=distances,
            )  # fmt: skip
            text = plan.to_json()
            if Plan.from_json(text) != plan:
                raise Mismatch("json", "the plan differs after JSON")
        maps = oracle.Growth(json.loads(text))
        key = jax.random.key(1000 * self.chain.seed + number)
        with _no_failure("grow"):
            grown = _grow(self.project, plan, key)
        if self.tamper:
            grown = self.tamper(plan, self.project, grown)
        self._count(g, maps)
        wanted = maps.grow(self.state, _flat(grown.params), g.ramp_steps)
        adam = adam_of(grown)
        self._compare("parameters", grown.params, wanted.value)
        self._compare("moments", adam.mu, wanted.mu)
        self._compare("moments", adam.nu, wanted.nu)
        for path, born in wanted.born.items():
            require_close("ages", path, _youngest(adam.born, path, plan.config), born)
            self.counts.checks["ages"] += 1
        if maps.exact:
            self._check_function(number, maps, wanted)
        if g.meshes and jax.device_count() == DEVICES:
            self._check_mesh(g, plan, key, grown)
        before, source, small = self.project, self.state, self.config
        boosted = self.settings.added_rate != 1 or g.added_rate != 1
        self.model, self.after, self.maps = plan.config, g, maps
        self.state, self.project = wanted, grown
        self.tx = self._optimizer(wanted.steps)
        self.update = self._jitted()
        if self.chain.model_checks:
            self._check_model(number)
        if not boosted:
            claimed = {a: at for a, at in plan.locks(before).items() if maps.has_entries(a)}
            check_locks(self._truly_locked(number), claimed)
            self.counts.checks["locks"] += 1
        fading = source.fade_steps and source.kept(source.steps) > 0
        clipped = self.chain.optimizer.clip_norm < UNCLIPPED
        if not maps.follows or not g.steps or boosted or fading or clipped:
            return None
        return self._followed(number, source, small)

    def _count(self, g: ChainGrowth, maps: oracle.Growth) -> None:
        self.counts.growths += 1
        self.counts.exact += maps.exact
        self.counts.operators.update({o.name for o in choose(g.recipe).values()})

    def _check_function(self, number: int, maps: oracle.Growth, grown: oracle.State) -> None:
        """Logits, and gradients unless there is noise, with masks at 0."""
        batch, masks = self._batch(3, number), maps.masks(0.0)
        before = decoder.forward(self.config, self.state.value, batch).logits
        after = decoder.forward(maps.big, grown.value, batch, masks).logits
        require_close("function", "logits", after[..., : before.shape[-1]], before)
        self.counts.checks["function"] += 1
        if not maps.plan["noise_db"]:
            _, old = decoder.gradient(self.config, self.state.value, batch)
            _, new = decoder.gradient(maps.big, grown.value, batch, masks)
            self.counts.checks["gradients"] += maps.check_gradient(old, new)

    def _check_model(self, number: int) -> None:
        """The project's decoder, with masks at a random value."""
        assert self.maps is not None
        batch, masks = self._batch(4, number), self.maps.masks(self._rng(5, number).uniform(0, 1))
        with _no_failure("model"):
            logits = _logits_of(
                self.model, self.project.params, _device_batch(batch), _device_masks(masks)
            )
        # Masks are float32 numbers.
        masks = {axis: np.float32(mask).astype(float) for axis, mask in masks.items()}
        want = decoder.forward(self.config, self.state.value, batch, masks).logits
        require_close("model", "logits", np.asarray(logits), want)
        self.counts.checks["model"] += 1

    def _truly_locked(self, number: int) -> dict[str, tuple[int, ...]]:
        """Copies that have not separated after some steps of the independent model."""
        assert self.maps is not None
        state, masks = self.state, self._masks
        for n in range(LOCK_STEPS):
            batch = self._batch(6, number, n)
            _, grads = decoder.gradient(self.config, state.value, batch, masks(n))
            state = oracle.adamw(state, grads, self.config, self.settings)
        return self.maps.locked(state.value)

    def _followed(self, number: int, source: oracle.State, small: decoder.Config) -> decoder.Tree:
        """Trains the small model on the batches of the grown one, and maps the result."""
        assert self.maps is not None and self.after is not None
        state = dataclasses.replace(source, grown_at=None)
        for n in range(self.after.steps):
            _, grads = decoder.gradient(small, state.value, self._batch(number, n))
            state = oracle.adamw(state, grads, small, self.settings)
        return {path: self.maps.follow(path, x) for path, x in state.value.items()}

    def _check_mesh(self, g: ChainGrowth, plan: Plan, key: jax.Array, grown: TrainState) -> None:
        """The growth on meshes must give the bits of one device."""
        rules = RulesConfig(kv_heads="", q_per_kv="tensor") if g.split_queries else RulesConfig()
        source, target = (
            sharding.make_layout(MeshConfig(data, fsdp, tensor, rules))
            for data, fsdp, tensor in (g.meshes[:3], g.meshes[3:])
        )
        self.counts.mesh += 1
        with _no_failure("grow_on_mesh"):
            placed = sharding.shardings(self.project, plan.table, *source)
            state = jax.device_put(jax.tree.map(np.asarray, self.project), placed)
            on_mesh = growth.grow_on_mesh(state, plan, key, source, target)
        pairs = zip(
            jax.tree_util.tree_leaves_with_path(on_mesh), jax.tree.leaves(grown), strict=True
        )
        for (keys, got), want in pairs:
            name, got, want = jax.tree_util.keystr(keys), np.asarray(got), np.asarray(want)
            self.counts.checks["mesh"] += 1
            if name.startswith(".params") and _summed(g, "/".join(k.key for k in keys[1:])):
                require_close("mesh", name, got, want, MESH_BITS)
            elif not np.array_equal(got, want):
                raise Mismatch(
                    "mesh", f"{name} differs from one device's in {np.sum(got != want)} entries"
                )


def _summed(g: ChainGrowth, path: str) -> bool:
    """Whether the parameter's entries depend on sums, whose order may differ on a mesh."""
    on = decoder.PARAMS[path]
    return ("vocab" in g.operators and "vocab" in dict(on)) or (
        g.noise_db > 0 and any(role == "in" for _, role in on)
    )


def _youngest(born: Mapping[str, Any], path: str, model: TransformerConfig) -> np.ndarray:
    """The birth step of every entry of a parameter: the latest of its slots."""
    shape, ages = decoder.shape_of(path, mapping.to_dict(model)), np.zeros((), int)
    for kind, dims in axes.table(model)[path].slots.items():
        here = [size if dim in dims else 1 for dim, size in enumerate(shape)]
        ages = np.maximum(ages, np.asarray(born[kind]).reshape(here))
    return np.broadcast_to(ages, shape)


def check_locks(true: Mapping[str, tuple[int, ...]], claimed: Mapping[str, Any]) -> None:
    """Compares the copies that a plan calls locked with those that did not separate.

    Args:
      true: positions of copies that are still as their source after some steps, by axis.
      claimed: what `Plan.locks` answers.

    Raises:
      Mismatch: a lock is not reported, or a reported copy separated.
    """
    named = {axis: tuple(int(p) for p in at) for axis, at in claimed.items() if len(at)}
    if named != dict(true):
        raise Mismatch("locks", f"reported {named}, true {dict(true)}")


def _device_batch(batch: decoder.Batch) -> dict[str, jax.Array]:
    return {
        name: jnp.asarray(x, jnp.float32 if name == "weights" else jnp.int32)
        for name, x in batch.items()
    }


def _device_masks(masks: dict[str, np.ndarray] | None) -> dict[str, jax.Array] | None:
    if not masks:
        return None
    return {axis: jnp.asarray(mask, jnp.float32) for axis, mask in masks.items()}
