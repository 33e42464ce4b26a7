"""Steps of training an encoder, here or in transformers on PyTorch: the worker of
`python -m scripts.bench_train --model=...`, which is what to run.

Pretraining at base width, B 4 rows of T 256 tokens, 12 layers of 768; `minilm` is fine-tuned to two labels in full, 32
rows of 64 tokens, 6 layers of 384. f32, dropout .1, clip 1, AdamW. Reads how many steps to take from stdin, a line each
time, and answers with a line of JSON (`lm.bench.serve`); first a line: {'tokens' (of a step), 'flops' (of a token)}.
"""

import dataclasses
import itertools

from absl import flags

from experiments import cli
from lm import bench

_SIDE = flags.DEFINE_enum('side', 'lm', ['lm', 'torch'], 'Whose steps.')
_MODEL = flags.DEFINE_enum('model', 'bert', ['bert', 'electra', 'deberta', 'minilm'], 'What is trained.')
_SET = flags.DEFINE_multi_string('set', [], 'Changes to the config.')
T, B, V = 256, 4, 30522


def main(_: list[str]) -> None:
  from lm import classification, pretrain_encoder

  c = _config(_MODEL.value, _SET.value)
  flops = (classification if _MODEL.value == 'minilm' else pretrain_encoder).task(c).flops.total
  run = {'lm': _ours, 'torch': _theirs}[_SIDE.value](_MODEL.value, c)
  bench.serve(run, tokens=c.data.batch * c.data.length, flops=flops)


def _config(model, changes):
  from experiments import bert, classify, deberta, electra
  from lm import config
  from lm.data import labelled
  from lm.models import deberta as deberta_lib

  steady = dict(optim__lr=1e-4, optim__schedule='constant', optim__warmup=0)
  if model == 'minilm':
    rows = labelled.Config(length=64, batch=32)
    return config.override(config.replace(classify.minilm(), data=rows, **steady), *changes)
  c = {'bert': bert.bert_base, 'electra': electra.electra_base, 'deberta': deberta.deberta_base}[model]()
  if model == 'bert':
    c = config.replace(c, nsp=False, data__packing='full_sentences', loss__max_predictions=0)
  if model == 'deberta':
    c = dataclasses.replace(c, model=deberta_lib.Config(vocab=V), decoder=False)
  unrolled = lambda m: dataclasses.replace(m, scan_layers=False)
  c = dataclasses.replace(c, model=unrolled(c.model) if hasattr(c.model, 'scan_layers') else dataclasses.replace(
      c.model, generator=unrolled(c.model.generator), discriminator=unrolled(c.model.discriminator)))
  return config.override(config.replace(c, data__length=T, data__batch=B, **steady), *changes)


def _ours(model, c):
  """run(n): n steps of this package."""
  task, batch = (_labelled if model == 'minilm' else _pretraining)(c)
  return bench.steps(c, task, itertools.repeat(batch))


def _pretraining(c):
  """(task, a batch of rows between [CLS] and [SEP])."""
  import jax
  import jax.numpy as jnp

  from lm import pretrain_encoder
  from lm.data import inputs, masking

  task = pretrain_encoder.task(c, masking.Tokens(mask=103, vocab=V, special=(0, 100, 101, 102, 103)))
  ids_BT = jax.random.randint(jax.random.key(0), (B, T), 1000, V)
  ends_BT = jnp.zeros((B, T), bool).at[:, 0].set(True).at[:, -1].set(True)
  return task, inputs.Inputs(ids_BT, jnp.ones_like(ids_BT), jnp.zeros_like(ids_BT),
                             jnp.broadcast_to(jnp.arange(T)[None], ids_BT.shape), ends_BT, jnp.zeros(B, bool),
                             jnp.arange(B, dtype=jnp.uint32))


def _labelled(c):
  """(task, a batch of full rows with labels)."""
  import jax
  import jax.numpy as jnp

  from lm import classification
  from lm.data import framing

  ids_BT = jax.random.randint(jax.random.key(0), (c.data.batch, c.data.length), 1000, c.model.vocab)
  return classification.task(c), framing.Labelled(ids_BT, jnp.ones_like(ids_BT), jnp.arange(c.data.batch) % c.classes)


def _theirs(model, c):
  """run(n): n steps of transformers."""
  import torch
  import transformers as hf

  torch.set_default_device(bench.start_torch())
  ids = torch.randint(1000, V, (c.data.batch, c.data.length))
  if model == 'electra':
    size = dict(vocab_size=V, embedding_size=768, num_hidden_layers=12)
    generator = hf.ElectraForMaskedLM(hf.ElectraConfig(**size, hidden_size=256, num_attention_heads=4,
                                                       intermediate_size=1024))
    discriminator = hf.ElectraForPreTraining(hf.ElectraConfig(**size, hidden_size=768, num_attention_heads=12,
                                                              intermediate_size=3072))
    discriminator.electra.embeddings = generator.electra.embeddings
    networks = torch.nn.ModuleList([generator, discriminator])
  else:
    made = {'bert': lambda: hf.BertForMaskedLM(hf.BertConfig(vocab_size=V)),
            'deberta': lambda: hf.DebertaForMaskedLM(hf.DebertaConfig(
                vocab_size=V, relative_attention=True, pos_att_type=['c2p', 'p2c'], position_biased_input=False,
                type_vocab_size=0, max_relative_positions=512)),
            'minilm': lambda: hf.BertForSequenceClassification(hf.BertConfig(
                vocab_size=V, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536))}
    networks = made[model]()
  networks.train()
  tx = torch.optim.AdamW(networks.parameters(), lr=1e-4, eps=1e-6, weight_decay=0.01)

  def loss():
    if model == 'minilm':
      return networks(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.arange(len(ids)) % 2).loss
    chosen = torch.rand(B, T) < 0.15
    masked, labels = torch.where(chosen, 103, ids), torch.where(chosen, ids, -100)
    if model != 'electra':
      return networks(input_ids=masked, labels=labels).loss
    out = generator(input_ids=masked, labels=labels)
    with torch.no_grad():
      drawn = torch.distributions.Categorical(logits=out.logits[chosen]).sample()
    filled = ids.clone()
    filled[chosen] = drawn
    return out.loss + 50 * discriminator(input_ids=filled, labels=(filled != ids).long()).loss

  def run(n):
    for _ in range(n):
      loss().backward()
      torch.nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
      tx.step()
      tx.zero_grad(set_to_none=True)
  return run


if __name__ == '__main__':
  cli.guard(main, __doc__)
