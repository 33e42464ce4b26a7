r"""What a run costs on a TPU slice or H100 cluster that is not here: compiles its real training step for it.

  pip install -e '.[tpu-aot]'      # the compiler for TPUs; .[cuda-aot] for H100s. Neither needs a device
  python -m scripts.compile_for --experiment=gpt3 --config=gpt3_175b_v5p --target=v5p:8x8x16
  python -m scripts.compile_for --experiment=gpt3 --config=gpt3_175b_h100 --target=h100:128x8 --json
  python -m scripts.compile_for --experiment=llama --config=llama2_7b --target=v5e:16x16 --search
  python -m scripts.compile_for --experiment=bert --config=bert_large --target=h100:1x8 --set mesh.fsdp=8

--target is v4, v5e, v5p or v6e with the slice's shape, or h100:HOSTSxGPUS. The mesh (mesh.data, mesh.fsdp, mesh.tensor,
mesh.pipe) must have as many devices; --set changes any field of the config, as in an experiment.

Prints, for one device and one step:
  memory       bytes of parameters, gradients, optimizer, and activations (all else that the compiler needs), against
               the device's; then "fits", or what to change
  FLOPs        of the matmuls in the compiled program, with loops multiplied out, against the model's 6 N + attention:
               4/3 where all is recomputed, less where attention skips what it cannot see, more by a pipeline's bubble
  collectives  by kind and mesh axis: how many, bytes sent by rings, seconds on the links they use
  roofline     seconds if everything overlapped perfectly, and what binds: compute, memory, ICI, NVLink or network
  run          days and money for optim.steps at --utilisation of that roofline, on demand

--search tries meshes, rematerialisation and microbatches by formula and compiles the best --top of them.

The compilers' plugins complain on stderr that they find no driver or device; that is as it should be.

What it is not: a measurement. Kernels that are not matmuls count by the memory they touch; links are taken as empty of
other traffic; stragglers, restarts, data and evaluation are not counted. That is what --utilisation stands for.

Exit status: 0 it fits, 2 a flag or field, or it does not fit.
"""

import dataclasses
import importlib
import json
import math
import pkgutil

from absl import flags
import jax

import experiments
from experiments import cli
from lm import budget, config, plan, plan_search, run, targets
from lm.errors import ConfigError

_NOT_RUNS = ('cli', 'encoders')  # the front door; a comparison of several runs
_EXPERIMENT = flags.DEFINE_string('experiment', '', 'A file of experiments/, e.g. gpt3.')
_CONFIG = flags.DEFINE_string('config', '', 'A config of that file, e.g. gpt3_175b_v5p.')
_SET = flags.DEFINE_multi_string('set', [], 'path.to.field=value, typed and checked, as in the experiment.')
_TARGET = flags.DEFINE_string('target', '', f'{", ".join(targets.DEVICES)}, then its shape: v5p:8x8x16, h100:16x8.')
_SEARCH = flags.DEFINE_bool('search', False, 'Look for the mesh, rematerialisation and microbatches.')
_TOP = flags.DEFINE_integer('top', 3, 'With --search: how many of the best are compiled.', lower_bound=1)
_UTILISATION = flags.DEFINE_float('utilisation', plan.UTILISATION, 'Share of the roofline that the run reaches; the '
                                  'default is what PaLM 540B did.', lower_bound=0.01, upper_bound=1.0)
_USD_HOUR = flags.DEFINE_float('usd_hour', None, 'Price of one device for one hour; default: on demand, see '
                               'lm/targets.py.', lower_bound=0.0)
_JSON = flags.DEFINE_bool('json', False, 'Print JSON.')
_HLO = flags.DEFINE_string('hlo', '', 'Write the optimised HLO to this file.')


def main(_: list[str]) -> None:
  jax.config.update('jax_platforms', 'cpu')  # compilers come as plugins, and none of their devices is here
  c = config.override(_found(), *_SET.value)
  target = targets.parse(_TARGET.value)
  if _SEARCH.value:
    _search(c, target)
    return
  made = plan.make(c, target, _keep)
  print(json.dumps(as_json(c, made), indent=1) if _JSON.value else as_text(c, made))
  if not made.memory.fits:
    raise ConfigError(plan.advice(c, made))


def _keep(text: str) -> None:
  if _HLO.value:
    with open(_HLO.value, 'w', encoding='utf-8') as file:
      file.write(text)


def _found() -> run.Config:
  """The config that --experiment and --config name."""
  names = [m.name for m in pkgutil.iter_modules(experiments.__path__) if m.name not in _NOT_RUNS]
  if _EXPERIMENT.value not in names:
    raise ConfigError(f'--experiment={_EXPERIMENT.value}: unknown; expected one of {", ".join(names)}')
  module = importlib.import_module(f'experiments.{_EXPERIMENT.value}')
  made = {f.__name__: f for f in module.CONFIGS}
  if _CONFIG.value not in made:
    raise ConfigError(f'--config={_CONFIG.value}: unknown; expected one of {", ".join(made)}')
  return made[_CONFIG.value]()


def _search(c: run.Config, target: targets.Target) -> None:
  found = plan_search.candidates(c, target)[:_TOP.value]
  plans = []
  for candidate in found:
    if not _JSON.value:
      print(f'compiling {plan_search.changes(c, candidate.config)}', flush=True)
    plans.append((candidate, plan.make(candidate.config, target)))
  plans.sort(key=lambda x: (not x[1].memory.fits, x[1].bound if x[1].seconds else math.inf))
  if _JSON.value:
    print(json.dumps([as_json(x.config, p) | {'set': plan_search.changes(c, x.config)} for x, p in plans], indent=1))
    return
  rows = [('step', 'bound', 'MFU', 'binding', 'GiB', 'by formula', 'days', '', 'flags')]
  share = _UTILISATION.value
  for x, p in plans:
    rows.append((f'{p.step_s(share):.2f} s', f'{p.bound:.2f} s', f'{p.mfu(share):.1%}', p.binding,
                 f'{p.memory.peak / targets.GIB:.1f}', f'{x.seconds:.2f} s, {x.memory / targets.GIB:.1f} GiB',
                 f'{p.days(share):.1f}', 'fits' if p.memory.fits else 'does not fit',
                 plan_search.changes(c, x.config)))
  print(budget.columns(rows))


def as_text(c: run.Config, p: plan.Plan) -> str:
  """The report for people."""
  mesh = ' x '.join(f'{a}={n}' for a, n in dataclasses.asdict(p.mesh).items() if n not in (0, 1, False))
  parts = [f'{_EXPERIMENT.value}.{_CONFIG.value} on {p.target}: {p.target.size} x {p.target.device.kind}; mesh {mesh}; '
           f'compiled in {p.compile_s:.0f} s']
  kinds = ('parameters', 'gradients', 'optimizer', 'activations', 'peak', 'limit')
  parts.append(budget.columns([('memory a device', 'GiB', ''), *((
      k, f'{getattr(p.memory, k) / targets.GIB:.3g}', f'{getattr(p.memory, k) / p.memory.limit:.1%}') for k in kinds)]))
  if p.seconds:
    parts += [_work(p), _sent(p), _time(p)]
  if p.loops:
    parts.append(f'counted too low: the trip counts of these loops are not known: {", ".join(p.loops)}')
  return '\n\n'.join([*parts, plan.advice(c, p)])


def _work(p):
  return budget.columns([('FLOPs a device and step', ''), ('compiled', f'{p.flops:.4g}'), (
      'model, 6 N + attention', f'{p.model_flops:.4g}'), ('compiled / model', f'{p.flops / p.model_flops:.3f}')])


def _sent(p):
  rows = [('collective', 'axes', 'devices', 'count', 'sent', 'seconds', 'over')]
  rows += [(x.kind, ' '.join(x.axes), str(x.size), f'{x.count:.0f}', budget.human(x.bytes, 'B'), f'{x.seconds:.4f}',
            x.resource) for x in p.links]
  return budget.columns(rows) if p.links else 'no collectives'


def _time(p):
  share, price = _UTILISATION.value, p.target.device.usd_hour if _USD_HOUR.value is None else _USD_HOUR.value
  rows = [('seconds a step', '')] + [(f'  {name}', f'{x:.4f}') for name, x in p.seconds.items()]
  rows += [
      ('roofline', f'{p.bound:.4f} s, bound by {p.binding}; MFU at most {p.mfu():.1%}'),
      (f'at {share:.3g} of it', f'{p.step_s(share):.4f} s, MFU {p.mfu(share):.1%}, '
                                f'{budget.human(p.tokens / p.step_s(share))} tokens/s'),
      ('the run', f'{p.steps:,} steps of {p.tokens:,} tokens: {p.days(share):.1f} days, '
                  f'${p.usd(share, price):,.0f} at ${price:.2f} a device and hour')]
  return budget.columns(rows)


def as_json(c: run.Config, p: plan.Plan) -> dict:
  """The report for programs; bytes, FLOPs, seconds of one device and step. What is not known is null."""
  share = _UTILISATION.value
  number = lambda x: x if math.isfinite(x) else None
  kinds = ('parameters', 'gradients', 'optimizer', 'activations', 'peak', 'limit')
  known = bool(p.seconds)
  return {
      'experiment': _EXPERIMENT.value, 'config': _CONFIG.value, 'target': str(p.target), 'devices': p.target.size,
      'mesh': dataclasses.asdict(p.mesh), 'compile_s': p.compile_s, 'fits': p.memory.fits, 'advice': plan.advice(c, p),
      'memory': {k: getattr(p.memory, k) for k in kinds},
      'flops': {'compiled': number(p.flops), 'model': p.model_flops, 'ratio': number(p.flops / p.model_flops)},
      'collectives': [dataclasses.asdict(x) for x in p.links], 'seconds': p.seconds, 'unknown_loops': list(p.loops),
      'roofline_s': number(p.bound), 'binding': p.binding, 'mfu_bound': number(p.mfu()) if known else None,
      'utilisation': share, 'step_s': number(p.step_s(share)), 'mfu': number(p.mfu(share)) if known else None,
      'tokens_a_step': p.tokens, 'steps': p.steps, 'days': number(p.days(share)),
      'usd': number(p.usd(share, _USD_HOUR.value))}


if __name__ == '__main__':
  cli.guard(main, __doc__)
