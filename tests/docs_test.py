"""What the documents say: commands can be given, counts are those of the configs, and no module goes unnamed."""

import configparser
import importlib
import inspect
import itertools
import pathlib
import re
import shlex
import sys

import pytest

from experiments import cli
from lm import config, params
from lm.errors import ConfigError

ROOT = pathlib.Path(__file__).parent.parent
EXPERIMENTS = sorted(p.stem for p in (ROOT / 'experiments').glob('*.py') if p.stem not in ('__init__', 'cli'))
SCRIPTS = sorted(p.stem for p in (ROOT / 'scripts').glob('*.py'))
DOCUMENTS = ['README.md', 'experiments/README.md', *sorted(f'docs/{p.name}' for p in (ROOT / 'docs').glob('*.md')),
             *(f'experiments/{name}.py' for name in EXPERIMENTS)]
FLAG = re.compile(r"DEFINE_(\w+)[(,]\s*'(\w+)'")
OPEN = re.compile(r'\.\.\.|[A-Z]*')  # values that the reader is to give
COUNT = re.compile(r'(\d[\d,]*(?:\.\d+)?)([MB]?)[- ]parameter|(\d+\.\d+)(M)(?! tokens| steps| a step)')
TEST = re.compile(r'\b[a-z0-9_]+_test\b')


def text_of(path):
  return (ROOT / path).read_text(encoding='utf-8')


def code(path, text):
  """What stands as code: in Markdown blocks and between backticks, in an experiment the lines set in by two spaces."""
  if path.endswith('.py'):
    doc = re.match(r'r?"""(.*?)"""', text, re.DOTALL)[1].replace('\\\n', ' ')
    return [line.strip() for line in doc.splitlines() if line.startswith('  ')]
  fence = re.compile(r'^```\w*\n(.*?)^```', re.DOTALL | re.MULTILINE)
  blocks = [line for block in fence.findall(text) for line in block.replace('\\\n', ' ').splitlines()]
  return blocks + [' '.join(span.split()) for span in re.findall(r'`([^`]+)`', fence.sub('', text))]


def commands(path, text):
  """(module, arguments): of `python -m`, of our modules by any name; the module is '' where flags stand alone."""
  for span in code(path, text):
    words = shlex.shlex(span, posix=True, punctuation_chars=';&|')
    words.whitespace_split = True
    try:
      parts = [list(part) for _, part in itertools.groupby(words, lambda word: word in (';', '&&', '|'))]
    except ValueError:  # an apostrophe: no command
      continue
    for part in parts:
      at = next((i for i, word in enumerate(part) if module_of(word)), None)
      if part[:2] == ['python', '-m'] and len(part) > 2:
        yield module_of(part[2]) or part[2], part[3:]
      elif at is not None:
        yield module_of(part[at]), part[at + 1:]
      elif part[0].startswith('--'):
        yield '', part


def module_of(word):
  """'scripts.sample' for that, 'sample', 'sample.py' and 'scripts/sample.py'; '' for what is no module of ours."""
  package, _, name = word.removesuffix('.py').replace('/', '.').rpartition('.')
  found = [f'{where}.{name}' for where, names in (('experiments', EXPERIMENTS), ('scripts', SCRIPTS))
           if name in names and package in ('', where)]
  return found[0] if found else ''


def flags_of(module):
  """Names of the flags that a module takes, 'no' before those of them that are yes or no."""
  source = inspect.getsource(cli._run)
  if module:
    source += text_of(module.replace('.', '/') + '.py')
  if 'cli.main(' in source:
    source += inspect.getsource(cli)
  found = FLAG.findall(source)
  return {name for _, name in found} | {f'no{name}' for kind, name in found if kind == 'bool'}


def configs_of(module):
  """{name: function} of the experiment."""
  found = importlib.import_module(module).CONFIGS
  return found if isinstance(found, dict) else {f.__name__: f for f in found}


def faults(path, text):
  """What cannot be given of the commands of a document."""
  anywhere = set().union(*(flags_of(f'{where}.{name}') for where, names in (
      ('experiments', EXPERIMENTS), ('scripts', SCRIPTS)) for name in names))
  yield from (f'{path}: {name}: no such test' for name in sorted(set(TEST.findall(text)))
              if not (ROOT / 'tests' / f'{name}.py').is_file())
  for module, arguments in commands(path, text):
    if module and not (ROOT / (module.replace('.', '/') + '.py')).is_file():
      if module.split('.')[0] in ('experiments', 'scripts', 'lm', 'tests'):
        yield f'{path}: python -m {module}: no such module'
      continue
    known, given = flags_of(module) if module else anywhere, {}
    for i, word in enumerate(arguments):
      name, equals, value = word.removeprefix('--').partition('=')
      if word.startswith('--'):
        given.setdefault(name, []).append(value if equals or name != 'set' else ''.join(arguments[i + 1:i + 2]))
        if name not in known:
          yield f'{path}: {module} --{name}: no such flag'
    experiment = ''.join(given.get('experiment', ())) or module.removeprefix('experiments.')
    if experiment not in EXPERIMENTS:
      if 'experiment' in given:
        yield f'{path}: {module} --experiment={experiment}: no such experiment'
      continue
    configs = configs_of(f'experiments.{experiment}')
    names = given.get('config', [next(iter(configs))])
    yield from (f'{path}: {module} --config={name}: no such config' for name in names
                if name not in configs and not OPEN.fullmatch(name))
    settings = [s for s in given.get('set', ()) if not OPEN.fullmatch(s.partition('=')[2])]
    for name in configs.keys() & set(names):
      try:
        config.override(configs[name](), *settings)
      except ConfigError as error:
        yield f'{path}: {module} --config={name}: {error}'


@pytest.mark.parametrize('path', DOCUMENTS)
def test_commands_can_be_given(path):
  found = list(faults(path, text_of(path)))
  assert not found, '\n'.join(found)


@pytest.mark.parametrize(('path', 'module', 'least'), [
    ('README.md', 'scripts.prepare_corpus', 3), ('README.md', 'experiments.gpt2', 2), ('README.md', '', 5),
    ('experiments/README.md', 'experiments.roberta', 1), ('experiments/README.md', '', 5),
    ('docs/speed.md', 'scripts.bench_train', 3), ('experiments/sft.py', 'experiments.sft', 2)])
def test_there_are_commands_to_check(path, module, least):
  assert len([m for m, _ in commands(path, text_of(path)) if m == module]) >= least


@pytest.mark.parametrize(('text', 'part'), [
    ('`python -m scripts.nothing --out=a`', 'python -m scripts.nothing: no such module'),
    ('```\npip install x; python -m experiments.nothing\n```', 'python -m experiments.nothing: no such module'),
    ('`python -m scripts.sample --modle=a`', 'scripts.sample --modle: no such flag'),
    ('```\npython -m scripts.sample \\\n    --max_nwe=3  # no\n```', '--max_nwe: no such flag'),
    ('`python -m scripts.sample\n--config=quickstart`', 'scripts.sample --config: no such flag'),
    ('`bench_train --pear=torch`', 'scripts.bench_train --pear: no such flag'),
    ('`python tests/fake_devices.py 8 experiments.gpt2 --work=a`', 'experiments.gpt2 --work: no such flag'),
    ('`--resum=never` alone', '--resum: no such flag'),
    ('`python -m experiments.gpt2 --config=gpt2_125m`', '--config=gpt2_125m: no such config'),
    ('`encoders.py --config=short`', '--config=short: no such config'),
    ('`python -m scripts.compile_for --experiment=gpt3 --config=gpt3_175b_v4`', '--config=gpt3_175b_v4: no such'),
    ('`python -m scripts.repeat --experiment=lore`', '--experiment=lore: no such experiment'),
    ('`python -m experiments.sft --config=smollm2 --set data.on_eror=skip`', 'on_eror'),
    ('`python -m experiments.gpt2 --set model.layers=two`', 'model.layers'),
    ('`pytest tests/nothing_test.py`', 'nothing_test: no such test'), ('`nn_tests.py`; `none_test`', 'none_test: no'),
])
def test_each_fault_is_found(text, part):
  assert any(part in fault for fault in faults('README.md', text)), list(faults('README.md', text))


@pytest.mark.parametrize('text', [
    'no code --nothing', '`--target=v5p:8x8x16`', '`pip download --no-deps a==1; unzip -qo b`', "`it's --nothing`",
    '`python -m experiments.gpt2 --config=NAME --nodescribe --set data.corpus=...`', '`XLA_FLAGS=--xla_nothing`'])
def test_what_is_no_fault(text):
  assert not list(faults('README.md', text))


def task_of(experiment, c):
  """The task that the experiment makes of the config."""
  own = getattr(importlib.import_module(f'experiments.{experiment}'), 'task', None)
  return (own or sys.modules[type(c).__module__].task)(c)


def count_faults(doc, count):
  """Counts of parameters in a docstring that are not `count`, to the digits that they have."""
  for number, unit, *short in COUNT.findall(' '.join(doc.split())):
    number, unit = (number, unit) if number else short
    digits = len(number.partition('.')[2])
    found = f'{count / {"": 1, "M": 1e6, "B": 1e9}[unit]:,.{digits}f}'
    if number != found:
      yield f'{number}{unit}; there are {found}{unit} ({count:,})'


COUNTED = [(name, f) for name in EXPERIMENTS for f in configs_of(f'experiments.{name}').values()
           if COUNT.search(' '.join(f.__doc__.split()))]


@pytest.mark.parametrize(('experiment', 'make'), COUNTED, ids=lambda x: getattr(x, '__name__', x))
def test_docstrings_have_the_count_of_their_config(experiment, make):
  found = list(count_faults(make.__doc__, params.count(task_of(experiment, make()).specs)))
  assert not found, '\n'.join(found)


def test_there_are_counts_to_check():
  names = {f.__name__ for _, f in COUNTED}
  assert {'quickstart', 'shakespeare_char_cpu', 'gpt2_124m', 'palm_540b', 'bert_cpu', 'electra_cpu'} <= names


@pytest.mark.parametrize(('doc', 'right'), [
    ('A 2.6M-parameter GPT.', True), ('A 3.4M-parameter GPT.', False), ('With 2,582,208\n  parameters.', True),
    ('2,582,209 parameters', False), ('2.58M in all', True), ('2.59M in all', False), ('3.2M tokens a step', True),
    ('0.003B parameters', True), ('3B parameters', False), ('3M parameters', True)])
def test_a_wrong_count_is_found(doc, right):
  assert (not list(count_faults(doc, 2_582_208))) == right


def unnamed(readme):
  """Modules and packages of lm/ that the table of floors lacks."""
  rows = ' '.join(re.findall(r'^\| [0-4] .*\|$', readme, re.MULTILINE))
  named = {name.rstrip('/') for name in re.findall(r'`([\w/]+)`', rows)}
  have = {p.stem for p in (ROOT / 'lm').iterdir() if p.suffix == '.py' or (p / '__init__.py').is_file()}
  return sorted(have - named - {'__init__'})


def test_the_table_of_floors_names_every_module():
  assert unnamed(text_of('README.md')) == []


@pytest.mark.parametrize('name', ['summary', 'kernels/'])
def test_a_module_that_the_table_lacks_is_found(name):
  assert name.rstrip('/') in unnamed(text_of('README.md').replace(f'`{name}`', ''))


def extras_without(readme):
  """Extras of setup.cfg that the README does not name."""
  setup = configparser.ConfigParser()
  setup.read_string(text_of('setup.cfg'))
  return sorted(name for name in setup['options.extras_require'] if f'`{name}`' not in readme)


def test_the_readme_names_every_extra():
  readme = text_of('README.md')
  assert extras_without(readme) == []
  assert extras_without(readme.replace('`rl`', '').replace('`cuda-aot`', '')) == ['cuda-aot', 'rl']
