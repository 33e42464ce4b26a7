"""The house rules that a machine can check: floors, sizes, banned names, nothing done at import."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FLOORS = (
    'errors disk hosts config params sharding products nn kernels',
    'models text data rewards',
    'losses logprobs metrics peft peft_hf peft_nodes mixout optim muon ema spikes budget hlo hlo_module '
    'targets',
    'host faults look train parallel pipeline checkpoint seal weights sampler decode beam rollout loop report events '
    'logs evaluate samples run start summary pictures monitor pretrain pretrain_encoder instruct preference '
    'classification classifier reward_model plan plan_search plan_tasks policy experience reinforce bench',
)
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names.split()}
FILES = sorted(p.relative_to(ROOT).as_posix() for top in ('lm', 'experiments', 'scripts')
               for p in (ROOT / top).rglob('*.py'))
PICKLES = ('pickle', 'cPickle', 'dill', 'shelve', 'marshal', 'cloudpickle', 'joblib')
CALLS = ('eval', 'exec', 'compile', '__import__', 'yaml.load', 'os.system', 'os.popen')
# Calls that a constant at module level may not make: they start a backend, or read or change the machine.
AT_IMPORT = ('jnp.', 'jax.', 'os.', 'np.random.', 'random.', 'time.', 'open', 'print', 'input', 'pathlib.Path.cwd',
             'logging.', 'sys.')
AT_IMPORT_OK = ('jax.jit', 'jax.custom_vjp', 'jax.custom_jvp', 'logging.getLogger', 'os.path.join')


def imports(tree):
  """(dotted name, line) of everything imported anywhere in the file, names included: 'lm.losses.Term'."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from ((alias.name, node.lineno) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      module = '.' * node.level + (node.module or '')
      yield from ((f'{module}.{alias.name}', node.lineno) for alias in node.names)


def dotted(node):
  """'jax.config.update' for that expression, '' for what is no plain chain of names."""
  if isinstance(node, ast.Name):
    return node.id
  if isinstance(node, ast.Attribute):
    head = dotted(node.value)
    return f'{head}.{node.attr}' if head else ''
  return ''


def floor_faults(path, tree):
  top, *rest = path.removesuffix('.py').removesuffix('/__init__').split('/')
  mine = FLOOR.get(rest[0]) if top == 'lm' and rest else 4
  if mine is None:
    yield f'lm/{rest[0]} has no floor; give it one in {pathlib.Path(__file__).name}'
    return
  for name, line in imports(tree):
    package, *inner = name.split('.')
    if package == '':
      yield f'{path}:{line}: relative import; name the module in full'
    if package == 'scripts':
      yield f'{path}:{line}: imports {name}; nothing imports scripts'
    if top == 'lm' and package in ('absl', 'experiments'):
      yield f'{path}:{line}: imports {name}; lm/ knows no flags and no experiment'
    if top == 'experiments' and package == 'experiments' and inner[0] != 'cli':
      yield f'{path}:{line}: imports {name}; an experiment imports experiments.cli only'
    if package == 'lm' and FLOOR.get(inner[0], 0) > mine:
      yield f'{path}:{line}: floor {mine} imports {name} of floor {FLOOR[inner[0]]}; imports only go down'
    if rest[:1] == ['losses'] and inner[:1] == ['losses'] and inner[1:] and inner[1].islower():
      yield f'{path}:{line}: imports {name}; losses never import each other'


def banned_faults(path, tree):
  for name, line in imports(tree):
    parts = name.split('.')
    if parts[0] in PICKLES:
      yield f'{path}:{line}: imports {name}; it runs what it reads'
    if any(p.startswith('_') for p in parts) and parts[0] != '__future__':
      yield f'{path}:{line}: imports {name}, which is private'
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and node.attr == '_src':
      yield f'{path}:{node.lineno}: uses {dotted(node)}, which is private'
    if not isinstance(node, ast.Call):
      continue
    name = dotted(node.func)
    if name in CALLS or isinstance(node.func, ast.Attribute) and node.func.attr == 'extractall':
      yield f'{path}:{node.lineno}: calls {name or node.func.attr}'
    for keyword in node.keywords:
      if keyword.arg in ('shell', 'allow_pickle') and not (
          isinstance(keyword.value, ast.Constant) and keyword.value.value is False):
        yield f'{path}:{node.lineno}: passes {keyword.arg}'


def size_faults(path, text, tree):
  most = {'lm/kernels': 400, 'experiments': 150}.get(path.rpartition('/')[0], 300)
  lines = len(text.splitlines())
  if lines > most:
    yield f'{path}: {lines} lines; expected at most {most}; take a part out that stands on its own'
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 60:
      yield f'{path}:{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines; expected at most 60'
  for i, line in enumerate(text.splitlines(), 1):
    if 'TODO' in line or 'FIXME' in line:
      yield f'{path}:{i}: a note to oneself; do it or drop it'
  if path.endswith('/utils.py'):
    yield f'{path}: name it after what it holds'


def import_faults(path, body):
  """Statements of a module or class body that do more than bind names."""
  for node in body:
    if isinstance(node, ast.ClassDef):
      yield from import_faults(path, node.body)
    elif isinstance(node, ast.If | ast.Try):  # an optional dependency, `if TYPE_CHECKING`
      handlers = [n for h in getattr(node, 'handlers', ()) for n in h.body]
      yield from import_faults(path, node.body + handlers + node.orelse)
    elif isinstance(node, ast.Assign | ast.AnnAssign):
      targets = node.targets if isinstance(node, ast.Assign) else [node.target]
      if any(isinstance(t, ast.Subscript | ast.Attribute) for t in targets):
        yield f'{path}:{node.lineno}: changes an object at import'
      yield from (f'{path}:{node.lineno}: calls {name} at import' for name in calls_now(node.value)
                  if name.startswith(AT_IMPORT) and name not in AT_IMPORT_OK)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
      if not dotted(node.value.func).split('.')[-1].startswith(('register', 'defvjp', 'defjvp')):
        yield f'{path}:{node.lineno}: calls {dotted(node.value.func)} at import'
    elif not isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.Pass) and not (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
      yield f'{path}:{node.lineno}: runs a statement ({type(node).__name__}) at import'


def calls_now(node):
  """Dotted names called when the expression is evaluated: a lambda's body is not."""
  if node is None or isinstance(node, ast.Lambda):
    return
  if isinstance(node, ast.Call):
    yield dotted(node.func)
  for child in ast.iter_child_nodes(node):
    yield from calls_now(child)


def faults(path, text):
  tree = ast.parse(text)
  found = [*floor_faults(path, tree), *banned_faults(path, tree), *size_faults(path, text, tree)]
  return found + (list(import_faults(path, tree.body)) if path.startswith('lm/') else [])


@pytest.mark.parametrize('path', FILES)
def test_a_file_keeps_the_rules(path):
  found = faults(path, (ROOT / path).read_text(encoding='utf-8'))
  assert not found, '\n'.join(found)


def test_there_are_files_to_check():
  assert 'lm/params.py' in FILES and len(FILES) > 10


@pytest.mark.parametrize('path, text, part', [
    ('lm/nn.py', 'from lm import train', 'floor 0 imports lm.train of floor 3'),
    ('lm/nn.py', 'def f():\n  from lm.models import decoder', 'of floor 1'),
    ('lm/data/loader.py', 'import lm.losses', 'floor 1 imports lm.losses'),
    ('lm/kernels/attention.py', 'from lm.models.decoder import Config', 'floor 0 imports'),
    ('lm/nn.py', 'from . import params', 'relative import'),
    ('lm/newcomer.py', 'x = 1', 'has no floor'),
    ('lm/run.py', 'from absl import flags', 'knows no flags'),
    ('lm/run.py', 'from experiments import cli', 'no experiment'),
    ('lm/run.py', 'import scripts.sample', 'nothing imports scripts'),
    ('experiments/bert.py', 'from experiments import gpt2', 'experiments.cli only'),
    ('scripts/sample.py', 'from scripts import plot', 'nothing imports scripts'),
    ('lm/losses/dpo.py', 'from lm.losses import ar', 'losses never import each other'),
    ('lm/losses/dpo.py', 'from lm.losses.ar import loss', 'losses never import each other'),
    ('scripts/a.py', 'import pickle', 'runs what it reads'),
    ('scripts/a.py', 'from jax._src import core', 'private'),
    ('scripts/a.py', 'import jax\nx = jax._src.core', 'private'),
    ('scripts/a.py', 'def f(s):\n  return eval(s)', 'calls eval'),
    ('scripts/a.py', 'def f(s):\n  return yaml.load(s)', 'calls yaml.load'),
    ('scripts/a.py', 'def f(z):\n  z.open("x").extractall()', 'calls extractall'),
    ('scripts/a.py', 'subprocess.run("ls", shell=True)', 'passes shell'),
    ('scripts/a.py', 'np.load(f, allow_pickle=True)', 'passes allow_pickle'),
    ('scripts/a.py', 'os.system("ls")', 'calls os.system'),
    ('lm/nn.py', 'x = 1\n' * 301, '301 lines'),
    ('lm/kernels/a.py', 'x = 1\n' * 401, '401 lines'),
    ('experiments/a.py', 'x = 1\n' * 151, '151 lines; expected at most 150'),
    ('lm/nn.py', 'def f():\n' + '  x = 1\n' * 60, 'f has 61 lines'),
    ('lm/nn.py', '# TO' + 'DO: later', 'a note to oneself'),
    ('lm/models/utils.py', '', 'name it after'),
    ('lm/nn.py', "jax.config.update('jax_enable_x64', True)", 'calls jax.config.update at import'),
    ('lm/nn.py', 'X = jnp.zeros(3)', 'calls jnp.zeros at import'),
    ('lm/nn.py', 'N = len(jax.devices())', 'calls jax.devices at import'),
    ('lm/nn.py', 'class A:\n  x = open("f").read()', 'calls open at import'),
    ('lm/nn.py', "os.environ['X'] = '1'", 'changes an object'),
    ('lm/nn.py', 'for i in range(3):\n  pass', 'runs a statement (For)'),
    ('lm/nn.py', 'try:\n  import x\nexcept ImportError:\n  print("no")', 'calls print'),
])
def test_each_rule_can_fail(path, text, part):
  assert any(part in fault for fault in faults(path, text)), faults(path, text)


@pytest.mark.parametrize('path, text', [
    ('lm/train.py', '"""Doc."""\nimport re\nfrom lm import nn, loop\nfrom lm.losses import Term\nX = re.compile("a")'),
    ('lm/losses/ar.py', 'from lm.losses import Term\nfrom lm import losses'),
    ('lm/nn.py', 'f = jax.jit(g)\nh = lambda: jnp.zeros(3)\nclass A:\n  """Doc."""\n  x: int = field(default=1)'),
    ('lm/nn.py', 'try:\n  import x\nexcept ImportError:\n  x = None\n'
     'jax.tree_util.register_dataclass(A)\nf.defvjp(g, h)'),
    ('lm/kernels/a.py', 'x = 1\n' * 400),
    ('experiments/bert.py', 'from absl import app\nfrom experiments import cli\nfrom lm import train\nmain()'),
])
def test_what_the_rules_allow(path, text):
  assert faults(path, text) == []


def test_importing_everything_starts_no_backend():
  """The number of fake devices can be set only until a backend is up."""
  _works("""
import importlib, pkgutil, jax, lm
for m in pkgutil.walk_packages(lm.__path__, 'lm.'):
  importlib.import_module(m.name)
jax.config.update('jax_num_cpu_devices', 3)
assert jax.device_count() == 3
""")


def test_nothing_imports_pytorch(tmp_path):
  """Not even where it is installed: a library that looks for it would add more than a second to every start."""
  (tmp_path / 'torch.py').write_text('raise RuntimeError("PyTorch is imported")')
  _works(f"""
import importlib, pathlib, pkgutil, experiments, lm
for package in (lm, experiments):
  for m in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):
    importlib.import_module(m.name)
lm.events.fresh(pathlib.Path({str(tmp_path)!r}) / 'events').close()
""", tmp_path)


def _works(code, *packages):
  environment = {'PATH': '', 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': os.pathsep.join(map(str, (*packages, ROOT)))}
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=environment, capture_output=True, text=True,
                        timeout=300, check=False)
  assert done.returncode == 0, done.stderr
