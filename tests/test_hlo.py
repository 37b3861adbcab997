"""Reading compiled programs: real ones of this machine's CPU, and excerpts of what XLA printed for
GPUs and TPUs.
"""

import json
import re

import jax
import jax.numpy as jnp
import pytest

import fp8jax
from fp8jax import hlo, recipes
from fp8jax._transform.names import site_scope
from fp8jax.hlo._program import Leaf, Program

SITE = f"jit(f)/mlp/fp8jax_product/{site_scope('mlp')}/jit(_forward)"


def gpu_program(gemm: str, metadata: str = f"{SITE}/forward/dot_general") -> str:
    """A loop of three iterations that casts, multiplies and stacks, as XLA prints it for GPUs."""
    return f"""HloModule jit_f, is_scheduled=true, \
entry_computation_layout={{(bf16[8,16]{{1,0}})->bf16[3,8,4]{{2,1,0}}}}

FileNames
1 "model.py"

%region_0.1 (a.1: s32[], b.1: s32[]) -> s32[] {{
  %a.1 = s32[] parameter(0), \
metadata={{op_name="jit(f)/other/fp8jax_product/{site_scope("other")}/reduce"}}
  %b.1 = s32[] parameter(1)
  ROOT %maximum.1 = s32[] maximum(%a.1, %b.1)
}}

%fused_cast (param_0.1: bf16[8,16]) -> (f8e4m3fn[8,16], s32[8]) {{
  %param_0.1 = bf16[8,16]{{1,0}} parameter(0)
  %constant_0 = s32[] constant(0)
  %bits.1 = s32[8,16]{{1,0}} convert(%param_0.1), \
metadata={{op_name="{SITE}/jit(group_amax)/reduce"}}
  %reduce.1 = s32[8]{{0}} reduce(%bits.1, %constant_0), dimensions={{1}}, to_apply=%region_0.1, \
metadata={{op_name="{SITE}/reduce"}}
  %codes.1 = f8e4m3fn[8,16]{{1,0}} convert(%param_0.1), \
metadata={{op_name="{SITE}/convert_element_type"}}
  ROOT %tuple.1 = (f8e4m3fn[8,16]{{1,0}}, s32[8]{{0}}) tuple(%codes.1, %reduce.1)
}}

%fused_stack (param_0.2: bf16[3,8,4], param_1.2: s32[], param_2.2: bf16[8,4]) -> bf16[3,8,4] {{
  %param_0.2 = bf16[3,8,4]{{2,1,0}} parameter(0)
  %param_2.2 = bf16[8,4]{{1,0}} parameter(2)
  %bitcast.2 = bf16[1,8,4]{{2,1,0}} bitcast(%param_2.2)
  %param_1.2 = s32[] parameter(1)
  %zero.2 = s32[] constant(0)
  ROOT %update.2 = bf16[3,8,4]{{2,1,0}} dynamic-update-slice(%param_0.2, %bitcast.2, %param_1.2, \
%zero.2, /*index=4*/%zero.2)
}}

%body.3 (arg.3: (s32[], bf16[8,16], bf16[3,8,4])) -> (s32[], bf16[8,16], bf16[3,8,4]) {{
  %arg.3 = (s32[], bf16[8,16]{{1,0}}, bf16[3,8,4]{{2,1,0}}) parameter(0)
  %index.3 = s32[] get-tuple-element(%arg.3), index=0
  %x.3 = bf16[8,16]{{1,0}} get-tuple-element(%arg.3), index=1
  %stack.3 = bf16[3,8,4]{{2,1,0}} get-tuple-element(%arg.3), index=2
  %cast.3 = (f8e4m3fn[8,16]{{1,0}}, s32[8]{{0}}) fusion(%x.3), kind=kInput, calls=%fused_cast, \
metadata={{op_name="{SITE}/reduce"}}
  %codes.3 = f8e4m3fn[8,16]{{1,0}} get-tuple-element(%cast.3), index=0
  %wide.3 = bf16[8,16]{{1,0}} bitcast(%x.3)
  %weights.3 = f8e4m3fn[16,4]{{0,1}} constant({{...}})
  %one.3 = f32[] constant(1)
  %gemm.3 = {gemm}, metadata={{op_name="{metadata}" stack_frame_id=57}}, \
backend_config={{"alpha_real":1}}
  %out.3 = bf16[8,4]{{1,0}} get-tuple-element(%gemm.3), index=0
  %fusion-start.3 = ((bf16[3,8,4]{{2,1,0}}, s32[], bf16[8,4]{{1,0}}), bf16[3,8,4]{{2,1,0}}, \
u32[]) fusion-start(%stack.3, %index.3, %out.3), kind=kLoop, calls=%fused_stack
  %fusion-done.3 = bf16[3,8,4]{{2,1,0}} fusion-done(%fusion-start.3)
  ROOT %tuple.3 = (s32[], bf16[8,16]{{1,0}}, bf16[3,8,4]{{2,1,0}}) tuple(%index.3, %x.3, \
%fusion-done.3)
}}

%condition.4 (arg.4: (s32[], bf16[8,16], bf16[3,8,4])) -> pred[] {{
  %arg.4 = (s32[], bf16[8,16]{{1,0}}, bf16[3,8,4]{{2,1,0}}) parameter(0)
  %index.4 = s32[] get-tuple-element(%arg.4), index=0
  %limit.4 = s32[] constant(3)
  ROOT %compare.4 = pred[] compare(%index.4, %limit.4), direction=LT
}}

ENTRY %main.5 (x.5: bf16[8,16]) -> bf16[3,8,4] {{
  %x.5 = bf16[8,16]{{1,0}} parameter(0), metadata={{op_name="params[\\'a\\']"}}
  %zero.5 = s32[] constant(0)
  %copy.5 = s32[] copy(%zero.5)
  %stack.5 = bf16[3,8,4]{{2,1,0}} broadcast(%zero.5), dimensions={{}}
  %tuple.5 = (s32[], bf16[8,16]{{1,0}}, /*index=2*/bf16[3,8,4]{{2,1,0}}) tuple(%copy.5, %x.5, \
%stack.5)
  %while.5 = (s32[], bf16[8,16]{{1,0}}, bf16[3,8,4]{{2,1,0}}) while(%tuple.5), \
condition=%condition.4, body=%body.3, backend_config={{"known_trip_count":{{"n":"3"}}}}
  ROOT %result.5 = bf16[3,8,4]{{2,1,0}} get-tuple-element(%while.5), index=2
}}
"""


CUBLAS = (
    "(bf16[8,4]{1,0}, s8[4096]{0}) custom-call(%codes.3, %weights.3, %one.3, %one.3), "
    'custom_call_target="__cublas$lt$matmul$f8"'
)
FALLEN = (
    "(bf16[8,4]{1,0}, s8[4096]{0}) custom-call(%wide.3, %wide.3), "
    'custom_call_target="__cublas$lt$matmul"'
)


def test_an_fp8_gemm_is_told_with_its_bytes():
    report = hlo.report(gpu_program(CUBLAS))
    (product,) = report.products
    # 8x16 and 16x4 codes, two scales; 8x4 of bfloat16 out; the workspace does not count.
    assert (product.site, product.product, product.engine, product.runs, product.bytes) == (
        "mlp",
        "forward",
        "cuBLASLt",
        3,
        128 + 64 + 8 + 64,
    )
    assert product.in_fp8 and str(product) == "cuBLASLt f8e4m3fn.f8e4m3fn"
    assert not report.fallen_back and not report.others
    # The cast: 8x16 of bfloat16 read, as many codes and 8 partial amaxes written. What stacks is
    # the loop's, not the site's.
    assert report.around == {"mlp": hlo.report(gpu_program(FALLEN)).around["mlp"]}
    assert (report.around["mlp"].kernels, report.around["mlp"].bytes) == (1, 256 + 128 + 32)


def test_a_product_that_fell_back_is_told():
    report = hlo.report(gpu_program(FALLEN))
    assert report.fallen_back == report.products
    assert str(report.products[0]) == "cuBLASLt bf16.bf16, decoded"
    assert report.verdict("mlp") == "cuBLASLt in bf16, no dlhs, no drhs"
    assert report.verdict("other") == "not in the program"
    assert "0 of 1 products of sites run in FP8" in str(report)


def test_trips_of_a_loop_that_copies_its_counter_as_those_of_tpus_do():
    text = """HloModule jit_f

%body.1 (p.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.1 = (s32[], f32[8]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %copy.1 = s32[] copy(%i.1)
  %one.1 = s32[] constant(1)
  %next.1 = s32[] add(%copy.1, %one.1)
  %x.1 = f32[8] get-tuple-element(%p.1), index=1
  %y.1 = f32[8] negate(%x.1), backend_config={"estimated_cycles":"7"}
  ROOT %out.1 = (s32[], f32[8]) tuple(%next.1, %y.1)
}

%condition.2 (p.2: (s32[], f32[8])) -> pred[] {
  %p.2 = (s32[], f32[8]) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %end.2 = s32[] constant(5)
  ROOT %lt.2 = pred[] compare(%i.2, %end.2), direction=LT
}

ENTRY %main.3 (x.3: f32[8]) -> (s32[], f32[8]) {
  %x.3 = f32[8] parameter(0)
  %zero.3 = s32[] constant(0)
  %start.3 = s32[] copy(%zero.3)
  %tuple.3 = (s32[], f32[8]) tuple(%start.3, %x.3)
  ROOT %while.3 = (s32[], f32[8]) while(%tuple.3), condition=%condition.2, body=%body.1
}
"""
    kernels = {kernel.instruction.name: kernel for kernel in Program.parse(text).kernels()}
    assert kernels["y.1"].runs == 5
    assert kernels["y.1"].cycles == 35 and kernels["start.3"].cycles is None


def test_a_product_of_no_site_is_another():
    report = hlo.report(gpu_program(CUBLAS, "jit(f)/attention/dot_general"))
    assert not report.products and len(report.others) == 1


def test_traffic_counts_each_launch_and_what_it_moves():
    # Before the loop 4 bytes copied, and 3x8x4 of bfloat16 filled from 4 bytes. In it, three times:
    # the cast; the stack, of which a third is written, and the number of the iteration read. The
    # product is none of it.
    assert hlo.traffic(gpu_program(CUBLAS)) == (
        2 + 3 * 2,
        8 + 4 + 192 + 3 * ((256 + 160) + (4 + 64 + 64)),
    )


@pytest.mark.parametrize(
    "inner, kind, expected",
    [
        (
            "dot(%codes.6, %codes.6), lhs_contracting_dims={1}",
            '{"kind":"__triton_nested_gemm_fusion"}',
            "Triton f8e5m2.f8e5m2",
        ),
        (
            "dot(%wide.6, %codes.6), lhs_contracting_dims={1}",
            '{"kind":"__triton_gemm"}',
            "Triton bf16.f8e5m2, decoded",
        ),
        (
            "convolution(%codes.6, %codes.6), window={size=1}, dim_labels=0bf_io0->0bf",
            "{}",
            "XLA f8e5m2.f8e5m2",
        ),
        ("multiply(%wide.6, %wide.6)", "{}", "reduction bf16.bf16, decoded"),
    ],
    ids=["triton", "triton-decoded", "tpu", "reduction"],
)
def test_a_product_inside_a_fusion(inner, kind, expected):
    layout = "{1,0:T(8,128)(4,1)S(1)}"
    text = f"""HloModule jit_f

%fused.6 (p.6: f8e5m2[8,8]) -> bf16[8,8] {{
  %codes.6 = f8e5m2[8,8]{layout} parameter(0)
  %wide.6 = bf16[8,8]{layout} convert(%codes.6)
  ROOT %product.6 = bf16[8,8]{layout} {inner}, \
metadata={{op_name="{SITE}/dlhs/cond/branch_0_fun/dot_general"}}
}}

ENTRY %main.7 (p.7: f8e5m2[8,8]) -> bf16[8,8] {{
  %p.7 = f8e5m2[8,8]{layout} parameter(0)
  ROOT %fusion.7 = bf16[8,8]{layout} fusion(%p.7), kind=kCustom, calls=%fused.6, \
backend_config={{"fusion_backend_config":{kind}}}
}}
"""
    (product,) = hlo.report(text).products
    assert (str(product), product.product, product.kernel, product.bytes) == (
        expected,
        "dlhs",
        "fusion.7",
        64 + 128,
    )


def two_layers(params, x):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return jnp.square(x @ params["head"]).mean(dtype=jnp.float32)


@pytest.fixture(scope="module")
def compiled_step():
    params = {"layers": jnp.ones((3, 32, 32)), "head": jnp.ones((32, 32))}
    fp8_loss = fp8jax.fp8(two_layers, recipes.delayed())
    x = jnp.ones((16, 32))
    scales = fp8_loss.init(params, x)
    compiled = jax.jit(jax.grad(fp8_loss, argnums=(0, 1))).lower(scales, params, x).compile()
    return compiled, fp8_loss.explain(params, x)


def test_every_product_of_a_step_is_found_on_this_machine(compiled_step):
    compiled, explanation = compiled_step
    report = hlo.report(compiled)
    assert not report.others
    looped = next(site.name for site in explanation.sites if site.loops)
    found = sorted((one.site, one.product, one.runs) for one in report.products)
    assert found == sorted(
        (site.name, product, 3 if site.name == looped else 1)
        for site in explanation.sites
        for product in ("forward", "dlhs", "drhs")
    )
    assert report.fallen_back == report.products  # A CPU multiplies decoded codes.
    assert hlo.report(compiled.as_text()) == report
    # Each site reads and writes its operands' codes at the least: 16x32 twice, and 32x32.
    assert all(around.bytes > 2 * (2 * 16 * 32 + 32 * 32) for around in report.around.values())


def test_explain_takes_the_report_as_a_column(compiled_step):
    compiled, explanation = compiled_step
    report = hlo.report(compiled)
    verdicts = {site.name: report.verdict(site.name) for site in explanation.sites}
    assert all(re.fullmatch(r"XLA in (bf16|f32)", verdict) for verdict in verdicts.values())
    with_column = explanation.with_report(report)
    assert "compiled" in str(with_column) and "compiled" not in str(explanation)
    assert {
        row["name"]: row["compiled"] for row in json.loads(with_column.to_json())["sites"]
    } == verdicts
    assert "compiled" not in json.loads(explanation.to_json())["sites"][0]


def test_the_report_is_data(compiled_step):
    data = json.loads(hlo.report(compiled_step[0]).to_json())
    assert {
        "site",
        "product",
        "engine",
        "lhs",
        "rhs",
        "out",
        "runs",
        "bytes",
        "kernel",
        "in_fp8",
    } == data["products"][0].keys()
    assert data["others"] == [] and all(around["kernels"] > 0 for around in data["around"].values())


def test_what_fp8_adds_is_the_difference_to_the_same_step_without(compiled_step):
    compiled, explanation = compiled_step
    params, x = {"layers": jnp.ones((3, 32, 32)), "head": jnp.ones((32, 32))}, jnp.ones((16, 32))
    without = jax.jit(jax.grad(two_layers)).lower(params, x).compile()
    here, there = hlo.traffic(compiled), hlo.traffic(without)
    added = hlo.added(compiled, without, explanation.sites)
    assert added.launches_per_site == (here.launches - there.launches) / 4 > 1
    assert added.bytes == here.bytes - there.bytes > 0
    # Three layers and the head: lhs 16x32 and out, 32x32 weights; f32 read once, two bytes of codes
    # written.
    assert added.minimum == 4 * (4 + 2) * (2 * 16 * 32 + 32 * 32)
    assert hlo.added(without, without, explanation.sites)[:2] == (0, 0)


# A counter and what it counts, as XLA prints loops for TPUs: without their length.
COUNTED = """
%body.1 (state.1: (f32[], s32[])) -> (f32[], s32[]) {
  %state.1 = (f32[], s32[]) parameter(0)
  %sum.1 = f32[] get-tuple-element(%state.1), index=0
  %count.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=1
  %one.1 = s32[]{:T(128)} constant(1)
  %next.1 = s32[]{:T(128)} add(%count.1, %one.1)
  %more.1 = f32[] exponential(%sum.1)
  ROOT %tuple.1 = (f32[], s32[]) tuple(%more.1, %next.1)
}

%condition.2 (state.2: (f32[], s32[])) -> pred[] {
  %end.2 = s32[]{:T(128)} constant(7)
  %state.2 = (f32[], s32[]) parameter(0)
  %count.2 = s32[]{:T(128)} get-tuple-element(%state.2), index=1
  ROOT %compare.2 = pred[]{:T(512)} compare(%count.2, %end.2), direction=LT
}

ENTRY %main.3 (x.3: f32[], n.3: s32[]) -> (f32[], s32[]) {
  %x.3 = f32[] parameter(0)
  %n.3 = s32[] parameter(1)
  %first.3 = s32[]{:T(128)} constant(2)
  %copy.3 = s32[]{:T(128)} copy(%first.3)
  %tuple.3 = (f32[], s32[]) tuple(%x.3, %copy.3)
  ROOT %while.3 = (f32[], s32[]) while(%tuple.3), condition=%condition.2, body=%body.1
}
"""


@pytest.mark.parametrize(
    "replaced, by, runs",
    [
        ("", "", 5),
        ("constant(7)", "constant(1)", 0),
        ("body=%body.1", 'body=%body.1, backend_config={"known_trip_count":{"n":"4"}}', 4),
        # What is not known counts once: another step, another question, a start or an end that is
        # no constant.
        ("constant(1)", "constant(2)", 1),
        ("direction=LT", "direction=NE", 1),
        ("copy(%first.3)", "copy(%n.3)", 1),
        ("compare(%count.2, %end.2)", "compare(%end.2, %count.2)", 1),
        ("add(%count.1, %one.1)", "multiply(%count.1, %one.1)", 1),
    ],
    ids=[
        "counted",
        "never",
        "said",
        "other-step",
        "other-question",
        "start-unknown",
        "downwards",
        "not-added",
    ],
)
def test_how_often_a_loop_runs(replaced, by, runs):
    program = Program.parse(COUNTED.replace(replaced, by, 1) if replaced else COUNTED)
    assert [
        kernel.runs for kernel in program.kernels() if kernel.instruction.opcode == "exponential"
    ] == [runs]


@pytest.mark.parametrize(
    "dtype, size",
    [("s4", 3), ("u8", 5), ("bf16", 10), ("f8e4m3b11fnuz", 5), ("c64", 40), ("token", 0)],
)
def test_bytes_of_an_array(dtype, size):
    assert Leaf(dtype, (5,)).bytes == size


def test_errors_name_what_to_do():
    with pytest.raises(
        TypeError, match="compiled must be a jax.stages.Compiled or its text; got <function"
    ):
        hlo.report(two_layers)
    with pytest.raises(
        ValueError, match="text must be that of a compiled program, with an ENTRY computation"
    ):
        hlo.report("module @jit_f {}")
    with pytest.raises(ValueError, match="line must be an instruction of a compiled program; got"):
        Program.parse("ENTRY %main () -> f32[] {\n  %a = f32[] 12\n}\n")
