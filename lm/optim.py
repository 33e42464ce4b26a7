"""Optimizers: which leaves learn, at what rate, and by which rule.

`make` gives an optax transformation over the trainable half of a parameter tree (None in the holes). AdamW is written
out here rather than chained, so that a step holds no tree but the gradient, the moments and the parameters, and goes
through memory once for each it writes: `optax.chain(clip_by_global_norm, adamw)` stores a scaled copy of the gradient,
and a caller who wants to drop a non-finite step stores copies of everything. Values equal optax's (tests).
L is the leading axis of stacked layers.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
import re
from typing import Any, Literal
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm import ema, muon, params, spikes
from lm.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Config:
  """One optimizer and its learning rate over the run. Patterns are regular expressions searched for in the path.

  Attributes:
    name: 'adam_no_bias_correction' is BERT's and ELECTRA's Adam, 'adam_tf' that of TensorFlow 1, whose eps is added to
      the uncorrected sqrt(v) (both decay as AdamW does). 'muon' takes the matrices of stacked blocks by Muon, at update
      sizes that match AdamW's (arXiv:2502.16982), the rest by AdamW.
    lr: the peak; a multiplier of `multipliers` scales it.
    schedule: see `schedule`.
    steps: updates in the whole run.
    warmup: updates before the peak.
    decay_steps: updates the decay takes, 0 = all after the warm-up. 'linear' and 'cosine' decay right after the warm-up
      and then stay at `min_lr`; 'wsd' and 'inverse_sqrt' hold the peak and decay over the last `decay_steps`.
    min_lr: where the decay ends, absolute.
    weight_decay: decoupled and times the learning rate: p <- p - lr * (update + weight_decay * p).
    no_decay: leaves without weight decay, '' = none; by default norms and biases.
    clip: largest global norm of the gradient; 0 = no bound.
    networks: patterns of leaves that are clipped by a norm of their own, as by an optimizer of their own (DeBERTa-v3).
    multipliers: (pattern, factor) of the learning rate, first match wins; a factor may be a tuple of one per layer.
    freeze: leaves that do not train; '' = none.
    thaw: (pattern, step): leaves that do not change before that update, first match wins; of stacked layers a tuple of
      one step a layer (gradual unfreezing, arXiv:1801.06146 §3.3). Until then their moments stay 0, and their
      gradients are in no norm.
    microbatches: parts in which a step takes its batch.
    ema: decay a step of the average of the parameters that evaluation, sampling and export then use, see `lm.ema`;
      0 = no average.
    spike_sigma: a step whose loss or gradient norm lies so many standard deviations above the mean of the
      `spike_window` steps before it changes nothing, see `lm.spikes`; 0 = none is left out.
  """

  name: Literal['adamw', 'adam_no_bias_correction', 'adam_tf', 'muon'] = 'adamw'
  lr: float = 1e-3
  schedule: Literal['constant', 'linear', 'cosine', 'wsd', 'inverse_sqrt', 'bert_linear', 'electra_linear'] = 'cosine'
  steps: int = 1000
  warmup: int = 0
  decay_steps: int = 0
  min_lr: float = 0.0
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  no_decay: str = r'(scale|bias)$'
  clip: float = 1.0
  networks: tuple[str, ...] = ()
  multipliers: tuple[tuple[str, float | tuple[float, ...]], ...] = ()
  freeze: str = ''
  thaw: tuple[tuple[str, int | tuple[int, ...]], ...] = ()
  microbatches: int = 1
  ema: float = 0.0
  spike_sigma: float = 0.0
  spike_window: int = 128

  def __post_init__(self):
    for name in ('lr', 'min_lr', 'eps', 'weight_decay', 'clip', 'spike_sigma'):
      _check(name, getattr(self, name), 0 <= getattr(self, name) < math.inf, 'a finite number, at least 0')
    for name in ('b1', 'b2', 'ema'):
      _check(name, getattr(self, name), 0 <= getattr(self, name) < 1, '0 <= value < 1')
    _check('steps', self.steps, 1 <= self.steps < 2**31, 'at least 1, less than 2**31')
    _check('microbatches', self.microbatches, self.microbatches >= 1, 'at least 1')
    _check('spike_window', self.spike_window, self.spike_window >= 4, 'at least 4')
    _check('warmup', self.warmup, 0 <= self.warmup <= self.steps, f'0 to optim.steps={self.steps}')
    left = self.steps - self.warmup
    _check('decay_steps', self.decay_steps, 0 <= self.decay_steps <= left, f'0 to optim.steps - optim.warmup = {left}')
    _check('min_lr', self.min_lr, self.min_lr <= self.lr, f'at most optim.lr={self.lr}')
    for name, unread in (('decay_steps', ('constant', 'bert_linear', 'electra_linear')), ('min_lr', ('constant',))):
      if getattr(self, name) and self.schedule in unread:
        raise ConfigError(f'optim.{name}: {getattr(self, name)}, which {self.schedule!r} does not read; set '
                          f'optim.{name}=0, or another optim.schedule')
    for name, pattern in (('no_decay', self.no_decay), ('freeze', self.freeze), *_patterns(self)):
      try:
        re.compile(pattern)
      except re.error as error:
        raise ConfigError(f'optim.{name}: {pattern!r} is no regular expression ({error}); correct it') from error
    for name, why in (('thaw', 'moves all of its leaves'), ('networks', 'clips by one norm')):
      if getattr(self, name) and self.name == 'muon':
        raise ConfigError(f"optim.{name}: 'muon' {why}; set optim.{name}=() or another optim.name")
    for _, when in self.thaw:
      for step in when if isinstance(when, tuple) else (when,):
        _check('thaw', step, 0 <= step < self.steps, f'updates of the run, 0 to optim.steps - 1 = {self.steps - 1}')
    for _, factor in self.multipliers:
      for f in factor if isinstance(factor, tuple) else (factor,):
        _check('multipliers', f, 0 <= f < math.inf, 'finite factors, at least 0')


def schedule(c: Config) -> Callable[[int | jax.Array], jax.Array]:
  """lr(step), f32 scalar, where step counts the updates made before this one; constant outside 0..c.steps.

  With w = warmup, the rate is a ramp min(1, (step + 1) / (w + 1)) (nanoGPT's: never 0) times

  - constant: lr
  - linear, cosine: lr down to min_lr over `decay_steps` after the warm-up, then min_lr (GPT-2, GPT-3, Llama)
  - wsd: lr, then linearly to min_lr over the last `decay_steps` (SmolLM2)
  - inverse_sqrt: lr * sqrt(s / step) from step s = steps - decay_steps on; at least min_lr. PaLM §5: lr 1e-2, s 10,000.

  Two schedules follow their released code instead, with the decay counted from step 0 over all `steps`:

  - bert_linear: lr * step / w before step w, then lr * (1 - step / steps): BERT, DeBERTa; drops at step w
  - electra_linear: lr * (1 - step / steps) * min(1, step / w)
  """
  decay = c.decay_steps or c.steps - c.warmup
  start = c.warmup if c.schedule in ('linear', 'cosine') else c.steps - decay

  def rate(step: int | jax.Array) -> jax.Array:
    t = jnp.clip(jnp.asarray(step, jnp.float32), 0, c.steps)
    between = lambda weight: c.min_lr + (c.lr - c.min_lr) * weight
    if c.schedule in ('bert_linear', 'electra_linear'):
      ramp, falling = jnp.minimum(1, t / max(c.warmup, 1)), between(1 - t / c.steps)
      if c.schedule == 'electra_linear':
        return falling * ramp if c.warmup else falling
      return jnp.where(t < c.warmup, c.lr * ramp, falling)
    ramp = jnp.minimum(1, (t + 1) / (c.warmup + 1))
    done = jnp.clip((t - start) / max(decay, 1), 0, 1)
    if c.schedule == 'cosine':
      return ramp * between(0.5 * (1 + jnp.cos(jnp.pi * done)))
    if c.schedule == 'inverse_sqrt':
      return ramp * jnp.maximum(c.lr * jnp.sqrt(max(start, 1) / jnp.maximum(t, max(start, 1))), c.min_lr)
    return ramp * (c.lr if c.schedule == 'constant' else between(1 - done))
  return rate


def layer_decay(layers: int, decay: float, as_in_paper: bool = False) -> tuple[tuple[str, Any], ...]:
  """`multipliers` that lower the rate by `decay` a layer below the head (ELECTRA; google-research optimization.py).

  The code counts a pooler that is no longer there, so that the last layer has decay^2 (its issue 51); `as_in_paper`
  gives that layer `decay`.
  """
  top = layers + (1 if as_in_paper else 2)
  return ((r'^(embed|project|relative|conv)/', decay**top),
          ('^blocks/', tuple(decay ** (top - 1 - i) for i in range(layers))))


def trainable_mask(c: Config, tree: params.Tree) -> params.Tree:
  """Tree of bools for `params.split`: False where `c.freeze` matches the path.

  Raises:
    ConfigError: the pattern matches no leaf, or all of them.
  """
  if not c.freeze:
    return jax.tree.map(lambda _: True, tree)
  frozen = params.match(tree, c.freeze)
  if not any(jax.tree.leaves(frozen)):
    raise ConfigError(f'optim.freeze: {c.freeze!r} matches no parameter; expected part of a path such as '
                      f'{next(iter(params.flatten(tree)))!r}')
  if all(jax.tree.leaves(frozen)):
    raise ConfigError(f'optim.freeze: {c.freeze!r} matches every parameter; leave one to train')
  return jax.tree.map(lambda f: not f, frozen)


def make(c: Config, specs: params.Tree) -> optax.GradientTransformationExtraArgs:
  """The transformation for trees with the paths of `specs` (Specs or arrays); None leaves have no optimizer state.

  `update(grads, state, params, norm=None, ok=None)`: `norm` is the gradient's global norm where the caller has it;
  where the bool scalar `ok` is False, updates are 0 and the state stays, whatever the gradients hold.

  Raises:
    ConfigError: a pattern that matches no leaf, a multiplier without one factor a layer; Muon without a matrix.
  """
  if c.lr == 0:
    warnings.warn('optim.lr: 0; no parameter will change; expected a positive rate', stacklevel=2)
  leaves = params.flatten(specs)
  factors = {path: _of_layers('multipliers', c.multipliers, 1.0, path, leaf.shape) for path, leaf in leaves.items()}
  thaws = _thaws(c, leaves)
  for name, pattern in _patterns(c):
    if not any(re.search(pattern, path) for path in leaves):
      raise ConfigError(f'optim.{name}: {pattern!r} matches no parameter; expected part of a path such as '
                        f'{next(iter(leaves))!r}')
  adam = _adam(c, factors, thaws)
  tx = adam
  if c.name == 'muon':
    tx = muon.make(schedule(c), c.weight_decay, lambda path: _decay(c, path) > 0, lambda path: factors[path],
                   muon.matrices(leaves), adam, lambda grads, norm: _clip(c, grads, norm))
  if c.spike_sigma:
    tx = spikes.wrap(tx, c.spike_sigma, c.spike_window)
  return ema.wrap(tx, c.ema) if c.ema else tx


def gradient_norm(c: Config, specs: params.Tree) -> Callable[[params.Tree, Any], jax.Array]:
  """of(grads, opt_state): the global norm of the gradients of what the next update of `make(c, specs)` may move."""
  thaws = _thaws(c, params.flatten(specs))

  def of(grads, opt_state):
    while hasattr(opt_state, 'inner'):
      opt_state = opt_state.inner
    return _norm_awake(thaws, opt_state.count, params.flatten(grads))
  return of if c.thaw else lambda grads, _: optax.tree.norm(grads)


def _check(name, value, right, expected):
  if not right:
    raise ConfigError(f'optim.{name}: {value}; expected {expected}')


def _patterns(c):
  """[(field, pattern)] of those that must match a leaf."""
  return [*(('networks', p) for p in c.networks), *(('multipliers', p) for p, _ in c.multipliers),
          *(('thaw', p) for p, _ in c.thaw)]


def _of_layers(name, pairs, default, path, shape):
  """The leaf's value in (pattern, value) pairs: a number, or an array [L, 1, ...] of one a layer."""
  value = next((v for pattern, v in pairs if re.search(pattern, path)), default)
  if not isinstance(value, tuple):
    return value
  if not shape or shape[0] != len(value):
    raise ConfigError(f'optim.{name}: {len(value)} values for {path} of shape {shape}; expected one a layer')
  return np.asarray(value, np.float32).reshape(-1, *(1,) * (len(shape) - 1))


def _thaws(c, leaves):
  return {path: _of_layers('thaw', c.thaw, 0, path, leaf.shape) for path, leaf in leaves.items()}


def _norm(grads):
  return optax.tree.norm(list(grads.values()))


def _norm_awake(thaws, count, grads):
  """`_norm` of what moves after `count` updates; masks sums, not gradients, of which a copy would be stored."""
  def square(path, g):
    sums = jnp.sum(jnp.square(g), axis=tuple(range(min(np.ndim(thaws[path]), 1), g.ndim)), keepdims=True)
    return jnp.sum(jnp.where(count >= thaws[path], sums, 0))
  return jnp.sqrt(sum(square(path, g) for path, g in grads.items()))


def _decay(c, path):
  return 0.0 if c.no_decay and re.search(c.no_decay, path) else c.weight_decay


def _clip(c, grads, norm, norm_of=_norm):
  """path -> what to multiply the gradient by so that its network's norm is at most `c.clip`."""
  if not c.clip:
    return lambda path: 1.0
  network = lambda path: next((pattern for pattern in c.networks if re.search(pattern, path)), '')
  groups = {}
  for path, g in params.flatten(grads).items():
    groups.setdefault(network(path), {})[path] = g
  norms = {name: norm_of(group) for name, group in groups.items()} if c.networks or norm is None else {'': norm}
  factors = {name: jnp.minimum(1.0, c.clip / n) for name, n in norms.items()}
  return lambda path: factors[network(path)]


def _adam(c: Config, factors: dict[str, Any], thaws: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
  """Clipped AdamW (arXiv:1711.05101 alg. 2); one pass over memory a leaf and output."""
  rate_at = schedule(c)

  def init(tree):
    zeros = lambda: jax.tree.map(jnp.zeros_like, tree)
    return optax.ScaleByAdamState(jnp.int32(0), zeros(), zeros())

  def update(grads, state, tree, *, norm=None, ok=None):
    keep = lambda new, old: new if ok is None else jnp.where(ok, new, old)
    clip = _clip(c, grads, norm, functools.partial(_norm_awake, thaws, state.count) if c.thaw else _norm)
    rate, count = rate_at(state.count), state.count + 1
    # Scalars: the loops below then multiply once for clipping and once for bias correction.
    def corrections(path):  # a leaf's moments begin when it thaws
      age = jnp.maximum(count - thaws[path], 1) if c.thaw else count
      unbias1, unbias2 = (1.0, 1.0) if c.name == 'adam_no_bias_correction' else (
          1 / (1 - c.b1**age), 1 / (1 - c.b2**age))
      return unbias1, unbias2, c.eps * jnp.sqrt(unbias2) if c.name == 'adam_tf' else c.eps
    awake = lambda path, x: jnp.where(state.count >= thaws[path], x, jnp.zeros_like(x)) if c.thaw else x
    scaled = lambda path, g: awake(path, clip(path) * g)
    mu = params.map_with_path(lambda path, m, g: keep(c.b1 * m + (1 - c.b1) * scaled(path, g), m), state.mu, grads)
    # Not square(g): the compiler would share it with the norm's square, and store it.
    nu = params.map_with_path(lambda path, v, g: keep(c.b2 * v + (1 - c.b2) * scaled(path, g) * scaled(path, g), v),
                              state.nu, grads)

    def step(path, p, m, v):
      unbias1, unbias2, eps = corrections(path)
      direction = m * unbias1 / (jnp.sqrt(v * unbias2) + eps) + _decay(c, path) * p
      return keep(awake(path, -rate * factors[path] * direction), jnp.zeros_like(p))
    return params.map_with_path(step, tree, mu, nu), optax.ScaleByAdamState(keep(count, state.count), mu, nu)
  return optax.GradientTransformationExtraArgs(init, update)
