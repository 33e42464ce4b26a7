r"""Continues prompts with a trained model, streaming the text as it comes.

  python -m scripts.sample --model=runs/quickstart --prompt='In the beginning' --prompt='却说曹操'
  python -m scripts.sample --model=SmolLM2-135M-Instruct.Q4_1.gguf --chat=chatml --temperature=0 --prompt='What is JAX?'
  echo 'Once upon a time' | python -m scripts.sample --model=HF_FOLDER --max_new=200 --top_p=0.95

--model is a workdir of an experiment (its best checkpoint), a Hugging Face folder (GPT-2 or Llama) or a GGUF file.
Without --prompt, one is read from standard input. One prompt streams, in whole characters: one that takes several
tokens appears with its last. Several prompts are decoded together, which takes little longer than one, and printed at
the end. Text ends at the model's end tokens, or after --max_new tokens. The program for a model is compiled once and
kept in ~/.cache/lm (or $XDG_CACHE_HOME/lm).

Exit status: 0 done, 2 a flag is wrong, 3 the tokenizer, 4 the weights.
"""

import dataclasses
import sys

from absl import flags
import jax
import numpy as np

from experiments import cli
from lm import decode, host, peft, sampler, weights
from lm.data import conversations
from lm.errors import ConfigError, DataError
from lm.models import blocks, decoder
from lm.text import chat, streaming

_MODEL = flags.DEFINE_string('model', '', 'A workdir, a Hugging Face folder, or a .gguf file.')
_PROMPT = flags.DEFINE_multi_string('prompt', [], 'What to continue; may be repeated.')
_MAX_NEW = flags.DEFINE_integer('max_new', None, 'Most new tokens; default 256, or as many positions as the model has.')
_TEMPERATURE = flags.DEFINE_float('temperature', 0.8, 'Divides the logits; 0 = always the most likely token.')
_TOP_K = flags.DEFINE_integer('top_k', 0, 'Draw from the k most likely tokens; 0 = all.')
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'Draw from the most likely tokens that hold this much probability.')
_SEED = flags.DEFINE_integer('seed', 0, 'The same seed gives the same text.', lower_bound=0, upper_bound=2**32 - 1)
_CHAT = flags.DEFINE_enum('chat', '', ['', *conversations.TEMPLATES], 'Write each prompt as a user turn in this '
                          'template, for models tuned to it.')
_DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16', 'int8'], 'How weights are held; int8 is the '
                           'fastest for one prompt on a CPU and changes the text slightly.')
_NEWEST = flags.DEFINE_bool('newest', False, 'Of a workdir, the newest checkpoint instead of the best.')


def main(_: list[str]) -> None:
  if not _MODEL.value:
    raise ConfigError('--model: not given; expected a workdir, a Hugging Face folder or a .gguf file; see --help')
  host.keep_compiled_programs()
  found = weights.load(_MODEL.value, best=not _NEWEST.value)
  tokenizer = found.tokenizer
  if tokenizer is None:
    raise DataError(f'{_MODEL.value}: no tokenizer beside the weights; expected tokenizer.json, vocab files or a '
                    '.model; copy it there')
  texts = _PROMPT.value or [_read()]
  prompts = [[*peft.virtual_tokens(found.params), *_encode(tokenizer, text)] for text in texts]
  model, most = decode.of(decoder, found.config), max(map(max, prompts))
  if most >= found.config.vocab + len(peft.virtual_tokens(found.params)):
    raise ConfigError(f'{_MODEL.value}: its tokenizer gives id {most}, the model has {found.config.vocab}; expected '
                      'the tokenizer that it was trained with; put that one there')
  if model.length is not None:  # a learned prefix takes the first positions
    model = dataclasses.replace(model, length=model.length - blocks.virtual(found.params['blocks']))
  stop = [tokenizer.eos_id, tokenizer.control.get('<|im_end|>'), *found.ends]
  stop += chat.stop_ids(conversations.TEMPLATES[_CHAT.value], tokenizer) if _CHAT.value else []
  s = sampler.Sampling(_room(model, prompts), _TEMPERATURE.value, _TOP_K.value, _TOP_P.value,
                       tuple(sorted({i for i in stop if i is not None})))
  decode.check(model, prompts, s)
  p, key = decode.prepare(found.params, _DTYPE.value), jax.random.key(_SEED.value)
  del found  # its weights are in p, too
  # A continuation is printed behind its prompt; an answer is a text of its own.
  shown = [('', ()) for _ in texts] if _CHAT.value else list(zip(texts, prompts, strict=True))
  if len(prompts) == 1:
    (text, before), = shown
    print(text, end='', flush=True)
    drawn = (int(ids_B[0]) for ids_B in decode.stream(model, p, prompts, s, key))
    for piece in streaming.pieces(tokenizer.decode, drawn, before):
      print(piece, end='', flush=True)
    print()
    return
  sample = decode.generate(model, p, prompts, s, key)
  for (text, before), ids, n in zip(shown, np.asarray(sample.tokens_BT), np.asarray(sample.lengths_B), strict=True):
    print(text + ''.join(streaming.pieces(tokenizer.decode, ids[:n].tolist(), before)), end='\n\n')


def _read() -> str:
  if sys.stdin.isatty():
    print('prompt, then Ctrl-D:', file=sys.stderr, flush=True)
  try:
    return sys.stdin.buffer.read().decode().replace('\r\n', '\n').rstrip('\n')
  except UnicodeDecodeError as error:
    raise DataError(f'the prompt on stdin: byte {error.start} is not UTF-8; expected UTF-8; re-encode it') from error


def _encode(tokenizer, text: str) -> list[int]:
  """Ids of the prompt, begun as documents are begun in training; control ids come from here, never from the text."""
  if _CHAT.value:
    return chat.prompt(conversations.TEMPLATES[_CHAT.value], [chat.Message('user', text)], tokenizer).tolist()
  ids = [*tokenizer.begin, *tokenizer.encode(text).tolist()]
  if not ids and tokenizer.bos_id not in (None, tokenizer.control.get('<|im_start|>')):
    return [tokenizer.bos_id]
  if not ids:
    raise ConfigError('--prompt: empty, and no token of this tokenizer begins a document; expected text; give some')
  return ids


def _room(model: decode.Model, prompts: list[list[int]]) -> int:
  if _MAX_NEW.value is not None or model.length is None:
    return 256 if _MAX_NEW.value is None else _MAX_NEW.value
  return max(1, min(256, model.length - max(map(len, prompts))))


if __name__ == '__main__':
  cli.guard(main, __doc__)
