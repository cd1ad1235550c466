"""What a compiled program costs, read from its text: of known programs compiled here, and of the forms that other backends write."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from w2s_jax import hlo
from w2s_jax import mesh as mesh_lib

LAYERS, TOKENS, WIDTH = 5, 64, 32


def layers(w, x):
    def body(x, w):
        return jnp.tanh(x @ w), None
    return jax.lax.scan(body, x, w)[0].sum()


def read(function, *args, **options) -> hlo.Cost:
    return hlo.cost(jax.jit(function, **options).lower(*args).compile().as_text(), 8)


def shapes(sharding_w=None, sharding_x=None, depth=LAYERS):
    return (jax.ShapeDtypeStruct((depth, WIDTH, WIDTH), jnp.float32, sharding=sharding_w),
            jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.float32, sharding=sharding_x))


# --------------------------------------------------------------------------- loops


@pytest.mark.parametrize("depth", [3, 12])
@pytest.mark.parametrize("function, products", [(layers, 1), (jax.grad(layers), 3)])
def test_a_loops_body_counts_as_often_as_it_runs(function, products, depth):
    found = read(function, *shapes(depth=depth))
    one = 2.0 * TOKENS * WIDTH * WIDTH
    assert found.flops == depth * products * one
    assert found.once == products * one and set(found.loops) == {depth}


def test_loops_inside_loops_multiply():
    def outer(w, x):
        return jax.lax.fori_loop(0, 7, lambda i, x: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0], x)
    assert read(outer, *shapes()).flops == 7 * LAYERS * 2.0 * TOKENS * WIDTH * WIDTH


def test_a_loop_of_unknown_length_counts_once():
    def some(n, w, x):
        return jax.lax.fori_loop(0, n, lambda i, x: x @ w[0], x)
    found = read(some, jax.ShapeDtypeStruct((), jnp.int32), *shapes())
    assert found.flops == 2.0 * TOKENS * WIDTH * WIDTH and found.loops == (1,)


@pytest.mark.parametrize("start, step, end, trips", [(0, 1, 8, 8), (0, 2, 8, 4), (3, 1, 8, 5), (1, 3, 8, 3)])
@pytest.mark.parametrize("add", ["add(%n, %s)", "fusion(%n), kind=kLoop, calls=%inside"])
def test_loops_as_the_tpus_compiler_leaves_them(start, step, end, trips, add):
    """Without a count of their own: from, by and to constants; a ring's products come two a trip."""
    text = f"""HloModule m

%inside (p: s32[]) -> s32[] {{
  %p = s32[]{{:T(128)}} parameter(0)
  %c = s32[]{{:T(128)}} constant({step})
  ROOT %a = s32[]{{:T(128)}} add(%p, %c)
}}

%body (t: (f32[8,8], s32[])) -> (f32[8,8], s32[]) {{
  %t = (f32[8,8]{{1,0}}, s32[]{{:T(128)}}) parameter(0)
  %x = f32[8,8]{{1,0}} get-tuple-element(%t), index=0
  %n = s32[]{{:T(128)}} get-tuple-element(%t), index=1
  %s = s32[]{{:T(128)}} constant({step})
  %y = f32[8,8]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %m = s32[]{{:T(128)}} {add}
  ROOT %r = (f32[8,8]{{1,0}}, s32[]{{:T(128)}}) tuple(%y, %m)
}}

%condition (t: (f32[8,8], s32[])) -> pred[] {{
  %end = s32[]{{:T(128)}} constant({end})
  %t = (f32[8,8]{{1,0}}, s32[]{{:T(128)}}) parameter(0)
  %n = s32[]{{:T(128)}} get-tuple-element(%t), index=1
  ROOT %lt = pred[]{{:T(512)}} compare(%n, %end), direction=LT
}}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {{
  %x = f32[8,8]{{1,0}} parameter(0)
  %zero = s32[]{{:T(128)}} constant({start})
  %copy = s32[]{{:T(128)}} copy(%zero)
  %init = (f32[8,8]{{1,0}}, s32[]{{:T(128)}}) tuple(%x, %copy)
  %w = (f32[8,8]{{1,0}}, s32[]{{:T(128)}}) while(%init), condition=%condition, body=%body
  ROOT %r = f32[8,8]{{1,0}} get-tuple-element(%w), index=0
}}
"""
    found = hlo.cost(text)
    assert found.loops == (trips,) and found.flops == trips * 2.0 * 8**3


def test_of_two_branches_the_dearer_counts():
    def either(p, w, x):
        return jax.lax.cond(p, lambda: layers(w, x), lambda: (x @ w[0]).sum())
    found = read(either, jax.ShapeDtypeStruct((), jnp.bool_), *shapes())
    assert found.flops == LAYERS * 2.0 * TOKENS * WIDTH * WIDTH


def test_a_stack_is_read_a_layer_at_a_time():
    """A loop that slices its layer reads every layer once, not the stack as often as there are layers."""
    stack = LAYERS * WIDTH * WIDTH * 4
    states = LAYERS * TOKENS * WIDTH * 4
    assert stack < read(layers, *shapes()).bytes < 4 * stack + 8 * states


# --------------------------------------------------------------------------- collectives


@pytest.fixture(scope="module")
def mesh():
    return mesh_lib.make_mesh({"data": 1, "fsdp": 4, "model": 2}, jax.devices()[:8])


def test_what_a_sharded_program_sends(mesh):
    """Weights split over four devices are gathered in every layer, their gradients summed over the rows' devices."""
    w, x = NamedSharding(mesh, P(None, "fsdp", None)), NamedSharding(mesh, P("fsdp", None))

    def keep(w, x):
        def body(x, w):
            w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P(None, None)))
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), x_), None
        x_ = x.sharding if hasattr(x, "sharding") and x.sharding.mesh.shape else NamedSharding(mesh, P("fsdp", None))
        return jax.lax.scan(body, x, w)[0].sum()

    found = read(keep, *shapes(w, x))
    gathers = [c for c in found.collectives if c.kind == "all-gather"]
    assert [(c.group, c.count) for c in gathers] == [(4, LAYERS)]
    assert gathers[0].bytes == LAYERS * WIDTH * WIDTH * 4 * 3 / 4
    assert found.flops == LAYERS * 2.0 * (TOKENS / 4) * WIDTH * WIDTH


HEAD = "HloModule m\n\n%add (a: f32[], b: f32[]) -> f32[] {{\n  %a = f32[] parameter(0)\n  %b = f32[] parameter(1)\n" \
       "  ROOT %s = f32[] add(%a, %b)\n}}\n\nENTRY %main (x: f32[64,32]) -> f32[64,32] {{\n" \
       "  %x = f32[64,32]{{1,0:T(8,128)}} parameter(0)\n  {}\n}}\n"  # fmt: skip
SIZE = 64 * 32 * 4


@pytest.mark.parametrize("line, expected", [
    ("ROOT %r = f32[64,32]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add",
     ("all-reduce", 4, 2 * SIZE * 3 / 4)),
    ("ROOT %r = f32[64,32]{1,0} all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add",
     ("all-reduce", 4, 2 * SIZE * 3 / 4)),
    ("ROOT %r = f32[64,32]{1,0} all-reduce(%x), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'b'}, to_apply=%add",
     ("all-reduce", 2, SIZE)),
    ("ROOT %r = f32[64,32]{1,0} all-reduce(%x), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'a','b'}, to_apply=%add",
     ("all-reduce", 8, 2 * SIZE * 7 / 8)),
    ("ROOT %r = f32[64,32]{1,0} all-reduce(%x), channel_id=1, replica_groups=mesh['a'=8] {'a':(2)4}, to_apply=%add",
     ("all-reduce", 4, 2 * SIZE * 3 / 4)),
    ("ROOT %r = f32[64,32]{1,0} all-reduce(%x), replica_groups={}, to_apply=%add", ("all-reduce", 8, 2 * SIZE * 7 / 8)),
    ("ROOT %r = f32[16,32]{1,0} reduce-scatter(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add",
     ("reduce-scatter", 4, SIZE * 3 / 4)),
    ("ROOT %r = f32[256,32]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}",
     ("all-gather", 4, 4 * SIZE * 3 / 4)),
    ("%s = (f32[64,32]{1,0}, f32[256,32]{1,0}) all-gather-start(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}\n"
     "  ROOT %r = f32[256,32]{1,0} all-gather-done(%s)", ("all-gather", 4, 4 * SIZE * 3 / 4)),
    ("ROOT %r = f32[64,32]{1,0} all-to-all(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}",
     ("all-to-all", 4, SIZE * 3 / 4)),
    ("ROOT %r = f32[64,32]{1,0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}", ("collective-permute", 2, SIZE)),
    # the parts of one asynchronous collective on a TPU carry one channel
    ("%g = f32[256,32]{1,0:T(8,128)} all-gather(%x), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}\n"
     "  ROOT %r = f32[256,32]{1,0:T(8,128)S(1)} all-gather(%x), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}",
     ("all-gather", 4, 4 * SIZE * 3 / 4)),
])
def test_collectives_in_every_form(line, expected):
    (found,) = hlo.cost(HEAD.format(line), 8).collectives
    assert (found.kind, found.group, found.bytes) == expected and found.count == 1


def test_a_group_of_one_sends_nothing():
    line = "ROOT %r = f32[64,32]{1,0} all-reduce(%x), channel_id=1, replica_groups=[8,1]<=[8], to_apply=%add"
    assert hlo.cost(HEAD.format(line), 8).collectives == ()


def test_a_reduce_scatter_that_is_a_fusion():
    """The TPU's compiler writes one as an all-reduce and a slice, in a computation of that name."""
    text = """HloModule m

%all-reduce-scatter.1 (x: f32[64,32]) -> f32[16,32] {
  %x = f32[64,32]{1,0:T(8,128)} parameter(0)
  %s = f32[64,32]{1,0} all-reduce(%x), channel_id=19, replica_groups={{0,1,2,3}}, to_apply=%add
  %i = s32[] constant(0)
  ROOT %d = f32[16,32]{1,0} dynamic-slice(%s, %i, %i), dynamic_slice_sizes={16,32}
}

ENTRY %main (x: f32[64,32]) -> f32[16,32] {
  %x = f32[64,32]{1,0:T(8,128)} parameter(0)
  ROOT %r = f32[16,32]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    (found,) = hlo.cost(text, 4).collectives
    assert found == hlo.Collective("reduce-scatter", 4, 1, SIZE * 3 / 4)


# --------------------------------------------------------------------------- forms of a TPU


@pytest.mark.parametrize("window, lhs, rhs, out", [
    ("", (64, 32), (32, 16), (64, 16)),  # a plain product
    ("window={size=3 pad=1_1}", (8, 12, 32), (3, 32, 16), (8, 12, 16)),
    ("window={size=4 stride=2 pad=1_2}", (8, 13, 32), (4, 32, 16), (8, 7, 16)),
    ("window={size=12 stride=11 pad=11_11 lhs_dilate=12}", (8, 12, 32), (12, 32, 16), (8, 14, 16)),
    ("window={size=3 rhs_dilate=2 pad=2_2}", (8, 12, 32), (3, 32, 16), (8, 12, 16)),
])
def test_flops_of_a_convolution(window, lhs, rhs, out):
    """Only products with real elements count; the reference tries every place."""
    labels = "bf_io->bf" if len(lhs) == 2 else "b0f_0io->b0f"
    text = lambda dims: ",".join(map(str, dims))  # noqa: E731
    line = f"%k = f32[{text(rhs)}]{{0}} parameter(1)\n  ROOT %r = f32[{text(out)}]{{0}} convolution(%y, %k), {window}, dim_labels={labels}"
    module = HEAD.format(f"%y = f32[{text(lhs)}]{{0}} parameter(2)\n  {line}")
    fields = dict(part.split("=") for part in window[8:-1].split())
    stride, pad = int(fields.get("stride", 1)), int(fields.get("pad", "0_0").split("_")[0])
    base, step = int(fields.get("lhs_dilate", 1)), int(fields.get("rhs_dilate", 1))
    pairs = 1
    if len(lhs) == 3:
        at = np.arange(out[1])[:, None] * stride + np.arange(rhs[0])[None] * step - pad
        pairs = ((at >= 0) & (at <= (lhs[1] - 1) * base) & (at % base == 0)).sum()
    assert hlo.cost(module).flops == 2.0 * pairs * lhs[0] * rhs[-2] * rhs[-1]


def test_windows_are_listed_by_the_number_of_the_dimension():
    """A product over heads and features as a TPU has it: the labels name the dimensions in any order."""
    line = "ROOT %r = f32[8,512,64,1]{0} convolution(%y, %k), window={size=2x1}, dim_labels=1b0f_0io1->1bf0"
    module = HEAD.format(f"%y = f32[8,512,2,256]{{0}} parameter(1)\n  %k = f32[2,256,64,1]{{0}} parameter(2)\n  {line}")
    assert hlo.cost(module).flops == 2.0 * 8 * 512 * (2 * 256) * 64


def test_attention_kernels_and_vector_memory_of_a_tpu():
    text = """HloModule m

ENTRY %main (q: bf16[2,4,128,64]) -> bf16[2,4,128,64] {
  %q = bf16[2,4,128,64]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[2,4,128,64]{3,2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %near = bf16[2,4,128,64]{3,2,1,0:T(8,128)(2,1)S(1)} negate(%k)
  %splash_mha_fwd_segmented.3 = bf16[2,4,128,64]{3,2,1,0} custom-call(%q, %near, %k), frontend_attributes={kernel_metadata={
}}
  ROOT %splash_mha_dq.1 = bf16[2,4,128,64]{3,2,1,0} custom-call(%q, %near), custom_call_target="tpu_custom_call"
}
"""
    found = hlo.cost(text)
    assert found.attention_flops == (2 + 3) * 2.0 * 2 * 4 * 128 * 128 * 64
    assert found.bytes == 4 * 2 * 4 * 128 * 64 * 2  # q and the result, twice; what lies in the vector memory moves nothing


@pytest.mark.parametrize("line, expected", [
    ("%s = ((f32[64,32]{1,0:T(8,128)}), f32[8,32]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:8], [0:32]}\n"
     "  ROOT %r = f32[8,32]{1,0:T(8,128)S(1)} slice-done(%s)", SIZE / 8),  # a part, fetched
    ("%s = (f32[64,32]{1,0:T(8,128)S(1)}, f32[64,32]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)\n"
     "  ROOT %r = f32[64,32]{1,0:T(8,128)S(1)} copy-done(%s)", SIZE),
    ("ROOT %r = f32[64,32]{1,0:T(8,128)} negate(%x)", 2 * SIZE),
    ("ROOT %r = f32[64,32]{1,0:T(8,128)} all-to-all(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}", 2 * SIZE),
])
def test_memory_traffic_of_a_tpus_instructions(line, expected):
    assert hlo.cost(HEAD.format(line), 8).bytes == expected


def test_a_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no HLO module"):
        hlo.cost("hello")


# --------------------------------------------------------------------------- a step of the trainer


@functools.cache
def step_cost(depth: int, tokens: int) -> hlo.Cost:
    import tiny

    from w2s_jax import ahead, config, costs, train
    from w2s_jax.models import build
    c = config.shipped("plan")
    c.update({"n_train": 16, "batch_size": 16, "epochs": 1, "lengths": str(tokens), "model": "tiny"})
    mesh = mesh_lib.make_mesh({"data": 1, "fsdp": 8, "model": 1}, jax.devices()[:8])
    model = build(tiny.config(n_layer=depth, n_embd=48, n_inner=192), head="classifier", remat="full")
    texts = ahead.corpus(c, model)
    plan = ahead.training_plan(c, model, texts, costs.Settings(1, 8, 1, "full", 0), "cpu")
    program = ahead.program(c, model, mesh)
    arguments = train.abstract_arguments(program, train.dispatch_inputs(texts, plan, 0))
    return hlo.cost(train.lower(program, *arguments).compile().as_text(), 8)


def test_a_steps_flops_are_linear_in_depth_and_tokens(fast_compiles):
    base, deep, long = step_cost(2, 16), step_cost(4, 16), step_cost(2, 32)
    weights = 2 * 12 * 48**2
    assert base.flops == pytest.approx(8 * weights * 2 * 16, rel=0.25)  # forward, again, backward; two documents a device
    assert deep.flops == pytest.approx(2 * base.flops, rel=0.03)
    assert long.flops == pytest.approx(2 * base.flops, rel=0.08)  # attention grows with the square
    gathered = [sum(c.count for c in cost.collectives if c.kind == "all-gather") for cost in (base, deep)]
    assert gathered[1] > gathered[0]
