"""Packed kernels: each dot equals the einsum with the weights that the leaf stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import nn
from lm.kernels import quantised

KINDS = ('float32', 'bfloat16', 'int8')
CASES = [  # equation, shape of x, shape of w, contracted dimensions of w
    ('BTD,DNH->BTNH', (3, 2, 40), (40, 5, 8), (0,)),
    ('BTNH,NHD->BTD', (3, 2, 5, 8), (5, 8, 40), (0, 1)),
    ('BTD,DF->BTF', (1, 1, 40), (40, 24), (0,)),  # one row takes a way of its own
    ('...D,VD->...V', (2, 40), (70, 40), (1,)),
    ('...D,VD->...V', (20, 40), (70, 40), (1,)),  # so many rows take another way than few, where outputs lie together
    ('BTF,FD->BTD', (10, 2, 40), (40, 24), (0,)),
]


def _normal(seed, shape, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape, dtype)


@pytest.mark.parametrize('columns', [0, 2, 128])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('equation, x_shape, w_shape, inputs', CASES)
def test_dot_is_einsum_with_the_unpacked_kernel(equation, x_shape, w_shape, inputs, kind, columns):
  x, w = _normal(0, x_shape), quantised.pack(_normal(1, w_shape), inputs, kind, columns)
  if kind == 'bfloat16':
    x = x.astype(jnp.bfloat16).astype(jnp.float32)  # it is rounded to that
  want = np.einsum(equation, np.asarray(x, np.float64), np.asarray(quantised.unpack(w), np.float64))
  got = jax.jit(nn.dot, static_argnums=2)(w, x, equation)
  assert got.dtype == jnp.float32 and got.shape == want.shape
  # int8: 16 bits of an activation, so an error near sqrt(40) / 2^16; 8 bits would be off by 256 times as much.
  np.testing.assert_allclose(got, want, atol=1e-3 if kind == 'int8' else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('columns', [0, 2, 128])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('rows', [1, 3, 20])
def test_joined_kernels_give_what_each_gives(rows, kind, columns):
  x, equations = _normal(0, (rows, 1, 40)), ['BTD,DNH->BTNH', 'BTD,DKH->BTKH', 'BTD,DF->BTF']
  shapes = (40, 6, 8), (40, 2, 8), (40, 7)
  ws = [quantised.pack(_normal(i, shape), (0,), kind, columns) for i, shape in enumerate(shapes)]
  want = nn.dots(ws, x, equations)
  got = jax.jit(lambda joined, x: nn.dots([joined, None, None], x, equations))(quantised.join(ws), x)
  assert [y.shape for y in got] == [(rows, 1, 6, 8), (rows, 1, 2, 8), (rows, 1, 7)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), got, want)
  with pytest.raises(ValueError, match='BTD,FD->BTF'):
    nn.dots([quantised.join(ws[2:])], x, ['BTD,FD->BTF'])


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('rows', [1, 3])
def test_dot_in_bfloat16(kind, rows):
  x, w = _normal(0, (rows, 1, 40), jnp.bfloat16), quantised.pack(_normal(1, (40, 24)), (0,), kind)
  got = nn.dot(w, x, 'BTD,DF->BTF')
  want = np.asarray(x, np.float64) @ np.asarray(quantised.unpack(w), np.float64)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2**-7, atol=1e-2)


def test_unpack_is_the_kernel_to_the_precision_of_its_kind():
  w = _normal(0, (6, 8, 30)) * jnp.linspace(0.01, 100, 30)[None, None]
  for inputs in ((0,), (0, 1), (2,)):
    pack = lambda kind, inputs=inputs: quantised.unpack(quantised.pack(w, inputs, kind))
    np.testing.assert_array_equal(pack('float32'), w)
    np.testing.assert_array_equal(pack('bfloat16'), w.astype(jnp.bfloat16).astype(jnp.float32))
    step = jnp.abs(w).max(inputs, keepdims=True) / 127
    assert (jnp.abs(pack('int8') - w) <= 0.501 * step).all()


def test_an_int8_scale_belongs_to_one_output():
  w = quantised.pack(_normal(0, (4, 3, 5)), (0,), 'int8')
  assert w.values.dtype == jnp.int8 and w.values.shape == (4, 15) and w.scale_O.shape == (15,)
  assert (jnp.abs(w.values.astype(jnp.int32)).max(0) == 127).all()


def test_zeros_stay_zero():
  for kind in KINDS:
    zero, some = jnp.zeros((40, 24)), _normal(0, (2, 1, 40))
    assert (nn.dot(quantised.pack(zero, (0,), kind), some, 'BTD,DF->BTF') == 0).all()
    assert (nn.dot(quantised.pack(_normal(1, (40, 24)), (0,), kind), 0 * some, 'BTD,DF->BTF') == 0).all()


def test_a_row_is_not_rounded_by_its_neighbours():
  w, x = quantised.pack(_normal(1, (40, 24)), (0,), 'int8'), _normal(0, (2, 1, 40))
  alone = nn.dot(w, x[:1], 'BTD,DF->BTF')
  beside = nn.dot(w, x.at[1].multiply(1e6), 'BTD,DF->BTF')[:1]
  np.testing.assert_array_equal(alone, beside)


def test_extreme_activations_fit_the_limbs():
  """Every integer the limbs can hold, by its position between the extremes."""
  x = jnp.linspace(-1, 1, 2 * 32639 + 1)[None, None]
  limbs, weights = quantised._bytes(x[0])
  assert all((jnp.abs(limb) <= 128).all() and limb.max() <= 127 for limb in limbs)
  np.testing.assert_allclose(sum(a * b for a, b in zip(limbs, weights, strict=True)), x[0], atol=0.51 / 32639)


def test_another_contraction_is_refused():
  w = quantised.pack(_normal(0, (40, 24)), (0,), 'int8')
  with pytest.raises(ValueError, match='contracts'):
    nn.dot(w, _normal(1, (2, 1, 24)), 'BTF,DF->BTD')
  with pytest.raises(ValueError, match='contracts'):
    nn.dot(w, _normal(1, (40, 2)), 'DB,DF->BF')


def test_a_packed_kernel_is_a_pytree_of_arrays():
  w = quantised.pack(_normal(0, (40, 2, 12)), (0,), 'int8')
  leaves, tree = jax.tree.flatten(w)
  assert [x.dtype for x in leaves] == [jnp.int8, jnp.float32]
  assert jax.tree.unflatten(tree, leaves).shape == (40, 2, 12)
