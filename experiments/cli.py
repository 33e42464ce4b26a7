"""The command line that every experiment has; an experiment calls `main` with its config functions.

Not an experiment: the only module here that others import.
"""

from collections.abc import Callable, Sequence
import json
import logging
import sys
from typing import Any

from absl import app, flags, logging as absl_logging

from lm import config, run
from lm.errors import ConfigError, Error


def main(doc: str, configs: Sequence[Callable[[], run.Config]], task: Callable[[Any], run.Task]) -> None:
  """Parses flags, then describes or runs the chosen config. Exits with the code of `lm.errors`."""
  by_name = {f.__name__: f for f in configs}
  names = '\n'.join(f'    {name}: {(f.__doc__ or "").strip().splitlines()[0]}' for name, f in by_name.items())
  flags.DEFINE_enum('config', next(iter(by_name)), list(by_name), f'Which run:\n{names}')
  flags.DEFINE_multi_string('set', [], 'path.to.field=value, typed and checked; may be repeated. '
                            'E.g. --set optim.lr=1e-4 --set data.corpus=book.txt')
  flags.DEFINE_string('workdir', '', 'Where the run writes: config.json, metrics.jsonl, checkpoints/, curves.png, '
                      'summary.json. Starting again in the same place resumes.')
  flags.DEFINE_bool('describe', False, 'Print the parameter table, counts, tokens and FLOPs; allocate nothing.')
  flags.DEFINE_bool('resume_with_changes', False, 'Resume although the config differs from the one in --workdir.')
  flags.DEFINE_bool('traceback', False, 'On an error, show where it was raised.')

  def program(_: list[str]) -> None:
    values = flags.FLAGS
    c = config.override(by_name[values.config](), *values.set)
    if values.describe:
      print(run.describe(c, task(c)))
      return
    if not values.workdir:
      raise ConfigError('--workdir: not given; expected a directory to write to; e.g. --workdir=runs/' + values.config)
    summary = run.run(c, task(c), values.workdir, values.resume_with_changes)
    print(json.dumps(summary, indent=1))
    print(f'done: {values.workdir}/curves.png shows the loss; sample with: python -m scripts.sample '
          f'--model={values.workdir} --prompt="..."')
  guard(program, doc)


def guard(program: Callable[[list[str]], None], doc: str) -> None:
  """`app.run` whose expected failures are one line on stderr and the documented exit code."""
  absl_logging.set_verbosity(absl_logging.WARNING)
  logging.getLogger('jax').setLevel(logging.WARNING)

  def parse(argv):
    try:
      return flags.FLAGS(argv)
    except flags.Error as error:
      fail(ConfigError(f'{error}; see --help'))

  def guarded(argv):
    if argv[1:]:
      fail(ConfigError(f'{argv[1]!r}: unexpected argument; flags start with --; see --help'))
    try:
      program(argv)
    except Error as error:
      if getattr(flags.FLAGS, 'traceback', False):
        raise
      fail(error)

  sys.modules['__main__'].__doc__ = doc
  app.run(guarded, flags_parser=lambda argv: _help(argv) or parse(argv))


def fail(error: Error) -> None:
  print('error: ' + ' '.join(str(error).split()), file=sys.stderr, flush=True)
  sys.exit(error.code)


def _help(argv):
  if {'--help', '-h', '--helpfull', '-help'} & set(argv):
    print(sys.modules['__main__'].__doc__)
    print('\n'.join(filter(None, (flags.FLAGS.main_module_help(), flags.FLAGS.module_help(__name__)))))
    sys.exit(0)
