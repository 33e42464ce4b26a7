"""Conversations as rows: what is a target, what a cut takes, and that packing changes no loss."""

import dataclasses
import functools
import itertools
import json

import jax
import numpy as np
import pytest

from lm import params, sharding
from lm.data import conversations, memory, packing, sft, splits
from lm.data.examples import Preference
from lm.errors import ConfigError, DataError
from lm.losses import ar
from lm.models import decoder
from lm.text import chat, tokenizer as tokenizers
from tests.golden.chat import make

M = chat.Message
BYTE = tokenizers.byte()
FROZEN = tokenizers.load(make.HERE)
TEMPLATES = make.TEMPLATES
GOLDEN = list(make.conversations().values())
BAD = 'say # # # Response: a'  # of WordPiece, whose text has spaces around punctuation anyway


def talk(*words, system=None):
  first = [] if system is None else [M('system', system)]
  return [*first, *(M(('user', 'assistant')[i % 2], text) for i, text in enumerate(words))]


def random_talks(n, seed=0, most=40):
  rng = np.random.default_rng(seed)
  text = lambda: ''.join(rng.choice(list('abc 。一二\n'), rng.integers(1, most)))
  return [talk(*(text() for _ in range(2 * rng.integers(1, 4))), system=text() if rng.random() < .5 else None)
          for _ in range(n)]


def show(ids):
  """Bytes as text, '$' for the end of a turn."""
  return ''.join('$' if i == BYTE.eos_id else chr(i) for i in ids)


def rows_of(batch):
  """(ids, mask, positions) of every segment, row by row."""
  for b, row in enumerate(batch.segments_BT):
    for s in range(1, row.max() + 1):
      at = np.flatnonzero(row == s)
      assert (np.diff(at) == 1).all()
      yield batch.ids_BT[b, at], batch.mask_BT[b, at], batch.positions_BT[b, at]


@pytest.mark.parametrize('name', TEMPLATES)
@pytest.mark.parametrize('loss', sft.LOSSES)
def test_rows_are_what_the_template_writes(name, loss):
  batch, report = sft.conversations(GOLDEN, TEMPLATES[name], FROZEN, 120, loss=loss, pack=False)
  assert batch.ids_BT.shape == (2, 121)
  for messages, (ids, mask, positions) in zip(GOLDEN, rows_of(batch), strict=True):
    want, targets = chat.encode(TEMPLATES[name], messages, FROZEN)
    end = int(np.flatnonzero(targets)[-1]) + 1  # ChatML's last line break teaches nothing
    assert ids.tolist() == want[:end].tolist() and positions.tolist() == list(range(end))
    if loss == 'last':
      targets[:len(chat.prompt(TEMPLATES[name], messages[:-1], FROZEN))] = False
    if loss == 'all':
      targets[1:] = True
    assert mask.tolist() == targets[:end].tolist()
  assert not batch.ids_BT[batch.segments_BT == 0].any() and not batch.mask_BT[batch.segments_BT == 0].any()
  assert (batch.ids_BT.dtype, batch.segments_BT.dtype, batch.positions_BT.dtype) == (np.int32,) * 3
  assert report == sft.Report(2, 0, 0, (), int(batch.mask_BT.sum()), 0, int((batch.segments_BT > 0).sum()), 2)


def test_the_loss_of_the_last_turn_is_the_default_loss_of_one_turn():
  found = [sft.conversations([talk('q', 'a')], chat.chatml, BYTE, 60, loss=loss)[0]
           for loss in ('assistant', 'last')]
  jax.tree.map(np.testing.assert_array_equal, *found)
  assert show(found[0].ids_BT[0][found[0].mask_BT[0]]) == 'a$'


def test_packing_holds_every_conversation_once_and_whole():
  talks = random_talks(60)
  (alone, one), (packed, report) = (sft.conversations(talks, chat.chatml, FROZEN, 300, pack=pack, seed=3)
                                    for pack in (False, True))
  unordered = lambda batch: sorted((ids.tolist(), mask.tolist()) for ids, mask, _ in rows_of(batch))
  assert unordered(alone) == unordered(packed)
  for _, mask, positions in rows_of(packed):
    assert positions.tolist() == list(range(len(positions))) and not mask[0]
  assert len(packed.ids_BT) < len(alone.ids_BT) == 60 and (packed.segments_BT > 0).mean() > 0.85
  assert dataclasses.replace(report, rows=60) == one
  again, other = (sft.conversations(talks, chat.chatml, FROZEN, 300, seed=seed)[0] for seed in (3, 4))
  jax.tree.map(np.testing.assert_array_equal, again, packed)
  assert other.ids_BT.shape != again.ids_BT.shape or not np.array_equal(other.ids_BT, again.ids_BT)


@pytest.mark.slow
@pytest.mark.parametrize('positions', ['learned', 'rotary'])
def test_a_packed_row_has_the_loss_of_its_conversations(positions):
  c = decoder.Config(vocab=FROZEN.vocab_size, length=128, layers=2, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=32,
                     positions=positions)
  p = params.init(decoder.specs(c), jax.random.key(0))
  p = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), p)
  apply = lambda p, ids_BT, *, key, **where: decoder.apply(p, c, ids_BT, **where)
  run = jax.jit(jax.value_and_grad(lambda p, batch: ar.loss(
      p, batch, None, apply=apply, head=lambda p: p['embed']['tokens'], c=ar.Config())[0]['nll'].total))
  talks = [*GOLDEN, *random_talks(4, most=12)]
  loss, grad = zip(*(run(p, sft.conversations(talks, chat.llama2, FROZEN, 127, pack=pack)[0])
                     for pack in (True, False)), strict=True)
  assert loss[0] > 100
  np.testing.assert_allclose(loss[0], loss[1], rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), *grad)


TALK = talk('abcd', 'efgh', 'ijkl', 'mnop', system='st')
ALL = 'st\nabcd\nefgh$ijkl\nmnop$'


@pytest.mark.parametrize(('width', 'text'), [
    (99, ALL), (len(ALL), ALL), (len(ALL) - 1, 'st\nijkl\nmnop$'),  # the oldest exchange goes as a whole
    (13, 'st\nijkl\nmnop$'), (12, 'st\nijkl\nmnop'),  # then the end of the answer, while it has half of the room
    (11, 'st\njkl\nmnop'), (10, 'st\njkl\nmno'), (8, 'st\nkl\nmn'), (6, 'st\nl\nm'), (4, 's\n\nm'), (3, '\n\nm')])
def test_what_a_cut_takes(width, text):
  batch, report = sft.conversations([TALK], chat.plain, BYTE, width - 1, pack=False)
  (ids, mask, _), = rows_of(batch)
  assert show(ids) == text
  answers = 'efgh$mnop$' if text == ALL else text.rpartition('\n')[2]
  assert show(ids[mask]) == answers
  assert report == sft.Report(1, int(text != ALL), 0, (), len(answers), 10 - len(answers), len(ids), 1)


@pytest.mark.parametrize(('messages', 'width', 'text'), [
    (talk('q' * 50 + 'end', 'yes'), 20, 'q' * 12 + 'end\nyes$'),  # the answer is whole, the question's end stays
    (talk('why', 'b' * 50), 20, 'why\n' + 'b' * 16),
    (talk('q' * 50, 'b' * 50), 21, 'q' * 10 + '\n' + 'b' * 10),
    (talk('q', 'b', system='s' * 50), 20, 's' * 15 + '\nq\nb$'),
    (talk('q' * 50, 'b' * 50, system='s' * 50), 22, 's' * 10 + '\n' + 'q' * 5 + '\n' + 'b' * 5),
    (talk('a', 'b', 'c' * 9, 'd', 'e', 'f'), 15, 'e\nf$'),
    (talk('a', 'b', 'c' * 9, 'd', 'e', 'f'), 16, 'c' * 9 + '\nd$e\nf$'),
    ([*talk('a', 'b'), M('user', 'unanswered')], 20, 'a\nb$')])
def test_cuts_of_many_shapes(messages, width, text):
  for pack in (False, True):
    (ids, _, _), = rows_of(sft.conversations([messages], chat.plain, BYTE, width - 1, pack=pack)[0])
    assert show(ids) == text


def test_a_cut_leaves_the_marks_around_an_input():
  asked = M('user', 'do this\n' + 'i' * 40, 'i' * 40)
  write = lambda task, input, answer: f'### Instruction:\n{task}\n\n### Input:\n{input}\n\n### Response:{answer}'
  whole = write('do this', 'i' * 40, 'yes$')
  template = functools.partial(chat.alpaca, system='')
  for width, text in ((len(whole), whole), (len(whole) - 2, write(' this', 'i' * 40, 'yes$')),
                      (len(whole) - 9, write('', 'i' * 38, 'yes$'))):
    (ids, mask, _), = rows_of(sft.conversations([[asked, M('assistant', 'yes')]], template, BYTE, width - 1)[0])
    assert show(ids) == text and show(ids[mask]) == 'yes$'


def test_alpaca_rows_of_a_file_are_the_published_ones(tmp_path):
  records = [{'instruction': 'Name it.', 'input': '法国', 'output': 'Paris', 'split': 'train'},
             {'instruction': '你好', 'input': '', 'output': '好', 'split': 'validation'}]
  (tmp_path / 'a.json').write_text(json.dumps(records))
  c = conversations.Config(str(tmp_path / 'a.json'), 'alpaca', tokenizer='byte', length=300)
  text = lambda ids: show(ids).encode('latin1').decode()
  found = {part: [(text(ids), text(ids[mask])) for ids, mask, _ in rows_of(rows)]
           for part, rows in conversations.prepare(c, tmp_path).splits.items()}
  assert found == {
      'train': [(f'{chat.ALPACA_INPUT}\n\n### Instruction:\nName it.\n\n### Input:\n法国\n\n### Response:Paris$',
                 'Paris$')],
      'validation': [(f'{chat.ALPACA}\n\n### Instruction:\n你好\n\n### Response:好$', '好$')]}


@pytest.mark.parametrize('name', TEMPLATES)
@pytest.mark.parametrize('tokenizer', [BYTE, FROZEN], ids=['byte', 'frozen'])
def test_a_cut_leaves_the_beginning_of_the_answer_and_splits_no_character(name, tokenizer):
  talks = random_talks(12, seed=1, most=90)
  for width in (70, 140, 221):
    batch, report = sft.conversations(talks, TEMPLATES[name], tokenizer, width - 1, pack=False, loss='last')
    kept = [i for i in range(len(talks)) if i not in report.dropped_at]
    assert report.kept == len(kept) and report.dropped == len(talks) - len(kept)
    cut = 0
    for i, (ids, mask, _) in zip(kept, rows_of(batch), strict=True):
      whole, targets = chat.encode(TEMPLATES[name], talks[i], tokenizer)
      start = len(chat.prompt(TEMPLATES[name], talks[i][:-1], tokenizer))
      answer = ids[mask].tolist()
      assert 0 < len(answer) and whole[start:start + len(answer)].tolist() == answer
      assert len(ids) <= width and '\ufffd' not in tokenizer.decode(ids)
      assert mask.tolist() == [t >= len(ids) - len(answer) for t in range(len(ids))]
      cut += len(ids) < int(np.flatnonzero(targets)[-1]) + 1
    assert cut == report.truncated


def test_what_cannot_be_learned_is_dropped_and_counted():
  talks = [talk('q', 'a'), [M('user', 'q')], talk('q', 'b'), talk('q', 'a' * 9, system='s')]
  _, report = sft.conversations(talks, chat.chatml, BYTE, 61)
  assert report.dropped_at == (1, 3) and report.dropped == 2 and report.kept == 2
  assert str(report) == ('2 kept in 2 rows, 0 of them truncated by 0 targets, 2 dropped (the first: example 1); '
                         f'4 targets of {report.tokens} tokens')
  with pytest.raises(DataError, match='data.length=20: no example has a target left') as error:
    sft.conversations(talks, chat.chatml, BYTE, 20)
  assert '\n' not in str(error.value)


def batches_of(rows, batch, blank):
  """(training batches of one epoch, those of an evaluation), of a set in memory whose splits are both `rows`."""
  c = conversations.Config(batch=batch, threads=0)
  data = memory.Data(c, 0, BYTE, {'train': rows, 'validation': rows}, blank)
  place = sharding.batch_sharding(sharding.make_mesh(sharding.Config()))
  trained = itertools.islice(memory.train_batches(data, place), memory.steps_per_epoch(data))
  evaluated = memory.eval_batches(data, 'validation', batch, place)
  return [[jax.device_get(b) for b in found] for found in (trained, evaluated)]


BLANK = packing.Batch(np.int32(0), np.int32(0), np.int32(0), np.bool_(False))


def test_an_epoch_has_whole_batches_and_an_evaluation_all_rows():
  rows, report = sft.conversations(random_talks(23), chat.plain, BYTE, 400, pack=False)
  trained, evaluated = batches_of(rows, 10, BLANK)
  assert [b.ids_BT.shape for b in trained] == [(10, 401)] * 2 and isinstance(trained[0], packing.Batch)
  assert len({row.tobytes() for b in trained for row in b.ids_BT}) == 20
  assert sum(int(b.mask_BT.sum()) for b in evaluated) == report.targets
  np.testing.assert_array_equal(np.concatenate([b.ids_BT for b in evaluated])[:23], rows.ids_BT)
  assert len(evaluated) == 3 and not evaluated[-1].segments_BT[3:].any()


def prepared(folder, *files, **fields):
  """`conversations.prepare` of files of records, each a list of turns, or (turns, split), or a line as it stands."""
  paths = [folder / f'{i}.jsonl' for i in range(len(files))]
  for path, rows in zip(paths, files, strict=True):
    rows = [row if isinstance(row, tuple) else (row, None) for row in rows]
    path.write_text(''.join((turns if isinstance(turns, str) else json.dumps(
        {'messages': turns} | ({'split': split} if split else {}))) + '\n' for turns, split in rows))
  c = conversations.Config(**{'corpus': tuple(map(str, paths)), 'tokenizer': 'byte', 'template': 'plain', 'length': 40,
                              'pack': False} | fields)
  return conversations.prepare(c, folder)


def test_fields_by_other_names_in_another_encoding(tmp_path):
  rows = [{'dialog': ['问', f'答 {i}'], 'part': ('train', 'dev')[i % 2]} for i in range(4)]
  (tmp_path / 'gb.jsonl').write_bytes('\n'.join(json.dumps(row, ensure_ascii=False) for row in rows).encode('gb18030'))
  c = conversations.Config(str(tmp_path / 'gb.jsonl'), encoding='gb18030', rename=(
      ('dialog', 'messages'), ('part', 'split')))
  assert [(e.messages[1].content, part) for e, part in conversations.divided(c)] == [
      (f'答 {i}', ('train', 'validation')[i % 2]) for i in range(4)]
  with pytest.raises(ConfigError, match="data.encoding='utf-9'"):
    conversations.Config(encoding='utf-9')


def said(data):
  return {name: [show(ids) for ids, _, _ in rows_of(rows)] for name, rows in data.splits.items()}


def test_files_are_split_as_one_set(tmp_path):
  """A file so small that nothing of it validates; and who validates is by the text alone, whatever the file."""
  many = [[f'question {i}', '是'] for i in range(60)]
  one = said(prepared(tmp_path, many))
  drawn = splits.by_hash([turns[0] for turns in many], (0.9, 0.1))
  assert [text.split('\n')[0] for text in one['validation']] == [many[i][0] for i in drawn.validation]
  few = [many[i] for i in drawn.train[:2]]
  two = said(prepared(tmp_path, [row for row in many if row not in few], few))
  assert {k: sorted(v) for k, v in two.items()} == {k: sorted(v) for k, v in one.items()}
  for fraction, part in ((0.0001, 'validation'), (0.9999, 'train')):
    with pytest.raises(ConfigError, match=f'data.validation_fraction={fraction}: of 2 records none is left for {part}'):
      prepared(tmp_path, few, validation_fraction=fraction)
  with pytest.raises(ConfigError, match='of 1 records none is left for validation'):
    prepared(tmp_path, [(['q', 'a'], 'train')])
  assert len(said(prepared(tmp_path, few, [(['q', 'a'], 'validation')], validation_fraction=0.0001))['validation']) == 1


def test_a_conversation_whose_split_is_said_once_is_in_no_other(tmp_path):
  rows = [[f'{i}', 'a'] for i in range(40)]
  found = said(prepared(tmp_path, [['Same  text', 'b'], *rows], [(['same text', 'c'], 'test'), ['同 一', 'd']],
                        [(['同一', 'e'], 'validation')]))
  assert found['test'] == ['Same  text\nb$', 'same text\nc$'] and len(found['validation']) > 2
  texts = [text.encode('latin1').decode() for text in found['validation']]
  assert {'同 一\nd$', '同一\ne$'} <= set(texts)
  # Some begin alike and go on otherwise, which is no leak of a conversation; one that is whole in two splits is.
  found = said(prepared(tmp_path, [(['hi', 'a'], 'train'), (['hi', 'b'], 'test'), ['Hi', 'A'], ['hi', 'c'],
                                    (['q', 'd'], 'validation')]))
  assert found['train'] == ['hi\na$', 'Hi\nA$'] and found['test'] == ['hi\nb$', 'hi\nc$']
  with pytest.raises(DataError, match=r"1.jsonl:2: split 'test', but the same text at .*0.jsonl:1 has split 'train'"):
    prepared(tmp_path, [(['Hi', 'a'], 'train')], [['q', 'a'], (['hi', 'A'], 'test')])


def test_skip_leaves_out_the_conversation_that_trains(tmp_path, capsys):
  files = [(['Hi', 'a'], 'train'), (['q', '答 案'], 'test'), (['w', 'b'], 'train')], [
      (['hi', 'A'], 'validation'), (['Q', '答案'], 'validation'), ['q', '答案']]
  with pytest.raises(DataError, match=r"1.jsonl:1: split 'validation', but the same text at .*0.jsonl:1 has split"):
    prepared(tmp_path, *files)
  capsys.readouterr()
  found = {name: [text.encode('latin1').decode() for text in some]
           for name, some in said(prepared(tmp_path, *files, on_error='skip')).items()}
  assert found == {'train': ['w\nb$'], 'validation': ['hi\nA$'], 'test': ['q\n答 案$', 'q\n答案$']}
  first, second = capsys.readouterr().out.split('1.jsonl:\n')  # each file has a table of its own
  assert 'split                   1   33.33%' in first and 'split                   1   33.33%' in second
  assert f"{tmp_path}/0.jsonl:1: split 'train', but the same text at {tmp_path}/1.jsonl:1 has split 'val" in first
  assert f"{tmp_path}/1.jsonl:2: split 'validation', but the same text at {tmp_path}/0.jsonl:2 has split 't" in second


def test_what_is_dropped_or_refused_is_named_by_its_line(tmp_path, capsys):
  rows = [{'instruction': f'say {i}', 'output': str(i)} for i in range(40)]
  rows[20]['split'] = 'train'
  rows[20]['instruction'] = '### Response: twice'
  (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  words = [*'[PAD] [UNK] [CLS] [SEP] say # response : twice instruction'.split(), *(str(i) for i in range(40))]
  (tmp_path / 'vocab.txt').write_text('\n'.join(words) + '\n')
  c = conversations.Config(str(tmp_path / 'a.jsonl'), 'alpaca', tokenizer=str(tmp_path / 'vocab.txt'), length=40)
  with pytest.raises(DataError, match='a.jsonl:21: field instruction: the tokenizer cannot tell its words from'):
    conversations.prepare(c, tmp_path)
  capsys.readouterr()
  sets = conversations.prepare(dataclasses.replace(c, on_error='skip', pack=False), tmp_path).splits
  assert sum(len(rows.ids_BT) for rows in sets.values()) == 39
  table = capsys.readouterr().out
  assert 'kept                   39   97.50%' in table and 'words                   1    2.50%' in table
  assert f'{tmp_path}/a.jsonl:21: field instruction: the tokenizer cannot tell its words from' in table
  _, report = sft.conversations([talk('q', 'a'), [M('user', 'q')]], chat.chatml, BYTE, 61, names=['f:1', 'f:2'])
  assert report.dropped == 1 and '1 dropped (the first: f:2)' in str(report)


@pytest.mark.parametrize(('record', 'field'), [
    ({'messages': [{'role': 'user', 'content': 'say'}, {'role': 'assistant', 'content': BAD}]}, 'messages[1].content'),
    ({'conversations': [{'from': 'human', 'value': BAD}, {'from': 'gpt', 'value': 'a'}]}, 'conversations[0].value'),
    ({'messages': ['say', 'a'], 'system': BAD}, 'system'), ({'messages': ['say', 'a', BAD, 'a']}, 'messages[2]'),
    ({'instruction': 'say', 'input': BAD, 'output': 'a'}, 'instruction or input'),
    ({'instruction': 'say', 'output': BAD}, 'output'),
    ({'instruction': 'say', 'output': 'a', 'history': [['say', BAD]]}, 'history[0][1]')])
def test_what_the_tokenizer_refuses_is_named_or_left_out_with_its_field(record, field, tmp_path, capsys):
  rows = [record, *({'instruction': 'say', 'output': 'a', 'split': part} for part in ('train', 'validation'))]
  rows[2]['instruction'] = 'a'
  for name, some in (('a', rows[:2]), ('b', rows[2:]), ('c', [record])):
    (tmp_path / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, some)))
  (tmp_path / 'vocab.txt').write_text('\n'.join('[PAD] [UNK] [CLS] [SEP] say a # response :'.split()) + '\n')
  c = conversations.Config(tuple(str(tmp_path / name) for name in ('a.jsonl', 'b.jsonl')), 'alpaca', length=400,
                           tokenizer=str(tmp_path / 'vocab.txt'))
  with pytest.raises(DataError) as stopped:
    conversations.prepare(c, tmp_path)
  said = f'{tmp_path}/a.jsonl:1: field {field}: the tokenizer cannot tell its words from'
  assert str(stopped.value).startswith(said) and '\n' not in str(stopped.value)
  capsys.readouterr()
  data = conversations.prepare(dataclasses.replace(c, on_error='skip'), tmp_path)
  assert data.rows('train') == data.rows('validation') == 1
  printed = capsys.readouterr().out
  assert 'words                   1   50.00%' in printed and said in printed and 'b.jsonl' not in printed
  with pytest.raises(DataError, match='c.jsonl: none of 1 records can be used; the first: .*c.jsonl:1: field'):
    conversations.prepare(dataclasses.replace(c, corpus=(*c.corpus, str(tmp_path / 'c.jsonl')), on_error='skip'),
                          tmp_path)


def test_a_file_of_one_split_is_divided_though_it_trains_nothing(tmp_path):
  rows = [{'instruction': f'say {i}', 'output': str(i), 'split': 'test'} for i in range(3)]
  (tmp_path / 'test.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  c = conversations.Config(str(tmp_path / 'test.jsonl'), 'plain', tokenizer='byte', length=40)
  assert [part for _, part in conversations.divided(c)] == ['test'] * 3
  with pytest.raises(ConfigError, match='none is left for train'):
    conversations.prepare(c, tmp_path)


def test_wrong_conversations_and_cut_turns_are_told(tmp_path, capsys):
  rows = [(['q', 'a'], 'train'), (['w', 'b'], 'validation')]
  bad = ('{"messages": ["q", ""]}', None)
  with pytest.raises(DataError, match='0.jsonl:3: '):
    prepared(tmp_path, [*rows, bad])
  capsys.readouterr()
  assert said(prepared(tmp_path, [*rows, bad], on_error='skip')) == {'train': ['q\na$'], 'validation': ['w\nb$']}
  assert 'kept                    2   66.67%' in capsys.readouterr().out
  prepared(tmp_path, rows)
  assert 'records' not in capsys.readouterr().out
  found = said(prepared(tmp_path, [*rows, (['e', 'c', 'nobody answers'], 'train')]))
  assert found['train'] == ['q\na$', 'e\nc$'] and 'last turn cut           1' in capsys.readouterr().out


def pair(chosen, rejected, *prompt, system=None):
  return Preference(tuple(talk(*prompt, system=system)), chosen, rejected)


@pytest.mark.parametrize('name', TEMPLATES)
def test_pairs_share_their_prompt_and_count_the_answer_only(name):
  asked = [pair('是水星。', 'Mars.', *(m.content for m in GOLDEN[1][1:4]), system='请'), pair('yes', 'no, never', 'q')]
  rows, report = sft.pairs(asked, TEMPLATES[name], FROZEN, 90)
  assert (report.kept, report.rows, report.truncated) == (2, 4, 0)
  for i, preference in enumerate(asked):
    prompt = chat.prompt(TEMPLATES[name], preference.prompt, FROZEN).tolist()
    for side, answer in (('chosen', preference.chosen), ('rejected', preference.rejected)):
      batch, last = getattr(rows, side), getattr(rows, f'{side}_last_B')[i]
      ids, mask = batch.ids_BT[i], batch.mask_BT[i]
      assert batch.ids_BT.shape == (2, 91) and batch.segments_BT[i].tolist() == [1] * (last + 1) + [0] * (90 - last)
      assert ids[:len(prompt)].tolist() == prompt and mask.tolist() == [len(prompt) <= t <= last for t in range(91)]
      assert chat.parse(TEMPLATES[name], ids[mask], FROZEN) == (answer, True) and not ids[last + 1:].any()
  assert report.targets == rows.chosen.mask_BT.sum() + rows.rejected.mask_BT.sum()


def test_a_long_prompt_is_cut_alike_for_both_answers():
  rows, report = sft.pairs([pair('yes', 'n' * 12, 'a', 'b', 'q' * 30 + 'end')], chat.plain, BYTE, 19)
  text = [show(side.ids_BT[0])[:last[0] + 1] for side, last in (
      (rows.chosen, rows.chosen_last_B), (rows.rejected, rows.rejected_last_B))]
  assert text == ['q' * 6 + 'end\nyes$', 'q' * 6 + 'end\n' + 'n' * 10]
  assert (report.truncated, report.cut_targets) == (1, 3)


def test_pairs_that_a_cut_makes_equal_are_dropped():
  asked = [pair('n' * 40 + 'x', 'n' * 40 + 'y', 'q'), pair('good', 'bad', 'q')]
  rows, report = sft.pairs(asked, chat.plain, BYTE, 19)
  assert report.dropped_at == (0,) and report.kept == len(rows.chosen.ids_BT) == 1
  assert sft.pairs(asked, chat.plain, BYTE, 60)[1].dropped == 0


def test_pairs_come_in_batches():
  rows, _ = sft.pairs([pair(f'a{i}', f'b{i}', 'q') for i in range(8)], chat.plain, BYTE, 9)
  trained, (first, second, third) = batches_of(rows, 3, sft.Pair(BLANK, BLANK, np.int32(0), np.int32(0)))
  assert isinstance(third, sft.Pair) and third.chosen.ids_BT.shape == (3, 10) and len(trained) == 2
  assert third.chosen_last_B.tolist() == [4, 4, 0] and not third.rejected.mask_BT[2].any()
  for batch in (*trained, first, second):
    for a, b in zip(batch.chosen.ids_BT, batch.rejected.ids_BT, strict=True):
      assert show(a)[:2] == show(b)[:2] == 'q\n' and a[3] == b[3]  # rows of a pair stay together


@pytest.mark.parametrize(('call', 'error', 'text'), [
    (lambda: sft.conversations(GOLDEN, chat.plain, BYTE, 9, loss='users'), ConfigError, "data.loss='users'"),
    (lambda: sft.conversations(GOLDEN, chat.plain, BYTE, 0), ConfigError, 'data.length=0; expected at least 1'),
    (lambda: sft.conversations([], chat.plain, BYTE, 9), DataError, 'no example has a target left'),
    (lambda: sft.conversations([GOLDEN[0], talk('a')[:0]], chat.plain, BYTE, 99), DataError, 'example 1: conversation'),
    (lambda: sft.conversations([[M('assistant', 'a')]], chat.plain, BYTE, 9), DataError, 'example 0: message 0: role'),
    (lambda: sft.pairs([], chat.plain, BYTE, 9), DataError, 'no example'),
    (lambda: sft.conversations(GOLDEN, chat.plain, tokenizers.char('ab'), 9), ConfigError, 'end token')])
def test_bad_input_is_named(call, error, text):
  with pytest.raises(error, match=text) as found:
    call()
  assert '\n' not in str(found.value)
