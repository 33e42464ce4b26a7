"""Prompts and graded answers as rows: what is written, masked, cut, left out, and where it goes."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lm import sharding
from lm.data import examples, preferences
from lm.data.examples import Graded
from lm.errors import ConfigError, DataError
from lm.text import chat, tokenizer as tokenizers, training

BYTE = tokenizers.byte()
PLACE = sharding.batch_sharding(sharding.make_mesh(sharding.Config()))


def config(**changes):
  return preferences.Config(**{'corpus': 'x', 'tokenizer': 'byte', 'template': 'plain', 'length': 40, 'batch': 2,
                               'answers': 3, 'validation_fraction': 0.5, 'threads': 0} | changes)


def graded(prompt, answers, grades, **more):
  return Graded(tuple([chat.Message('user', prompt)] if prompt else ()), tuple(answers), tuple(grades), **more)


def show(ids):
  return bytes(i for i in ids if i < 256).decode() + '$' * int((np.asarray(ids) == BYTE.eos_id).sum())


def rows(found, n):
  """[(text of the row, text of its mask)] of prompt n."""
  b = jax.tree.map(lambda x: x[n], found.answers)
  return [(show(ids[seen > 0]), show(ids[mask])) for ids, seen, mask, there in zip(
      b.ids_BT, b.segments_BT, b.mask_BT, found.exists_NK[n], strict=True) if there]


def write(path, *records):
  path.write_text('\n'.join(json.dumps(r, ensure_ascii=False) for r in records), encoding='utf-8')
  return path


def test_prompts_with_unequal_numbers_of_answers_share_arrays():
  found, report = preferences.ranked([graded('why?', ['ab', '好', 'c'], [1, 3, 2]),
                                      graded('how', ['x', 'yz'], [2, -1.5])], config(), BYTE)
  assert rows(found, 0) == [('why?\nab$', 'ab$'), ('why?\n好$', '好$'), ('why?\nc$', 'c$')]
  assert rows(found, 1) == [('how\nx$', 'x$'), ('how\nyz$', 'yz$')]
  assert found.grades_NK.tolist() == [[1, 3, 2], [2, -1.5, 0]] and found.grades_NK.dtype == np.float32
  assert found.exists_NK.tolist() == [[True] * 3, [True, True, False]]
  assert all(x.shape == (2, 3, 41) for x in jax.tree.leaves(found.answers))
  assert not any(x[1, 2].any() for x in jax.tree.leaves(found.answers))
  assert found.answers.positions_BT[0, 0, :8].tolist() == [*range(8)]
  assert (report.prompts, report.answers, report.truncated, report.dropped) == (2, 5, 0, 0)


@pytest.mark.parametrize('template', ['none', 'chatml'])
def test_without_a_prompt_a_row_is_the_running_text(template):
  found, _ = preferences.ranked([graded('', ['很好看', 'bad'], [9, 2])], config(template=template), BYTE)
  ids = found.answers.ids_BT[0, 0]
  n = len('很好看'.encode())
  assert show(ids[:n + 1]) == '很好看$' and not ids[n + 1:].any()
  assert found.answers.mask_BT[0, 0].tolist() == [False] + [True] * n + [False] * (40 - n)  # nothing predicts the first


def test_no_template_writes_prompt_and_answer_as_one_text():
  found, _ = preferences.ranked([graded('POST: a\nTL;DR:', [' b', ' c'], [1, 0])], config(template='none'), BYTE)
  assert rows(found, 0) == [('POST: a\nTL;DR: b$', ' b$'), ('POST: a\nTL;DR: c$', ' c$')]
  talk = Graded(tuple(chat.Message(r, 'x') for r in ('user', 'assistant', 'user')), ('a', 'b'), (1., 0.), origin='f:3')
  with pytest.raises(DataError, match='f:3: a prompt of 3 turns.*set data.template=chatml'):
    preferences.ranked([talk], config(template='none'), BYTE)


def test_the_template_without_marks_is_a_whole_template():
  ask = [chat.Message('user', 'go on')]
  assert show(chat.prompt(preferences.bare, ask, BYTE)) == 'go on'
  assert chat.stop_ids(preferences.bare, BYTE) == (BYTE.eos_id,)
  assert chat.parse(preferences.bare, [97, 98, BYTE.eos_id, 99], BYTE) == ('ab', True)


def test_a_prompt_too_long_is_cut_alike_for_all_answers():
  found, report = preferences.ranked([graded('0123456789' * 5, ['ab', 'c' * 30], [1, 0])], config(), BYTE)
  (short, _), (long, said) = rows(found, 0)
  prompt = short.removesuffix('ab$')
  assert long.startswith(prompt) and len(prompt) == 21 and prompt.endswith('9\n')
  assert said == 'c' * 20 and len(long) == 41  # cut short, so it does not teach to stop there
  assert report.truncated == 2


def test_answers_given_twice_and_prompts_without_a_better_answer_are_left_out():
  found, report = preferences.ranked([
      graded('p', ['a', 'b', 'a', 'c', 'd'], [1, 2, 9, 3, 4]), graded('q', ['a', 'b'], [2, 2], origin='f:2'),
      graded('r', ['z' * 60 + 'a', 'z' * 60 + 'b', 'c'], [3, 2, 1]), graded('s', ['z' * 60 + 'a', 'z' * 60], [1, 0])],
      config(), BYTE)
  assert [text for _, text in rows(found, 0)] == ['a$', 'b$', 'c$'] and found.grades_NK[0].tolist() == [1, 2, 3]
  assert found.exists_NK.sum(1).tolist() == [3, 2] and found.grades_NK[1].tolist() == [3, 1, 0]
  assert report == preferences.Report(2, 5, 1, 2, 1, 2, 'f:2')
  assert 'left out: 2 answers given twice, 1 above data.answers, 2 prompts' in str(report)


def test_answers_of_unequal_grades_come_before_more_of_the_same():
  found, report = preferences.ranked([graded('p', ['a', 'b', 'c', 'd'], [3, 3, 1, 2])], config(answers=2), BYTE)
  assert [text for _, text in rows(found, 0)] == ['a$', 'c$'] and found.grades_NK[0].tolist() == [3, 1]
  assert (report.dropped, report.surplus) == (0, 2)


def test_an_encoder_gets_its_own_frame(tmp_path):
  texts = ['good film 好电影 bad'] * 10
  tokenizer = training.train_sentencepiece(texts, tmp_path / 'x.model', vocab=278,
                                             control_symbols=('[CLS]', '[SEP]', '[MASK]'))
  cls, sep = (tokenizer.control[name] for name in ('[CLS]', '[SEP]'))
  c = config(length=20)
  found, _ = preferences.ranked([graded('好电影', ['good', 'bad'], [1, 0]), graded('', ['good ' * 30, 'bad'], [1, 0])],
                                c, tokenizer, encoder=True)
  for (n, k), parts in {(0, 0): ['好电影', 'good'], (0, 1): ['好电影', 'bad'], (1, 1): ['bad']}.items():
    want = [cls, *(i for part in parts for i in [*tokenizer.encode(part), sep])]
    row = jax.tree.map(lambda x, n=n, k=k: x[n, k], found.answers)
    assert row.ids_BT[:len(want)].tolist() == want and not row.segments_BT[len(want):].any()
    said = len(tokenizer.encode(parts[-1])) + 1
    assert np.flatnonzero(row.mask_BT).tolist() == [*range(len(want) - said, len(want))]
  assert found.answers.segments_BT[1, 0].all() and found.answers.ids_BT[1, 0, -1] == sep  # the mark is never cut off


def test_files_of_both_kinds_make_one_set(tmp_path, capsys):
  path = write(tmp_path / 'a.jsonl',
               {'prompt': 'q', 'chosen': 'yes', 'rejected': 'no', 'split': 'train'},
               {'conversations': [{'from': 'human', 'value': 'q2'}], 'chosen': {'from': 'gpt', 'value': '是'},
                'rejected': {'from': 'gpt', 'value': '否'}, 'split': 'train'},
               {'prompt': '', 'answers': ['a', 'b', 'c'], 'grades': [1, 2, 2.5], 'split': 'validation'},
               {'prompt': [{'role': 'user', 'content': 'u'}], 'answers': ['a', 'b'], 'grades': [0, 1], 'split': 'test'})
  data = preferences.prepare(config(corpus=str(path)), tmp_path)
  train = data.splits['train']
  assert [rows(train, i) for i in (0, 1)] == [[('q\nyes$', 'yes$'), ('q\nno$', 'no$')],
                                              [('q2\n是$', '是$'), ('q2\n否$', '否$')]]
  assert train.grades_NK.tolist() == [[1, 0, 0]] * 2
  assert [data.rows(part) for part in ('train', 'validation', 'test')] == [2, 1, 1]
  assert 'validation: 1 prompts with 3 answers' in capsys.readouterr().out
  preferences.check(data, BYTE.vocab_size)
  (batch,) = preferences.eval_batches(data, 'validation', 2, PLACE)
  assert np.asarray(batch.exists_NK).tolist() == [[True] * 3, [False] * 3]
  assert not any(np.asarray(x)[1].any() for x in jax.tree.leaves(batch))
  assert next(preferences.train_batches(data, PLACE)).answers.ids_BT.shape == (2, 3, 41)


def test_fields_by_other_names_in_another_encoding(tmp_path):
  (tmp_path / 'gb.csv').write_bytes('question,chosen,rejected,part\n问,是,否,train\n'.encode('gb18030'))
  c = config(corpus=str(tmp_path / 'gb.csv'), encoding='gb18030', rename=(('question', 'prompt'), ('part', 'split')))
  data = preferences.prepare(c, tmp_path)
  assert rows(data.splits['train'], 0) == [('问\n是$', '是$'), ('问\n否$', '否$')]
  with pytest.raises(ConfigError, match="data.encoding='gb1'"):
    config(encoding='gb1')


def test_the_input_of_an_instruction_is_written_as_alpacas(tmp_path):
  path = write(tmp_path / 'a.jsonl', {'instruction': '译', 'input': '好', 'chosen': 'good', 'rejected': 'bad',
                                      'split': 'train'})
  data = preferences.prepare(config(corpus=str(path), template='alpaca', length=300), tmp_path)
  prompt = f'{chat.ALPACA_INPUT}\n\n### Instruction:\n译\n\n### Input:\n好\n\n### Response:'
  assert rows(data.splits['train'], 0) == [(f'{prompt}good$', 'good$'), (f'{prompt}bad$', 'bad$')]


def test_the_split_is_by_the_prompt_or_else_by_the_answers():
  prompts = [graded(f'question {i}', ['a', 'b'], [1, 0]) for i in range(200)]
  parts = preferences.assigned(prompts, 0.25)
  assert parts == preferences.assigned(prompts[::-1], 0.25)[::-1] and 30 < parts.count('validation') < 70
  again = preferences.assigned([graded(f'question {i}', ['other', 'c'], [1, 0]) for i in range(200)], 0.25)
  assert parts == again
  alone = preferences.assigned([graded('', [f'{i}', 'b'], [1, 0]) for i in range(200)], 0.25)
  assert alone == preferences.assigned([graded('', ['b', f'{i}'], [3, 2]) for i in range(200)], 0.25)
  assert 30 < alone.count('validation') < 70
  with pytest.raises(DataError, match="split 'extra'"):
    preferences.assigned([graded('p', ['a', 'b'], [1, 0], split='extra')], 0.25)


@pytest.mark.parametrize('fields, part', [
    ({'answers': ['a']}, 'answers and grades: found 1 of them and 2 of them'),
    ({'answers': 'ab'}, 'found a string and 2 of them'), ({'grades': None}, 'and null'),
    ({'answers': ['a', ' ']}, r'field answers\[1\]: nothing but space'),
    ({'answers': ['a', 3]}, r'field answers\[1\]: found the number 3'),
    ({'grades': [1, True]}, r'field grades\[1\]: found true'),
    ({'grades': ['1', 2]}, r'field grades\[0\]: found a string'),
    ({'grades': [1, 10**400]}, r'field grades\[1\]'),
    ({'prompt': None}, 'no field prompt'), ({'prompt': ' '}, 'field prompt: nothing but space'),
    ({'prompt': [{'role': 'assistant', 'content': 'a'}]}, r'prompt\[0\]: found assistant'),
    ({'split': 'extra'}, 'field split'),
])
def test_a_wrong_record_is_named(fields, part, tmp_path):
  good = {'prompt': 'p', 'answers': ['a', 'b'], 'grades': [1, 2]}
  path = write(tmp_path / 'a.jsonl', good, good | fields)
  with pytest.raises(DataError, match=f'a.jsonl:2: .*{part}'):
    examples.read(path, 'graded')
  found, report = examples.read(path, 'graded', on_error='skip')
  assert len(found) == 1 and sum(report.faults.values()) == 1


@pytest.mark.parametrize('changes, part', [
    ({'answers': 1}, 'data.answers=1'), ({'template': 'none', 'system': 'Be brief.'}, 'data.system'),
    ({'template': 'x'}, 'data.template'), ({'length': 2}, 'data.length=2')])
def test_a_config_out_of_range(changes, part):
  with pytest.raises(ConfigError, match=part):
    config(**changes)


def test_a_set_without_a_single_preference_has_no_rows(tmp_path):
  path = write(tmp_path / 'a.jsonl', {'prompt': 'p', 'answers': ['a', 'b'], 'grades': [1, 1], 'split': 'train'})
  data = preferences.prepare(config(corpus=str(path)), tmp_path)
  assert data.rows('train') == data.rows('validation') == 0
  with pytest.raises(DataError, match='0 training rows'):
    preferences.check(data, BYTE.vocab_size)


@pytest.mark.parametrize(('record', 'field'), [
    ({'prompt': 'say', 'chosen': 'a', 'rejected': 'x ### Response: x'}, 'rejected or answers[1]'),
    ({'prompt': 'say', 'answers': ['a', '### Response:', 'x'], 'grades': [1, 2, 3]}, 'answers[1]'),
    ({'prompt': 'say ### Response:', 'answers': ['a', 'x'], 'grades': [1, 2]}, 'prompt[0]'),
    ({'conversations': [{'from': 'human', 'value': '### Response:'}], 'chosen': 'a', 'rejected': 'x'},
     'conversations[0].value')])
def test_what_the_tokenizer_refuses_is_named_or_left_out_with_its_field(record, field, tmp_path, capsys):
  (tmp_path / 'vocab.txt').write_text('\n'.join('[PAD] [UNK] [CLS] [SEP] say a x # response :'.split()) + '\n')
  good = [{'prompt': f'say {part}', 'chosen': 'a', 'rejected': 'x', 'split': part} for part in ('train', 'validation')]
  path = write(tmp_path / 'a.jsonl', *good, record)
  c = config(corpus=str(path), template='alpaca', length=200, tokenizer=str(tmp_path / 'vocab.txt'))
  with pytest.raises(DataError) as stopped:
    preferences.prepare(c, tmp_path)
  said = f'{path}:3: field {field}: the tokenizer cannot tell its words from'
  assert str(stopped.value).startswith(said)
  capsys.readouterr()
  data = preferences.prepare(dataclasses.replace(c, on_error='skip'), tmp_path)
  assert [data.rows(part) for part in ('train', 'validation')] == [1, 1]
  printed = capsys.readouterr().out
  assert 'words                   1   33.33%' in printed and said in printed


def test_running_text_of_many_turns_is_named_or_left_out(tmp_path, capsys):
  talk = [{'role': role, 'content': 'u'} for role in ('user', 'assistant', 'user')]
  path = write(tmp_path / 'a.jsonl', {'prompt': talk, 'chosen': 'a', 'rejected': 'b'},
               {'prompt': 'q', 'chosen': 'a', 'rejected': 'b', 'split': 'train'})
  c = config(corpus=str(path), template='none')
  with pytest.raises(DataError, match='a.jsonl:1: a prompt of 3 turns; expected one.*set data.template=chatml'):
    preferences.prepare(c, tmp_path)
  assert preferences.prepare(dataclasses.replace(c, on_error='skip'), tmp_path).rows('train') == 1
  assert 'turns                   1   50.00%' in capsys.readouterr().out


def test_a_preference_in_two_splits_is_named_or_left_out(tmp_path, capsys):
  same = {'prompt': 'which?', 'chosen': 'this', 'rejected': 'that'}
  rows = [same | {'split': 'train'}, {'prompt': 'what?', 'chosen': 'a', 'rejected': 'b', 'split': 'train'},
          same | {'prompt': 'WHICH?', 'split': 'test'},
          {'prompt': 'who?', 'chosen': 'c', 'rejected': 'd', 'split': 'validation'}]
  path = write(tmp_path / 'a.jsonl', *rows)
  with pytest.raises(DataError, match="a.jsonl:3: split 'test', but the same text at .*a.jsonl:1 has split 'train'"):
    preferences.prepare(config(corpus=str(path), batch=1), tmp_path)
  data = preferences.prepare(config(corpus=str(path), batch=1, on_error='skip'), tmp_path)
  assert [data.rows(part) for part in ('train', 'validation', 'test')] == [1, 1, 1]
  assert 'split                   1' in capsys.readouterr().out
