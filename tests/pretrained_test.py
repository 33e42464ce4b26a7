"""What is told of an encoder's pretraining by its saved config is what was trained."""

import json

import pytest

from experiments import bert, deberta, electra, roberta
from lm import config, params, pretrain_encoder
from lm.errors import ConfigError
from lm.models import pretrained


@pytest.mark.parametrize('c', [bert.bert_cpu(), roberta.roberta_cpu(), electra.electra_cpu(), deberta.deberta_cpu(),
                               deberta.deberta_v3_cpu()], ids=['bert', 'roberta', 'electra', 'deberta', 'deberta_v3'])
def test_saved_config_tells_the_model_and_all_that_was_trained(c):
  model, specs = pretrained.from_json(json.loads(json.dumps(config.to_json(c))))
  assert model == c.model
  assert params.flatten(specs) == params.flatten(pretrain_encoder.task(c).specs)
  names = params.flatten(specs)
  assert any(name.startswith('nsp/') for name in names) == getattr(c, 'nsp', False)
  assert any(name.startswith('decoder/') for name in names) == getattr(c, 'decoder', False)


def test_another_model_is_refused():
  with pytest.raises(ConfigError, match='has the fields layers; expected those of an encoder'):
    pretrained.from_json({'model': {'layers': 2}})
