"""DeBERTa-v3's pair (arXiv:2111.09543): ELECTRA's game with gradient-disentangled embedding sharing.

The discriminator's embeddings are the generator's, through which none of its gradients pass, plus a difference of its
own that starts at 0 (§3.3). Shared are the tokens and, where the input has them, absolute positions.
"""

import dataclasses
from typing import Literal

import jax

from lm import params
from lm.errors import ConfigError
from lm.models import deberta, heads

_SHARED = ('tokens', 'positions')


def _base(layers: int) -> deberta.Config:
  return deberta.Config(vocab=128100, layers=layers, buckets=256, shared=True, key_bias=True, relative_norm=True)


@dataclasses.dataclass(frozen=True)
class Config:
  """Two encoders; defaults are DeBERTa-v3-base's: the generator is as wide and half as deep."""

  generator: deberta.Config = _base(6)
  discriminator: deberta.Config = _base(12)
  sharing: Literal['gdes', 'tied', 'untied'] = 'gdes'

  def __post_init__(self):
    for name in ('vocab', 'length') if self.sharing == 'untied' else ('vocab', 'length', 'width', 'positions'):
      ours, theirs = getattr(self.generator, name), getattr(self.discriminator, name)
      if ours != theirs:
        field = 'token_embed' if name == 'width' else name
        raise ConfigError(f'model.generator.{field}={ours}; expected {theirs}, as in model.discriminator; set both '
                          'alike')


def specs(c: Config) -> params.Tree:
  """{'generator': encoder with 'mlm' and 'decoder', 'discriminator': encoder with 'rtd'}.

  Of the discriminator's 'embed' the shared tables are the differences with 'gdes', and missing when tied.
  """
  G, D = c.generator, c.discriminator
  generator = deberta.specs(G) | {'mlm': heads.mlm_specs(G.vocab, G.width, G.embed, G.std),
                                  'decoder': deberta.decoder_specs(G)}
  discriminator = deberta.specs(D) | {'rtd': heads.rtd_specs(D.embed, D.std, norm=True)}
  for name in _SHARED if c.sharing != 'untied' else ():
    spec = discriminator['embed'].pop(name, None)
    if spec is not None and c.sharing == 'gdes':
      discriminator['embed'][name] = dataclasses.replace(spec, init=params.zeros)
  return {'generator': generator, 'discriminator': discriminator}


def generator(p: params.Tree) -> params.Tree:
  """The generator's tree with 'mlm' and 'decoder': `deberta.decode_masked` takes it with `c.generator`."""
  return p['generator']


def discriminator(p: params.Tree, c: Config) -> params.Tree:
  """The discriminator's tree with 'rtd' and whole embeddings: `deberta.apply` takes it with `c.discriminator`.

  It is also what is fine-tuned and exported, 'rtd' aside.
  """
  tree, source = p['discriminator'], p['generator']['embed']
  embed = dict(tree['embed'])
  for name in _SHARED if c.sharing != 'untied' else ():
    if name in source:
      embed[name] = jax.lax.stop_gradient(source[name]) + embed[name] if c.sharing == 'gdes' else source[name]
  return {**tree, 'embed': embed}
