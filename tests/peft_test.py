"""Few parameters in place of all: the tree's surgery on every family of models."""

import functools
import json

import jax
import jax.numpy as jnp
from marks import few, slow
import numpy as np
import pytest

from experiments import bert, gpt2, roberta
from lm import budget, hlo, nn, optim, params, peft, peft_hf, peft_nodes, train
from lm.data.framing import Labelled
from lm.data.packing import Batch
from lm.errors import ConfigError
from lm.losses import ar
from lm.models import blocks, deberta, decoder, encoder

SHAPE = dict(vocab=50, length=16, layers=3, embed=24, heads=4, head_dim=6, mlp=40)
FAMILIES = {
    'gpt2': (decoder, decoder.Config(**SHAPE, kv_heads=4)),
    'llama': (decoder, decoder.Config(**SHAPE, kv_heads=2, positions='rotary', norm='rms', norm_bias=False, bias=False,
                                      activation='swiglu', scan_layers=False)),
    'palm': (decoder, decoder.Config(**SHAPE, kv_heads=1, positions='rotary', parallel=True, bias=False)),
    'bert': (encoder, encoder.Config(**SHAPE)),
    'deberta': (deberta, deberta.Config(**SHAPE, relative=8)),
}
EVERYWHERE = r'^blocks/(attn/[qkvo]|mlp/(up|gate|down))$'
IDS_BT = jax.random.randint(jax.random.key(5), (2, 11), 4, 50)
SEGMENTS_BT = jnp.array([[1] * 11, [1] * 8 + [0] * 3])


def model(kind):
  family, c = FAMILIES[kind]
  p = jax.jit(lambda key: params.init(family.specs(c), key))(jax.random.key(0))
  # Biases and norms as if trained.
  return family, c, jax.tree.map(lambda w: w + 0.1 * jnp.sin(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape), p)


def tuned(kind, c):
  """(family, its config, base parameters, specs with what `c` adds, the grafted tree)."""
  family, m, p = model(kind)
  specs = peft.specs(c, family.specs(m))
  return family, m, p, specs, jax.jit(lambda p, key: peft.graft(p, specs, key))(p, jax.random.key(1))


def hidden(family, c, p, segments_BT=SEGMENTS_BT, **options):
  # Compiled for each: a model that is traced again may be compiled into other sums.
  return np.asarray(jax.jit(lambda p: family.apply(peft.materialise(p), c, IDS_BT, segments_BT=segments_BT,
                                                   **options))(p))


def moved(p, pattern, by=0.05):
  """The leaves that match, as if trained."""
  shift = lambda path, w: w + by * jnp.cos(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape)
  return params.map_with_path(lambda path, w: shift(path, w) if params.match({path: w}, pattern)[path] else w, p)


@pytest.mark.parametrize('kind', few(FAMILIES, 'llama', 'bert'))
def test_lora_starts_as_the_model_bit_for_bit(kind):
  family, c, p, specs, tree = tuned(kind, peft.Config('lora', targets=EVERYWHERE, rank=3))
  np.testing.assert_array_equal(hidden(family, c, tree), hidden(family, c, p))
  a = params.flatten(tree)['blocks/attn/o/lora_a']
  assert a.shape == (3, 4, 6, 3) and abs(float(a.std()) - (1 / 3 / 24) ** 0.5) < 0.02  # uniform within 1/sqrt(24)


@pytest.mark.parametrize('stabilised', [False, True])
@pytest.mark.parametrize('kind', few(FAMILIES, 'llama', 'bert'))
def test_merged_is_unmerged(kind, stabilised):
  lora = peft.Config('lora', targets=EVERYWHERE, rank=4, alpha=12, rank_stabilised=stabilised)
  family, c, p, specs, tree = tuned(kind, lora)
  tree = moved(tree, 'lora_', 0.02)
  merged = jax.jit(peft.merge)(tree)
  assert jax.tree.structure(merged) == jax.tree.structure(p)
  assert np.abs(hidden(family, c, tree) - hidden(family, c, p)).max() > 1e-2
  np.testing.assert_allclose(hidden(family, c, merged), hidden(family, c, tree), atol=1e-5)
  q, node = params.flatten(p)['blocks/attn/q'], tree['blocks']['attn']['q']
  by_hand = q + (12 / 2 if stabilised else 12 / 4) * np.einsum('ldr,lrnh->ldnh', node.lora_a, node.lora_b)
  np.testing.assert_allclose(merged['blocks']['attn']['q'], by_hand, atol=1e-6)
  again = jax.jit(peft.unmerge)(merged, tree)
  for path, w in params.flatten(tree).items():
    np.testing.assert_allclose(params.flatten(again)[path], w, atol=1e-6, err_msg=path)


@pytest.mark.parametrize('lead, products', [((4, 16), 7), ((2, 4), 8)])
@pytest.mark.parametrize('equation, shape, inputs', [('BTD,DNH->BTNH', (32, 4, 6), 1),
                                                     ('BTNH,NHD->BTD', (4, 6, 32), 2)])
def test_many_rows_take_the_sum_of_weights_and_few_each_weight(lead, products, equation, shape, inputs):
  """With the same values and derivatives; the sum is formed once for both."""
  keys = jax.random.split(jax.random.key(0), 5)
  sides = [(*shape[:inputs], 3), (3, *shape[inputs:])]
  w = peft_nodes.Lora(*(jax.random.normal(k, s) for k, s in zip(keys, [shape, *sides], strict=False)), scale=0.7)
  x, plain = jax.random.normal(keys[3], (*lead, *shape[:inputs])), peft_nodes.lora_weight
  g = jax.random.normal(keys[4], (*lead, *shape[inputs:]))

  def run(f):
    def both(w, x):
      y, pull = jax.vjp(lambda trained, x: f(w.replace(**trained), x), {'lora_a': w.lora_a, 'lora_b': w.lora_b}, x)
      return y, pull(g)
    return jax.jit(both).lower(w, x).compile()
  program = run(lambda w, x: nn.dot(w, x, equation))
  for got, want in zip(*(jax.tree.leaves(p(w, x)) for p in (
      program, run(lambda w, x: jnp.einsum(equation, x, plain(w))))), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  assert program.as_text().count(' dot(') == products


def test_what_bfloat16_would_round_away_beside_a_weight_is_kept():
  w = jnp.tile(jnp.array([[1.0], [-1.0]]), (8, 16))
  node = peft_nodes.Lora(w, jnp.full((16, 2), 2**-6), jnp.full((2, 16), 2**-6), scale=1.0)
  y_BTF = jax.jit(lambda x: nn.dot(node, x, 'BTD,DF->BTF'))(jnp.ones((4, 8, 16), jnp.bfloat16))
  np.testing.assert_array_equal(np.asarray(y_BTF, np.float32), 16 * 2 * 2**-12)


@pytest.mark.slow
def test_dropout_is_on_the_path_of_lora_alone():
  family, c, p, specs, tree = tuned('gpt2', peft.Config('lora', rank=4, rate=0.5))
  key = jax.random.key(3)
  np.testing.assert_array_equal(hidden(family, c, tree, key=key), hidden(family, c, p, key=key))
  tree = moved(tree, 'lora_')
  one, other = (hidden(family, c, tree, key=jax.random.key(i)) for i in (3, 4))
  assert np.abs(one - other).max() > 1e-3
  # Linear in x: the mean over many keys is what there is without dropout.
  node = jax.tree.map(lambda x: x[0], tree['blocks']['attn']['q'])
  x_BTD = jax.random.normal(jax.random.key(9), (2, 5, 24))
  dot = jax.jit(lambda key: nn.dot(node, x_BTD, 'BTD,DNH->BTNH', key))
  many = jax.vmap(dot)(jax.random.split(key, 4000))
  np.testing.assert_allclose(many.mean(0), dot(None), atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize('kind', FAMILIES)
def test_houlsby_is_two_bottlenecks_before_the_sum(kind):
  """With a zero bottleneck it is the model; else W up(gelu(W down h)) of each branch, as a change of o and down."""
  family, c, p, specs, tree = tuned(kind, peft.Config('houlsby', width=5))
  still = params.map_with_path(lambda path, w: w * 0 if 'expand' in path else w, tree)
  np.testing.assert_array_equal(hidden(family, c, still), hidden(family, c, p))
  x_BTD, y_BTNH = jax.random.normal(jax.random.key(2), (2, 7, 24)), jax.random.normal(jax.random.key(3), (2, 7, 4, 6))
  node = jax.tree.map(lambda w: w[0], moved(tree, 'reduce|expand')['blocks']['attn']['o'])
  bias = jnp.arange(24.0) / 24
  h = jnp.einsum('BTNH,NHD->BTD', y_BTNH, node.w) + bias[None, None]
  want = x_BTD + h + jax.nn.gelu(h @ node.reduce + node.reduce_bias[None, None]) @ node.expand + node.expand_bias[
      None, None]
  np.testing.assert_allclose(nn.residual(node, x_BTD, y_BTNH, 'BTNH,NHD->BTD', bias), want, atol=1e-5)


def test_pfeiffer_reads_the_normed_sum():
  shapes = (4, 3), (3,), (3, 4), (4,)
  node = peft_nodes.Adapter(jnp.eye(4), *(jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes)),
                            'pfeiffer')
  x, y = (jax.random.normal(jax.random.key(i), (2, 3, 4)) for i in (7, 8))
  norm = lambda x: nn.layer_norm(x, jnp.ones(4))
  bottleneck = jax.nn.relu(norm(x + y) @ node.reduce + node.reduce_bias[None, None]) @ node.expand
  want = norm(x + y + bottleneck + node.expand_bias[None, None])
  np.testing.assert_allclose(nn.residual(node, x, y, 'BTD,DE->BTE', None, norm=norm), want, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('hidden_width', [0, 7])
@pytest.mark.parametrize('kind', ['gpt2', 'llama', 'palm', 'bert'])
def test_a_prefix_is_a_cache_of_tokens_that_never_were(kind, hidden_width):
  """Keys and values of real tokens, taken as prefix, give what those tokens in front give; segments see it all."""
  family, c, p, specs, tree = tuned(kind, peft.Config('prefix', length=3, hidden=hidden_width))
  whole = jax.jit(peft.materialise)(tree)
  attn = whole['blocks']['attn']
  assert attn['prefix_k'].shape == (3, 3, c.__dict__.get('kv_heads', 4), 6) and blocks.virtual(whole['blocks']) == 3
  if family is decoder:
    cache = decoder.init_cache(c, 2, 3)
    first = jnp.broadcast_to(jnp.array([[7, 8, 9]]), (2, 3))
    _, cache = jax.jit(lambda p: decoder.apply(p, c, first, cache=cache))(p)
    slots = lambda xs: jnp.stack([x.reshape(2, -1, 3, 6)[0].swapaxes(0, 1) for x in xs])
    attn |= {'prefix_k': slots(cache.keys), 'prefix_v': slots(cache.values)}
    positions_BT = jnp.broadcast_to(jnp.arange(11)[None], IDS_BT.shape)
    got = hidden(family, c, whole, None, positions_BT=positions_BT)
    joined = jnp.concatenate([first, IDS_BT], axis=1)
    want = jax.jit(lambda p: decoder.apply(p, c, joined))(p)[:, 3:]
    np.testing.assert_allclose(got, want, atol=2e-5)
    packed = jnp.array([[1] * 5 + [2] * 6] * 2)  # both documents of a row see the prefix
    got = hidden(family, c, whole, packed, positions_BT=positions_BT - jnp.where(packed == 2, 5, 0))
    for part in (slice(0, 5), slice(5, 11)):
      alone = jax.jit(lambda p, ids: decoder.apply(p, c, ids))(whole, IDS_BT[:, part])
      np.testing.assert_allclose(got[:, part], alone, atol=2e-5)
  else:
    assert np.abs(hidden(family, c, tree) - hidden(family, c, p)).max() > 1e-3


def test_a_prompt_is_rows_behind_the_table():
  family, c, p, specs, tree = tuned('gpt2', peft.Config('prompt', length=2))
  tree['embed']['tokens'] = tree['embed']['tokens'].replace(prompt=p['embed']['tokens'][jnp.array([7, 9])])
  virtual = jnp.concatenate([jnp.array([[50, 51]] * 2), IDS_BT], axis=1)
  real = jnp.concatenate([jnp.array([[7, 9]] * 2), IDS_BT], axis=1)
  apply = jax.jit(lambda p, ids: family.apply(p, c, ids))
  np.testing.assert_array_equal(apply(tree, virtual), apply(p, real))
  np.testing.assert_array_equal(decoder.head(tree, c), decoder.head(p, c))
  x_BTD = apply(p, real)
  np.testing.assert_array_equal(decoder.logits(tree, c, x_BTD), decoder.logits(p, c, x_BTD))


def test_a_prompt_stands_before_each_row_or_behind_its_first_token():
  """The row that fills up a batch has none."""
  ids_BT, segments_BT = [[5, 6, 7], [8, 9, 0], [0, 0, 0]], [[1, 2, 2], [1, 1, 0], [0, 0, 0]]
  positions_BT, types_BT = [[0, 1, 2], [0, 1, 0], [0, 0, 0]], [[1, 0, 1], [1, 1, 0], [0, 0, 0]]
  rows = {name: jnp.array(x) for name, x in (('ids_BT', ids_BT), ('segments_BT', segments_BT))}
  ids = {0: [[20, 21, 5, 6, 7], [20, 21, 8, 9, 0], [20, 21, 0, 0, 0]],
         1: [[5, 20, 21, 6, 7], [8, 20, 21, 9, 0], [0, 20, 21, 0, 0]]}
  segments = {0: [[1, 1, 1, 2, 2], [1, 1, 1, 1, 0], [0] * 5], 1: [[1, 1, 1, 2, 2], [1, 1, 1, 1, 0], [0] * 5]}
  positions = {0: [[0, 1, 2, 3, 4], [0, 1, 2, 3, 2], [0, 1, 2, 2, 2]],
               1: [[0, 1, 2, 3, 4], [0, 1, 2, 3, 2], [0, 1, 2, 2, 2]]}
  marks = {0: [[0, 0, 1, 0, 1], [0, 0, 1, 1, 0], [0] * 5], 1: [[1, 0, 0, 0, 1], [1, 0, 0, 1, 0], [0] * 5]}
  labels_B = jnp.array([1, 0, -1])
  for first in (0, 1):
    want = {'ids_BT': ids[first], 'segments_BT': segments[first], 'positions_BT': positions[first]}
    for batch, marked in ((Labelled(**rows, labels_B=labels_B, types_BT=jnp.array(types_BT),
                                    positions_BT=jnp.array(positions_BT)), 'types_BT'),
                          (Batch(**rows, positions_BT=jnp.array(positions_BT), mask_BT=jnp.array(types_BT) > 0),
                           'mask_BT')):
      found = vars(peft.prompted(batch, vocab=20, length=2, first=first))
      for name, x_BT in (want | {marked: marks[first]}).items():
        assert found[name].tolist() == x_BT and found[name].dtype == getattr(batch, name).dtype, name
      assert found.get('labels_B', labels_B).tolist() == [1, 0, -1]
    plain = peft.prompted(Labelled(**rows, labels_B=labels_B), vocab=20, length=2, first=first)
    assert plain.ids_BT.tolist() == ids[first] and plain.types_BT is None and plain.positions_BT is None


@pytest.mark.parametrize('kind', few(FAMILIES, 'llama', 'bert'))
def test_top_trains_the_last_blocks_alone(kind):
  family, c, p, specs, tree = tuned(kind, peft.Config('top', layers=2))
  np.testing.assert_allclose(hidden(family, c, tree), hidden(family, c, p), atol=1e-5)
  config = optim.Config(freeze=peft.freeze(peft.Config('top', layers=2), c.layers))
  learns = [path for path, yes in params.flatten(optim.trainable_mask(config, specs)).items() if yes]
  assert learns and all(path.startswith(('blocks/1/', 'blocks/2/')) for path in learns)
  np.testing.assert_array_equal(jax.jit(peft.merge)(tree)['blocks']['attn']['q'], p['blocks']['attn']['q'])


def trainable(c, base, layers):
  specs = peft.specs(c, base)
  mask = optim.trainable_mask(optim.Config(freeze=peft.freeze(c, layers)), specs)
  return params.count(params.split(specs, mask)[0])


def test_published_numbers_of_trainable_parameters():
  gpt2_medium, bert_large = gpt2.gpt2_355m().model, bert.bert_large().model
  medium = decoder.specs(gpt2_medium)
  assert trainable(peft.Config('lora', rank=4, alpha=32), medium, 24) == 393_216
  assert trainable(peft.Config('lora', rank=8), encoder.specs(roberta.roberta_base().model), 12) == 294_912
  specs = peft.specs(peft.Config('houlsby', width=64), encoder.specs(bert_large))
  assert params.count(specs, 'reduce|expand') == 6_343_680
  assert trainable(peft.Config('prefix', length=5, hidden=512), medium, 24) == 25_744_896
  stored = jax.eval_shape(lambda key: peft.materialise(params.init(peft.specs(peft.Config('prefix', length=5), medium),
                                                                   key)), jax.random.key(0))
  assert params.count(stored, 'prefix_') == 245_760


@pytest.mark.parametrize('method', few(['lora', 'houlsby', 'pfeiffer', 'prefix', 'prompt', 'top'], 'lora'))
def test_only_what_trains_has_optimizer_state_and_moves(method):
  c = peft.Config(method, targets=EVERYWHERE, rank=2, width=3, length=2, hidden=4, layers=1)
  family, m, p, specs, tree = tuned('gpt2', c)
  optimizer = optim.Config(lr=0.1, schedule='constant', freeze=peft.freeze(c, m.layers))
  tx, mask = optim.make(optimizer, specs), optim.trainable_mask(optimizer, specs)
  state = train.state_of(tree, tx, mask)
  count = params.count(params.split(specs, mask)[0])
  assert 0 < count < 0.6 * params.count(family.specs(m))
  assert params.count((state.opt_state.mu, state.opt_state.nu)) == 2 * count

  def loss(p, batch, key):
    x_BTD = family.apply(peft.materialise(p), m, batch, key=key)
    return {'x': ar.Term(jnp.square(x_BTD).sum(), jnp.float32(batch.size))}, {}
  ids_BT = IDS_BT.at[:, :2].set(jnp.array([50, 51])) if method == 'prompt' else IDS_BT
  state, metrics = jax.jit(train.make_step(loss, tx))(state, ids_BT, jax.random.key(0))
  after = params.flatten(params.join(state.params, state.frozen))
  still = {path for path, w in params.flatten(tree).items() if np.array_equal(w, after[path])}
  frozen = {path for path, yes in params.flatten(mask).items() if not yes}
  assert float(metrics['grad_norm']) > 0 and frozen <= still
  assert not {path for path in still - frozen if 'lora_a' not in path}  # b is 0 still: a has no gradient yet


@pytest.mark.parametrize('scan_layers, chunk', [(True, 64), slow(False, 1024), slow(False, 64), slow(True, 1024)])
def test_no_gradient_of_a_frozen_weight_is_formed(scan_layers, chunk):
  """FLOPs of the compiled step: forward and the way back through activations, two thirds of a full step, and LoRA's."""
  c = decoder.Config(vocab=512, length=64, layers=4, embed=256, heads=4, kv_heads=4, head_dim=64, mlp=1024,
                     scan_layers=scan_layers)
  batch = Batch(*(jnp.ones((4, 65), kind) for kind in (jnp.int32, jnp.int32, jnp.int32, bool)))

  def flops(method):
    few = peft.Config(method, rank=8, targets=r'^blocks/attn/[qv]$', train='')
    specs = peft.specs(few, decoder.specs(c))
    optimizer = optim.Config(freeze=peft.freeze(few, c.layers))
    tx, mask = optim.make(optimizer, specs), optim.trainable_mask(optimizer, specs)
    loss = functools.partial(ar.loss, apply=lambda p, ids_BT, **arrays: decoder.apply(p, c, ids_BT, **arrays),
                             head=lambda p: decoder.head(p, c), c=ar.Config(chunk=chunk))
    state = jax.eval_shape(lambda key: train.init(specs, tx, mask, key), jax.random.key(0))
    step = jax.jit(train.make_step(loss, tx)).lower(state, batch, jax.random.key(0)).compile()
    return sum(hlo.flops(step.as_text()).values())
  assert flops('lora') <= 0.72 * flops('full')


@pytest.mark.parametrize('c, message', [
    (dict(method='lora', targets='nothing'), "peft.targets: 'nothing' matches no parameter"),
    (dict(method='lora', targets='embed/tokens'), 'peft.targets: embed/tokens of shape'),
    (dict(method='lora', targets='attn/q_bias'), 'peft.targets: blocks/attn/q_bias of shape'),
    (dict(method='lora', targets='('), 'is no regular expression'), (dict(method='lora', rank=0), 'peft.rank=0'),
    (dict(method='lora', rate=1.0), 'peft.rate=1.0'), (dict(method='top', layers=9), 'at most the 3 blocks'),
    (dict(method='bitfit'), "peft.method='bitfit'"), (dict(method='prompt', length=0), 'peft.length=0')], ids=str)
def test_mistakes(c, message):
  with pytest.raises(ConfigError) as error:
    peft.specs(peft.Config(**c), decoder.specs(FAMILIES['gpt2'][1]))
  assert message in str(error.value) and '\n' not in str(error.value)


def test_adapters_do_not_merge():
  *_, tree = tuned('bert', peft.Config('houlsby'))
  with pytest.raises(ConfigError, match='cannot be merged'):
    peft.merge(tree)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['gpt2', 'llama', 'bert'])
def test_each_weight_keeps_its_own_rank_and_scale(kind, tmp_path):
  """Written and read again twice; GPT-2's q and v are one tensor there, of one scale."""
  family, c, p = model(kind)
  draw = lambda i, *shape: 0.3 * jax.random.normal(jax.random.key(i), shape)
  attn = dict(p['blocks']['attn'])
  for i, (name, rank, scale) in enumerate((('q', 2, 4.0), ('v', 4, 2.0), ('o', 4, 1.5))):
    w = attn[name]
    inputs = 2 if name == 'o' else 1
    attn[name] = peft_nodes.Lora(w, draw(2 * i, *w.shape[:1 + inputs], rank),
                                 draw(2 * i + 1, 3, rank, *w.shape[1 + inputs:]), scale)
  tree = p | {'blocks': p['blocks'] | {'attn': attn}}
  few, again = peft.Config('lora', train='', rank=2, alpha=8), tree
  for turn in range(2):
    peft_hf.save(tmp_path / f'{turn}', c, again, few)
    few, again = peft_hf.load(tmp_path / f'{turn}', c, p)
    np.testing.assert_allclose(hidden(family, c, again), hidden(family, c, tree), atol=2e-5)
  if kind != 'gpt2':
    assert [again['blocks']['attn'][name].scale for name in 'qvo'] == [4.0, 2.0, 1.5]
  path = tmp_path / '1/adapter_config.json'
  fields = json.loads(path.read_text())
  name = next(n for n in fields['alpha_pattern'] if '0' in n)
  path.write_text(json.dumps(fields | {'alpha_pattern': fields['alpha_pattern'] | {name: 7.0}}))
  with pytest.raises(ConfigError, match='alpha_pattern: .*7.0.* expected one number for all layers'):
    peft_hf.load(tmp_path / '1', c, p)


def test_a_tensor_that_holds_heads_in_turn_is_refused(tmp_path):
  few = peft.Config('lora', train='', targets='^blocks/attn/q$')
  _, c, p, _, tree = tuned('deberta', few)
  with pytest.raises(ConfigError, match='head by head, for which LoRA is not cut'):
    peft_hf.save(tmp_path, c, tree, few)


LITTLE = dict(vocab=9, length=8, layers=1, embed=8, heads=2, head_dim=4, mlp=8)


@pytest.mark.parametrize('model, target', [
    (decoder.Config(**LITTLE, kv_heads=2, tied=False), '^unembed$'),
    (decoder.Config(**LITTLE, kv_heads=2, positions='relative'), 'attn/relative$'),
    (deberta.Config(**LITTLE, relative=4, conv=3), '^conv/kernel$')])
def test_what_no_product_of_a_block_reads_gets_no_lora(model, target):
  specs = (deberta if isinstance(model, deberta.Config) else decoder).specs(model)
  with pytest.raises(ConfigError, match='peft.targets: .* is no matrix of a product'):
    peft.specs(peft.Config('lora', targets=target), specs)


def test_a_pattern_of_what_trains_besides_matches_something():
  specs = decoder.specs(decoder.Config(**LITTLE, kv_heads=2))
  for method in ('lora', 'top', 'prefix'):
    with pytest.raises(ConfigError, match="peft.train: '\\^clasify/' matches no parameter; expected .*'final_norm/"):
      peft.specs(peft.Config(method, train='^clasify/', layers=1), specs)
    peft.specs(peft.Config(method, train='^final_norm/', layers=1), specs)
    peft.specs(peft.Config(method, layers=1), specs)  # the default names a head, which not every model has


def test_flops_of_a_step_in_which_few_train():
  full = budget.Flops(60.0, 12.0)
  assert peft.step_flops(peft.Config(), full, 4) == full
  assert peft.step_flops(peft.Config('lora'), full, 4) == budget.Flops(40.0, 12.0)
  assert peft.step_flops(peft.Config('top', layers=4), full, 4) == full
  assert peft.step_flops(peft.Config('top', layers=1), full, 4) == budget.Flops(30.0, 6.0)
