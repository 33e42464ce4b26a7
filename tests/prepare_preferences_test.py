"""The files of scripts/prepare_preferences, from made-up packages laid out as the real ones, and prepare_arithmetic."""

import collections
import hashlib
import io
import itertools
import json
import pathlib
import re
import subprocess
import sys
import tarfile

import pytest

from lm.data import examples, prompts
from lm.rewards import arithmetic
from lm.text import tokenizer as tokenizers

ROOT = pathlib.Path(__file__).parent.parent
TEXTS = {f'{("A", "An", "这")[i % 3]} sentence number {i} .': (i * 37 % 77 - 38) / 10 for i in range(300)}
PAIRS = [{'conversations': [{'from': 'human', 'value': f'question {i // 2} 问题'}],
          'chosen': {'from': 'gpt', 'value': f'good {i}'}, 'rejected': {'from': 'gpt', 'value': f'bad {i}'}}
         for i in range(60)]
# One process for each script: starting one takes longer than the rest, and flags are global to a process. The hash of a
# package that is made up here is not the real one's.
DRIVER = """
import contextlib, dataclasses, importlib, io, json, sys
from absl import flags
from lm.data import recipes
from lm.errors import Error
script = importlib.import_module('scripts.' + sys.argv[1])
for name, recipe in recipes.PREFERENCES.items():
  recipes.PREFERENCES[name] = dataclasses.replace(recipe, sha256='', command=('false',))
for line in sys.stdin:
  for name in flags.FLAGS:
    flags.FLAGS[name].unparse()
  flags.FLAGS(['script', *json.loads(line)])
  printed, code, error = io.StringIO(), 0, ''
  try:
    with contextlib.redirect_stdout(printed):
      script.main([])
  except Error as e:
    code, error = e.code, str(e)
  print(json.dumps([code, printed.getvalue(), error]), flush=True)
"""


def tenth(text):
  return int(hashlib.sha1(text.encode()).hexdigest(), 16) % 10 == 0


def tar(members):
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode='w:gz') as t:
    for name, content in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      t.addfile(info, io.BytesIO(content))
  return buffer.getvalue()


@pytest.fixture(scope='module')
def downloads(tmp_path_factory):
  folder = tmp_path_factory.mktemp('downloads')
  rows = '\n'.join(f'{i}\t{grade}\t{text}' for i, (text, grade) in enumerate(TEXTS.items()))
  rows += '\n998\t3\tTwice .\n999\t-3\tTwice .'  # two minds about one text: it is left out
  inner = tar({'hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt': rows.encode()})
  (folder / 'vaderSentiment-3.3.2.tar.gz').write_bytes(
      tar({'vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz': inner}))
  (folder / 'llamafactory-0.9.5.tar.gz').write_bytes(tar({
      'llamafactory-0.9.5/data/dpo_en_demo.json': json.dumps(PAIRS).encode(),
      'llamafactory-0.9.5/data/dpo_zh_demo.json': b'junk'}))
  return folder


def process(script):
  with subprocess.Popen([sys.executable, '-c', DRIVER, script], cwd=ROOT, stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE, text=True) as found:
    def run(**given):
      """(exit status, what is printed, the error)."""
      found.stdin.write(json.dumps([f'--{name}={value}' for name, value in given.items()]) + '\n')
      found.stdin.flush()
      return json.loads(found.stdout.readline())
    yield run
    found.stdin.close()


@pytest.fixture(scope='module')
def preferences():
  yield from process('prepare_preferences')


@pytest.fixture(scope='module')
def sums():
  yield from process('prepare_arithmetic')


@pytest.fixture
def records(tmp_path):
  """records(script, flags...) -> the records of the file that it writes."""
  def make(run, **given):
    out = tmp_path / f'{len(list(tmp_path.iterdir()))}.jsonl'
    code, _, error = run(out=out, **given)
    assert (code, error) == (0, '')
    return [json.loads(line) for line in out.read_text(encoding='utf-8').splitlines()]
  return make


@pytest.mark.parametrize('given, answers, gap', [
    ({}, 2, 1.0), ({'gap': 3}, 2, 3.0), ({'answers': 4}, 4, 0.0), ({'answers': 9, 'gap': 0.2, 'times': 3}, 9, 0.2),
    ({'times': 3, 'prompt': '一篇影评：\n'}, 2, 1.0)])
def test_groups_are_graded_apart_and_no_sentence_is_on_both_sides(given, answers, gap, preferences, records, downloads):
  found = records(preferences, kind='movie', downloads=downloads, **given)
  used = {'train': collections.Counter(), 'validation': collections.Counter()}
  for r in found:
    assert r.keys() == {'prompt', 'answers', 'grades', 'split'} and r['prompt'] == given.get('prompt', '')
    assert len(r['answers']) == len(set(r['answers'])) == answers
    assert r['grades'] == [TEXTS[text] for text in r['answers']]
    assert all(abs(a - b) >= gap for a, b in itertools.combinations(r['grades'], 2))
    used[r['split']].update(r['answers'])
  for split, counts in used.items():
    assert all(tenth(text) == (split == 'validation') for text in counts)
    assert max(counts.values()) <= given.get('times', 1)
  assert len({frozenset(r['answers']) for r in found}) == len(found)
  held_out = sum(map(tenth, TEXTS))
  assert len(used['train']) > 0.9 * (300 - held_out) and len(used['validation']) > 0.5 * held_out


def test_the_order_in_a_group_tells_nothing_and_the_seed_decides(preferences, records, downloads):
  make = lambda seed: records(preferences, kind='movie', downloads=downloads, seed=seed)
  first = make(0)
  better = sum(r['grades'][0] > r['grades'][1] for r in first) / len(first)
  assert 0.3 < better < 0.7 and first == make(0) != make(1)


def test_groups_are_records_that_the_reader_takes(preferences, downloads, tmp_path):
  preferences(kind='movie', downloads=downloads, out=tmp_path / 'm.jsonl', answers=3)
  found, report = examples.read(tmp_path / 'm.jsonl', 'graded')
  assert report.kept == report.seen > 50 and {e.split for e in found} == {'train', 'validation'}
  assert all(e.grades == tuple(TEXTS[text] for text in e.answers) for e in found)


def test_pairs_keep_their_shape_and_one_question_in_ten_validates(preferences, downloads, tmp_path):
  code, printed, _ = preferences(kind='dpo_demo', downloads=downloads, out=tmp_path / 'd.jsonl')
  found, _ = examples.read(tmp_path / 'd.jsonl', 'preference')
  assert code == 0 and 'for tests only' in printed
  assert [(e.prompt[0].content, e.chosen, e.rejected) for e in found] == [
      (f'question {i // 2} 问题', f'good {i}', f'bad {i}') for i in range(60)]
  assert [e.split == 'validation' for e in found] == [tenth(e.prompt[0].content) for e in found]
  assert len({e.split for e in found}) == 2


def test_a_wrong_flag_or_package_is_named(preferences, downloads, tmp_path):
  (tmp_path / 'there.jsonl').write_text('mine')
  fine = {'kind': 'movie', 'downloads': downloads, 'out': tmp_path / 'x.jsonl'}
  for given, code, part in (({'out': tmp_path / 'there.jsonl'}, 2, 'exists already'), ({'out': ''}, 2, '--kind, --out'),
                            ({'answers': 9, 'gap': 3.5}, 3, 'lower --gap or --answers'),
                            ({'downloads': tmp_path / 'none'}, 3, 'check the network')):
    found = preferences(**(fine | given))
    assert found[0] == code and part in found[2], found
  assert (tmp_path / 'there.jsonl').read_text() == 'mine' and not (tmp_path / 'x.jsonl').exists()


@pytest.mark.slow
@pytest.mark.parametrize('given', [{}, {'language': 'zh', 'digits': 1}, {'digits': 3, 'operators': 'multiply'}])
def test_sums_are_right_distinct_and_their_numbers_are_in_one_split(given, sums, records):
  found = records(sums, count=900, **given)
  compute = {'+': int.__add__, '-': int.__sub__, '*': int.__mul__, '×': int.__mul__}
  sides, sizes, signs = collections.defaultdict(set), collections.Counter(), set()
  for r in found:
    chinese = given.get('language') == 'zh'
    a, sign, b = re.fullmatch(r'(\d+) (.) (\d+) 等于多少？' if chinese else r'What is (\d+) (.) (\d+)\?',
                              r['prompt']).groups()
    assert int(r['answer']) == compute[sign](int(a), int(b))
    sides[tuple(sorted((int(a), int(b))))].add(r['split'])
    sizes[len(a), len(b)] += 1
    signs.add(sign)
  digits = given.get('digits', 2)
  assert len({r['prompt'] for r in found}) == len(found) == min(900, 300 if digits == 1 else 900)
  assert set(map(len, sides.values())) == {1} and set(itertools.product(range(1, digits + 1), repeat=2)) == set(sizes)
  assert signs == ({'*'} if 'operators' in given else {'+', '-', '×' if chinese else '*'})
  assert 0.03 < sum(r['split'] == 'validation' for r in found) / len(found) < 0.2
  share = sizes[1, 1] / len(found)
  assert share == 1 if digits == 1 else share > 0.6 * min(1 / digits**2, 1)  # not one in a hundred, as by chance


def test_solved_equations_stand_above_one_to_complete(sums, records):
  for language, digits, shots in (('en', 2, 2), ('zh', 1, 4)):
    found = records(sums, count=250, language=language, digits=digits, shots=shots)
    held_out = {r['prompt'].split('\n')[-1] for r in found if r['split'] == 'validation'}
    assert held_out and len(found) == 250
    for r in found:
      *shown, asked = r['prompt'].split('\n')
      assert len(set(shown)) == shots and asked.endswith(' =')
      for line in (*shown, f'{asked} {r["answer"]}'):
        a, sign, b, equals, c = line.split(' ')
        assert equals == '=' and {'+': int.__add__, '-': int.__sub__}.get(sign, int.__mul__)(int(a), int(b)) == int(c)
      assert not {line.rsplit(' ', 1)[0] for line in shown} & ({asked} | held_out)


def test_sums_become_prompts_whose_answers_are_rewarded(sums, tmp_path):
  assert sums(out=tmp_path / 'a.jsonl', count=200, seed=3)[0] == 0
  found, _ = prompts.read(tmp_path / 'a.jsonl', prompts.Config(), tokenizers.byte())
  some = [record for record, _ in found]
  assert len(some) == 200 and arithmetic(some, [f'{r.prompt} It is {r.answer}.' for r in some]) == [1] * 200
  assert sum(arithmetic(some, [r.prompt for r in some])) < 20


@pytest.mark.parametrize('given, part', [
    ({'operators': 'add,divide'}, '--operators=add,divide; expected some of add'),
    ({'operators': 'add,add'}, 'each once'), ({'operators': ''}, '--operators='),
    ({'count': 1}, 'expected some of each split'), ({'out': ''}, '--out: not given')])
def test_a_wrong_flag_of_the_sums_is_named(given, part, sums, tmp_path):
  code, _, error = sums(**({'out': tmp_path / 'x.jsonl'} | given))
  assert code == 2 and part in error and not (tmp_path / 'x.jsonl').exists()
