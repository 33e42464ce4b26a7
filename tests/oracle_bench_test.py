"""What scripts/bench_peft gives PyTorch's side of conversations; no timing."""

import json
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip('torch')
pytest.importorskip('transformers')
pytestmark = pytest.mark.oracle

DRIVER = """
import itertools, json, sys
from absl import flags
from scripts import bench_peft
flags.FLAGS(['bench_peft'])
c = bench_peft.make_config((f'data.corpus={sys.argv[1]}', 'data.tokenizer=byte', 'data.template=plain',
                            'data.length=64', 'data.batch=2'), False)
found = {}
for grouped in (False, True):
  taken = []
  some = itertools.islice(bench_peft.padded(c, grouped, taken), 6)
  found[str(grouped)] = [[x.tolist() for x in batch] for batch in some]
  assert sum(map(int, taken)) == sum(sum(map(sum, real)) for _, real, _ in found[str(grouped)])
print(json.dumps(found))
"""


@pytest.fixture(scope='module')
def batches(tmp_path_factory):
  """{grouped: [(ids, real, labels), ...]}."""
  rng, path = random.Random(0), tmp_path_factory.mktemp('bench') / 'chat.jsonl'
  path.write_text('\n'.join(json.dumps({'messages': [
      {'role': 'user', 'content': f'{i:03}'}, {'role': 'assistant', 'content': 'a' * rng.choice([1, 2, 3, 30])}]})
                            for i in range(120)))
  done = subprocess.run([sys.executable, '-c', DRIVER, str(path)], cwd=pathlib.Path(__file__).parent.parent,
                        capture_output=True, text=True, timeout=300, check=False)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  return {name: [[np.array(x) for x in batch] for batch in some] for name, some in found.items()}


@pytest.mark.parametrize('grouped', ['False', 'True'])
def test_rows_are_whole_conversations_padded_to_the_longest(batches, grouped):
  seen = []
  for ids_BT, real_BT, labels_BT in batches[grouped]:
    lengths_B = real_BT.sum(1)
    assert ids_BT.shape[1] == lengths_B.max() and len(ids_BT) > 2  # of a packed row several
    assert (real_BT == (np.arange(ids_BT.shape[1]) < lengths_B[:, None])).all() and not ids_BT[real_BT == 0].any()
    targets_BT = labels_BT != -100
    assert (labels_BT[targets_BT] == ids_BT[targets_BT]).all() and not targets_BT[real_BT == 0].any()
    texts = [bytes(row[:n].astype(np.uint8).tolist()).decode() for row, n in zip(ids_BT, lengths_B, strict=True)]
    learned = [row[chosen] for row, chosen in zip(ids_BT, targets_BT, strict=True)]
    assert {bytes(x[x < 256].astype(np.uint8).tolist()).decode().strip() for x in learned} <= {
        n * 'a' for n in (1, 2, 3, 30)}
    seen += [text[:60] for text in texts]
  assert len(set(seen)) == len(seen)


def test_grouped_batches_have_less_padding(batches):
  share = {name: np.mean([real.mean() for _, real, _ in some]) for name, some in batches.items()}
  assert share['True'] > share['False'] + 0.1
