"""lm.products: the forms that products take are equal, and where weights are joined."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import hlo, products

EQUATIONS = ('BTD,DNH->BTNH', 'BTD,DKH->BTKH', 'BTD,DF->BTF')
D = 16
FEW, MANY, LARGE = (2, 8), (8, 32), (64, 2048)  # rows: less than 4 D, more, and many for a product of 2^25


def arrays(lead, dtype=jnp.float32):
  keys = iter(jax.random.split(jax.random.key(0), 8))
  ws = [jax.random.normal(next(keys), (D, *shape)) for shape in ((4, 8), (2, 8), (24,))]
  x = jax.random.normal(next(keys), (*lead, D)).astype(dtype)
  gs = [jax.random.normal(next(keys), (*lead, *w.shape[1:])).astype(dtype) for w in ws]
  return x, tuple(ws), tuple(gs)


def einsums(x, ws):
  return tuple(jnp.einsum(equation, x, w.astype(x.dtype)) for equation, w in zip(EQUATIONS, ws, strict=True))


def both(f, x, ws, gs):
  """(values, derivatives) in one program."""
  def run(x, ws, gs):
    ys, pull = jax.vjp(f, x, ws)
    return ys, pull(gs)
  return jax.jit(run).lower(x, ws, gs).compile()


@pytest.mark.slow
@pytest.mark.parametrize('lead', [FEW, MANY, LARGE])
@pytest.mark.parametrize('dtype, rtol', [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_products_are_einsums(lead, dtype, rtol):
  x, ws, gs = arrays(lead, dtype)
  found = both(lambda x, ws: products.products(EQUATIONS, x, ws), x, ws, gs)(x, ws, gs)
  expected = both(einsums, x, ws, gs)(x, ws, gs)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


def test_the_derivative_joins_weights_where_products_are_small_and_rows_are_many():
  for lead, expected in ((FEW, 9), (MANY, 5), (LARGE, 9)):  # values, and derivatives by x and by w
    args = arrays(lead)
    program = both(lambda x, ws: products.products(EQUATIONS, x, ws), *args)
    assert program.as_text().count(' dot(') == expected
    assert sum(hlo.flops(program.as_text()).values()) == 3 * 2 * args[0].size * sum(w[0].size for w in args[1])


@pytest.mark.parametrize('equation, x, w', [('BTD,DNH->BTNH', (4, 32, 16), (16, 4, 8)),
                                            ('BTNH,NHD->BTD', (4, 32, 4, 8), (4, 8, 16)),
                                            ('BTD,D->BT', (4, 32, 16), (16,))])
def test_a_product_is_einsum_and_nothing_is_copied_transposed(equation, x, w):
  x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate((x, w)))
  g = jax.random.normal(jax.random.key(2), jnp.einsum(equation, x, w).shape)
  program = both(lambda x, w: products.product(equation, x, w), x, w, g)
  expected = both(lambda x, w: jnp.einsum(equation, x, w), x, w, g)
  for a, b in zip(jax.tree.leaves(program(x, w, g)), jax.tree.leaves(expected(x, w, g)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  assert not [line for line in program.as_text().split('\n') if ' transpose(' in line]


@pytest.mark.parametrize('equation', ['BDT,DF->BTF', 'BTHN,NHD->BTD', 'BTD,FDG->BTFG'])
def test_dimensions_in_another_order_are_refused(equation):
  x, w = (jnp.ones((2,) * len(axes)) for axes in equation.split('->')[0].split(','))
  with pytest.raises(ValueError, match='expected "batch in, in out'):
    products.product(equation, x, w)


def test_the_derivative_of_a_thin_weight_is_formed_transposed():
  """As [R, D]: XLA on a CPU takes four times as long over [D, R]."""
  shapes = (4, 32, 256), (256, 8), (4, 32, 8)
  x, w, g = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
  program = jax.jit(jax.grad(lambda w: (products.product('BTD,DR->BTR', x, w) * g).sum())).lower(w).compile()
  np.testing.assert_allclose(program(w), jnp.einsum('BTD,BTR->DR', x, g), rtol=1e-5, atol=1e-4)
  dots = [line.split(' = ')[1] for line in program.as_text().split('\n') if ' dot(' in line]
  assert [dot.split('{')[0] for dot in dots] == ['f32[8,256]']
