r"""Scores what a model answers to the last user turn of each conversation, against the answer that the file has.

  python -m scripts.score --model=runs/sft --data=chats.jsonl      # written as the run wrote, on what it held out
  python -m scripts.score --model=SmolLM2-135M-Instruct.Q4_1.gguf --chat=chatml --data=test.jsonl --split=all

--model is what scripts.sample takes; it answers greedily, or with --beams by beam search, as papers do for BLEU (LoRA's
GPT-2 on E2E: --beams=10 --length_penalty=0.8 --distinct=4 --max_new=64). --data is what experiments.sft takes:
conversations or instructions, in JSON lines, JSON, CSV, Parquet or YAML, read as the run read its own. Of --split are
the records that say so, or that training holds out of a file which does not say. Prints each score with its 95%
bootstrap interval (BLEU and chrF: of all records as one text), and writes --out, a line a record: prompt, reply,
reference, whether the reply had ended, language, origin.

Exit status: 0 done, 2 a flag is wrong or a package missing, 3 the data or the tokenizer, 4 the weights.
"""

import itertools
import json
import math
import pathlib

from absl import flags
import numpy as np
import tqdm

from experiments import cli
from lm import beam, config, decode, disk, metrics, params, peft, sampler, weights
from lm.data import conversations, examples, turns
from lm.errors import ConfigError, DataError
from lm.models import blocks, decoder
from lm.text import chat, scan
from lm.text.tokenizer import Tokenizer

_MEANS = {'exact_match': metrics.exact_match, 'rouge_l': lambda *args: metrics.rouge(*args)['rougeL']}
METRICS = _MEANS | {'bleu': metrics.bleu, 'chrf': lambda *args: metrics.chrf(*args[:2])}

_MODEL = flags.DEFINE_string('model', '', 'A workdir, a Hugging Face folder, or a .gguf file.')
_DATA = flags.DEFINE_string('data', '', 'A file or folder of conversations or instructions with their answers.')
_CHAT = flags.DEFINE_enum('chat', '', ['', *conversations.TEMPLATES], 'How turns are written; default: as the run did.')
_SPLIT = flags.DEFINE_enum('split', 'validation', [*examples.SPLITS, 'all'], 'Which records.')
_METRICS = flags.DEFINE_list('metrics', list(METRICS), 'Which scores, comma-separated.')
_LANGUAGE = flags.DEFINE_enum('language', 'auto', ['auto', 'en', 'zh'], 'By whose words texts are compared; auto: each '
                              "record's own, with scores for each language.")
_MAX_NEW = flags.DEFINE_integer('max_new', 64, 'Most new tokens of a reply.', lower_bound=1)
_BEAMS = flags.DEFINE_integer('beams', 1, 'Continuations that are kept beside each other; 1 = greedily.', lower_bound=1)
_PENALTY = flags.DEFINE_float('length_penalty', 1.0, 'Of beams: an answer is judged by its log-probability over its '
                              'length to this power.')
_DISTINCT = flags.DEFINE_integer('distinct', 0, 'Of beams: no sequence of so many tokens comes twice in an answer; '
                                 '0 = it may.', lower_bound=0)
_LIMIT = flags.DEFINE_integer('limit', 200, 'Most records, drawn by chance, always the same; 0 = all.', lower_bound=0)
_BATCH = flags.DEFINE_integer('batch', 16, 'Replies decoded together.', lower_bound=1)
_OUT = flags.DEFINE_string('out', 'replies.jsonl', 'The file of replies; must not exist.')
_ON_ERROR = flags.DEFINE_enum('on_error', 'stop', ['stop', 'skip'], 'A wrong record ends it, or is left out.')


def main(_: list[str]) -> None:
  for flag in (_MODEL, _DATA, _METRICS, _OUT):
    if not flag.value:
      raise ConfigError(f'--{flag.name}: not given; expected --model=MODEL --data=FILE; see --help')
  for name in _METRICS.value:
    if name not in METRICS:
      raise ConfigError(f'--metrics={name}: unknown; expected some of {", ".join(METRICS)}; correct it')
    METRICS[name](['a'], ['a'], 'en')  # a missing package is found now
  if _BEAMS.value == 1 and (_PENALTY.value != 1 or _DISTINCT.value):
    raise ConfigError('--beams=1: --length_penalty and --distinct are of beams; expected at least 2; set it')
  if (out := pathlib.Path(_OUT.value)).exists():
    raise ConfigError(f'--out={out}: exists already; it is not overwritten; choose another name or delete it')
  c = _written()
  rows = _answered(_records(c), weights.load(_MODEL.value), c.written)
  out.parent.mkdir(parents=True, exist_ok=True)
  disk.write(out, ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows).encode())
  print(f'{metrics.table(_table(rows))}\n\n{out}: {len(rows)} replies, {sum(row["ended"] for row in rows)} ended')


def _written() -> conversations.Config:
  """How the model was trained on conversations, where a workdir says so; else --chat decides."""
  c, workdir = conversations.Config(), weights.kind_of(_MODEL.value) == 'workdir'
  try:
    saved = json.loads((pathlib.Path(_MODEL.value) / 'config.json').read_bytes()) if workdir else {}
    c = config.from_json(conversations.Config, saved['config']['data'])
  except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
    if not _CHAT.value:
      raise ConfigError(f'--chat: not given, and {_MODEL.value} is no run on conversations; give it') from error
  return c if _CHAT.value in ('', c.template) else config.replace(c, template=_CHAT.value, system='')


def _records(c: conversations.Config) -> list[examples.Chat]:
  if _SPLIT.value == 'all':
    found, report = examples.read(_DATA.value, 'chat', _ON_ERROR.value, c.encoding, rename=dict(c.rename))
    print(report.table())
  else:
    c = config.replace(c, corpus=_DATA.value, on_error=_ON_ERROR.value)
    try:
      found = [e for e, part in conversations.divided(c, unanswered='fault') if part == _SPLIT.value]
    except ConfigError as error:
      raise ConfigError(f'{error}; or take them all with --split=all') from error
  print(f'{len(found)} of --split={_SPLIT.value}')
  drawn = np.random.default_rng(0).permutation(len(found))[:_LIMIT.value or None]
  return [found[i] for i in np.sort(drawn)]


def _answered(talks: list[examples.Chat], found: weights.Model, template: chat.Template) -> list[dict]:
  """The rows of --out; a conversation that leaves the model no room for a reply is left out, which is said."""
  if (tok := found.tokenizer) is None:
    raise DataError(f'{_MODEL.value}: no tokenizer beside the weights; expected its files; copy them there')
  model, p, rows = decode.of(decoder, found.config), decode.prepare(found.params), {}
  own = ('en', 'zh') if _LANGUAGE.value == 'auto' else (_LANGUAGE.value, _LANGUAGE.value)
  room = math.inf if model.length is None else model.length - blocks.virtual(found.params['blocks']) - _MAX_NEW.value
  stop = chat.stop_ids(template, tok)
  prompts, virtual = _prompts(talks, template, tok), peft.virtual_tokens(found.params)
  order = [i for i in sorted(prompts, key=lambda i: len(prompts[i])) if len(virtual) + len(prompts[i]) <= room]
  if len(order) < len(prompts):
    print(f'{len(prompts) - len(order)} left out: no room for --max_new={_MAX_NEW.value} after {room} tokens and more')
  with tqdm.tqdm(total=len(order), desc='answers', unit=' records', disable=None) as bar:
    for at in range(0, len(order), _BATCH.value):
      some = order[at:at + _BATCH.value]
      full = some + some[:1] * (_BATCH.value - len(some))  # one program for all batches of a width
      for i, ids in zip(some, _decoded(model, p, [[*virtual, *prompts[i]] for i in full], stop), strict=False):
        (reply, ended), (*_, asked, answer) = chat.parse(template, ids, tok), (m.content for m in talks[i].messages)
        rows[i] = {'prompt': asked, 'reply': reply, 'reference': answer, 'ended': ended, 'origin': talks[i].origin,
                   'language': own[_language(asked, answer) == 'zh']}
      bar.update(len(some))
  if not rows:
    raise DataError(f'{_DATA.value}: none of --split={_SPLIT.value} to answer; expected one; see --split, --max_new')
  return [rows[i] for i in sorted(rows)]


def _decoded(model: decode.Model, p: params.Tree, prompts: list[list[int]], stop: tuple[int, ...]) -> list[np.ndarray]:
  """The ids of the answer to each prompt."""
  if _BEAMS.value > 1:
    c = beam.Config(_BEAMS.value, _MAX_NEW.value, _PENALTY.value, _DISTINCT.value, stop)
    found = beam.generate(model, p, prompts, c)
    tokens_BT, lengths_B = found.tokens_BKT[:, 0], found.lengths_BK[:, 0]
  else:
    found = decode.generate(model, p, prompts, sampler.Sampling(_MAX_NEW.value, temperature=0, stop=stop))
    tokens_BT, lengths_B = found.tokens_BT, found.lengths_B
  return [ids_T[:n] for ids_T, n in zip(np.asarray(tokens_BT), np.asarray(lengths_B), strict=True)]


def _prompts(talks: list[examples.Chat], template: chat.Template, tok: Tokenizer) -> dict[int, np.ndarray]:
  """The ids before each last answer; what cannot be written ends it or is left out and said, as --on_error has it."""
  out, faults = {}, []
  for i, e in enumerate(talks):
    try:
      out[i] = chat.prompt(template, e.messages[:-1], tok)
    except DataError as error:
      faults.append(turns.refused(error, e.origin))
      if _ON_ERROR.value == 'stop':
        raise faults[0] from error
  if faults:
    print(f'{len(faults)} left out; the first: {faults[0]}')
  return out


def _language(asked: str, answer: str) -> str:
  """The reference's language; the question's where the reference has no letters."""
  found = scan.language(answer)
  return scan.language(asked) if found == 'und' else found


def _table(rows: list[dict]) -> dict[str, dict[str, float]]:
  out = {}
  for language, name in itertools.product(sorted({row['language'] for row in rows}), _METRICS.value):
    pairs = zip(*((row['reference'], row['reply']) for row in rows if row['language'] == language), strict=True)
    score = lambda *texts, name=name, language=language: METRICS[name](*texts, language)
    if name in _MEANS:
      found = metrics.bootstrap(np.mean, np.array([score([a], [b]) for a, b in zip(*pairs, strict=True)]))
    else:  # each resample counts all words anew
      found = metrics.bootstrap(score, *map(list, pairs), resamples=500, method='percentile')
    out[f'{name}, {language}'] = {'score': found.value, 'from': found.low, 'to': found.high, 'records': found.count}
  return out


if __name__ == '__main__':
  cli.guard(main, __doc__)
