"""lm/hlo.py on programs compiled here for 8 fake devices, and on pieces of what XLA prints for TPUs and GPUs."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np
import pytest

from lm import hlo, hlo_module


@pytest.fixture(scope='module')
def mesh():
  return jax.make_mesh((2, 2, 2), ('data', 'fsdp', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 3)


def compiled(f, mesh, specs, *shapes, out=P()):
  """The text of f under shard_map over the whole mesh."""
  f = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False))
  return f.lower(*(jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, spec))
                   for s, spec in zip(shapes, specs, strict=True))).compile().as_text()


@pytest.mark.parametrize('axes', [('data',), ('fsdp',), ('tensor',), ('data', 'tensor'), ('fsdp', 'tensor')])
def test_an_all_reduce_tells_axes_and_bytes_of_the_ring(mesh, axes):
  text = compiled(lambda x: jax.lax.psum(x, axes), mesh, (P(),), (1000, 4))
  c, = hlo.collectives(text, mesh)
  n = 2 ** len(axes)
  assert (c.kind, c.axes, c.size, c.count, c.dtypes) == ('all-reduce', axes, n, 1, ('f32',))
  assert c.payload == 16000 and c.bytes == pytest.approx(2 * (n - 1) / n * 16000) and 'psum' in c.where
  assert sorted(c.groups_Gn.flat) == list(range(8))


def test_each_kind(mesh):
  def f(x_BD):
    gathered = jax.lax.all_gather(x_BD, ('data', 'fsdp'), tiled=True)
    part = jax.lax.psum_scatter(jnp.sin(gathered), 'tensor', tiled=True)
    swapped = jax.lax.all_to_all(jnp.cos(part), 'fsdp', 0, 1, tiled=True)
    return jax.lax.ppermute(swapped * 2, 'data', [(0, 1), (1, 0)])
  found = {c.kind: c for c in hlo.collectives(compiled(f, mesh, (P(),), (64, 32), out=P('data')), mesh)}
  assert {k: (c.axes, c.bytes) for k, c in found.items()} == {
      'all-gather': (('data', 'fsdp'), 3 * 64 * 32 * 4), 'reduce-scatter': (('tensor',), 256 * 32 * 4 / 2),
      'all-to-all': (('fsdp',), 128 * 32 * 4 / 2), 'collective-permute': (('data',), 128 * 32 * 4)}


def test_loops_multiply(mesh):
  def f(x_DD):
    def inner(x, _):
      return jnp.sin(jax.lax.psum(x @ x, 'tensor')), None
    def outer(x, _):
      return jax.lax.ppermute(jax.lax.scan(inner, x, None, length=5)[0], 'data', [(0, 1), (1, 0)]), None
    return jax.lax.scan(outer, x_DD, None, length=3)[0]
  text = compiled(f, mesh, (P(),), (16, 16))
  counts = {c.kind: c.count for c in hlo.collectives(text, mesh)}
  assert counts == {'all-reduce': 15, 'collective-permute': 3}
  assert sum(hlo.flops(text).values()) == 15 * 2 * 16**3 and hlo.unknown_loops(text) == []


def test_a_loop_whose_length_is_data_is_named(mesh):
  f = jax.jit(lambda x, n: jax.lax.fori_loop(0, n, lambda i, x: jnp.sin(x @ x), x))
  text = f.lower(jnp.ones((8, 8)), jnp.int32(3)).compile().as_text()
  assert len(hlo.unknown_loops(text)) == 1 and sum(hlo.flops(text).values()) == 2 * 8**3


@pytest.mark.parametrize('equation, a, b, flops', [
    ('BTD,DF->BTF', (4, 8, 16), (16, 32), 2 * 4 * 8 * 16 * 32),
    ('BKTH,BKSH->BKTS', (2, 3, 8, 16), (2, 3, 12, 16), 2 * 2 * 3 * 8 * 12 * 16),
    ('BTF,BTD->FD', (4, 8, 32), (4, 8, 16), 2 * 4 * 8 * 16 * 32)])
def test_flops_of_products(equation, a, b, flops):
  text = jax.jit(functools.partial(jnp.einsum, equation)).lower(jnp.ones(a), jnp.ones(b)).compile().as_text()
  assert sum(hlo.flops(text).values()) == flops


def test_the_flops_of_a_convolution_leave_out_padding():
  f = jax.jit(lambda x, w: jax.lax.conv_general_dilated(x, w, (1,), 'SAME', dimension_numbers=('NWC', 'WIO', 'NWC')))
  text = f.lower(jnp.ones((2, 10, 3)), jnp.ones((3, 3, 5))).compile().as_text()
  assert sum(hlo.flops(text).values()) == 2 * 2 * 3 * 5 * (3 * 10 - 2)


def test_of_a_conditional_the_heaviest_branch_counts():
  f = jax.jit(lambda p, x: jax.lax.cond(p, lambda x: jnp.sin(x @ x), lambda x: x, x))
  text = f.lower(jnp.array(True), jnp.ones((8, 8))).compile().as_text()
  assert sum(hlo.flops(text).values()) == 2 * 8**3


def test_traffic_of_a_scan_reads_a_layer_at_a_time():
  """L layers of weights are read once in all, not L times, though each trip's operand is all of them."""
  f = jax.jit(lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0])
  text = f.lower(jnp.ones((8, 256)), jnp.ones((32, 256, 256))).compile().as_text()
  weights = 32 * 256 * 256 * 4
  assert weights <= hlo.traffic(text) < 4 * weights


def module(*lines, before=()):
  """A module of one entry computation."""
  head = ['HloModule m, is_scheduled=true', '', *before, 'ENTRY %main (p: f32[8,8]) -> f32[8,8] {']
  return '\n'.join([*head, *(f'  {line}' for line in lines), '}'])


MESH = {'data': 2, 'fsdp': 2, 'tensor': 2}


@pytest.mark.parametrize('groups, axes', [
    ('{{0,1},{2,3},{4,5},{6,7}}', ('tensor',)),
    ('{{0,2},{4,6},{1,3},{5,7}}', ('fsdp',)),
    ('{}', ('data', 'fsdp', 'tensor')),
    ('[4,2]<=[8]', ('tensor',)),
    ('[4,2]<=[4,2]T(1,0)', ('fsdp',)),
    ('[4,2]<=[2,2,2]T(2,1,0)', ('data',)),
    ('[4,2]<=[2,2,2]T(2,0,1)', ('fsdp',)),
    ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_0'}", ('data', 'fsdp')),
    ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_2'}", ('tensor',)),
    ("mesh['axis_0'=2,'axis_1'=4], device_ids=([2,2,2]T(1,0,2)) {'axis_0'}", ('fsdp',)),
    ("mesh['a'=8] {'a':(1)2}", ('data',)),
    ("mesh['a'=8] {'a':(2)2}", ('fsdp',)),
    ("mesh['a'=8] {'a':(4)2}", ('tensor',)),
    ("mesh['a'=2,'b'=4] {'a','b':(2)2}", ('data', 'tensor')),
])
def test_groups_as_xla_spells_them(groups, axes):
  text = module('%p = f32[8,8]{1,0} parameter(0)', f'ROOT %r = f32[8,8]{{1,0}} all-reduce(%p), channel_id=1, '
                f'replica_groups={groups}, use_global_device_ids=true, to_apply=%add')
  c, = hlo.collectives(text, MESH)
  assert c.axes == axes and c.size == 2 ** len(axes) and c.bytes == RING_256[c.size]


RING_256 = {n: 256 * 2 * (n - 1) / n for n in (2, 4, 8)}


def test_asynchronous_forms_count_once():
  text = module(
      '%p = f32[8,8]{1,0} parameter(0)',
      '%g = (f32[8,8]{1,0}, f32[32,8]{1,0}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}',
      '%g.d = f32[32,8]{1,0} all-gather-done(%g)',
      '%s = ((f32[32,8]{1,0}, /*index=1*/f32[32,8]{1,0}), (f32[8,8]{1,0}, f32[8,8]{1,0})) '
      'reduce-scatter-start(%g.d, %g.d), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add',
      '%s.d = (f32[8,8]{1,0}, f32[8,8]{1,0}) reduce-scatter-done(%s)',
      '%e = f32[8,8]{1,0} get-tuple-element(%s.d), index=0',
      '%c = (f32[8,8]{1,0:T(8,128)S(1)}, f32[8,8]{1,0:T(8,128)}, u32[]{:S(2)}, u32[]{:S(2)}) '
      'collective-permute-start(%e), source_target_pairs={{0,4},{4,0},{1,1}}',
      'ROOT %c.d = f32[8,8]{1,0:T(8,128)S(1)} collective-permute-done(%c)')
  gather, scatter, permute = hlo.collectives(text, MESH)
  assert (gather.kind, gather.axes, gather.bytes) == ('all-gather', ('fsdp', 'tensor'), 3 * 256)
  assert (scatter.kind, scatter.bytes) == ('reduce-scatter', 3 / 4 * 2 * 1024)
  assert (permute.kind, permute.axes, permute.size, permute.bytes) == ('collective-permute', ('data',), 2, 256)


def test_an_async_wrapper_is_looked_into():
  wrapped = ('%wrapped (q: f32[8,8]) -> f32[2,8] {', '  %q = f32[8,8]{1,0} parameter(0)',
             '  ROOT %r = f32[2,8]{1,0} reduce-scatter(%q), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add',
             '}', '')
  text = module('%p = f32[8,8]{1,0} parameter(0)',
                '%a = ((f32[8,8]{1,0}), f32[2,8]{1,0}) async-start(%p), calls=%wrapped',
                'ROOT %d = f32[2,8]{1,0} async-done(%a)', before=wrapped)
  c, = hlo.collectives(text, MESH)
  assert (c.kind, c.bytes) == ('reduce-scatter', 192)


def test_a_tpu_all_reduce_that_keeps_a_slice_is_a_reduce_scatter():
  fused = ('%all-reduce-scatter.1 (q: f32[8,8]) -> f32[4,8] {', '  %q = f32[8,8]{1,0:T(8,128)} parameter(0)',
           '  %ar = f32[8,8]{1,0:T(8,128)} all-reduce(%q), replica_groups={{0,2},{4,6},{1,3},{5,7}}, to_apply=%add',
           '  %z = u32[] constant(0)',
           '  ROOT %s = f32[4,8]{1,0:T(8,128)} dynamic-slice(%ar, %z, %z), dynamic_slice_sizes={4,8}', '}', '')
  text = module('%p = f32[8,8]{1,0:T(8,128)} parameter(0)',
                'ROOT %f = f32[4,8]{1,0:T(8,128)} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1', before=fused)
  c, = hlo.collectives(text, MESH)
  assert (c.kind, c.axes, c.bytes) == ('reduce-scatter', ('fsdp',), 128)


@pytest.mark.parametrize('line, a, b, flops', [  # as XLA printed them for a TPU v5p
    ('f32[2,2,256,64]{2,3,1,0:T(8,128)} convolution(%a, %b), window={size=2x2 lhs_dilate=2x2}, '
     'dim_labels=01bf_01io->01bf', 'bf16[2,2,256,384]', 'bf16[2,2,384,64]', 2 * 2 * 2 * 256 * 384 * 64),
    ('bf16[2,1024,2,64]{1,3,2,0:T(8,128)(2,1)} convolution(%a, %b), window={size=1x2 pad=0_0x1_1 rhs_reversal=0x1}, '
     'dim_labels=0bf1_i1o0->0b1f', 'bf16[2,1024,512,1]', 'bf16[512,2,64,1]', 2 * 2 * 1024 * 512 * 2 * 64),
    ('bf16[2,128,512]{2,1,0:T(8,128)(2,1)} convolution(%a, %b), window={size=1}, dim_labels=0bf_io0->0bf',
     'bf16[2,128,512]', 'bf16[512,512,1]', 2 * 2 * 128 * 512 * 512)])
def test_a_tpu_spells_matmuls_as_convolutions(line, a, b, flops):
  text = module(f'%a = {a}{{3,2,1,0}} parameter(0)', f'%b = {b}{{3,2,1,0}} parameter(1)', f'ROOT %r = {line}')
  assert sum(hlo.flops(text).values()) == flops


def test_matmuls_of_a_gpu_library():
  text = module(
      '%a = bf16[4,16,32]{2,1,0} parameter(0)', '%b = bf16[4,32,8]{2,1,0} parameter(1)',
      'ROOT %r = (bf16[4,16,8]{2,1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", '
      'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],'
      '"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}')
  assert sum(hlo.flops(text).values()) == 2 * 4 * 16 * 32 * 8


def test_a_kernel_counts_what_it_declares():
  text = module('%a = bf16[16,32]{1,0} parameter(0)',
                'ROOT %r = bf16[16,32]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", '
                'backend_config={"custom_call_config":{"cost_estimate":{"flops":"1234","bytes_accessed":"5"}}}')
  assert hlo.flops(text) == {'': 1234.0}


def test_a_kernel_counts_what_its_name_says():
  text = module('%a = bf16[16,32]{1,0} parameter(0)',
                'ROOT %r = bf16[16,32]{1,0} custom-call(%a), custom_call_target="__gpu$xla.gpu.triton", '
                'metadata={op_name="jit(step)/while/body/flash_keys_flops5678/pallas_call"}')
  assert sum(hlo.flops(text).values()) == 5678


@pytest.mark.parametrize('start, step, direction, trips', [
    (0, '1', 'LT', 7), (2, '1', 'LT', 5), (0, '1', 'LE', 8), (0, '2', 'LT', 4), (1, '3', 'LE', 3), (9, '1', 'LT', 0)])
def test_a_trip_count_that_only_the_program_tells(start, step, direction, trips):
  """As on TPUs; a loop that multiplies windows of matrices takes two of them a trip."""
  before = (
      '%condition (c: (s32[], f32[8,8])) -> pred[] {', '  %n = s32[]{:T(128)} constant(7)',
      '  %c = (s32[]{:T(128)}, f32[8,8]{1,0}) parameter(0)', '  %i = s32[]{:T(128)} get-tuple-element(%c), index=0',
      f'  ROOT %lt = pred[]{{:T(512)}} compare(%i, %n), direction={direction}', '}', '',
      '%body (b: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {', '  %b = (s32[], f32[8,8]{1,0}) parameter(0)',
      '  %x = f32[8,8]{1,0} get-tuple-element(%b), index=1',
      '  %d = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}',
      '  %j = s32[] get-tuple-element(%b), index=0', f'  %s = s32[] constant({step})', '  %k = s32[] add(%j, %s)',
      '  ROOT %t = (s32[], f32[8,8]{1,0}) tuple(%k, %d)', '}', '')
  text = module('%p = f32[8,8]{1,0} parameter(0)', f'%k = s32[]{{:T(128)}} constant({start})',
                '%t = (s32[]{:T(128)}, f32[8,8]{1,0}) tuple(%k, %p)',
                '%w = (s32[]{:T(128)}, f32[8,8]{1,0}) while(%t), condition=%condition, body=%body',
                'ROOT %r = f32[8,8]{1,0} get-tuple-element(%w), index=1', before=before)
  assert sum(hlo.flops(text).values()) == trips * 2 * 8**3 and hlo.unknown_loops(text) == []


def test_a_counter_that_a_fusion_raises():
  before = (
      '%raise (q: s32[], n: s32[]) -> (f32[], s32[]) {', '  %q = s32[] parameter(0)', '  %n = s32[] parameter(1)',
      '  %f = f32[] convert(%q)', '  %a = s32[] add(%q, %n)', '  ROOT %t2 = (f32[], s32[]) tuple(%f, %a)', '}', '',
      '%condition (c: (s32[], s32[])) -> pred[] {', '  %c = (s32[], s32[]) parameter(0)',
      '  %i = s32[] get-tuple-element(%c), index=1', '  %n = s32[] get-tuple-element(%c), index=0',
      '  ROOT %lt = pred[] compare(%i, %n), direction=LT', '}', '',
      '%body (b: (s32[], s32[])) -> (s32[], s32[]) {', '  %b = (s32[], s32[]) parameter(0)',
      '  %n = s32[] get-tuple-element(%b), index=0', '  %j = s32[] get-tuple-element(%b), index=1',
      '  %two = s32[] constant(2)', '  %r = (f32[], s32[]) fusion(%j, %two), kind=kLoop, calls=%raise',
      '  %k = s32[] get-tuple-element(%r), index=1', '  ROOT %t = (s32[], s32[]) tuple(%n, %k)', '}', '')
  text = module('%p = f32[8,8]{1,0} parameter(0)', '%n = s32[] constant(10)', '%z = s32[] constant(0)',
                '%t = (s32[], s32[]) tuple(%n, %z)',
                '%w = (s32[], s32[]) while(%t), condition=%condition, body=%body',
                'ROOT %r = f32[8,8]{1,0} copy(%p)', before=before)
  parsed = hlo.parse(text)
  main = parsed.computations['main']
  assert hlo_module.trips(parsed, main['w'], main) == 5


def test_shapes_and_memories():
  text = module('%p = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, pred[3]{0}, s4[10]{0}, f8e4m3fn[7]{0}) parameter(0)',
                'ROOT %r = f32[8,8]{1,0} constant({...})')
  shapes = hlo.parse(text).computations['main']['p'].shapes
  assert [s.bytes for s in shapes] == [2048, 3, 5, 7] and [s.hbm_bytes for s in shapes] == [0, 3, 5, 7]


def test_the_parser_finds_every_computation_of_a_real_module(mesh):
  f = lambda x: jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, None, length=4)[0]
  text = compiled(f, mesh, (P(),), (8, 8))
  parsed = hlo.parse(text)
  assert text.count('\n}') == len(parsed.computations) and parsed.entry in parsed.computations
  assert {i.opcode for i in parsed.computations[parsed.entry].values()} >= {'parameter', 'while'}
  assert isinstance(parsed, hlo_module.Module) and np.isfinite(hlo.traffic(parsed))
