"""Masks against their statistics and promises, the loss against its dense form and numpy."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
from marks import few, slow
import numpy as np
import pytest

from lm import config, sharding, train
from lm.data import corpora, loader, masking
from lm.data.inputs import Inputs
from lm.errors import ConfigError
from lm.losses import mlm
from lm.text import tokenizer as tokenizers

V, D = 40, 8
CLS, SEP, MASK, PAD = 1, 2, 3, 0
TOKENS = masking.Tokens(MASK, V, (PAD, CLS, SEP, MASK), np.arange(V) % 3 != 0)
KINDS = {'bert': {}, 'word': {'spans': 'word'}, 'ngram': {'spans': 'ngram'}, 'span': {'spans': 'span'},
         'roberta': {'counts': 'roberta'}, 'electra': {'counts': 'electra', 'mask': 0.85, 'random': 0.0},
         'v3': {'mask': 1.0, 'random': 0.0}, 'few': {'max_predictions': 3}, 'all': {'rate': 1.0}}


def inputs_of(lengths, T, seed=0, vocab=V):
  """Rows of the given lengths with [CLS] ... [SEP] ... [SEP]; 0 = an empty row."""
  rng = np.random.default_rng(seed)
  lengths, columns = np.asarray(lengths)[:, None], np.arange(T)[None]
  used = columns < lengths
  special = used & ((columns == 0) | (columns == lengths // 2) | (columns == lengths - 1))
  ids = np.where(special, np.where(columns == 0, CLS, SEP), rng.integers(4, vocab, (len(lengths), T)))
  as32 = lambda x: jnp.asarray(x, jnp.int32)
  return Inputs(as32(np.where(used, ids, PAD)), as32(used), as32(used & (columns > lengths // 2)),
                as32(np.where(used, columns, 0)), jnp.asarray(special), jnp.asarray(rng.random(len(lengths)) < 0.5),
                jnp.asarray(rng.permutation(2**20)[:len(lengths)], jnp.uint32))


@functools.cache
def corruption(c, tokens):
  return jax.jit(functools.partial(masking.corrupt, c=c, t=tokens))


def corrupt(inputs, seed=0, tokens=TOKENS, **kwargs):
  return corruption(masking.Config(**kwargs), tokens)(inputs, jax.random.key(seed))


LENGTHS = [0, 1, 2, 3, 4, 9, 64, 64, 50, 33, 64, 17]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('seed', range(5))
def test_what_is_corrupted_is_what_is_predicted(kind, seed):
  inputs, c = inputs_of(LENGTHS, 64, seed), masking.Config(**KINDS[kind])
  m = jax.tree.map(np.asarray, corrupt(inputs, seed, **KINDS[kind]))
  P = c.predictions(64)
  assert m.positions_BP.shape == m.targets_BP.shape == m.weights_BP.shape == (len(LENGTHS), P)
  ids, special, used = (np.asarray(x) for x in (inputs.ids_BT, inputs.special_BT, inputs.segments_BT > 0))
  for b, length in enumerate(LENGTHS):
    n = int(m.weights_BP[b].sum())
    positions = m.positions_BP[b, :n]
    assert m.weights_BP[b].tolist() == [1] * n + [0] * (P - n) and len(set(positions.tolist())) == n
    assert (used[b] & ~special[b])[positions].all() and (m.targets_BP[b, :n] == ids[b, positions]).all()
    untouched = np.ones(64, bool)
    untouched[positions] = False
    assert (m.ids_BT[b] == ids[b])[untouched].all()
    assert ((m.ids_BT[b] >= 0) & (m.ids_BT[b] < V)).all()
    free = (used[b] & ~special[b]).sum()
    count = min(P, max(1, round(c.rate * length)), free)
    if kind in ('bert', 'v3', 'few', 'all', 'span'):
      assert n == count
    elif kind == 'roberta':
      assert n in {min(P, free, int(c.rate * length) + u) for u in (0, 1)}
    elif kind in ('ngram', 'electra'):
      assert min(count, 1) <= n <= (P if kind == 'ngram' else count)
    else:
      assert n <= count
  if kind == 'v3':
    assert (m.ids_BT != ids).sum() == m.weights_BP.sum() and (m.ids_BT[m.ids_BT != ids] == MASK).all()
  if kind == 'all':
    assert m.weights_BP.sum() == (used & ~special).sum()


def chi2(observed, expected):
  return ((observed - expected)**2 / expected).sum()


@pytest.mark.parametrize('kind', few(['bert', 'roberta', 'electra', 'word', 'span'], 'bert', 'span'))
def test_statistics_of_a_million_tokens(kind):
  """Selection share and place, 80/10/10, and random replacements uniform over the vocabulary."""
  B, T, vocab = 8192, 128, 64
  inputs = inputs_of([T] * B, T, vocab=vocab)
  tokens = masking.Tokens(MASK, vocab, (PAD, CLS, SEP, MASK), np.arange(vocab) % 3 != 0)
  m = jax.tree.map(np.asarray, corrupt(inputs, tokens=tokens, **KINDS[kind]))
  ids = np.asarray(inputs.ids_BT)
  n = m.weights_BP.sum()
  chosen = np.zeros((B, T), bool)
  np.put_along_axis(chosen, np.where(m.weights_BP > 0, m.positions_BP, 0), True, axis=1)
  chosen[:, 0] = False
  assert ids.size >= 10**6 and chosen.sum() == n
  share = {'bert': 19 / T, 'span': 19 / T, 'roberta': 0.15, 'word': 19 / T,
           'electra': 125 / T * (1 - (1 - 1 / 125)**19)}[kind]
  assert abs(n / ids.size - share) < (2e-4 if kind != 'word' else 1e-3)
  places = np.delete(chosen.sum(0), [0, T // 2, T - 1])
  if kind in ('bert', 'roberta', 'electra'):
    # Without replacement a row's draws repel each other: the statistic is at most that of independent ones.
    assert chi2(places, places.mean()) < 125 + 5 * np.sqrt(2 * 125)
  else:
    assert abs(places[10:-10] / places.mean() - 1).max() < 0.25
  got = np.take_along_axis(m.ids_BT, m.positions_BP, 1)[m.weights_BP > 0]
  was = m.targets_BP[m.weights_BP > 0]
  mask, random = masking.Config(**KINDS[kind]).mask, masking.Config(**KINDS[kind]).random
  allowed = vocab - (4 if kind == 'roberta' else 0)
  other = random * (1 - 1 / allowed)  # a random token may be the original one
  as_mask = mask + (0 if kind == 'roberta' else random / allowed)
  counts = np.array([(got == MASK).sum(), (got == was).sum()])
  counts, want = np.append(counts, n - counts.sum()), n * np.array([as_mask, 1 - mask - other, mask + other - as_mask])
  clumped = 5 if kind == 'span' else 1  # a span of 3.8 words on average has one fate
  assert counts[want < 0.5].sum() == 0
  assert chi2(counts[want > 0.5], want[want > 0.5]) < 20 * clumped  # 2 degrees of freedom: once in 20,000 times
  if random:
    replaced = got[(got != was) & (got != MASK)]
    seen = np.bincount(replaced, minlength=vocab)
    if kind == 'roberta':
      assert not seen[[PAD, CLS, SEP, MASK]].any()
      seen = seen[4:]
    else:
      assert seen[[PAD, CLS, SEP]].all()  # the whole vocabulary, as in BERT's code; [MASK] itself was counted above
      seen = np.append(seen[4:] * 60 / 59, seen[:3])  # an ordinary token is missed where it was the original
    assert chi2(seen, seen.mean()) < clumped * (len(seen) + 5 * np.sqrt(2 * len(seen)))


def test_robertas_random_words_are_the_ordinary_ones():
  m = corrupt(inputs_of([64] * 100, 64), counts='roberta', mask=0.0, random=1.0)
  drawn = jnp.take_along_axis(m.ids_BT, m.positions_BP, 1)[m.weights_BP > 0]
  assert set(drawn.tolist()) == set(range(V)) - set(TOKENS.special)


def test_counts_round_as_pythons_do():
  lengths = np.arange(3, 65)
  m = corrupt(inputs_of(lengths, 64), max_predictions=64)
  want = [min(max(1, round(0.15 * n)), n - 3) for n in lengths.tolist()]
  assert np.asarray(m.weights_BP.sum(1)).tolist() == want


def word_numbers(inputs, b):
  """Number of the word of each token, -1 for special ones, by a loop."""
  ids, special, used = (np.asarray(x[b]) for x in (inputs.ids_BT, inputs.special_BT, inputs.segments_BT))
  words, word, fresh = [], -1, True
  for i, s, u in zip(ids, special, used, strict=True):
    free = bool(u) and not s
    word += free and (fresh or bool(TOKENS.starts_V[i]))
    words.append(word if free else -1)
    fresh = not free
  return np.array(words)


def chosen_rows(inputs, m):
  positions, weights = np.asarray(m.positions_BP), np.asarray(m.weights_BP) > 0
  for b in range(len(positions)):
    chosen = np.zeros(inputs.ids_BT.shape[1], bool)
    chosen[positions[b, weights[b]]] = True
    yield b, chosen


def test_whole_words_are_chosen_whole_and_as_many_as_fit():
  inputs = inputs_of([64] * 60 + [20] * 20, 64)
  for b, chosen in chosen_rows(inputs, corrupt(inputs, spans='word')):
    words = word_numbers(inputs, b)
    sizes = np.bincount(words[words >= 0])
    taken = set(words[chosen].tolist())
    assert chosen.sum() == sum(sizes[w] for w in taken)
    room = min(9, max(1, round(0.15 * int((inputs.segments_BT[b] > 0).sum())))) - chosen.sum()
    assert room == 0 or all(sizes[w] > room for w in range(len(sizes)) if w not in taken)


@pytest.mark.slow
def test_spans_are_runs_of_words_with_the_lengths_of_spanbert():
  """With one span a row at most, its length is the drawn one: geometric with p = .2, cut at 10."""
  every = dataclasses.replace(TOKENS, starts_V=None)
  T = 512
  inputs = inputs_of([T] * 3000, T)
  m = corrupt(inputs, tokens=every, spans='span', rate=10 / T, max_predictions=10, mask=1.0, random=0.0)
  corrupted, alone = np.asarray(m.ids_BT), 0
  for b, chosen in chosen_rows(inputs, m):
    starts = np.flatnonzero(np.diff(chosen.astype(int), prepend=0) == 1)
    stops = np.flatnonzero(np.diff(chosen.astype(int), append=0) == -1) + 1
    assert chosen.sum() == 10 and (stops - starts).max() <= 10 and (corrupted[b, chosen] == MASK).all()
    alone += len(starts) == 1
  p10 = 0.2 * 0.8**9 / (1 - 0.8**10)
  assert alone / 3000 == pytest.approx(p10, abs=0.02)  # the rest are several spans, the last cut short


def spanbert(T, count, rng):
  """How many runs of masked tokens SpanBERT's loop leaves among T words."""
  masked = np.zeros(T, bool)
  while masked.sum() < count:
    length = rng.choice(np.arange(1, 11), p=0.2 * 0.8**np.arange(10) / (1 - 0.8**10))
    anchor = rng.integers(T)
    if not masked[anchor]:
      for i in range(anchor, min(anchor + length, T)):
        masked[i] |= masked.sum() < count
  return (np.diff(masked.astype(int), prepend=0) == 1).sum()


def test_many_spans_fall_as_the_loop_of_spanbert_lets_them():
  rng = np.random.default_rng(0)
  want = [spanbert(61, 38, rng) for _ in range(1500)]
  inputs = inputs_of([64] * 1500, 64)
  m = corrupt(inputs, tokens=dataclasses.replace(TOKENS, starts_V=None), spans='span', rate=38 / 64)
  got = [(np.diff(np.delete(chosen, [0, 32, 63]).astype(int), prepend=0) == 1).sum()
         for _, chosen in chosen_rows(inputs, m)]
  assert abs(np.mean(got) - np.mean(want)) < 5 * np.sqrt((np.var(got) + np.var(want)) / 1500)


def test_all_of_a_span_is_replaced_in_one_way():
  inputs = inputs_of([64] * 200, 64)
  m = corrupt(inputs, spans='span', mask=0.5, random=0.0, rate=0.1)
  together = []
  for b, chosen in chosen_rows(inputs, m):
    masked = np.asarray(m.ids_BT[b]) == MASK
    together += [masked[i] == masked[i + 1] for i in np.flatnonzero(chosen[:-1] & chosen[1:])]
  assert np.mean(together) > 0.9  # two spans may touch


def test_ngrams_lie_in_their_windows():
  """One n-gram in each window of 6 n words: never more than 3 words on end but where two windows meet."""
  every = dataclasses.replace(TOKENS, starts_V=None)
  inputs = inputs_of([256] * 800, 256)
  m = corrupt(inputs, tokens=every, spans='ngram', rate=1 / 6.5, max_predictions=256)
  share, lengths = [], np.zeros(4)
  for _, chosen in chosen_rows(inputs, m):
    words = np.delete(chosen, [0, 128, 255])
    starts = np.flatnonzero(np.diff(words.astype(int), prepend=0) == 1)
    stops = np.flatnonzero(np.diff(words.astype(int), append=0) == -1) + 1
    assert (stops - starts).max() <= 6 and starts[0] < 18
    lengths += np.bincount(np.minimum(stops - starts, 3), minlength=4)
    share.append(words.mean())
    assert np.diff(starts).max() < 36
  assert 0.11 < np.mean(share) < 1 / 6 + 0.01  # n of 6 n, less what the windows' ends cut off
  assert lengths[1] > lengths[2] > lengths[3] > 0
  few = corrupt(inputs, tokens=every, spans='ngram', max_predictions=256).weights_BP.sum(1)
  assert few.max() == round(0.15 * 256) > few.min()  # a window in 6 is more than the rate: the last ones stay whole


@pytest.mark.slow  # compiles long
def test_draws_do_not_depend_on_the_neighbours_and_do_on_the_key():
  inputs = inputs_of(LENGTHS, 64)
  part = jax.tree.map(lambda x: x[4:9], inputs)
  for kind in KINDS.values():
    whole, again, other = corrupt(inputs, **kind), corrupt(part, **kind), corrupt(inputs, seed=1, **kind)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a[4:9] == b).all(), whole, again))
    assert (whole.positions_BP != other.positions_BP).any() or kind.get('rate') == 1.0
    static = corrupt(inputs, static=True, **kind), corrupt(inputs, seed=1, static=True, **kind)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), *static))
    renamed = inputs.replace(draw_B=inputs.draw_B + 1)
    assert (corrupt(renamed, static=True, **kind).ids_BT != static[0].ids_BT).any()


def specs_and_functions(seed=0):
  """A model that sees the mean of its row, so that corruption matters, with head, bias and NSP."""
  keys = jax.random.split(jax.random.key(seed), 6)
  draw = lambda i, *shape: 0.5 * jax.random.normal(keys[i], shape)
  p = {'tokens': draw(0, V, D), 'positions': draw(1, 64, D), 'w': draw(2, D, D), 'bias': draw(3, V),
       'nsp': draw(4, D, 2)}

  def apply(p, ids_BT, *, positions_BT, segments_BT, types_BT, key):
    x = p['tokens'][ids_BT] + p['positions'][positions_BT] + types_BT[..., None]
    used = (segments_BT > 0)[..., None]
    return jnp.tanh(x + (x * used).sum(1, keepdims=True) / jnp.maximum(used.sum(1, keepdims=True), 1))
  head = lambda p, x: (jnp.tanh(x @ p['w']), p['tokens'], p['bias'])
  return p, dict(apply=apply, head=head, tokens=TOKENS), lambda p, x: x[:, 0] @ p['nsp']


@pytest.mark.slow
def test_gathered_loss_is_the_dense_loss():
  p, f, _ = specs_and_functions()
  inputs, key, c = inputs_of(LENGTHS, 64), jax.random.key(5), mlm.Config(chunk=50)

  def dense(p):
    m = masking.corrupt(inputs, jax.random.fold_in(key, 0), c, TOKENS)
    x = f['apply'](p, m.ids_BT, positions_BT=inputs.positions_BT, segments_BT=inputs.segments_BT,
                   types_BT=inputs.types_BT, key=None)
    y, w, b = f['head'](p, x)
    nll = -jax.nn.log_softmax(jnp.einsum('btd,vd->btv', y, w) + b[None, None])
    weights = jnp.zeros(inputs.ids_BT.shape).at[jnp.arange(len(LENGTHS))[:, None], m.positions_BP].add(m.weights_BP)
    picked = jnp.take_along_axis(nll, inputs.ids_BT[..., None], -1)[..., 0]
    return (picked * weights).sum() / weights.sum()

  def gathered(p):
    terms, metrics = mlm.loss(p, inputs, key, c=c, **f)
    assert set(terms) == {'nll'} and set(metrics) == {'loss', 'accuracy'}
    return train.objective(terms, {k: t.weight for k, t in terms.items()})
  (a, da), (b, db) = (jax.jit(jax.value_and_grad(f))(p) for f in (gathered, dense))
  assert float(a) == pytest.approx(float(b), abs=1e-6)
  for x, y in zip(jax.tree.leaves(da), jax.tree.leaves(db), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-6)
  assert float(abs(da['bias']).max()) > 1e-3 and float(abs(da['w']).max()) > 1e-3


def test_next_sentence_term():
  p, f, nsp = specs_and_functions()
  inputs = inputs_of([64, 50, 0, 33], 64).replace(random_B=jnp.array([True, False, True, False]))
  inputs = inputs.replace(types_BT=inputs.types_BT.at[3].set(0))  # one segment: nothing to tell
  logits = jnp.array([[1.0, 3.0], [0.5, 0.7], [9.0, 0.0], [9.0, 0.0]])
  given = functools.partial(mlm.loss, inputs=inputs, c=mlm.Config(), nsp=lambda p, x: logits, **f)
  terms, metrics = jax.jit(lambda p: given(p, key=jax.random.key(0)))(p)
  want = np.log1p(np.exp(-2.0)) + np.log1p(np.exp(0.2))
  assert float(terms['nsp'].weight) == 2 and float(terms['nsp'].total) == pytest.approx(want, rel=1e-6)
  assert float(metrics['nsp_loss'].total) == pytest.approx(want, rel=1e-6)
  assert (float(metrics['nsp_accuracy'].total), float(metrics['nsp_accuracy'].weight)) == (1, 2)
  grad = jax.jit(jax.grad(lambda p: mlm.loss(p, inputs, None, c=mlm.Config(), nsp=nsp, **f)[0]['nsp'].total))(p)
  assert float(abs(grad['nsp']).max()) > 0


@pytest.mark.parametrize('microbatches', [slow(2), 4])
def test_accumulation_of_static_masks_is_exact(microbatches):
  """Rows differ in how much they predict, so a mean of microbatch means would be wrong."""
  p, f, nsp = specs_and_functions()
  inputs = inputs_of([64, 0, 5, 64, 40, 3, 2, 64], 64)
  loss = functools.partial(mlm.loss, c=mlm.Config(static=True), nsp=nsp, **f)
  whole, parts = (jax.jit(train.accumulate(loss, m))(p, inputs, jax.random.key(1)) for m in (1, microbatches))
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-6)
  assert set(whole[2]) == {'loss', 'accuracy', 'nsp_loss', 'nsp_accuracy', 'targets'}


@pytest.mark.slow
def test_accumulation_of_dynamic_masks_weighs_by_what_was_drawn():
  p, f, _ = specs_and_functions()
  inputs = inputs_of([64, 0, 5, 64, 40, 3, 2, 64], 64)
  loss = functools.partial(mlm.loss, c=mlm.Config(counts='roberta'), **f)
  key = jax.random.key(1)
  grads, value, metrics = jax.jit(train.accumulate(loss, 4))(p, inputs, key)

  def by_hand(p):
    parts = [loss(p, jax.tree.map(lambda x, i=i: x[i::4], inputs), key)[0]['nll']
             for i in range(4)]
    return sum(t.total for t in parts) / sum(t.weight for t in parts)
  want, want_grads = jax.jit(jax.value_and_grad(by_hand))(p)
  assert float(value) == pytest.approx(float(want), abs=1e-6) and float(metrics['loss']) == pytest.approx(float(want))
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('lengths', [[0, 0], [1, 2], [2, 0]])
def test_nothing_to_mask_gives_loss_and_gradient_zero(lengths):
  p, f, _ = specs_and_functions()
  inputs = inputs_of(lengths, 64)
  for microbatches in (1, 2):
    loss = functools.partial(mlm.loss, c=mlm.Config(), **f)
    grads, value, metrics = jax.jit(train.accumulate(loss, microbatches))(p, inputs, jax.random.key(0))
    assert float(value) == 0 and all(float(m) == 0 for m in metrics.values())
    assert all(not np.asarray(g).any() for g in jax.tree.leaves(grads))


def test_any_mesh_gives_the_same():
  p, f, nsp = specs_and_functions()
  inputs = inputs_of([64, 64, 5, 64, 40, 3, 2, 64], 64)
  loss = functools.partial(mlm.loss, c=mlm.Config(), nsp=nsp, **f)
  gradient = train.accumulate(loss, 1)
  want = jax.jit(gradient)(p, inputs, jax.random.key(1))
  mesh = sharding.make_mesh(sharding.Config(data=4, tensor=2))
  with sharding.use(mesh):
    sharded = jax.device_put(inputs, sharding.batch_sharding(mesh))
    got = jax.jit(gradient)(p, sharded, jax.random.key(1))
  for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize('kind', few(['bert', 'word', 'span', 'ngram'], 'bert', 'ngram'))
def test_no_array_of_tokens_times_vocabulary(kind):
  """Neither [B, T, V] nor [B, P, V], forward or backward."""
  B, T, vocab, d = 8, 128, 2048, 16
  c = mlm.Config(chunk=16, **KINDS[kind])
  inputs = inputs_of([T] * B, T)
  p = {'tokens': jnp.ones((vocab, d)), 'bias': jnp.zeros(vocab)}
  apply = lambda p, ids, **_: p['tokens'][ids]
  f = lambda p: mlm.loss(p, inputs, jax.random.key(0), apply=apply, head=lambda p, x: (x, p['tokens'], p['bias']), c=c,
                         tokens=TOKENS)[0]['nll'].total
  for program in (f, jax.grad(f)):
    text = jax.jit(program).lower(p).compile().as_text()
    sizes = [np.prod([int(n) for n in shape.split(',')]) for shape in re.findall(r'[a-z]+\d*\[([0-9,]+)\]', text)]
    assert vocab * d <= max(sizes) < B * c.predictions(T) * vocab / 4


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  root = tmp_path_factory.mktemp('data')
  words = ['[PAD]', '[CLS]', '[SEP]', '[MASK]', '[UNK]', '.', *'abcdefgh', '##a']
  (root / 'vocab.txt').write_text('\n'.join(words) + '\n')
  rng = np.random.default_rng(0)
  corpora.write_jsonl(root / 'a.jsonl', [corpora.Document(str(i), ' '.join(rng.choice(list('abcdefgh.'), 60)))
                                         for i in range(40)])
  c = loader.Config(str(root / 'a.jsonl'), tokenizer=str(root / 'vocab.txt'), length=32, batch=8, packing='bert_pairs',
                    copies=2)
  return loader.prepare(c, root / 'cache', seed=1)


def test_a_resumed_run_draws_the_same_masks(data):
  """From the loader's start step and the key folded with the step, as `train.make_step` does."""
  tokens = masking.tokens(data.tokenizer)
  assert (tokens.mask, tokens.vocab, tokens.special) == (3, 15, (0, 1, 2, 3)) and not tokens.starts_V[14]
  place = sharding.batch_sharding(sharding.make_mesh(sharding.Config()))
  draw = jax.jit(lambda batch, step: masking.corrupt(
      batch, jax.random.fold_in(jax.random.key(9), step), masking.Config(), tokens))

  def run(start, steps):
    batches = itertools.islice(loader.train_batches(data, place, start), steps)
    return [draw(batch, step) for step, batch in enumerate(batches, start)]
  straight, resumed = run(0, 6), run(3, 3)
  for a, b in zip(straight[3:], resumed, strict=True):
    assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), a, b))


@pytest.mark.parametrize('static', [True, False])
def test_epochs_repeat_static_masks_and_no_others(data, static):
  tokens, rows = masking.tokens(data.tokenizer), data.rows_per_epoch
  steps = -(-2 * rows // 8)
  seen = {}
  draw = jax.jit(lambda batch, key: masking.corrupt(batch, key, masking.Config(static=static), tokens))
  for step in range(steps):
    batch = Inputs(**loader.host_batch(data, step))
    m = draw(batch, jax.random.fold_in(jax.random.key(9), step))
    for number, ids in zip(batch.draw_B.tolist(), np.asarray(m.ids_BT), strict=True):
      seen.setdefault(number, []).append(ids.tolist())
  twice = [ids[0] == ids[1] for ids in seen.values() if len(ids) > 1]
  assert len(twice) == rows and (all(twice) if static else sum(twice) < rows / 20)


@pytest.mark.parametrize(('kwargs', 'match'), [
    ({'rate': 0.0}, 'rate'), ({'rate': 1.1}, 'rate'), ({'mask': 0.8, 'random': 0.3}, 'loss.random'),
    ({'mask': -0.1}, 'loss.mask'), ({'spans': 'letter'}, 'spans'), ({'counts': 'gpt'}, 'counts'),
    ({'counts': 'electra', 'spans': 'word'}, 'spans'), ({'max_predictions': -1}, 'max_predictions'),
    ({'chunk': 0}, 'chunk')])
def test_bad_config(kwargs, match):
  with pytest.raises(ConfigError, match=match):
    mlm.Config(**kwargs)


def test_config():
  assert masking.Config().predictions(512) == 79 and masking.Config().predictions(128) == 19
  assert masking.Config(rate=0.25).predictions(512) == 130 and masking.Config().predictions(4) == 1
  assert masking.Config(rate=1.0).predictions(64) == 64 and masking.Config(max_predictions=77).predictions(512) == 77
  c = config.override(mlm.Config(), 'spans=word', 'rate=0.25', 'chunk=7')
  assert (c.spans, c.rate, c.chunk) == ('word', 0.25, 7)


def test_a_tokenizer_without_a_mask_token_is_a_config_error():
  with pytest.raises(ConfigError, match='vocabulary without a mask token'):
    masking.tokens(tokenizers.byte())
