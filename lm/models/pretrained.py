"""The trees that encoders' pretraining trains, and the network that is kept of each.

Masked language modelling trains one network with its heads, replaced-token detection (ELECTRA, DeBERTa-v3) a pair.
"""

import dataclasses
from typing import Any

from lm import config, params
from lm.errors import ConfigError
from lm.models import deberta, deberta_pair, electra, encoder, heads

Config = encoder.Config | deberta.Config | electra.Config | deberta_pair.Config


def specs(model: Config, nsp: bool = False, decoder: bool = False) -> params.Tree:
  """All that is trained. nsp: with BERT's next-sentence prediction; decoder: with DeBERTa's enhanced mask decoder."""
  if isinstance(model, electra.Config):
    return electra.specs(model)
  if isinstance(model, deberta_pair.Config):
    return deberta_pair.specs(model)
  disentangled = isinstance(model, deberta.Config)
  tree = (deberta if disentangled else encoder).specs(model) | {
      'mlm': heads.mlm_specs(model.vocab, model.width, model.embed, model.std)}
  if decoder:
    tree['decoder'] = deberta.decoder_specs(model)
  if nsp:
    tree |= {'pooler': heads.pooler_specs(model.embed, model.std), 'nsp': heads.nsp_specs(model.embed, model.std)}
  return tree


def network(model: Config, p: params.Tree) -> tuple[encoder.Config | deberta.Config, params.Tree]:
  """(config, parameters) of the encoder that is kept after pretraining; what served that alone is left out."""
  if isinstance(model, electra.Config):
    return model.discriminator, electra.discriminator(p)
  if isinstance(model, deberta_pair.Config):
    model, p = model.discriminator, deberta_pair.discriminator(p, model)
  return model, {k: v for k, v in p.items() if not (isinstance(model, deberta.Config) and k in ('decoder', 'rtd'))}


def from_json(saved: dict[str, Any]) -> tuple[Config, params.Tree]:
  """(config, specs) of the model in a run's saved config, told from the others by the names of its fields.

  Raises:
    ConfigError: it is none of them. KeyError, TypeError: it is no config of such a run.
  """
  names = set(saved['model'])
  for kind in (encoder.Config, deberta.Config, electra.Config, deberta_pair.Config):
    if names == {field.name for field in dataclasses.fields(kind)}:
      model = config.from_json(kind, saved['model'])
      return model, specs(model, saved.get('nsp', False), saved.get('decoder', False))
  raise ConfigError(f'model has the fields {", ".join(sorted(names))}; expected those of an encoder')
