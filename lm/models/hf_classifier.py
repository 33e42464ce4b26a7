"""The classifiers of transformers as tables: an encoder's body with the head that its architecture has for labels.

Layouts: see `lm.models.tables`; D embed, E the head's hidden layer, C classes.
"""

from lm import params
from lm.errors import ConfigError
from lm.models import heads
from lm.models.tables import Family, linear, Row

# {model_type: (architecture, heads it has, their rows)}. BERT's pooler is among the rows of its body.
_ARCHITECTURES: dict[str, tuple[str, tuple[str, ...], tuple[Row, ...]]] = {
    'bert': ('BertForSequenceClassification', ('pooler', 'classify'), linear('classifier', 'C,D->DC', 'classify/out')),
    'roberta': ('RobertaForSequenceClassification', ('classify',), (
        *linear('classifier.dense', 'E,D->DE', 'classify/dense'),
        *linear('classifier.out_proj', 'C,D->DC', 'classify/out'))),
} | {kind: (f'{name}ForSequenceClassification', ('classify',), (
    *linear('pooler.dense', 'E,D->DE', 'classify/dense'), *linear('classifier', 'C,D->DC', 'classify/out')))
     for kind, name in (('deberta', 'Deberta'), ('deberta-v2', 'DebertaV2'))}


def family(kind: str, body: Family, p: params.Tree) -> Family:
  """`body`, the family of an encoder's model_type, with the classifier whose head `p` holds under 'classify'.

  Raises:
    ConfigError: their classifier of this type has another head.
  """
  name, needed, rows = _ARCHITECTURES.get(kind, ('', (), ()))
  classes, dense = p['classify']['out'].shape[-1], any('dense' in row.name for row in rows[:1])
  if not name or ('dense' in p['classify'], 'pooler' in p) != (dense, 'pooler' in needed):
    raise ConfigError(f'pooling: no classifier of transformers has the head of this {kind}; expected pooling=pooler of '
                      'BERT, pooling=first of RoBERTa or DeBERTa; classify with scripts.classify')
  specs = {'classify': lambda c: heads.classify_specs(c.embed, classes, c.std, dense)}
  return body._replace(architectures={name: needed}, rows=body.rows + rows, heads={**body.heads, **specs})
