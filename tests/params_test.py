"""Parameters: keyed initial values, stacking, paths, splitting."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import params
from lm.params import Spec

BLOCK = {'attn': {'q': Spec((4, 2, 3), ('embed', 'heads', 'head_dim')),
                  'o': Spec((2, 3, 4), ('heads', 'head_dim', 'embed'))},
         'norm': {'scale': Spec((4,), ('embed',), params.ones)}}
SPECS = {'embed': Spec((7, 4), ('vocab', 'embed'), params.Normal(1.0)), 'blocks': params.stack(3, BLOCK),
         'norm': {'scale': Spec((4,), ('embed',), params.ones), 'bias': Spec((4,), ('embed',), params.zeros)}}


def key():
  return jax.random.key(0)


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_init_follows_the_specs():
  tree = params.init(SPECS, key())
  assert {p: (x.shape, x.dtype) for p, x in params.flatten(tree).items()} == {
      p: (s.shape, jnp.float32) for p, s in params.flatten(SPECS).items()}
  assert (tree['norm']['scale'] == 1).all() and (tree['norm']['bias'] == 0).all()
  same(tree, params.init(SPECS, key()))
  leaves = [x.ravel()[:12] for p, x in params.flatten(tree).items() if 'norm' not in p]
  assert len({x.tobytes() for x in map(np.asarray, leaves)}) == len(leaves), 'two leaves start equal'


def test_adding_or_removing_a_leaf_changes_no_other():
  more = SPECS | {'aaa': Spec((5,), (None,)), 'zzz': Spec((5,), (None,)), 'norm': {'scale': SPECS['norm']['scale']}}
  old, new = params.flatten(params.init(SPECS, key())), params.flatten(params.init(more, key()))
  assert new.keys() - old.keys() == {'aaa', 'zzz'} and old.keys() - new.keys() == {'norm/bias'}
  for path in old.keys() & new.keys():
    np.testing.assert_array_equal(old[path], new[path], err_msg=path)


def test_layers_differ_and_more_layers_keep_the_first_ones():
  three, five = (params.init(params.stack(n, BLOCK), key()) for n in (3, 5))
  same(three, jax.tree.map(lambda x: x[:3], five))
  assert not np.array_equal(three['attn']['q'][0], three['attn']['q'][1])
  assert params.flatten(params.stack(3, BLOCK))['attn/q'].axes == ('layers', 'embed', 'heads', 'head_dim')


def test_a_stacked_initialiser_sees_the_shape_of_one_layer():
  spec = params.stack(2, {'w': Spec((64, 32, 8), ('embed', 'heads', 'head_dim'), params.FanIn(1))})
  np.testing.assert_allclose(params.init(spec, key())['w'].std(), 64**-0.5, rtol=0.03)


@pytest.mark.parametrize('init, std', [(params.Normal(0.02), 0.02), (params.FanIn(), 100**-0.5),
                                       (params.FanIn(2), 3000**-0.5)])
def test_spread(init, std):
  x = init(key(), (100, 30, 20))
  np.testing.assert_allclose([x.mean(), x.std()], [0, std], rtol=0.02, atol=0.02 * std)


@pytest.mark.slow
def test_drawing_once_gives_the_usual_bits(monkeypatch):
  monkeypatch.delenv('XLA_FLAGS')  # which name an effort, for the tests
  kinds = (params.Normal(0.1), params.TruncatedNormal(0.1), params.Uniform(0.1), params.Stacked(params.FanIn(1)))
  draw = lambda key: [init(jax.random.fold_in(key, i), (3, 16, 5)) for i, init in enumerate(kinds)]
  usual = jax.jit(draw, compiler_options={'xla_backend_optimization_level': 3})(key())
  jax.tree.map(np.testing.assert_array_equal, params.jit_once(draw)(key()), usual)


def test_unstack_is_indexing_and_so_is_its_gradient():
  tree = params.init(SPECS['blocks'], key())
  layers = params.unstack(tree)
  assert len(layers) == 3
  for i, layer in enumerate(layers):
    same(layer, jax.tree.map(lambda x, i=i: x[i], tree))

  def loss(pick):
    return lambda t: sum((i + 1) * sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(pick(t, i))) for i in range(3))
  a = jax.grad(loss(lambda t, i: params.unstack(t)[i]))(tree)
  same(a, jax.grad(loss(lambda t, i: jax.tree.map(lambda x: x[i], t)))(tree))


def test_abstract_is_what_init_gives():
  assert params.abstract(SPECS) == jax.eval_shape(lambda: params.init(SPECS, key()))


def test_counts():
  assert params.count(SPECS) == 7 * 4 + 3 * (24 + 24 + 4) + 8 == params.count(params.init(SPECS, key()))
  assert params.count(SPECS, 'embed') == 28 and params.count(SPECS, 'attn/(q|o)$') == 144
  assert params.count(SPECS, 'no such') == 0
  assert params.count({'big': Spec((1 << 20, 1 << 20), (None, None))}) == 1 << 40  # Python's integers


def test_match_and_paths():
  matched = params.flatten(params.match(SPECS, 'scale$'))
  assert [p for p, m in matched.items() if m] == ['blocks/norm/scale', 'norm/scale']
  assert list(params.flatten(SPECS)) == ['blocks/attn/o', 'blocks/attn/q', 'blocks/norm/scale', 'embed', 'norm/bias',
                                         'norm/scale']
  seen = []
  params.map_with_path(lambda path, a, b: seen.append((path, a == b)), SPECS, SPECS)
  assert seen == [(p, True) for p in params.flatten(SPECS)]


@pytest.mark.parametrize('pattern', ['', 'attn', 'norm', 'embed', 'no such', r'^blocks/(?!attn)'])
def test_split_and_join_are_inverses(pattern):
  tree = params.init(SPECS, key())
  mask = params.match(tree, pattern)
  yes, no = params.split(tree, mask)
  same(params.join(yes, no), tree)
  same(params.join(no, yes), tree)
  flat = lambda t: set(params.flatten(t))
  assert flat(yes) == {p for p in flat(tree) if re.search(pattern, p)} and flat(no) == flat(tree) - flat(yes)


def test_holes_pass_through_tree_functions():
  tree = params.init(SPECS, key())
  train, frozen = params.split(tree, params.match(tree, 'attn'))
  assert train['embed'] is None and frozen['blocks']['attn']['q'] is None
  assert params.count(train) + params.count(frozen) == params.count(tree)
  grads = jax.grad(lambda t: sum(jnp.sum(x**2) for x in jax.tree.leaves(params.join(t, frozen))))(train)
  same(grads, jax.tree.map(lambda x: 2 * x, train))


def test_a_spec_names_every_dimension():
  with pytest.raises(ValueError, match='2 dimensions but 1 axes'):
    Spec((2, 3), ('embed',))
