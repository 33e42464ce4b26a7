"""scripts.convert as a program: to a workdir and back is bitwise, and a failure is one line with its exit code."""

import pathlib
import subprocess
import sys

import numpy as np
from safetensors import numpy as st

from lm.text import tokenizer

ROOT = pathlib.Path(__file__).parent.parent


def _convert(*args):
  return subprocess.run([sys.executable, '-m', 'scripts.convert', *map(str, args)], cwd=ROOT, capture_output=True,
                        text=True, timeout=120, check=False)


def test_to_a_workdir_and_back(tmp_path):
  golden = ROOT / 'tests' / 'golden' / 'llama'
  tokenizer.char('abc').save(tmp_path / 'tok')
  out = _convert(f'--from={golden}', '--to=workdir', f'--out={tmp_path}/run', f'--tokenizer={tmp_path}/tok')
  assert out.returncode == 0, out.stderr
  out = _convert(f'--from={tmp_path}/run', f'--out={tmp_path}/hf')
  assert out.returncode == 0, out.stderr
  want, got = (st.load_file(folder / 'model.safetensors') for folder in (golden, tmp_path / 'hf'))
  assert want.keys() == got.keys()
  assert all(np.array_equal(want[name], got[name]) for name in want)
  assert tokenizer.load(tmp_path / 'hf').sha256 == tokenizer.load(tmp_path / 'tok').sha256
  out = _convert(f'--from={golden}', f'--out={tmp_path}/hf')
  assert (out.returncode, out.stderr.count('\n')) == (4, 1)
  assert 'not empty' in out.stderr
