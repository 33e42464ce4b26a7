"""What a step reads, as a person sees it."""

import json
import re

import numpy as np
import pytest
import tiny

from experiments import cli, gpt2, sft
from lm import config, instruct, look, pretrain
from lm.data import conversations, loader
from lm.errors import ConfigError
from lm.text import tokenizer


@pytest.fixture
def corpus(tmp_path):
  return tiny.write_text(tmp_path / 'text.txt')


def test_the_texts_of_a_step_are_those_it_trains_on(corpus, tmp_path):
  c, task = tiny.make_config(corpus, skip_batches=((2, 4),)), tiny.task()
  data = loader.prepare(c.data, tmp_path / 'data', seed=c.seed)
  for step, number in ((1, 0), (2, 1), (3, 6), (12, 15)):
    lines = look.batch(c, task, tmp_path, step).split('\n\n')
    ids_BT = loader.host_batch(data, number)['ids_BT']
    assert len(lines) == len(ids_BT) == 8
    for i, (line, ids_T) in enumerate(zip(lines, ids_BT, strict=True)):
      text = look.with_controls(data.tokenizer, ids_T)
      assert line.strip() == f'row {i}: 17 tokens, 16 targets\n{text}'.strip()
  for step in (0, 13):
    with pytest.raises(ConfigError, match=f'--show_batch={step}: the run has steps 1 to 12'):
      look.batch(c, task, tmp_path, step)


def test_control_tokens_are_named_and_chinese_stays_whole():
  tok = tokenizer.load('byte')
  eos = next(name for name, i in tok.control.items() if i == tok.eos_id)
  ids = np.concatenate([tok.encode('却说 cao'), [tok.eos_id], tok.encode('曹操'), [tok.eos_id, tok.eos_id]])
  assert look.with_controls(tok, ids) == f'却说 cao{eos}曹操{eos}{eos}'


def test_from_the_command_line(corpus, tmp_path, capsys):
  """Nothing is trained, no checkpoint is made."""
  argv = tiny.argv(workdir=tmp_path / 'run', data__corpus=corpus, show_batch=4)
  assert cli.run_argv(['gpt2', *argv], 'Doc.', gpt2.CONFIGS, pretrain.task) == 0
  out = capsys.readouterr().out
  assert out.count('17 tokens, 16 targets') == 8
  assert {p.name for p in (tmp_path / 'run').iterdir()} == {'data'}
  assert cli.run_argv(['gpt2', *tiny.argv(workdir=tmp_path / 'run', data__corpus=corpus, show_batch=7)], 'Doc.',
                      gpt2.CONFIGS, pretrain.task) == 2
  assert 'error: --show_batch=7: the run has steps 1 to 6' in capsys.readouterr().err


def test_targets_are_marked_where_not_all_tokens_are(tmp_path):
  """Chat templates by eye: the answers and the ends of their turns, and nothing else."""
  talks = [{'messages': [{'role': 'user', 'content': f'问{i}'}, {'role': 'assistant', 'content': f'answer {i}'}]}
           for i in range(30)]
  (tmp_path / 'chat.jsonl').write_text(''.join(json.dumps(talk, ensure_ascii=False) + '\n' for talk in talks))
  c = config.replace(sft.smollm2(), data=conversations.Config(corpus=str(tmp_path / 'chat.jsonl'), tokenizer='byte',
                                                               template='plain', length=64, batch=4, pack=False))
  text = look.batch(c, instruct.task(c), tmp_path, 1)
  shown = [row.split('\n', 1) for row in text.strip().split('\n\n')]
  assert len(shown) == 4
  for head, row in shown:
    inside = re.findall(f'{look.OPENS}(.*?){look.CLOSES}', row, re.DOTALL)
    assert len(inside) == 1 and re.match(r' ?answer \d+', inside[0])
    assert re.search(r'问\d', row.split(look.OPENS)[0])
    assert head.startswith('row ') and head.endswith('targets')
