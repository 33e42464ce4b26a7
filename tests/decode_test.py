"""Decoding against the forward pass, sampling against a NumPy oracle and its own distribution."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
from marks import few
import numpy as np
import pytest
from scipy import stats
import tokenizers

from lm import decode, host, nn, params, sampler, sharding
from lm.errors import ConfigError
from lm.models import decoder
from lm.sampler import Sampling
from lm.text import streaming, tokenizer, training

GPT2 = decoder.Config(vocab=96, length=64, layers=2, embed=32, heads=4, kv_heads=4, head_dim=8, mlp=64)
LLAMA = dataclasses.replace(GPT2, kv_heads=2, positions='rotary', norm='rms', norm_bias=False, bias=False,
                            activation='swiglu', tied=False)
CONFIGS = {'gpt2': GPT2, 'llama': LLAMA,
           'odd': dataclasses.replace(GPT2, kv_heads=1, positions='relative', parallel=True, logit_scale=0.5)}
PROMPTS = ([3, 1, 4], [15, 9, 26, 5, 35, 8, 9], [79, 3, 23, 84, 62, 64, 33, 83, 27, 95, 2, 88])
GREEDY = Sampling(max_new=9, temperature=0)


def key(seed=7):
  return jax.random.key(seed)


@functools.cache
def weights(name):
  """Large enough for sharp and varied predictions: a tiny model of the usual scale repeats itself."""
  p = params.init(decoder.specs(CONFIGS[name]), jax.random.key(0))
  return jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x + 0.1 * jnp.cos(jnp.arange(x.size)), p)


def model(name):
  return decode.of(decoder, CONFIGS[name])


def forward(name, prompt, tokens):
  """Log-probabilities [len(tokens), V] of a plain forward pass over prompt and tokens."""
  c, p = CONFIGS[name], weights(name)
  score = jax.jit(lambda p, ids_BT: jax.nn.log_softmax(decoder.logits(p, c, decoder.apply(p, c, ids_BT))))
  return score(p, jnp.array([[*prompt, *tokens]]))[0, len(prompt) - 1:-1]


def rows(sample):
  """[(tokens, logprobs)] without what lies beyond each row's length."""
  return [(t[:n].tolist(), lp[:n]) for t, lp, n in zip(*map(np.asarray, (
      sample.tokens_BT, sample.logprobs_BT, sample.lengths_B)), strict=True)]


@pytest.mark.parametrize('name', CONFIGS)
def test_greedy_decoding_is_the_forward_pass(name):
  for prompt, (tokens, logprobs) in zip(
      PROMPTS, rows(decode.generate(model(name), weights(name), PROMPTS, GREEDY)), strict=True):
    want = forward(name, prompt, tokens)
    assert len(tokens) == GREEDY.max_new and len(set(tokens)) > 1
    np.testing.assert_array_equal(tokens, want.argmax(-1))
    np.testing.assert_allclose(logprobs, want.max(-1), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['gpt2', 'llama'])
def test_logprobs_of_sampled_tokens_are_the_models_at_that_temperature(name):
  s = Sampling(max_new=9, temperature=1.5, top_k=40, top_p=0.95)
  for prompt, (tokens, logprobs) in zip(
      PROMPTS, rows(decode.generate(model(name), weights(name), PROMPTS, s, key())), strict=True):
    want = jax.nn.log_softmax(forward(name, prompt, tokens) / s.temperature)
    np.testing.assert_allclose(logprobs, want[jnp.arange(9), jnp.array(tokens)], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('name, temperature', [('gpt2', 0), ('llama', 1.0)])
def test_padding_changes_nothing(name, temperature):
  s = dataclasses.replace(GREEDY, temperature=temperature)
  run = jax.jit(functools.partial(decode.run, model(name), s))
  ids_BT = jnp.array([PROMPTS[1], PROMPTS[1][::-1]])
  want = run(weights(name), ids_BT, jnp.ones_like(ids_BT), key())
  for pad in (3, 17):
    padded_BT = jnp.pad(ids_BT, ((0, 0), (pad, 0)), constant_values=5)
    got = run(weights(name), padded_BT, jnp.pad(jnp.ones_like(ids_BT), ((0, 0), (pad, 0))), key())
    np.testing.assert_array_equal(got.tokens_BT, want.tokens_BT)
    np.testing.assert_allclose(got.logprobs_BT, want.logprobs_BT, atol=1e-4)


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_mates():
  s = dataclasses.replace(GREEDY, temperature=1.0)
  generate = functools.partial(decode.generate, model('llama'), weights('llama'), s=s)
  together = rows(generate(prompts=PROMPTS, key=key()))
  others = rows(generate(prompts=(PROMPTS[2], PROMPTS[1], PROMPTS[0], [5] * 20), key=key()))
  assert together[1][0] == others[1][0]
  np.testing.assert_allclose(together[1][1], others[1][1], atol=1e-4)
  assert rows(generate(prompts=PROMPTS[:1], key=key()))[0][0] == together[0][0]


def test_keys_differ_by_row_and_position():
  s = Sampling(max_new=40, temperature=100.0)
  (a, _), (b, _) = rows(decode.generate(model('llama'), weights('llama'), [PROMPTS[0]] * 2, s, key()))
  (c, _), _ = rows(decode.generate(model('llama'), weights('llama'), [PROMPTS[0]] * 2, s, key(8)))
  assert len(set(a)) > 20 and np.mean(np.array(a) == b) < 0.2 and np.mean(np.array(a) == c) < 0.2


def test_stop_tokens_end_rows_and_the_loop():
  free = Sampling(max_new=20)
  whole = [t for t, _ in rows(decode.generate(model('llama'), weights('llama'), PROMPTS, free, key()))]
  stop = (whole[0][2], whole[1][5], whole[2][4])
  ends = [min(i for i, t in enumerate(row) if t in stop) + 1 for row in whole]
  assert len(set(ends)) > 1 and max(ends) < 20
  steps = []

  def apply(p, ids_BT, **kwargs):
    jax.debug.callback(lambda: steps.append(1))
    return model('llama').apply(p, ids_BT, **kwargs)
  counting = dataclasses.replace(model('llama'), apply=apply)
  s = dataclasses.replace(free, stop=stop)
  sample = decode.generate(counting, weights('llama'), PROMPTS, s, key())
  assert [t for t, _ in rows(sample)] == [row[:n] for row, n in zip(whole, ends, strict=True)]
  beyond = np.arange(20)[None] >= np.array(ends)[:, None]
  assert not np.asarray(sample.tokens_BT)[beyond].any() and not np.asarray(sample.logprobs_BT)[beyond].any()
  jax.effects_barrier()
  assert len(steps) == max(ends)


@pytest.mark.slow
@pytest.mark.parametrize('temperature, most', [(1.0, 9), (0, 1)])
def test_stream_yields_what_generate_returns(temperature, most):
  s = Sampling(max_new=most, temperature=temperature, stop=(1, 2, 3, 5, 8, 13, 21, 34, 55, 89))
  want = [t for t, _ in rows(decode.generate(model('gpt2'), weights('gpt2'), PROMPTS, s, key()))]
  columns = np.stack(list(decode.stream(model('gpt2'), weights('gpt2'), PROMPTS, s, key())), 1)
  assert [[t for t in row.tolist() if t >= 0] for row in columns] == want
  assert columns.shape[1] == max(map(len, want))


def test_a_second_call_compiles_nothing():
  traces = []

  def apply(p, ids_BT, **kwargs):
    traces.append(ids_BT.shape)
    return model('llama').apply(p, ids_BT, **kwargs)
  counting = dataclasses.replace(model('llama'), apply=apply)
  p = decode.prepare(weights('llama'))
  for prompts in (PROMPTS, [[1], [2] * 16, [3, 4]]):
    decode.generate(counting, p, prompts, GREEDY)
    list(decode.stream(counting, p, prompts, GREEDY))
  # A bucket of 16; the while loop may trace its body twice, to settle the types of its carry.
  assert set(traces) == {(3, 16), (3, 1)} and traces.count((3, 16)) == 2 and len(traces) <= 6
  assert decode.of(decoder, dataclasses.replace(LLAMA)) is model('llama')


@pytest.mark.slow
@pytest.mark.parametrize('name, columns', [('gpt2', 16), ('llama', 0), ('llama', 128), ('odd', 16)])
def test_prepared_parameters_give_the_same_tokens(name, columns, monkeypatch):
  monkeypatch.setattr(host, 'rows_as_columns', lambda platform: columns)
  want = decode.generate(model(name), weights(name), PROMPTS, GREEDY)
  got = decode.generate(model(name), decode.prepare(weights(name)), PROMPTS, GREEDY)
  np.testing.assert_array_equal(got.tokens_BT, want.tokens_BT)
  np.testing.assert_allclose(got.logprobs_BT, want.logprobs_BT, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('kind, most', [('bfloat16', 0.05), ('int8', 0.1)])
@pytest.mark.parametrize('name', ['gpt2', 'llama'])
def test_fewer_bits_stay_close(name, kind, most):
  """Along the tokens of f32, by log-probability: mean absolute difference, and never none at all."""
  c, p = CONFIGS[name], weights(name)
  low = decode.prepare(p, kind)
  ids_BT = jax.random.randint(key(), (4, 16), 0, c.vocab)
  score = jax.jit(lambda p: jax.nn.log_softmax(decoder.logits(p, c, decoder.apply(p, c, ids_BT))))
  off = jnp.abs(score(low) - score(p)).mean()
  assert 1e-5 < off < most


def test_prepare_refuses_an_unknown_kind():
  with pytest.raises(ConfigError, match='int4'):
    decode.prepare(weights('gpt2'), 'int4')


@pytest.mark.parametrize('kind, prompts', [('float32', PROMPTS[:1]), ('int8', PROMPTS[:2])])
def test_no_step_copies_the_cache_or_a_kernel(kind, prompts):
  p, (ids_BT, segments_BT) = decode.prepare(weights('llama'), kind), decode.pad(prompts)
  loop = jax.jit(functools.partial(decode.run, model('llama'), GREEDY)).lower(p, ids_BT, segments_BT, None)
  text = loop.compile().as_text()
  copied = {tuple(map(int, re.findall(r'\d+', shape))) for shape in re.findall(r'\w+\[([\d,]*)\]\S* copy\(', text)}
  cache = model('llama').init_cache(len(prompts), 16 + GREEDY.max_new)
  big = {x.shape for x in cache.keys} | {x.shape for x in jax.tree.leaves(p['blocks']) if x.ndim > 1}
  assert not copied & big


@pytest.mark.slow
def test_under_a_mesh():
  mesh = sharding.make_mesh(sharding.Config(data=2, fsdp=2, tensor=2))
  prompts, s = [*PROMPTS, PROMPTS[0]], Sampling(max_new=9)
  want = decode.generate(model('llama'), weights('llama'), prompts, s, key())
  with sharding.use(mesh):
    places = sharding.shardings(decoder.specs(LLAMA), mesh)
    got = decode.generate(model('llama'), jax.device_put(weights('llama'), places), prompts, s, key())
  np.testing.assert_array_equal(got.tokens_BT, want.tokens_BT)


def oracle(logits, s):
  """The distribution that `s` asks for, by the definition: sort, cut, renormalise."""
  z = logits.astype(np.float64) / s.temperature
  order = np.argsort(-z, kind='stable')
  if s.top_k:
    order = order[:s.top_k]
  p = np.exp(z[order] - z[order].max())
  p /= p.sum()
  before = np.cumsum(p) - p
  last = z[order][before < s.top_p - 1e-9].min()
  kept = z[order] >= last
  out = np.zeros(len(z))
  out[order[kept]] = p[kept] / p[kept].sum()
  return out


FILTERS = [Sampling(), Sampling(temperature=0.6), Sampling(top_k=5), Sampling(top_p=0.7),
           Sampling(temperature=1.7, top_k=50, top_p=0.9), Sampling(top_k=1), Sampling(top_p=1e-6)]


@pytest.mark.parametrize('s', FILTERS)
def test_candidates_match_the_oracle(s):
  logits_BV = np.array(2 * jax.random.normal(key(), (16, 300)))
  logits_BV[1] = np.round(logits_BV[1])  # many ties
  logits_BV[2, ::2] = -np.inf
  logits_BC, ids_BC = jax.jit(sampler.candidates, static_argnums=1)(logits_BV, s)
  got = np.zeros_like(logits_BV)
  np.put_along_axis(got, np.asarray(ids_BC), np.asarray(jax.nn.softmax(logits_BC)), 1)
  for row, z in zip(got, logits_BV, strict=True):
    np.testing.assert_allclose(row, oracle(z, s), atol=1e-6)


@pytest.mark.parametrize('s', few(FILTERS, FILTERS[0], FILTERS[4]))
def test_samples_follow_the_distribution(s):
  """Chi-square against the oracle; 300 tokens fill one chunk of the sampler and part of a second."""
  n, logits = 20000, np.asarray(2 * jax.random.normal(key(), (300,)))
  sample = jax.jit(sampler.sample_token, static_argnums=2)
  ids = sample(jnp.broadcast_to(jnp.array(logits)[None], (n, 300)), jax.random.split(key(), n), s)
  seen, want = np.bincount(ids, minlength=300), n * oracle(logits, s)
  assert not seen[want == 0].any()
  often = want > 5
  seen, want = (np.append(x[often], x[~often].sum()) for x in (seen, want))
  if want[-1] == 0:
    seen, want = seen[:-1], want[:-1]
  assert len(want) == 1 or stats.chisquare(seen, want * seen.sum() / want.sum()).pvalue > 1e-3


def test_temperature_zero_takes_the_first_of_the_largest():
  logits_BV = jnp.array([[0.0, 3.0, 3.0, 1.0], [-jnp.inf, -jnp.inf, -5.0, -jnp.inf]])
  assert sampler.sample_token(logits_BV, None, GREEDY).tolist() == [1, 2]


@pytest.mark.parametrize('bad, part', [
    ({'max_new': 0}, 'max_new=0'), ({'temperature': -0.1}, 'temperature=-0.1'), ({'temperature': 1e-40}, '1e-40'),
    ({'temperature': float('nan')}, 'nan'),
    ({'temperature': float('inf')}, 'inf'), ({'top_k': -1}, 'top_k=-1'), ({'top_p': 0.0}, 'top_p=0.0'),
    ({'top_p': 1.1}, 'top_p=1.1'), ({'stop': (-1,)}, 'stop')])
def test_sampling_checks_its_ranges(bad, part):
  with pytest.raises(ConfigError, match=part):
    Sampling(**bad)


def test_what_cannot_be_decoded_is_refused_before_compiling():
  def apply(*args, **kwargs):
    raise AssertionError('traced')
  untraced = dataclasses.replace(model('gpt2'), apply=apply)
  for prompts, s, k, part in [
      ([], GREEDY, None, 'prompts'), ([[1], []], GREEDY, None, 'prompts'), ([[1]], Sampling(max_new=1), None, 'key'),
      ([[1], [2] * 56], GREEDY, None, 'at most 64')]:
    with pytest.raises(ConfigError, match=part):
      decode.generate(untraced, weights('gpt2'), prompts, s, k)
    with pytest.raises(ConfigError, match=part):
      next(decode.stream(untraced, weights('gpt2'), prompts, s, k))


def test_pad_to_a_width():
  ids_BT, segments_BT = decode.pad([[7], [8, 9, 10]], 4)
  np.testing.assert_array_equal(ids_BT, [[0, 0, 0, 7], [0, 8, 9, 10]])
  np.testing.assert_array_equal(segments_BT, [[0, 0, 0, 1], [0, 1, 1, 1]])
  assert decode.pad([[1] * 17])[0].shape == (1, 32) and decode.pad([[1] * 17], 17)[0].shape == (1, 17)
  with pytest.raises(ConfigError, match='width=2: a prompt has 3 tokens'):
    decode.pad([[7], [8, 9, 10]], 2)


@pytest.mark.slow
def test_rows_of_a_larger_set_draw_what_they_draw_there():
  ids_BT, segments_BT = decode.pad([PROMPTS[0]] * 4, 4)
  run = jax.jit(functools.partial(decode.run, model('llama'), Sampling(max_new=9)))
  want = run(weights('llama'), ids_BT, segments_BT, key())
  got = run(weights('llama'), ids_BT[:2], segments_BT[:2], nn.Keys(key(), jnp.array([3, 1])))
  np.testing.assert_array_equal(got.tokens_BT, want.tokens_BT[jnp.array([3, 1])])
  assert len(set(map(tuple, np.asarray(want.tokens_BT).tolist()))) == 4


def test_the_last_position_of_a_learned_table_is_of_use():
  prompt = list(range(1, 56))
  (tokens, _), = rows(decode.generate(model('gpt2'), weights('gpt2'), [prompt], GREEDY))
  np.testing.assert_array_equal(tokens, forward('gpt2', prompt, tokens).argmax(-1))


def test_rotary_positions_have_no_end():
  (tokens, _), = rows(decode.generate(model('llama'), weights('llama'), [[3] * 70], GREEDY))
  assert len(tokens) == 9


def test_pieces_are_whole_characters():
  t, text = tokenizer.byte(), 'Größe 你好，世界 🎉!\n'
  out = list(streaming.pieces(t.decode, t.encode(text).tolist()))
  assert ''.join(out) == text and out == list(text)


def test_an_unfinished_character_is_left_out_and_a_wrong_byte_is_not():
  t = tokenizer.byte()
  assert ''.join(streaming.pieces(t.decode, t.encode('ab你').tolist()[:-1])) == 'ab'
  assert ''.join(streaming.pieces(t.decode, [0x61, 0xff, 0x62])) == 'a\ufffdb'


def test_control_ids_show_as_nothing():
  t = tokenizer.byte()
  assert list(streaming.pieces(t.decode, [0x61, t.eos_id, 0x62])) == ['a', 'b']


def test_pieces_keep_the_space_that_sentencepiece_drops_at_the_start_of_a_text(tmp_path):
  """And byte-fallback pieces: 你 is not in the training text."""
  t = training.train_sentencepiece(['the cat sat on the mat. a cat and a dog.'] * 50, tmp_path / 't.model', vocab=276)
  ids = t.encode('the cat 你 sat').tolist()
  assert len(list(streaming.pieces(t.decode, ids))) < len(ids)
  assert ''.join(streaming.pieces(t.decode, ids)) == t.decode(ids) == 'the cat 你 sat'


def test_pieces_behind_a_prompt_keep_their_first_space(tmp_path):
  """SentencePiece, and Metaspace as HF's tokenizers have it: either drops the space of a text's first token."""
  sp = training.train_sentencepiece(['the cat sat on the mat. a cat and a dog.'] * 50, tmp_path / 't.model', vocab=276)
  vocab = {name: i for i, name in enumerate(('▁', 'a', 'b', '▁a', '▁b'))}
  model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [('▁', 'a'), ('▁', 'b')]))
  model.pre_tokenizer, model.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
  model.save(str(tmp_path / 'tokenizer.json'))
  for t, prompt, more in ((sp, 'the cat', ' sat 你'), (tokenizer.load(tmp_path / 'tokenizer.json'), 'a', ' b')):
    ids = t.encode(prompt + more).tolist()
    n = len(t.encode(prompt))
    assert t.encode(prompt).tolist() == ids[:n]
    assert ''.join(streaming.pieces(t.decode, ids[n:], ids[:n])) == more
  assert ''.join(streaming.pieces(sp.decode, sp.encode(' sat').tolist(), [sp.bos_id])) == ' sat'  # begins a text


@pytest.mark.slow
@pytest.mark.parametrize('name', CONFIGS)
def test_a_long_prompt_attends_by_blocks(name, monkeypatch):
  """The tokens of the reference, without holding all scores; and no more padding than to the next 1,024."""
  c, B, T = dataclasses.replace(CONFIGS[name], length=1100), 2, 1024
  p, rng = params.init(decoder.specs(c), jax.random.key(1)), np.random.default_rng(0)
  prompts = [rng.integers(0, 96, n) for n in (T, 300)]
  found = {}
  for long in (decode._LONG, T):
    monkeypatch.setattr(decode, '_LONG', long)
    run = jax.jit(lambda p, *rows: decode.run(decode.of(decoder, c), GREEDY, p, *rows, None))
    compiled = run.lower(p, *decode.pad(prompts)).compile()
    found[long] = compiled(p, *decode.pad(prompts)), compiled.memory_analysis().temp_size_in_bytes
  (few_, least), (all_, most) = found.values()
  np.testing.assert_array_equal(few_.tokens_BT, all_.tokens_BT)
  np.testing.assert_allclose(few_.logprobs_BT, all_.logprobs_BT, atol=1e-4)
  scores = 4 * B * c.heads * T * (T + GREEDY.max_new)
  assert most > scores and (name == 'odd' or least < most - scores / 2)  # relative positions are a bias, held whole
  assert [decode.pad([[1] * n])[0].shape[1] for n in (3, 600, 1025, 2048, 4097)] == [16, 1024, 2048, 2048, 5120]
