"""Tokenizers as transformers reads them, whatever the model beside them: a tokenizer.json of the same ids.

What differs there: text that spells a control token becomes that token, as everywhere in transformers; behind it a
SentencePiece text begins anew, by a space; and a character that a character tokenizer lacks is left out.
"""

import dataclasses
import json
import re

from sentencepiece import sentencepiece_model_pb2
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from lm.errors import ConfigError
from lm.text import vocabulary
from lm.text.tokenizer import bpe_model, Tokenizer
from lm.text.tokenizer_files import HF_ADDED, HF_CONFIG, MADE_FROM

_NEVER = -1e6  # log-probability of a piece that no text may choose
_TYPES = sentencepiece_model_pb2.ModelProto.SentencePiece
_WRITTEN = (_TYPES.NORMAL, _TYPES.USER_DEFINED)  # what text can say; the others stand for bytes, or are control


def files(tokenizer: Tokenizer, encoder: bool = False) -> dict[str, bytes]:
  """{name: content} of all files of a folder that `AutoTokenizer` reads, and `tokenizer.load` as this tokenizer.

  Without a tokenizer.json where that cannot say the same as a SentencePiece model.

  Args:
    encoder: texts stand between [CLS] and [SEP], where it has all of BERT's special tokens; else behind what begins a
      document.
  """
  if tokenizer.kind in ('hf', 'wordpiece'):  # as AutoTokenizer knows them, a vocab.txt beside an encoder
    return dict(tokenizer.files)
  model = {'sentencepiece': _sentencepiece, 'byte': _byte, 'char': _char,
           'bpe': lambda t: bpe_model(t.files)}[tokenizer.kind](tokenizer)
  if model is None:
    return dict(tokenizer.files)
  model.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in
                            sorted(tokenizer.control, key=tokenizer.control.get)])
  name = {i: name for name, i in tokenizer.control.items()}
  roles = {role: getattr(tokenizer, f'{role}_id') for role in ('bos', 'eos', 'pad')}
  if encoder and (special := _special(tokenizer)):
    roles = special
    model.post_processor = processors.BertProcessing(*((name[roles[role]], roles[role]) for role in ('sep', 'cls')))
  elif tokenizer.begin:
    begin = name[tokenizer.bos_id]
    model.post_processor = processors.TemplateProcessing(f'{begin} $A', f'{begin} $A {begin} $B',
                                                         [(begin, tokenizer.bos_id)])
  config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}
  if not {HF_CONFIG, HF_ADDED} & tokenizer.files.keys():  # else what they said is in tokenizer.json and here alone
    config[MADE_FROM] = next(iter(tokenizer.files))
  config |= {f'{role}_token': name[i] for role, i in roles.items() if i is not None}
  return {**tokenizer.files, 'tokenizer.json': (model.to_str() + '\n').encode(),
          HF_CONFIG: (json.dumps(config, indent=2) + '\n').encode()}


def _special(tokenizer: Tokenizer) -> dict[str, int]:
  try:
    return dataclasses.asdict(vocabulary.special_ids(tokenizer))
  except ConfigError:
    return {}


def _sentencepiece(tokenizer: Tokenizer) -> tokenizers.Tokenizer | None:
  """None where tokenizer.json cannot say the same: other models, rules for characters, symbols of several of them."""
  proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.files['tokenizer.model'])
  trained, rules = proto.trainer_spec, proto.normalizer_spec
  make = {trained.UNIGRAM: _unigram, trained.BPE: _bpe}.get(trained.model_type)
  long = any(p.type == _TYPES.USER_DEFINED and len(p.piece) > 1 for p in proto.pieces)
  if (make is None or long or rules.precompiled_charsmap or rules.remove_extra_whitespaces
      or not rules.escape_whitespaces or trained.treat_whitespace_as_suffix):
    return None
  out = tokenizers.Tokenizer(make(proto))
  prefix = [normalizers.Prepend('▁')] if rules.add_dummy_prefix else []
  out.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(' ', '▁')])
  known, named = (set(''.join(p.piece for p in proto.pieces if (p.type in _WRITTEN) is said)) for said in (True, False))
  if rare := named - known:  # apart from its neighbours, as no piece has it: else '<0x0A>' would pass for that byte
    out.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex('|'.join(map(re.escape, sorted(rare)))), 'isolated')
  out.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(),
                                   *([decoders.Strip(' ', 1, 0)] if prefix else [])])
  return out


def _unigram(proto) -> models.Unigram:
  """Symbols of the user's get SentencePiece's own score, just below that of the best piece."""
  best = max(p.score for p in proto.pieces if p.type == _TYPES.NORMAL)
  score = {_TYPES.NORMAL: lambda p: p.score, _TYPES.USER_DEFINED: lambda p: best - 0.1}
  unknown = next(i for i, p in enumerate(proto.pieces) if p.type == _TYPES.UNKNOWN)
  return models.Unigram([(p.piece, score.get(p.type, lambda p: _NEVER)(p)) for p in proto.pieces], unknown,
                        byte_fallback=proto.trainer_spec.byte_fallback)


def _bpe(proto) -> models.BPE:
  """SentencePiece joins the neighbours that make the likeliest piece; here, all pairs that make it, in that order."""
  ids = {p.piece: i for i, p in enumerate(proto.pieces)}
  plain = {p.piece: -p.score for p in proto.pieces if p.type in _WRITTEN}
  merges = [(rank, piece[:i], piece[i:]) for piece, rank in plain.items() for i in range(1, len(piece))
            if piece[:i] in plain and piece[i:] in plain]
  unknown = next(p.piece for p in proto.pieces if p.type == _TYPES.UNKNOWN)
  return models.BPE(ids, [(a, b) for _, a, b in sorted(merges, key=lambda m: (m[0], ids[m[1]], ids[m[2]]))],
                    unk_token=unknown, fuse_unk=True, byte_fallback=proto.trainer_spec.byte_fallback)


def _byte(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
  out = tokenizers.Tokenizer(models.BPE(vocabulary.byte_letters() | dict(tokenizer.control), []))
  out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  out.decoder = decoders.ByteLevel()
  return out


def _char(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
  chars = json.loads(tokenizer.files['char.json'])['chars']
  out = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(chars)}, []))
  out.decoder = decoders.Fuse()
  return out
