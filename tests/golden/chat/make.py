"""Writes the frozen chat fixtures beside this file; run it when a template is meant to change, and read the diff.

  python -m tests.golden.chat.make

tokenizer.json: a small byte-level BPE with the control tokens of ChatML and of Llama-2. TEMPLATE.LANGUAGE.txt: a line
for each token of the conversation: '+' where it is a target, its id, its text ('\\x..' where a character is split).
"""

import json
import pathlib

import tokenizers

from lm.text import chat, tokenizer as loader, vocabulary

HERE = pathlib.Path(__file__).parent
TEMPLATES = {'chatml': chat.chatml, 'llama2': chat.llama2, 'alpaca': chat.alpaca, 'plain': chat.plain}
SPECIAL = ['<pad>', '<s>', '</s>', '<|im_start|>', '<|im_end|>']


def conversations() -> dict[str, list[chat.Message]]:
  found = json.loads((HERE / 'conversations.json').read_text(encoding='utf-8'))
  return {language: [chat.Message(*turn) for turn in turns] for language, turns in found.items()}


def listing(template: chat.Template, messages: list[chat.Message], tokenizer: loader.Tokenizer) -> str:
  pieces = dict(enumerate(vocabulary.pieces(tokenizer))) | {i: n.encode() for n, i in tokenizer.control.items()}
  lines = []
  for i, target in zip(*chat.encode(template, messages, tokenizer), strict=True):
    text = pieces[i].decode(errors='backslashreplace').replace('\n', '\\n')
    lines.append(f'{"+" if target else "."} {i:4} |{text}|\n')
  return ''.join(lines)


def main() -> None:
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  texts = [m.content for turns in conversations().values() for m in turns]
  words = ' '.join([*texts, chat.ALPACA, *chat.ROLES, '### Instruction: ### Response: [INST] <<SYS>> <</SYS>> [/INST]'])
  ascii_words = [word for word in words.split() if word.isascii()]
  parts = [*ascii_words, *(f' {word}' for word in ascii_words), *(c for c in words if not c.isascii())]
  model.train_from_iterator(parts, tokenizers.trainers.BpeTrainer(
      vocab_size=800, special_tokens=SPECIAL, show_progress=False,
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  model.save(str(HERE / 'tokenizer.json'), pretty=False)
  tokenizer = loader.load(HERE / 'tokenizer.json')
  for name, template in TEMPLATES.items():
    for language, messages in conversations().items():
      (HERE / f'{name}.{language}.txt').write_text(listing(template, messages, tokenizer), encoding='utf-8')


if __name__ == '__main__':
  main()
