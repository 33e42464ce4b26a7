"""scripts/train_tokenizer: what it trains on, and what is refused."""

import json
import pathlib
import subprocess
import sys

import pytest

from lm.data import corpora, records
from lm.text import tokenizer as tokenizers

FIRST = 0x4e00
ROOT = pathlib.Path(__file__).parent.parent


def run(*arguments):
  return subprocess.run([sys.executable, '-m', 'scripts.train_tokenizer', *arguments], cwd=ROOT, capture_output=True,
                        text=True, timeout=300, check=False)


@pytest.fixture
def corpus(tmp_path):
  """60 documents, each with a character that no other has."""
  path = tmp_path / 'text.jsonl'
  path.write_text('\n'.join(json.dumps({'text': f'text {chr(FIRST + i)}' * 3}) for i in range(60)))
  return path


@pytest.mark.slow
@pytest.mark.parametrize('fraction, vocab', [(0.0, 328), (0.3, 315)])
def test_held_out_documents_have_no_part_in_it(fraction, vocab, corpus, tmp_path):
  out = tmp_path / 'a.model'
  done = run('--kind=bpe', f'--vocab={vocab}', '--character_coverage=1', f'--text={corpus}', f'--out={out}',
             f'--validation_fraction={fraction}')
  assert done.returncode == 0, done.stderr
  tokenizer = tokenizers.load(out)
  held_out = {d.text[5] for part, d in records.assign(corpora.find(str(corpus)), records.Split('hash', fraction))
              if part == 'validation'}
  assert bool(held_out) == (fraction > 0)
  for character in map(chr, range(FIRST, FIRST + 60)):
    ids = tokenizer.encode(character)
    assert tokenizer.decode(ids) == character
    assert (len(ids) > 2) == (character in held_out)  # three bytes, or an id of its own, and a space's


@pytest.mark.slow
@pytest.mark.parametrize('arguments, expected', [
    ([], '--text: not given'), (['--text=nowhere.txt', '--out=a.model'], 'nowhere.txt'),
    (['--text=TEXT', '--out=a'], '--out=a: expected a name ending in .model; e.g. --out=a.model'),
    (['--text=TEXT', '--out=OUT.model', '--validation_fraction=1'], 'validation_fraction=1.0'),
    (['--text=TEXT', '--out=OUT.model', '--control_symbols=a,a'], "control_symbols: 'a' is there already"),
    (['--text=TEXT', '--out=OUT.model', '--control_symbols=<0x0A>'], "control_symbols: '<0x0A>' is there already"),
    (['--text=TEXT', '--kind=char', '--out=OUT', '--validation_fraction=0.1'],
     '--validation_fraction=0.1 with --kind=char'),
    (['--text=TEXT', '--kind=char', '--out=OUT', '--control_symbols=[CLS]'], 'not for --kind=char'),
])
def test_what_is_wrong_is_named(arguments, expected, corpus, tmp_path):
  done = run(*(a.replace('TEXT', str(corpus)).replace('OUT', str(tmp_path / 'out')) for a in arguments))
  assert done.returncode in (2, 3) and expected in done.stderr and done.stderr.count('\n') == 1


def test_text_that_is_damaged_from_its_first_line_is_named(tmp_path):
  (tmp_path / 'a.jsonl').write_bytes('{"text": "好"}\n'.encode('gbk'))
  done = run('--vocab=300', f'--text={tmp_path}/a.jsonl', f'--out={tmp_path}/a.model')
  assert done.returncode == 3, done.stderr
  assert done.stderr.startswith(f'error: {tmp_path}/a.jsonl:1: byte 10 is not UTF-8')


def test_damaged_text_is_named_and_not_the_vocabulary(corpus, tmp_path):
  corpus.write_bytes(corpus.read_bytes() + '\n{"text": "好"}\n'.encode('gbk'))
  done = run('--vocab=300', f'--text={corpus}', f'--out={tmp_path}/a.model')
  assert done.returncode == 3 and done.stderr.startswith(f'error: {corpus}:61: byte 10 is not UTF-8'), done.stderr
