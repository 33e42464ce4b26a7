"""The classifiers of transformers as tables: an encoder's body with the head that its architecture has for labels.

Layouts: see `lm.models.tables`; D embed, E the head's hidden layer, C classes.
"""

from collections.abc import Mapping

from lm import params
from lm.errors import ConfigError
from lm.models import heads
from lm.models.tables import Family, linear, Row, Tensor

# {model_type: (architecture, heads it has, their rows)}. BERT's pooler is among the rows of its body.
_ARCHITECTURES: dict[str, tuple[str, tuple[str, ...], tuple[Row, ...]]] = {
    'bert': ('BertForSequenceClassification', ('pooler', 'classify'), linear('classifier', 'C,D->DC', 'classify/out')),
    'roberta': ('RobertaForSequenceClassification', ('classify',), (
        *linear('classifier.dense', 'E,D->DE', 'classify/dense'),
        *linear('classifier.out_proj', 'C,D->DC', 'classify/out'))),
} | {kind: (f'{name}ForSequenceClassification', ('classify',), (
    *linear('pooler.dense', 'E,D->DE', 'classify/dense'), *linear('classifier', 'C,D->DC', 'classify/out')))
     for kind, name in (('deberta', 'Deberta'), ('deberta-v2', 'DebertaV2'))}


def family(kind: str, body: Family, classes: int) -> Family:
  """`body`, the family of an encoder's model_type, with its classifier, whose head is our 'classify'; or as it is."""
  if kind not in _ARCHITECTURES or not classes:
    return body
  name, needed, rows = _ARCHITECTURES[kind]
  specs = {'classify': lambda c: heads.classify_specs(c.embed, classes, c.std, _dense(rows))}
  return body._replace(architectures={name: needed, **body.architectures}, rows=body.rows + rows,
                       heads={**body.heads, **specs})


def of(kind: str, body: Family, p: params.Tree) -> Family:
  """`family` for parameters with a head 'classify', which only the classifier takes.

  Raises:
    ConfigError: their classifier of this type has another head.
  """
  name, needed, rows = _ARCHITECTURES.get(kind, ('', (), ()))
  if not name or ('dense' in p['classify'], 'pooler' in p) != (_dense(rows), 'pooler' in needed):
    raise ConfigError(f'pooling: no classifier of transformers has the head of this {kind}; expected pooling=pooler of '
                      'BERT, pooling=first of RoBERTa or DeBERTa; classify with scripts.classify')
  return family(kind, body, p['classify']['out'].shape[-1])._replace(architectures={name: needed})


def classes(kind: str, tensors: Mapping[str, Tensor]) -> int:
  """How many classes the head among their tensors has; 0: there is none."""
  rows = [row for row in _ARCHITECTURES.get(kind, ('', (), ()))[2] if row.paths == ('classify/out',)]
  return next((tensors[row.name].shape[0] for row in rows if row.name in tensors), 0)


def _dense(rows):
  return any(row.paths == ('classify/dense',) for row in rows)
