"""The command line that every experiment has; an experiment calls `main` with its config functions.

Not an experiment: the only module here that others import.
"""

from collections.abc import Callable, Sequence
import json
import logging
import os
import sys
import traceback
from typing import Any

from absl import flags, logging as absl_logging
import jax

from lm import config, faults, host, hosts, logs, look, run
from lm.errors import ConfigError, Error
from lm.models import decoder

EXIT = """Exit status: 0 done or complete already; 2 a flag or field; 3 the data; 4 a checkpoint or disk; 5 diverged;
70 another process of the job is stuck or gone, 75 SIGTERM and 130 Ctrl-C, both after saving: start again to resume."""
_FLAGS = (
    (flags.DEFINE_multi_string, 'set', [], 'path.to.field=value, typed and checked. E.g. --set optim.lr=1e-4 --set '
     'data.corpus=book.txt --set "data.corpus=(\'a.txt\', \'b.jsonl\')"'),
    (flags.DEFINE_string, 'workdir', '', 'Where the run writes: config.json, metrics.jsonl, tensorboard/, '
     'checkpoints/, tokenizer/, curves.png, summary.json. Starting again in the same place resumes.'),
    (flags.DEFINE_integer, 'show_batch', None, 'Print the texts that this step of the run reads, and train nothing: '
     'control tokens by name, targets in brackets where not all are.'),
    (flags.DEFINE_bool, 'describe', False, 'Print the parameter table, counts, tokens and FLOPs; allocate nothing.'),
    (flags.DEFINE_string, 'distributed', '', "Join a job of several processes: 'auto' on TPU pods, Slurm, Open MPI and "
     'Kubernetes, else HOST:PORT,PROCESSES,INDEX (process 0 at HOST). They share --workdir. See scripts/launch.'),
    (flags.DEFINE_integer, 'heartbeat_s', 100, 'Seconds of silence after which a process counts as dead.', 5),
    (flags.DEFINE_integer, 'wait_s', 600, 'Seconds that processes wait for one another; then all end.', 5),
    (flags.DEFINE_enum, 'resume', 'auto', ['auto', 'never', 'must'], 'Whether a run may or must be in --workdir.'),
    (flags.DEFINE_bool, 'resume_with_changes', False, 'Resume although config or data differ from those of --workdir; '
     'what differs is printed and kept in changes.jsonl. After another data.batch, rows are skipped or come again.'),
    (flags.DEFINE_integer, 'restore_step', None, 'Resume from this sealed step, newer ones to abandoned/; give once.'))
After = Callable[[Any, str], dict[str, Any]]


def main(doc: str, configs: Sequence[Callable[[], run.Config]], task: Callable[[Any], run.Task],
         after: After | None = None) -> None:
  """`run_argv` of the command line; exits with its status."""
  code = run_argv(sys.argv, doc, configs, task, after)
  hosts.leave()
  sys.exit(code)


def run_argv(argv: Sequence[str], doc: str, configs: Sequence[Callable[[], run.Config]],
             task: Callable[[Any], run.Task], after: After | None = None) -> int:
  """Parses flags (argv[0] is the program), then describes or runs the chosen config; the exit status of `EXIT`.

  `after` the run, (config, workdir) -> what summary.json gets besides; also where the run was complete already.
  """
  by_name = {f.__name__: f for f in configs}
  values = flags.FlagValues()
  flags.DEFINE_enum('config', next(iter(by_name)), list(by_name), 'Which run: see Configs.', flag_values=values)
  for define, *rest in _FLAGS:
    define(*rest, flag_values=values)

  def program(_: list[str]) -> None:
    if values.distributed and not values.describe and values.show_batch is None:
      hosts.join(values.distributed, values.heartbeat_s, values.wait_s)  # first: what fails from here on fails on all
    host.keep_compiled_programs()
    c = config.override(by_name[values.config](), *values.set)
    if values.describe:
      return print(look.describe(c, task(c)))
    if not values.workdir:
      raise ConfigError('--workdir: not given; expected a directory to write to; e.g. --workdir=runs/' + values.config)
    workdir = os.path.abspath(values.workdir)
    if values.show_batch is not None:
      return print(look.batch(c, task(c), workdir, values.show_batch))
    how = {k: values[k].value for k in ('resume_with_changes', 'resume', 'restore_step')}
    if jax.distributed.is_initialized():
      hosts.require_same({'--config': values.config, '--distributed': values.distributed.rsplit(',', 1)[0],
                          'JAX': jax.__version__} | {f'--{k}': v for k, v in how.items()} | config.flatten(c))
      hosts.require_shared(workdir)
    summary = run.run(c, task(c), workdir, **how)
    more = after(c, workdir) if after else {}
    if jax.process_index() == 0:
      if more:
        logs.write_summary(workdir, summary | more)
      print(json.dumps(summary | more, indent=1))
      hint = '' if not isinstance(getattr(c, 'model', None), decoder.Config) or hasattr(c, 'pooling') else (
          f'; sample with: python -m scripts.sample --model={workdir} --prompt="..."')
      print(f'done: {workdir}/curves.png shows how it went{hint}')

  def more_help() -> str:
    names = '\n'.join(f'  {name}: {(f.__doc__ or "").strip().splitlines()[0]}' for name, f in by_name.items())
    fields = '\n'.join(f'  {k}={v!r}' for k, v in config.flatten(by_name[values.config]()).items())
    return (f'Configs (--config):\n{names}\n\nFields (--set) and their values in --config={values.config}:\n{fields}'
            f'\n\n{EXIT}')
  return _run(argv, values, program, doc, more_help)


def guard(program: Callable[[list[str]], None], doc: str) -> None:
  """Runs a script whose flags are absl's global ones, and exits with its status."""
  sys.exit(_run(sys.argv, flags.FLAGS, program, doc, lambda: ''))


def _run(argv, values, program, doc, more_help) -> int:
  """The exit status; an expected failure is one line on stderr, without a traceback."""
  absl_logging.set_verbosity(absl_logging.FATAL)  # what a library finds wrong reaches us as an exception, too
  logging.getLogger('asyncio').setLevel(logging.CRITICAL)
  logging.getLogger('jax').setLevel(logging.WARNING)
  flags.DEFINE_bool('help', False, 'Print this.', flag_values=values, short_name='h')
  flags.DEFINE_bool('traceback', False, 'On an error, show where it was raised.', flag_values=values)
  flags.DEFINE_bool('keep_memory', True, 'Keep freed CPU memory: faster, and more is held.', flag_values=values)
  for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, 'reconfigure'):
      stream.reconfigure(errors='backslashreplace')  # names of files may be of another encoding
  try:
    rest = values(argv)
    if values.keep_memory:
      host.keep_freed_memory()  # before the first thread
    if values.traceback:
      absl_logging.set_verbosity(absl_logging.WARNING)
    if values.help:
      texts = doc, values.main_module_help(), values.module_help(__name__), more_help()
      print('\n\n'.join(text.strip() for text in texts if text), flush=True)
      return 0
    if rest[1:]:
      raise ConfigError(f'{rest[1]!r}: unexpected argument; flags start with --; see --help')
    program(rest)
    sys.stdout.flush()
    return 0
  except BrokenPipeError:  # whoever read it, such as `head`, has enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except (Error, flags.Error, KeyboardInterrupt, OSError, RuntimeError) as error:
    failure = ConfigError(f'{error}; see --help') if isinstance(error, flags.Error) else faults.expected(error)
    if failure is None or (values.is_parsed() and values.traceback):
      traceback.print_exc()
    code, line = failure.code if failure else 1, ' '.join(str(failure or error).split())
    line = ''.join(c if c.isprintable() else repr(c)[1:-1] for c in line)  # a name in it may not steer the terminal
    if jax.distributed.is_initialized():
      hosts.fail(code, line)
    print('error: ' + line, file=sys.stderr, flush=True)
    return code
