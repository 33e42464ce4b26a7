"""What a model is measured by: classes, numbers, texts; and how sure the number is.

Plain functions of the targets first, then the predictions. A metric of no items is NaN. Classes are numbers from 0.
BLEU and chrF count to 100, as published; the others to 1.

Shapes: N items, C classes.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import importlib
import itertools
import re
import string
import types
import unicodedata
import warnings

import numpy as np
import scipy  # its modules are imported where they are first used: over a second

from lm.errors import ConfigError

_HAN = '\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f'
_WORD = re.compile(rf'[{_HAN}]|[^\W_{_HAN}]+')
_BESIDE_HAN = re.compile(rf'(?<=[{_HAN}])\s+|\s+(?=[{_HAN}])')

References = Sequence[str | Sequence[str]]  # a text or several right ones for each item


@dataclasses.dataclass(frozen=True)
class Interval:
  """A number and its confidence interval; low and high are NaN where `count`, the values it is made from, is 1."""

  value: float
  low: float
  high: float
  level: float
  count: int

  def __str__(self) -> str:
    return f'{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]'


def accuracy(targets: np.ndarray, predictions: np.ndarray) -> float:
  return _score('accuracy_score', targets, predictions)


def f1(targets: np.ndarray, predictions: np.ndarray) -> float:
  """F1 of class 1; 0 where it is neither target nor prediction."""
  return _score('f1_score', targets, predictions, labels=[1], average='macro', zero_division=0)


def macro_f1(targets: np.ndarray, predictions: np.ndarray) -> float:
  """Mean F1 over the classes that are targets or predictions."""
  return _score('f1_score', targets, predictions, average='macro', zero_division=0)


def mcc(targets: np.ndarray, predictions: np.ndarray) -> float:
  """Matthews' correlation, of any number of classes; 0 where either side is constant."""
  one_class = any(len(x) and np.ptp(x) == 0 for x in _classes(targets, predictions))
  return 0.0 if one_class else _score('matthews_corrcoef', targets, predictions)


def pearson(targets: np.ndarray, predictions: np.ndarray) -> float:
  """Linear correlation; 0 where either side is constant (as `mcc`), NaN where a number is not finite."""
  return _correlation(scipy.stats.pearsonr, targets, predictions)


def spearman(targets: np.ndarray, predictions: np.ndarray) -> float:
  """Correlation of ranks, equal numbers sharing theirs; otherwise as `pearson`."""
  return _correlation(scipy.stats.spearmanr, targets, predictions)


def confusion(targets: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
  """int64 [C, C]: items of each target class (row) by predicted class (column)."""
  targets, predictions = _classes(targets, predictions, classes)
  if not len(targets):
    return np.zeros((classes, classes), np.int64)
  return _library('sklearn.metrics').confusion_matrix(targets, predictions, labels=np.arange(classes)).astype(np.int64)


def per_class(targets: np.ndarray, predictions: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, float]]:
  """{name: precision, recall, f1, support, predicted}; what would divide by 0 is 0, or NaN of no items at all."""
  targets, predictions = _classes(targets, predictions, len(names))
  scores = np.full((3, len(names)), np.nan)
  if len(targets):
    scores = _library('sklearn.metrics').precision_recall_fscore_support(
        targets, predictions, labels=np.arange(len(names)), zero_division=0)[:3]
  counts = [np.bincount(x, minlength=len(names)) for x in (targets, predictions)]
  columns = dict(zip(('precision', 'recall', 'f1', 'support', 'predicted'), (*scores, *counts), strict=True))
  return {name: {head: column[i].item() for head, column in columns.items()} for i, name in enumerate(names)}


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
  """`per_class`, or any such rows, in Markdown."""
  heads = list(dict.fromkeys(key for row in rows.values() for key in row))
  text = lambda value: f'{value:.4f}' if isinstance(value, float) else str(value)
  cells = [['', *heads], ['---'] + ['---:'] * len(heads)]
  cells += [[name.replace('|', r'\|'), *(text(row.get(h, '')) for h in heads)] for name, row in rows.items()]
  return '\n'.join(f'| {" | ".join(line)} |' for line in cells)


def rouge(targets: References, predictions: Sequence[str], language: str = 'en',
          stem: bool = False) -> dict[str, float]:
  """Mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L (sentence level), with the best of several references (Lin 2004).

  English is cut as ROUGE-1.5.5 does, which drops all but a-z and 0-9. Chinese counts characters, and words of other
  scripts, after NFKC and without case and punctuation. `stem` takes Porter's stems of English.
  """
  _language(language)
  names, references = ('rouge1', 'rouge2', 'rougeL'), _references(targets, predictions)
  if not references:
    return dict.fromkeys(names, np.nan)
  characters = types.SimpleNamespace(tokenize=lambda t: _WORD.findall(unicodedata.normalize('NFKC', t).casefold()))
  cut = {'en': None, 'zh': characters}[language]
  scorer = _library('rouge_score.rouge_scorer').RougeScorer(names, use_stemmer=stem, tokenizer=cut)
  scores = [scorer.score_multi(some, text) for some, text in zip(references, predictions, strict=True)]
  return {name: float(np.mean([score[name].fmeasure for score in scores])) for name in names}


def bleu(targets: References, predictions: Sequence[str], language: str = 'en') -> float:
  """SacreBLEU of the corpus, 0 to 100 (Post 2018); tokenizer 13a, or zh: each Chinese character a token."""
  _language(language)
  return _corpus('corpus_bleu', targets, predictions, tokenize={'en': '13a', 'zh': 'zh'}[language], force=True)


def chrf(targets: References, predictions: Sequence[str], word_order: int = 0) -> float:
  """chrF of the corpus in any language, 0 to 100 (Popović 2015); `word_order` 2 is chrF++."""
  return _corpus('corpus_chrf', targets, predictions, word_order=word_order)


def exact_match(targets: References, predictions: Sequence[str], language: str = 'en') -> float:
  """Share of predictions that equal one of their references after `normalise`."""
  references = _references(targets, predictions)
  hits = [normalise(text, language) in {normalise(r, language) for r in some}
          for some, text in zip(references, predictions, strict=True)]
  return float(np.mean(hits)) if hits else np.nan


def normalise(text: str, language: str = 'en') -> str:
  """An answer without what does not count.

  English is SQuAD's rule: no case, ASCII punctuation or articles, one space. Chinese: NFKC, no case, no punctuation
  but what makes another number (3.5, 1/2, 2:30, 3-5, -5, 5%), no space beside a Chinese character.
  """
  _language(language)
  if language == 'en':
    text = ''.join(c for c in text.lower() if c not in string.punctuation)
    return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text).split())
  text = unicodedata.normalize('NFKC', text).casefold().replace('\u2212', '-')
  points = {m.start() for m in re.finditer(r'(?<=\d)[./:-](?=\d)|(?<![\w-])-(?=\d)|(?<=\d)[%‰]', text)}
  text = ''.join(c for i, c in enumerate(text) if i in points or unicodedata.category(c)[0] != 'P')
  return _BESIDE_HAN.sub('', ' '.join(text.split()))


def perplexity(nats: np.ndarray | float, tokens: np.ndarray | float) -> float:
  """exp(sum of nats / sum of tokens): of totals, or of a value for each document; NaN of no tokens."""
  total, count = np.sum(np.asarray(nats, np.float64)), np.sum(np.asarray(tokens, np.float64))
  with np.errstate(over='ignore'):
    return float(np.exp(total / count)) if count else np.nan


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
  """Mean and Student-t interval of independent values, such as those of seeds."""
  return corrected_interval(values, 0, level)


def corrected_interval(values: Sequence[float], test_to_train: float, level: float = 0.95) -> Interval:
  """Mean and Student-t interval over folds, repeated or not, whose training sets overlap (Nadeau & Bengio 2003).

  The variance of the mean is s^2 (1 / J + test_to_train), of J values. For two methods on the same folds, give it the
  differences: they are significant where 0 lies outside.

  Args:
    test_to_train: items of a validation part over those of its training part: 1 / (k - 1) for k folds.
  """
  _level(level)
  values = np.asarray(values, np.float64)
  count = _length({'values': values.shape})
  mean = float(values.mean()) if count else np.nan
  if count < 2:
    return Interval(mean, np.nan, np.nan, level, count)
  half = float(scipy.stats.t.ppf((1 + level) / 2, count - 1) * values.std(ddof=1) * (1 / count + test_to_train)**0.5)
  return Interval(mean, mean - half, mean + half, level, count)


def bootstrap(statistic: Callable[..., float], *samples: Sequence, level: float = 0.95, resamples: int = 2000,
              seed: int = 0, method: str = 'BCa') -> Interval:
  """A statistic of all items and its interval over items drawn again, the same ones of each sample.

  Args:
    statistic: such as `accuracy` or `bleu`, of as many sequences as there are samples.
    method: of scipy.stats.bootstrap. BCa also evaluates once for each item; where it has no answer (all resamples
      equal), percentiles stand in.
  """
  _level(level)
  count = _length({f'sample {i}': (len(sample),) for i, sample in enumerate(samples, 1)})
  value = float(statistic(*samples)) if count else np.nan
  if count < 2:
    return Interval(value, np.nan, np.nan, level, count)

  def of_items(items):
    return statistic(*(s[items] if isinstance(s, np.ndarray) else [s[i] for i in items] for s in samples))
  with warnings.catch_warnings(), np.errstate(all='ignore'):
    warnings.simplefilter('ignore', scipy.stats.DegenerateDataWarning)
    found = scipy.stats.bootstrap((np.arange(count),), of_items, n_resamples=resamples, vectorized=False, method=method,
                            confidence_level=level, rng=np.random.default_rng(seed))
  low, high = found.confidence_interval
  if not np.isfinite([low, high]).all():
    low, high = np.quantile(found.bootstrap_distribution, [(1 - level) / 2, (1 + level) / 2])
  return Interval(value, float(low), float(high), level, count)


def paired(first: np.ndarray, second: np.ndarray) -> tuple[int, int, float]:
  """McNemar's exact test of two methods on the same items; bool [N] each: whether it is right.

  Returns:
    Items that only the first got right, those that only the second did, and the p-value of no difference.
  """
  first, second = np.asarray(first), np.asarray(second)
  if _length({'first': first.shape, 'second': second.shape}) and not first.dtype == second.dtype == bool:
    raise ConfigError(f'paired: {first.dtype}, {second.dtype}; expected bools: whether each item is right')
  one, other = int(np.sum(first > second)), int(np.sum(second > first))
  return one, other, float(scipy.stats.binomtest(one, one + other).pvalue) if one + other else 1.0


GLUE: dict[str, dict[str, Callable[[np.ndarray, np.ndarray], float]]] = {
    'cola': {'mcc': mcc}, 'stsb': {'pearson': pearson, 'spearman': spearman},
    **{task: {'accuracy': accuracy, 'f1': f1} for task in ('mrpc', 'qqp')},
    **{task: {'accuracy': accuracy} for task in ('sst2', 'mnli', 'qnli', 'rte', 'wnli')}}


def _score(name, targets, predictions, **options):
  targets, predictions = _classes(targets, predictions)
  of = getattr(_library('sklearn.metrics'), name)
  return float(of(targets, predictions, **options)) if len(targets) else np.nan


def _correlation(of, targets, predictions):
  targets, predictions = (np.asarray(x, np.float64) for x in (targets, predictions))
  count = _length({'targets': targets.shape, 'predictions': predictions.shape})
  if not count or not np.isfinite([targets, predictions]).all():
    return np.nan
  return 0.0 if min(np.ptp(targets), np.ptp(predictions)) == 0 else float(of(targets, predictions).statistic)


def _classes(targets, predictions, classes=None):
  """Both as int64 [N]."""
  found = {'targets': np.asarray(targets), 'predictions': np.asarray(predictions)}
  _length({name: x.shape for name, x in found.items()})
  for name, x in found.items():
    if x.size and x.dtype.kind not in 'biu':
      raise ConfigError(f'{name}: {x.dtype}; expected class numbers; take the argmax of logits')
    bad = (x < 0) | (x >= (np.inf if classes is None else classes))
    if bad.any():
      raise ConfigError(f'{name}: {x[bad][0]} at item {np.argmax(bad)}; expected a class from 0'
                        f'{f" to {classes - 1}" if classes else ""}; leave out rows that only fill up a batch')
  return tuple(x.astype(np.int64) for x in found.values())


def _length(shapes):
  if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
    raise ConfigError(f'{", ".join(shapes)}: shapes {list(shapes.values())}; expected [N] of one length')
  return next(iter(shapes.values()))[0]


def _references(targets, predictions):
  """The right texts of each item, as a list."""
  if len(targets) != len(predictions):
    raise ConfigError(f'targets: {len(targets)} for {len(predictions)} predictions; expected one text, or list, each')
  found = [[some] if isinstance(some, str) else list(some) for some in targets]
  if [] in found:
    raise ConfigError(f'targets: item {found.index([])} has no text; expected at least one; leave the item out')
  return found


def _corpus(name, targets, predictions, **options):
  """A score of sacrebleu, which takes the first references of all items, then the second ones (None: no more), ..."""
  streams = [list(stream) for stream in itertools.zip_longest(*_references(targets, predictions))]
  of = getattr(_library('sacrebleu'), name)
  return float(of(list(predictions), streams, **options).score) if streams else np.nan


def _level(level):
  if not 0 < level < 1:
    raise ConfigError(f'level={level}; expected more than 0 and less than 1, such as 0.95')


def _language(language):
  if language not in ('en', 'zh'):
    raise ConfigError(f"language={language!r}; expected 'en' or 'zh'")


def _library(name):
  """A module that only fine-tuning needs."""
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise ConfigError(f"metrics: {error}; run pip install -e '.[finetune]'") from error
