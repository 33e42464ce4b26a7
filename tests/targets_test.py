"""lm/targets.py: what --target accepts, and how fast groups of devices can send. No compiler is needed."""

import types

import numpy as np
import pytest

from lm import budget, targets
from lm.errors import ConfigError


@pytest.mark.parametrize('text, size, shape', [
    ('v5p:8x8x16', 1024, (8, 8, 16)), ('v5e:4x4', 16, (4, 4)), ('v6e:16x16', 256, (16, 16)), ('v4:2x2x1', 4, (2, 2, 1)),
    ('v5e:1x1', 1, (1, 1)), ('h100:128x8', 1024, (128, 8)), ('h100:1x1', 1, (1, 1))])
def test_targets(text, size, shape):
  target = targets.parse(text)
  assert (target.size, target.shape, str(target)) == (size, shape, text)
  assert target.device.peak == budget.PEAK[target.device.kind] > 1e14


@pytest.mark.parametrize('text, part', [
    ('', 'no device'), ('v9:2x2', "no device 'v9'; expected one of v4, v5e, v5p, v6e, h100"),
    ('v5p', 'expected v5p:XxYxZ, 3 numbers'), ('v5p:8x8', '3 numbers'), ('v5e:4x4x4', 'expected v5e:XxY, 2 numbers'),
    ('v5e:4x', '2 numbers'), ('v5e:0x4', 'at least 1'), ('h100:8', 'expected h100:HOSTSxGPUS'),
    ('h100:2x16', 'at most 8'), ('v5p:3x5x7', 'odd'), ('v5e:-2x4', '2 numbers')])
def test_what_is_refused_in_one_line(text, part):
  with pytest.raises(ConfigError) as failure:
    targets.parse(text)
  message = str(failure.value)
  assert part in message and message.startswith(f'--target={text}: ') and '\n' not in message


def test_a_compiler_that_is_missing_is_named_with_its_extra(monkeypatch):
  monkeypatch.setattr(targets.importlib.util, 'find_spec', lambda name: None)
  for text, extra in (('v5e:2x2', 'tpu-aot'), ('h100:1x8', 'cuda-aot')):
    with pytest.raises(ConfigError, match=rf"pip install -e '\.\[{extra}\]'"):
      targets.devices(targets.parse(text))


def gpus(hosts, each):
  return [types.SimpleNamespace(process_index=host) for host in range(hosts) for _ in range(each)]


def chips(*at):
  return [types.SimpleNamespace(coords=list(x), process_index=0) for x in at]


@pytest.mark.parametrize('hosts, each, rate, over', [
    (1, 8, 450e9, 'NVLink'),  # all NVLinks
    (4, 1, 50e9, 'network'),  # each GPU has its port
    (4, 4, 200e9, 'network'),  # rings over four ports
    (2, 8, 400e9, 'network')])
def test_gpus_send_over_nvlink_or_their_hosts_ports(hosts, each, rate, over):
  target, group = targets.parse('h100:16x8'), np.array(gpus(hosts, each), object)
  assert targets.rate(target, group) == rate
  assert targets.resource(target, [group]) == over


@pytest.mark.parametrize('at, ways', [
    ([(0, 0, 0), (1, 0, 0)], 1),  # a part of a dimension is a line
    ([(x, 0, 0) for x in range(4)], 2),  # the whole of one that closes
    ([(0, 0, z) for z in range(2)], 1),  # two chips are no ring of four
    ([(x, y, 0) for x in range(4) for y in range(4)], 4),
    ([(x, y, z) for x in range(4) for y in range(4) for z in range(2)], 5)])
def test_chips_send_along_the_dimensions_of_their_group(at, ways):
  target = targets.parse('v5p:4x4x2')
  assert targets.rate(target, np.array(chips(*at), object)) == ways * 100e9
  assert targets.resource(target, [np.array(chips(*at), object)]) == 'ICI'


def test_a_small_slice_of_v5e_does_not_close():
  line = [(x, 0) for x in range(4)]
  assert targets.rate(targets.parse('v5e:4x4'), np.array(chips(*line), object)) == 50e9
  assert targets.rate(targets.parse('v5e:16x16'), np.array(chips(*[(x, 0) for x in range(16)]), object)) == 100e9
