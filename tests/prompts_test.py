"""Prompts as rows: what a template writes, against the right edge; what is left out; and records that rewards see."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lm.data import conversations, prompts, splits
from lm.data.turns import Message
from lm.errors import ConfigError, DataError
from lm.text import chat, tokenizer as tokenizers
from tests.golden.chat import make

FROZEN = tokenizers.load(make.HERE)
ONE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
TALK = [{'role': 'user', 'content': '你好'}, {'role': 'assistant', 'content': '你好！'},
        {'role': 'user', 'content': 'What is JAX?'}]
RECORDS = [{'prompt': 'What is 17 + 8?', 'answer': '25'}, {'prompt': '十七加八等于多少？', 'answer': '25'},
           {'prompt': TALK}, {'prompt': TALK[:1], 'system': 'Be short.', 'split': 'test'}]


def config(path, records, **changes):
  path = path / 'in.jsonl'
  path.write_text(''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in records), encoding='utf-8')
  return prompts.Config(**{'corpus': str(path), 'tokenizer': str(make.HERE), 'length': 120, 'batch': 2} | changes)


def prepare(path, records, **changes):
  return prompts.prepare(config(path, records, **changes), path)


def rows_of(data):
  """{split: [(ids, record)]}, and checks what holds of every row."""
  found = {}
  for name, rows in data.splits.items():
    for ids_P, segments_P, index in zip(rows.ids_NP, rows.segments_NP, rows.index_N, strict=True):
      n = int(segments_P.sum())
      assert n > 0 and segments_P.tolist() == [0] * (data.config.length - n) + [1] * n
      assert not ids_P[:-n].any()
      found.setdefault(name, []).append((ids_P[-n:].tolist(), data.records[index]))
    assert {x.dtype for x in (rows.ids_NP, rows.segments_NP, rows.index_N)} == {np.dtype(np.int32)}
  return found


@pytest.mark.parametrize('name', ['chatml', 'llama2', 'alpaca', 'plain'])
def test_rows_are_prompts_as_the_template_writes_them_in_two_languages(name, tmp_path):
  data = prepare(tmp_path, [r | {'split': r.get('split', 'train')} for r in RECORDS], template=name)
  found = rows_of(data)
  assert {k: len(v) for k, v in found.items()} == {'train': 3, 'test': 1} and data.rows('validation') == 0
  for ids, record in [*found['train'], *found['test']]:
    messages = [chat.Message(m.role, m.content) for m in record.messages]
    whole = chat.encode(make.TEMPLATES[name], [*messages, chat.Message('assistant', 'x')], FROZEN)
    assert ids == chat.prompt(make.TEMPLATES[name], messages, FROZEN).tolist() == whole.ids[:len(ids)].tolist()
  assert [(r.prompt, r.answer, len(r.messages)) for r in data.records] == [
      ('What is 17 + 8?', '25', 1), ('十七加八等于多少？', '25', 1), ('What is JAX?', None, 3), ('你好', None, 2)]
  assert data.records[3].messages[0] == Message('system', 'Be short.') and data.records[1].origin.endswith('jsonl:2')


def test_fields_by_other_names_in_another_encoding(tmp_path):
  path = tmp_path / 'gb.csv'
  path.write_bytes('question,result,part\n十七加八,25,train\n'.encode('gb18030'))
  c = config(tmp_path, [], corpus=str(path), encoding='gb18030', rename=(
      ('question', 'prompt'), ('result', 'answer'), ('part', 'split')))
  assert [(r.prompt, r.answer) for r in prompts.prepare(c, tmp_path).records] == [('十七加八', '25')]
  with pytest.raises(DataError, match='gb.csv:2: field question: character 1 is not of the encoding'):
    prompts.prepare(config(tmp_path, [], corpus=str(path), rename=c.rename), tmp_path)


def test_the_input_of_a_turn_is_written_as_alpacas(tmp_path):
  asked = {'role': 'user', 'content': '译成英文。\n你好', 'input': '你好'}
  (ids, record), = rows_of(prepare(tmp_path, [{'prompt': [asked], 'split': 'train'}], template='alpaca'))['train']
  assert FROZEN.decode(ids[1:]) == (
      f'{chat.ALPACA_INPUT}\n\n### Instruction:\n译成英文。\n\n### Input:\n你好\n\n### Response:')
  assert record.prompt == '译成英文。\n你好'


def test_the_system_turn_of_the_config_is_written(tmp_path):
  records = [{'prompt': 'hi', 'split': 'train'}, {'prompt': 'hi', 'system': 'own', 'split': 'train'}]
  (ids, _), (own, _) = rows_of(prepare(tmp_path, records, system='Be kind.'))['train']
  assert 'Be kind.' in FROZEN.decode(ids) and 'Be kind.' not in FROZEN.decode(own)


def test_running_text_has_no_marks_and_an_empty_prompt_is_the_begin_of_a_document(tmp_path):
  records = [{'prompt': 'a film of 电影', 'split': 'train'}, {'prompt': '', 'split': 'train'}]
  for tokenizer, begin in ((FROZEN, [FROZEN.bos_id]), (tokenizers.byte(), [])):
    path = 'byte' if tokenizer.kind == 'byte' else str(make.HERE)
    (text, _), (empty, record) = rows_of(prepare(tmp_path, records, template='none', tokenizer=path))['train']
    assert text == [*begin, *tokenizer.encode('a film of 电影')] and empty == [tokenizer.bos_id] and record.prompt == ''
  turn = dataclasses.replace(FROZEN, bos_id=FROZEN.control['<|im_start|>'],  # SmolLM2's: it begins no document
                             control={name: i for name, i in FROZEN.control.items() if name != '<s>'})
  c = config(tmp_path, records, template='none')
  with pytest.raises(DataError, match=r'jsonl:2: a prompt of no tokens, and none of this tokenizer begins'):
    prompts.read(c.corpus, c, turn)


@pytest.mark.parametrize('template', ['none', 'chatml', 'llama2'])
def test_what_is_drawn_is_read_with_the_template(template):
  write = prompts.Config(template=template).written
  for said in ('The answer is 25.', '答案是25。'):
    whole = chat.encode(write, [chat.Message('user', '17 + 8'), chat.Message('assistant', said)], FROZEN)
    n = len(chat.prompt(write, [chat.Message('user', '17 + 8')], FROZEN))
    assert whole.ids[whole.mask][-1] in chat.stop_ids(write, FROZEN)
    assert chat.parse(write, whole.ids[n:], FROZEN) == (said, True)
    assert chat.parse(write, whole.ids[n:][:-3], FROZEN)[1] is False


def test_a_prompt_is_the_first_tokens_of_a_text_in_whole_characters(tmp_path, capsys):
  records = [{'text': t, 'split': 'train'} for t in ('a long film', '这部电影', 'ab', 'abé', 'four')]
  data = prepare(tmp_path, records, template='none', tokenizer='byte', length=4, cut=4)
  assert [(ids, r.prompt, r.text) for ids, r in rows_of(data)['train']] == [
      ([*b'a lo'], 'a lo', 'a long film'), ([*'这'.encode()], '这', '这部电影'), ([*'abé'.encode()], 'abé', 'abé'),
      ([*b'four'], 'four', 'four')]
  assert 'jsonl:3: a text of 2 tokens; expected at least data.cut=4' in capsys.readouterr().out
  (ids, record), = rows_of(prepare(tmp_path, records[:1], template='none', cut=2))['train']
  assert ids == [FROZEN.bos_id, *FROZEN.encode('a long film')[:2]] and 'a long film'.startswith(record.prompt)
  with pytest.raises(DataError, match='its first 2 tokens hold no whole character'):
    prepare(tmp_path, records[1:2], template='none', tokenizer='byte', length=4, cut=2)


def test_long_prompts_are_left_out_and_counted_never_cut(tmp_path, capsys):
  records = [{'prompt': 'x' * n, 'split': 'train'} for n in (5, 6, 7, 60)]
  data = prepare(tmp_path, records, template='none', tokenizer='byte', length=6)
  assert [len(ids) for ids, _ in rows_of(data)['train']] == [5, 6]
  printed = capsys.readouterr().out
  assert 'jsonl:3: a prompt of 7 tokens; expected at most 6' in printed and 'prompt too long         2' in printed
  with pytest.raises(DataError, match=r'none of 4 records .* the first: .*jsonl:1: a prompt of 5 tokens'):
    prepare(tmp_path, records, template='none', tokenizer='byte', length=4)


def test_batches_hold_every_row_once_and_the_index_finds_its_record(tmp_path):
  records = [{'prompt': f'question {i} 问题', 'answer': str(i), 'split': 'validation' if i % 4 == 0 else 'train'}
             for i in range(20)]
  data = prepare(tmp_path, records, batch=4)
  prompts.check(data, FROZEN.vocab_size)
  train, seen = prompts.train_batches(data, ONE), []
  for _ in range(3):
    batch = jax.device_get(next(train))
    for ids_P, segments_P, i in zip(batch.ids_NP, batch.segments_NP, batch.index_N, strict=True):
      record = data.records[i]
      assert ids_P[segments_P > 0].tolist() == chat.prompt(
          chat.chatml, [chat.Message('user', record.prompt)], FROZEN).tolist()
      assert f'question {record.answer} 问题' == record.prompt
      seen.append(int(record.answer))
  assert seen != sorted(seen) and set(seen) | {3} <= {i for i in range(20) if i % 4} and len(set(seen)) == 12
  held_out = [jax.device_get(b) for b in prompts.eval_batches(data, 'validation', 4, ONE)]
  index_N = np.concatenate([b.index_N for b in held_out])
  assert [data.records[i].answer for i in index_N if i >= 0] == ['0', '4', '8', '12', '16'] and (index_N < 0).sum() == 3
  last = np.concatenate([b.segments_NP for b in held_out])[index_N < 0]
  assert (last.sum(1) == 1).all() and (last[:, -1] == 1).all()  # no row without a token


def test_prompts_that_do_not_say_are_split_by_what_the_user_says_first(tmp_path, capsys):
  first = [f'question {i // 2}' for i in range(80)]
  data = prepare(tmp_path, [{'prompt': text} for text in first], validation_fraction=0.2)
  split = splits.by_hash(first, (0.8, 0.2))
  found = {name: [r.prompt for _, r in rows] for name, rows in rows_of(data).items()}
  assert found == {'train': [first[i] for i in split.train], 'validation': [first[i] for i in split.validation]}
  assert not set(found['train']) & set(found['validation']) and 'training has too' not in capsys.readouterr().out
  prepare(tmp_path, [{'prompt': 'the', 'split': s} for s in ('train', 'validation')])
  assert 'validation: 1 prompts, 1 of which training has too' in capsys.readouterr().out
  talks = conversations.Config(corpus=str(tmp_path / 'c.jsonl'), tokenizer=str(make.HERE), validation_fraction=0.2)
  (tmp_path / 'c.jsonl').write_text(''.join(json.dumps({'messages': [text, 'yes']}) + '\n' for text in first))
  held_out = conversations.prepare(talks, tmp_path).splits['validation']
  assert f'{found["validation"][0]}' in FROZEN.decode(held_out.ids_BT.ravel())  # the same side as in other sources


def test_of_held_out_prompts_as_many_are_evaluated_as_asked_for(tmp_path):
  records = [{'prompt': f'{i}', 'split': 'train' if i < 4 else 'validation'} for i in range(24)]
  some, other = (prompts.prepare(config(tmp_path, records, evaluated=5), tmp_path, seed) for seed in (0, 1))
  drawn = [r.prompt for _, r in rows_of(some)['validation']]
  assert len(set(drawn)) == 5 and some.rows('train') == 4 and drawn != [str(i) for i in range(4, 9)]
  assert drawn == [r.prompt for _, r in rows_of(other)['validation']]
  assert prepare(tmp_path, records, evaluated=99).rows('validation') == 20


def test_the_fingerprint_knows_what_rewards_see(tmp_path):
  records = [{'prompt': 'a', 'answer': '1', 'split': 'train'}, {'prompt': 'b', 'split': 'train'}]
  data = prepare(tmp_path, records)
  assert data.fingerprint == prepare(tmp_path, records).fingerprint and data.fingerprint is data.fingerprint
  other = prepare(tmp_path, [records[0] | {'answer': '2'}, records[1]])
  assert {k for k, v in data.fingerprint.items() if other.fingerprint[k] != v} == {'records'}
  json.dumps(data.fingerprint)
  more = dataclasses.replace(data, splits=data.splits | {'validation': data.splits['train']})
  assert more.fingerprint != data.fingerprint and more.records == data.records


@pytest.mark.parametrize('record, part', [
    ({'text': 'a'}, 'no field prompt (fields: text'),
    ({'prompt': 3}, 'field prompt: found the number 3'),
    ({'prompt': ' '}, 'field prompt: nothing but space'),
    ({'prompt': []}, 'field prompt: no turns'),
    ({'prompt': TALK[:2]}, 'field prompt: ends with assistant; expected user'),
    ({'prompt': 'a', 'answer': 25}, 'field answer: found the number 25'),
    ({'prompt': 'a', 'split': 'extra'}, "field split: found a string, 'extra'"),
    ([1], 'found a list; expected an object'),
    ('no json', 'found a string'),
])
def test_a_wrong_record_is_named_and_left_out_if_asked(record, part, tmp_path, capsys):
  records = [{'prompt': 'good', 'split': 'train'}, record]
  with pytest.raises(DataError) as stopped:
    prepare(tmp_path, records)
  assert part in str(stopped.value) and 'in.jsonl:2' in str(stopped.value)
  assert prepare(tmp_path, records, on_error='skip').rows('train') == 1
  assert part in capsys.readouterr().out


@pytest.mark.parametrize('record, changes, part', [
    ({'prompt': TALK}, {'template': 'none'}, 'a prompt of 3 turns; expected one'),
    ({'prompt': '', 'system': 'x'}, {}, 'a prompt of 2 turns; expected one'),
    ({'prompt': 'a'}, {'template': 'none', 'cut': 2}, 'no field text'),
])
def test_running_text_is_one_turn_and_texts_are_cut(record, changes, part, tmp_path):
  with pytest.raises(DataError, match=part):
    prepare(tmp_path, [record], **changes)


@pytest.mark.parametrize('changes, part', [
    ({'template': 'x'}, 'data.template'), ({'length': 0}, 'data.length'), ({'batch': 0}, 'data.batch'),
    ({'cut': 4}, "data.template='none'"), ({'cut': 65, 'template': 'none'}, 'data.cut=65; expected 0 to'),
    ({'cut': -1}, 'data.cut=-1'), ({'evaluated': -1}, 'data.evaluated'), ({'validation_fraction': 1.0}, 'share'),
    ({'system': 'x', 'template': 'none'}, 'data.system'), ({'rename': ('a', 'b')}, 'data.rename'),
])
def test_a_wrong_field_is_named(changes, part):
  with pytest.raises(ConfigError, match=part):
    prompts.Config(**changes)


@pytest.mark.parametrize(('prompt', 'field'), [
    ('say ### Response:', 'prompt'), ([TALK[0] | {'content': '### Response:'}], 'prompt[0].content')])
def test_what_the_tokenizer_refuses_is_named_or_left_out_with_its_field(prompt, field, tmp_path, capsys):
  (tmp_path / 'vocab.txt').write_text('\n'.join('[PAD] [UNK] [CLS] [SEP] say # response :'.split()) + '\n')
  records, how = [{'prompt': 'say', 'split': 'train'}, {'prompt': prompt}], {
      'template': 'alpaca', 'tokenizer': str(tmp_path / 'vocab.txt')}
  said = f'in.jsonl:2: field {field}: the tokenizer cannot tell its words from'
  with pytest.raises(DataError) as stopped:
    prepare(tmp_path, records, **how)
  assert said in str(stopped.value)
  assert prepare(tmp_path, records, **how, on_error='skip').rows('train') == 1
  printed = capsys.readouterr().out
  assert said in printed and 'words                   1   50.00%' in printed


def test_an_empty_corpus_or_none_is_an_error(tmp_path):
  with pytest.raises(ConfigError, match='data.corpus is empty'):
    prompts.prepare(prompts.Config(tokenizer='byte'), tmp_path)
  with pytest.raises(DataError, match='none of 0 records'):
    prepare(tmp_path, [])
