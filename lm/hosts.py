"""Processes that are one job: they join, wait for each other for a limited time, and end together.

Left alone, a job of several processes hangs in every fault but a dead process: who is alive in a collective waits for
ever for a peer that raised, or that is stuck in a read. So: `meet` is a barrier with a limit that names who is missing;
`fail` tells the others why this process ends, and they end with the same exit status, whatever they are waiting for.
A process that dies without a word (SIGKILL, a lost machine) is noticed by JAX's heartbeats, which end the others by
SIGABRT (134).
"""

import contextlib
import dataclasses
import ipaddress
import json
import os
import pathlib
import re
import secrets
import socket
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from lm.errors import ConfigError, Error, Lost

GRACE_S = 5.0  # from the news that a process failed until this one, if it does not leave by itself, is ended
_NEWS = 'lm/failed'
_LEAVING = threading.Lock()
_GONE = re.compile('gloo|nccl|coordination|connection (closed|reset)|socket closed|UNAVAILABLE|DEADLINE_EXCEEDED|'
                   'ABORTED', re.IGNORECASE)


@dataclasses.dataclass
class _Job:
  joined: bool = False
  wait_s: float = 600.0


_job = _Job()


def join(text: str, heartbeat_s: int = 100, wait_s: int = 600) -> None:
  """Makes the devices of all processes of the job visible to each; call it before anything that asks for devices.

  From here on an exception that nobody catches ends all processes of the job.

  Args:
    text: 'auto' (Slurm, Open MPI, Kubernetes, Cloud TPU: as JAX finds them) or 'HOST:PORT,PROCESSES,INDEX'.
    heartbeat_s: seconds of silence after which a process counts as dead.
    wait_s: seconds that processes wait for one another: here, and in every `meet`.

  Raises:
    ConfigError: what `text` says is no job. Lost: the coordinator cannot be reached. Where the others do not come in
      time this does not return: the process ends with the status of Lost.
  """
  # JAX ends its own wait by an abort with a stack trace: it is given longer than we wait.
  limits = {'heartbeat_timeout_seconds': heartbeat_s, 'initialization_timeout': wait_s + 60}
  late = Lost(f'--distributed={text}: not all processes of the job came within {wait_s} s; expected each to be started '
              'with one address, one number of processes and an index of its own; see the logs of the others')
  timer = threading.Timer(wait_s, fail, (late.code, str(late)))
  timer.daemon = True
  timer.start()
  try:
    if text == 'auto':
      jax.distributed.initialize(**limits)
    else:
      address, count, index = text.split(',')
      jax.distributed.initialize(address, int(count), int(index), coordinator_bind_address=_bind(address),
                                 cluster_detection_method='deactivate', **limits)
  except jax.errors.JaxRuntimeError as error:
    raise Lost(f'{late} ({str(error)[:200]})') from error
  except (ValueError, TypeError, KeyError, RuntimeError) as error:
    raise ConfigError(f"--distributed={text}: {error}; expected 'auto' or HOST:PORT,PROCESSES,INDEX") from error
  finally:
    timer.cancel()
  _job.joined, _job.wait_s = True, wait_s
  sys.excepthook = _die
  if _coordination():
    threading.Thread(target=_watch, args=_coordination(), name='hosts', daemon=True).start()


def leave() -> None:
  """The end of a job that went well: waits for the others, who may still be writing."""
  if jax.distributed.is_initialized():
    meet('the end', 3600)
    jax.distributed.shutdown()


def fail(code: int, why: str) -> NoReturn:
  """Ends this process with exit status `code`, and with it the others of the job; each prints the line `why`."""
  _tell(code, why)
  _end(code, f'error: {why}')


def meet(what: str, seconds: float | None = None) -> None:
  """Waits until every process is here, for at most `seconds` (None: `wait_s` of `join`). From any thread.

  Processes meet at the same places in the same order; 0.5 ms for two on one machine.

  Raises:
    Lost: somebody did not come; the message says who. The job is ended `GRACE_S` later, whatever holds up the others.
  """
  if jax.process_count() == 1:
    return
  seconds = _job.wait_s if seconds is None else seconds
  try:
    ocp.multihost.get_barrier_sync_fn()(key=f'lm/{what}', timeout_ms=int(1000 * seconds))
  except jax.errors.JaxRuntimeError as error:
    text = str(error)
    late = ', '.join(re.findall(r'^(\d+)$', text, re.MULTILINE)) if 'DEADLINE_EXCEEDED' in text else ''
    found = f'process {late} did not come within {seconds:g} s' if late else text[:200]
    lost = Lost(f'{what}: {found}; expected every process here: one is stuck or gone; start the job again to resume')
    _tell(lost.code, str(lost))
    raise lost from error


def share(text: str) -> list[str]:
  """What each process of the job gives, in their order. Collective."""
  if jax.process_count() == 1:
    return [text]
  meet('an exchange')
  mine = np.frombuffer(text.encode(), np.uint8)
  sizes_P = multihost_utils.process_allgather(np.int32(len(mine)))
  bytes_PN = multihost_utils.process_allgather(np.pad(mine, (0, int(sizes_P.max()) - len(mine))))
  return [row[:n].tobytes().decode() for row, n in zip(bytes_PN, sizes_P.tolist(), strict=True)]


def require_same(values: dict[str, Any]) -> None:
  """Raises ConfigError, on all processes, that lists those of the json-able `values` in which processes differ."""
  first, *others = [json.loads(text) for text in share(json.dumps(values, default=repr))]
  differing = [f'{k}: {first.get(k)!r} on process 0, {other.get(k)!r} on process {i}'
               for i, other in enumerate(others, 1) for k in sorted(first.keys() | other.keys())
               if first.get(k) != other.get(k)]
  if differing:
    raise ConfigError(f'--set: {"; ".join(differing[:4])}; expected the same on every process; start all of them with '
                      'one command line')


def require_shared(directory: str | os.PathLike) -> None:
  """Raises ConfigError, on all processes, where some do not see what process 0 writes into `directory`."""
  path = pathlib.Path(directory)
  token = f'.shared-{secrets.token_hex(8)}'
  if jax.process_index() == 0:
    try:
      path.mkdir(parents=True, exist_ok=True)
      (path / token).touch()
    except OSError:
      token = ''  # who writes there will say it better
  token = share(token)[0]
  try:
    blind = [str(i) for i, seen in enumerate(share(str((path / token).exists()))) if seen == 'False']
  finally:
    if jax.process_index() == 0 and token:
      (path / token).unlink()
  if blind:
    raise ConfigError(f'--workdir={directory}: process {", ".join(blind)} does not see what process 0 writes there; '
                      'expected one directory for all; put it on a file system that every machine mounts')


def lost(error: BaseException) -> Lost | None:
  """The failure of a collective behind what was raised, in a job of several processes; None where it is another."""
  if isinstance(error, Lost):
    return error
  cause = error
  while cause is not None and jax.distributed.is_initialized():
    if isinstance(cause, jax.errors.JaxRuntimeError) and _GONE.search(str(cause)):
      return Lost(f'another process of the job is gone, or the network to it: {str(cause)[:300]}; start the job again '
                  'to resume')
    cause = cause.__cause__
  return None


def _bind(address: str) -> str:
  """Where process 0 listens: at the address itself. JAX would take all interfaces, and who reaches the port can join.

  A machine's own name may stand for the loopback on that machine alone (Debian's /etc/hosts): then all interfaces.
  """
  given = os.environ.get('JAX_COORDINATOR_BIND_ADDRESS')
  host, port = address.rsplit(':', 1)
  if given or host == 'localhost':
    return given or address
  try:
    own = ipaddress.ip_address(socket.gethostbyname(host)).is_loopback and not host.startswith('127.')
  except OSError:
    return address
  return f'[::]:{port}' if own else address


def _coordination() -> tuple[Any, int] | None:
  """(JAX's client of the coordinator, number of this process); None in a single process.

  JAX 0.10 has no public name for them. None too where a later one has moved them: then news do not travel, and the
  peers of a process that fails end by a failing collective, a `meet` or missing heartbeats.
  """
  try:
    state = multihost_utils.distributed.global_state
    return (state.client, state.process_id) if _job.joined and state.client is not None else None
  except AttributeError:
    return None


def _tell(code, why):
  """Leaves the news for the others; the first to come stay."""
  if there := _coordination():
    client, index = there
    try:
      client.key_value_set(_NEWS, json.dumps([index, code, why]))
    except jax.errors.JaxRuntimeError:
      pass  # told by another already, or nobody is left to tell


def _watch(client, index):
  """Waits for news for as long as the process lives, and then ends it if need be."""
  while True:
    try:
      source, code, why = json.loads(client.blocking_key_value_get(_NEWS, 600_000))
      break
    except jax.errors.JaxRuntimeError as error:
      if 'DEADLINE_EXCEEDED' not in str(error):
        return  # an orderly end, or the coordinator is gone: JAX ends this process
  time.sleep(GRACE_S)
  _end(code, '' if source == index else f'error: process {source}: {why}')


def _end(code, line=''):
  """Ends the process, together with the others if they come; an orderly exit would wait for them for minutes."""
  _LEAVING.acquire()  # for good: of the main thread and the watching one only the first gets further
  with contextlib.suppress(RuntimeError):  # in a signal handler, in the midst of another print
    print(line, end='\n' if line else '', file=sys.stderr, flush=True)
    sys.stdout.flush()
  if there := _coordination():
    client, index = there
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      client.wait_at_barrier('lm/leaving', int(1000 * (GRACE_S + 3)))
      time.sleep(0.5 * (index == 0))  # with it ends the coordinator, which would abort those still here
  os._exit(code)


def _die(kind, error, trace):
  traceback.print_exception(kind, error, trace)
  fail(error.code if isinstance(error, Error) else 1, ' '.join(f'{kind.__name__}: {error}'.split()))
