"""Steps of LoRA fine-tuning, here or by Hugging Face's PEFT on PyTorch: the worker of
`python -m scripts.bench_train --peft=lora`, which is what to run.

The config is `smollm2` of experiments/lora.py: SmolLM2-135M's shape, rank 8 on every matrix of the blocks; with 4 rows
of 256 tokens, all of them targets. Weights are random; f32, no dropout, clip 1, AdamW. Changes by --set (peft.targets,
peft.rank, model.layers, data.batch, ...) hold for both sides; PyTorch takes bfloat16 by autocast.

With data.corpus and data.tokenizer the rows are conversations, the assistant's tokens the targets. This package packs
them, as its experiments do. PEFT's side takes as many of them a step, on average, in batches drawn at random and padded
to their longest, as transformers' and TRL's trainers do by default; with --grouped in batches of like lengths, by
transformers' sampler for `train_sampling_strategy='group_by_length'`. Counted are the conversations' tokens alone.

Reads how many steps to take from stdin, a line each time, and answers with a line of JSON (`lm.bench.serve`), of
conversations with the 'tokens' that these steps had; first a line: {'tokens' (of a step), 'flops' (of a token)}.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import itertools
import re
import sys

from absl import flags

from experiments import cli
from lm import bench
from lm.errors import ConfigError

_SIDE = flags.DEFINE_enum('side', 'lm', ['lm', 'peft'], 'Whose steps.')
_FULL = flags.DEFINE_bool('full', False, 'Train all parameters.')
_GROUPED = flags.DEFINE_bool('grouped', False, 'Of --side=peft: batches of conversations of like lengths.')
_COMPILE = flags.DEFINE_bool('compile', False, 'Of --side=peft: its model by torch.compile.')
_SET = flags.DEFINE_multi_string('set', [], 'Changes to the config.')
MODULES = {'attn/q': 'q_proj', 'attn/k': 'k_proj', 'attn/v': 'v_proj', 'attn/o': 'o_proj', 'mlp/up': 'up_proj',
           'mlp/gate': 'gate_proj', 'mlp/down': 'down_proj'}  # our names of the blocks' matrices, and theirs


def main(_: list[str]) -> None:
  from lm import instruct

  c = make_config(_SET.value, _FULL.value)
  flops = instruct.task(c).flops
  if not _FULL.value:  # of a frozen weight no gradient is formed: 4 N instead of 6 N
    flops = dataclasses.replace(flops, matmul=flops.matmul * 2 / 3)
  taken = []  # conversations' tokens, of each batch
  run = {'lm': _ours, 'peft': _theirs}[_SIDE.value](c, taken)

  def counted(n):
    taken.clear()
    run(n)
    return {'tokens': sum(map(int, taken))} if c.data.corpus else None
  bench.serve(counted, tokens=c.data.batch * c.data.length, flops=flops.total)


def make_config(changes, full: bool):
  """What both sides train."""
  from experiments import lora
  from lm import config, peft

  c = config.replace(lora.smollm2(), data__batch=4, optim__lr=1e-4, optim__schedule='constant', optim__warmup=0)
  c = config.override(c, *changes)
  if c.peft.method != 'lora':
    raise ConfigError(f'--set peft.method={c.peft.method}: expected lora; --full compares training in full')
  return dataclasses.replace(c, peft=peft.Config('full', train='')) if full else c


def modules(targets: str) -> list[str]:
  """PEFT's target_modules for our pattern of weights."""
  found = [theirs for ours, theirs in MODULES.items() if re.search(targets, f'blocks/{ours}')]
  if not found:
    raise ConfigError(f'--set peft.targets={targets}: matches none of blocks/{", blocks/".join(MODULES)}; name some')
  return found


def _ours(c, taken):
  """run(n): n steps of this package."""
  from lm import instruct

  batches = _packed(c, taken) if c.data.corpus else bench.rows(c.data.batch, c.data.length, c.model.vocab)
  return bench.steps(c, instruct.task(c), batches)


def _packed(c, taken):
  """Batches of packed conversations."""
  from lm import sharding
  from lm.data import memory

  for batch in memory.train_batches(_read(c), sharding.batch_sharding(sharding.make_mesh(c.mesh))):
    taken.append((batch.segments_BT > 0).sum())
    yield batch


def _read(c):
  """The rows of the corpus; what is said of it goes to stderr."""
  from lm.data import conversations

  with contextlib.redirect_stdout(sys.stderr):
    return conversations.prepare(c.data, '')


def padded(c, grouped: bool, taken: list[int]) -> Iterator:
  """Batches for PyTorch, one conversation a row: (ids, 1 where a token is, labels), [B, longest of them].

  Args:
    c: of both sides, with a corpus.
    grouped: conversations of like lengths together.
    taken: gets the real tokens of each batch.
  """
  import torch
  from torch.utils import data as torch_data
  from transformers import trainer_pt_utils

  packed = _read(c)
  lone = _read(dataclasses.replace(c, data=dataclasses.replace(c.data, pack=False))).splits['train']
  ids_NT, real_NT, mask_NT = (torch.tensor(x) for x in (lone.ids_BT, lone.segments_BT > 0, lone.mask_BT))
  lengths_N = real_NT.sum(1)
  B = round(c.data.batch * len(lengths_N) / packed.rows('train'))
  draw = torch.Generator(torch.get_default_device())
  sampler = (trainer_pt_utils.LengthGroupedSampler(B, lengths=lengths_N.tolist(), generator=draw) if grouped
             else torch_data.RandomSampler(range(len(lengths_N)), generator=draw))
  while True:
    for rows in torch_data.BatchSampler(sampler, B, drop_last=True):
      width = int(lengths_N[rows].max())
      ids, real, mask = (x[rows, :width] for x in (ids_NT, real_NT, mask_NT))
      taken.append(int(real.sum()))
      yield ids.long(), real.long(), torch.where(mask, ids, -100).long()


def _theirs(c, taken):
  """run(n): n steps of PEFT, or in full, of transformers' Llama."""
  import peft
  import torch
  import transformers as hf

  torch.set_default_device(bench.start_torch())
  m = c.model
  model = hf.LlamaForCausalLM(hf.LlamaConfig(
      vocab_size=m.vocab, hidden_size=m.embed, intermediate_size=m.mlp, num_hidden_layers=m.layers,
      num_attention_heads=m.heads, num_key_value_heads=m.kv_heads, head_dim=m.head_dim, rope_theta=m.rope_theta,
      max_position_embeddings=m.length, rms_norm_eps=m.norm_eps, tie_word_embeddings=m.tied, use_cache=False))
  if c.peft.method == 'lora':
    model = peft.get_peft_model(model, peft.LoraConfig(
        r=c.peft.rank, lora_alpha=c.peft.alpha, lora_dropout=c.peft.rate, use_rslora=c.peft.rank_stabilised,
        target_modules=modules(c.peft.targets), task_type='CAUSAL_LM'))
  model.train()
  trained = [p for p in model.parameters() if p.requires_grad]
  forward = torch.compile(model) if _COMPILE.value else model
  tx = torch.optim.AdamW(trained, lr=1e-4, betas=(c.optim.b1, c.optim.b2), eps=c.optim.eps,
                         weight_decay=c.optim.weight_decay)
  if c.data.corpus:
    batches = padded(c, _GROUPED.value, taken)
  else:
    ids = torch.randint(m.vocab, (c.data.batch, c.data.length + 1))
    batches = itertools.repeat((ids, None, ids))

  def run(n):
    for _ in range(n):
      ids, real, labels = next(batches)
      with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=m.dtype == 'bfloat16'):
        logits = forward(input_ids=ids[:, :-1], attention_mask=real if real is None else real[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.view(-1, m.vocab), labels[:, 1:].reshape(-1))
      loss.backward()
      torch.nn.utils.clip_grad_norm_(trained, 1.0)
      tx.step()
      tx.zero_grad(set_to_none=True)
  return run


if __name__ == '__main__':
  cli.guard(main, __doc__)
