"""scripts/launch: the files parse, call the program with flags it has, and start again on the right statuses only."""

import os
import pathlib
import subprocess

import pytest
import yaml

from experiments import cli, gpt2
from lm import errors, pretrain

LAUNCH = pathlib.Path(__file__).parent.parent / 'scripts' / 'launch'
AGAIN = {70, 75, 134, 137}
JOBSETS = ('jobset-gpu.yaml', 'jobset-tpu.yaml')


def run(argv, tmp_path, **variables):
  """(exit status, the lines that the stand-ins wrote) with srun, scontrol, sleep and python replaced."""
  for name in ('srun', 'scontrol', 'sleep', 'python'):
    path = tmp_path / name
    path.write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\n[ {name} != srun ] || exit "$STATUS"\n')
    path.chmod(0o755)
  done = subprocess.run(argv, cwd=tmp_path, env=os.environ | {'PATH': f'{tmp_path}:{os.environ["PATH"]}'} | variables,
                        capture_output=True, text=True, timeout=60, check=False)
  calls = tmp_path / 'calls'
  return done.returncode, calls.read_text().splitlines() if calls.exists() else []


def job(name):
  """(the JobSet, the Job in it, the pod, its container)."""
  jobset = yaml.safe_load((LAUNCH / name).read_text(encoding='utf-8'))
  inner, = jobset['spec']['replicatedJobs']
  container, = inner['template']['spec']['template']['spec']['containers']
  return jobset, inner['template']['spec'], inner['template']['spec']['template']['spec'], container


def described(call, capsys):
  """The flags of a call of python -m experiments.gpt2, after the program has accepted them with --describe."""
  words = call.split()
  flags = words[words.index('experiments.gpt2') + 1:]
  assert cli.run_argv(['gpt2', *flags, '--describe'], '', gpt2.CONFIGS, pretrain.task) == 0, capsys.readouterr().err
  return flags


def devices(flags):
  sizes = [int(f.split('=')[1]) for f in flags if f.startswith('mesh.')]
  assert len(sizes) == 2
  return sizes[0] * sizes[1]


@pytest.mark.parametrize('status', [0, 1, 2, 3, 4, 5, 70, 75, 130, 134, 137])
def test_slurm_queues_again_what_heals(tmp_path, status):
  code, calls = run(['bash', LAUNCH / 'slurm.sbatch'], tmp_path, STATUS=str(status), SLURM_JOB_ID='7')
  assert code == status
  assert ('scontrol requeue 7' in calls) == (status in AGAIN)
  assert calls[0].startswith('srun --kill-on-bad-exit=0 ')


def test_slurm_does_not_start_again_for_ever(tmp_path):
  code, calls = run(['bash', LAUNCH / 'slurm.sbatch'], tmp_path, STATUS='75', SLURM_JOB_ID='7',
                    SLURM_RESTART_COUNT='100')
  assert code == 75 and len(calls) == 1


def test_slurm_starts_a_process_for_each_device(tmp_path, capsys):
  options = dict(line.split()[1].removeprefix('--').split('=') for line in
                 (LAUNCH / 'slurm.sbatch').read_text(encoding='utf-8').splitlines()
                 if line.startswith('#SBATCH') and '=' in line)
  _, calls = run(['bash', LAUNCH / 'slurm.sbatch'], tmp_path, STATUS='0')
  flags = described(calls[0], capsys)
  assert '--distributed=auto' in flags
  assert options['ntasks-per-node'] == options['gpus-per-node']
  assert devices(flags) == int(options['nodes']) * int(options['gpus-per-node'])
  assert options['signal'].startswith('TERM@')  # with B: it would reach the script alone


@pytest.mark.parametrize('name, resource', [*zip(JOBSETS, ('nvidia.com/gpu', 'google.com/tpu'), strict=True)])
def test_a_jobset_starts_a_process_for_each_machine(tmp_path, capsys, name, resource):
  jobset, inner, _, container = job(name)
  assert (jobset['apiVersion'], jobset['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
  assert inner['completions'] == inner['parallelism'] and inner['completionMode'] == 'Indexed'
  code, (call,) = run(container['command'], tmp_path, JOB_COMPLETION_INDEX='1')
  flags = described(call, capsys)
  assert code == 0
  assert devices(flags) == inner['parallelism'] * container['resources']['limits'][resource]
  assert container['command'][2].startswith('exec ')  # or SIGTERM ends at the shell
  if name == 'jobset-gpu.yaml':
    name, worker = jobset['metadata']['name'], jobset['spec']['replicatedJobs'][0]['name']
    port = container['ports'][0]['containerPort']
    assert f'--distributed={name}-{worker}-0-0.{name}:{port},{inner["parallelism"]},1' in flags
  else:
    assert '--distributed=auto' in flags


@pytest.mark.parametrize('name', JOBSETS)
def test_a_jobset_starts_again_on_what_heals(name):
  jobset, inner, pod, container = job(name)
  disrupted, by_status = inner['podFailurePolicy']['rules']
  assert disrupted == {'action': 'Count', 'onPodConditions': [{'type': 'DisruptionTarget', 'status': 'True'}]}
  assert by_status == {'action': 'FailJob', 'onExitCodes': {
      'containerName': container['name'], 'operator': 'NotIn', 'values': sorted(AGAIN)}}
  rule, = jobset['spec']['failurePolicy']['rules']
  assert rule == {'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}
  assert inner['backoffLimit'] == 0 and pod['restartPolicy'] == 'Never'
  assert pod['terminationGracePeriodSeconds'] >= 300
  assert {v['name'] for v in pod['volumes']} == {m['name'] for m in container['volumeMounts']}


def test_what_heals_is_what_the_errors_say():
  codes = {e.code for e in errors.Error.__subclasses__()}
  assert codes & AGAIN == {errors.Lost.code, errors.Preempted.code}  # 134 and 137 are SIGABRT and SIGKILL
