"""ELECTRA's pair (arXiv:2003.10555): a small generator fills in masked words, a discriminator finds the replaced ones.

Embeddings (tokens, positions, types and their norm) are one table for both networks when tied; each network projects
them to its own width. The generator's words are read off the same table.
"""

import dataclasses

from lm import params
from lm.errors import ConfigError
from lm.models import encoder, heads


@dataclasses.dataclass(frozen=True)
class Config:
  """Two encoders; defaults are ELECTRA-small's (table 6: a quarter of the width, as many layers)."""

  generator: encoder.Config = encoder.Config(embed=64, heads=1, mlp=256, token_embed=128, activation='gelu_erf')
  discriminator: encoder.Config = encoder.Config(embed=256, heads=4, mlp=1024, token_embed=128, activation='gelu_erf')
  tied: bool = True

  def __post_init__(self):
    for name in ('vocab', 'length', 'offset', 'types', 'width') if self.tied else ('vocab', 'length'):
      ours, theirs = getattr(self.generator, name), getattr(self.discriminator, name)
      if ours != theirs:
        field = 'token_embed' if name == 'width' else name
        raise ConfigError(f'model.generator.{field}={ours}; expected {theirs}, as in model.discriminator; set both '
                          'alike')


def specs(c: Config) -> params.Tree:
  """{'embed', 'generator': {'project'?, 'blocks', 'mlm'}, 'discriminator': {'project'?, 'blocks', 'rtd'}} when tied;
  untied, each network has an 'embed' of its own."""
  G, D = c.generator, c.discriminator
  generator = encoder.specs(G) | {'mlm': heads.mlm_specs(G.vocab, G.width, G.embed, G.std)}
  discriminator = encoder.specs(D) | {'rtd': heads.rtd_specs(D.embed, D.std)}
  if not c.tied:
    return {'generator': generator, 'discriminator': discriminator}
  del generator['embed']
  return {'embed': discriminator.pop('embed'), 'generator': generator, 'discriminator': discriminator}


def generator(p: params.Tree) -> params.Tree:
  """The tree of the generator with its 'mlm' head: `encoder.apply` takes it with `c.generator`."""
  return _network(p, 'generator')


def discriminator(p: params.Tree) -> params.Tree:
  """The tree of the discriminator with its 'rtd' head: `encoder.apply` takes it with `c.discriminator`."""
  return _network(p, 'discriminator')


def _network(p, name):
  return {'embed': p['embed'], **p[name]} if 'embed' in p else p[name]
