"""Steps of LoRA fine-tuning, here or by Hugging Face's PEFT on PyTorch: the worker of
`python -m scripts.bench_train --peft=lora`, which is what to run.

The config is `smollm2` of experiments/lora.py: SmolLM2-135M's shape, rank 8 on every matrix of the blocks; with 4 rows
of 256 tokens, all of them targets. Weights are random; f32, no dropout, clip 1, AdamW. Changes by --set (peft.targets,
peft.rank, model.layers, data.batch, ...) hold for both sides; PyTorch takes bfloat16 by autocast. Reads how many
steps to take from stdin, a line each time, and answers with a line of JSON (`lm.bench.serve`); first a line: {'tokens'
(of a step), 'flops' (of a token)}.
"""

import dataclasses
import re

from absl import flags

from experiments import cli
from lm import bench
from lm.errors import ConfigError

_SIDE = flags.DEFINE_enum('side', 'lm', ['lm', 'peft'], 'Whose steps.')
_FULL = flags.DEFINE_bool('full', False, 'Train all parameters.')
_SET = flags.DEFINE_multi_string('set', [], 'Changes to the config.')
MODULES = {'attn/q': 'q_proj', 'attn/k': 'k_proj', 'attn/v': 'v_proj', 'attn/o': 'o_proj', 'mlp/up': 'up_proj',
           'mlp/gate': 'gate_proj', 'mlp/down': 'down_proj'}  # our names of the blocks' matrices, and theirs


def main(_: list[str]) -> None:
  from lm import instruct

  c = make_config(_SET.value, _FULL.value)
  flops = instruct.task(c).flops
  if not _FULL.value:  # of a frozen weight no gradient is formed: 4 N instead of 6 N
    flops = dataclasses.replace(flops, matmul=flops.matmul * 2 / 3)
  run = {'lm': _ours, 'peft': _theirs}[_SIDE.value](c)
  bench.serve(run, tokens=c.data.batch * c.data.length, flops=flops.total)


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


def _ours(c):
  """run(n): n steps of this package."""
  from lm import instruct

  return bench.steps(c, instruct.task(c), bench.rows(c.data.batch, c.data.length, c.model.vocab))


def _theirs(c):
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
  tx = torch.optim.AdamW(trained, lr=1e-4, betas=(c.optim.b1, c.optim.b2), eps=c.optim.eps,
                         weight_decay=c.optim.weight_decay)
  ids = torch.randint(m.vocab, (c.data.batch, c.data.length + 1))

  def run(n):
    for _ in range(n):
      with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=m.dtype == 'bfloat16'):
        logits = model(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.view(-1, m.vocab), ids[:, 1:].reshape(-1))
      loss.backward()
      torch.nn.utils.clip_grad_norm_(trained, 1.0)
      tx.step()
      tx.zero_grad(set_to_none=True)
  return run


if __name__ == '__main__':
  cli.guard(main, __doc__)
