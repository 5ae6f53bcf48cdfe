"""Reading a compiled program: loops by their trips, fusions by their cycles, collectives."""

import re

import pytest

from flaxpretrain.analysis import hlo


def with_cycles(text):
    """`cycles=N` as the compiler writes it."""
    estimate = r'backend_config={"window_config":{"estimated_cycles":"\1"}}'
    return re.sub(r"cycles=(\d+)", estimate, text)


PROGRAM = with_cycles("""HloModule jit_step, is_scheduled=true

%fused (a: bf16[8,4], b: bf16[4,16]) -> bf16[8,16] {
  %a = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[4,16]{1,0} parameter(1)
  ROOT %product = bf16[8,16]{1,0} convolution(%a, %b), dim_labels=bf_io->bf, cycles=1000
}

%condition (state: (s32[], bf16[8,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %state = (s32[]{:T(128)}, bf16[8,4]{1,0}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

%body (state.1: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %state.1 = (s32[]{:T(128)}, /*index=1*/bf16[8,4]{1,0}) parameter(0)
  %rows = bf16[8,4]{1,0} get-tuple-element(%state.1), index=1
  %table = bf16[4,16]{1,0} constant({...})
  %fusion = bf16[8,16]{1,0} fusion(%rows, %table), kind=kOutput, calls=%fused, cycles=10
  ROOT %next = (s32[]{:T(128)}, bf16[8,4]{1,0}) tuple(%state.1)
}

ENTRY %main (p: bf16[8,4]) -> f32[2,8] {
  %p = bf16[8,4]{1,0} parameter(0)
  %loop = (s32[]{:T(128)}, bf16[8,4]{1,0}) while(%p), condition=%condition, body=%body
  %sums = (f32[2,8]{1,0:T(8,128)S(1)}, f32[]) all-reduce(%p, %p), channel_id=1, to_apply=%add
  %gather-start = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%shard), dimensions={0}
  %shard = f32[2,4]{1,0} parameter(1)
  %scattered = f32[2,4]{1,0} reduce-scatter(%whole), dimensions={0}
  %whole = f32[8,4]{1,0} parameter(2)
  ROOT %copy = f32[2,8]{1,0} copy(%whole), cycles=5
}
""")


@pytest.fixture
def sums():
    return hlo.totals(hlo.parse(PROGRAM))


def test_cycles_of_a_loop_count_as_often_as_it_runs_and_those_inside_a_fusion_not(sums):
    assert sums.cycles == 12 * 10 + 5


def test_products_inside_fusions_and_loops_count_two_flops_a_multiply_add(sums):
    assert sums.flops == 12 * 2 * 8 * 4 * 16


def test_bytes_of_hbm_count_operands_and_results_but_not_what_stays_on_the_chip(sums):
    fusion = 2 * (8 * 4 + 4 * 16 + 8 * 16)
    reduced = 2 * (2 * 8 * 4) + 4  # the array of the result is on the chip, a number is not
    gathered = scattered = 4 * (2 * 4 + 8 * 4)
    copied = 4 * (8 * 4 + 2 * 8)
    assert sums.hbm_bytes == 12 * fusion + reduced + gathered + scattered + copied


SLICES = """HloModule jit_f

%fused (stack: f32[12,8], kept: f32[12,8], number: s32[]) -> f32[12,8] {
  %stack = f32[12,8]{1,0} parameter(0)
  %kept = f32[12,8]{1,0} parameter(1)
  %number = s32[] parameter(2)
  %zero = s32[] constant(0)
  %one = f32[1,8]{1,0} dynamic-slice(%stack, %number, %zero), dynamic_slice_sizes={1,8}
  ROOT %all = f32[12,8]{1,0} dynamic-update-slice(%kept, %one, %number, %zero)
}

ENTRY %main (a: f32[12,8], b: f32[12,8], n: s32[]) -> f32[12,8] {
  %a = f32[12,8]{1,0} parameter(0)
  %b = f32[12,8]{1,0} parameter(1)
  %n = s32[] parameter(2)
  ROOT %f = f32[12,8]{1,0} fusion(%a, %b, %n), kind=kLoop, calls=%fused
}
"""


def test_of_a_stack_only_the_slice_that_is_read_or_written_counts():
    # A row is read, a row is written, and the number of the row is read.
    assert hlo.totals(hlo.parse(SLICES)).hbm_bytes == 8 * 4 + 8 * 4 + 4


def test_collectives_count_the_full_array_of_a_device(sums):
    assert dict(sums.collective_counts) == {"all-reduce": 1, "all-gather": 1, "reduce-scatter": 1}
    assert dict(sums.collective_bytes) == {
        "all-reduce": 2 * 8 * 4 + 4,
        "all-gather": 8 * 4 * 4,  # the start of an asynchronous one repeats its operand
        "reduce-scatter": 8 * 4 * 4,
    }


def test_what_a_sparse_core_reduces_beside_the_step_is_counted():
    """As libtpu writes it for tpu7x: the computation is named by the start of a custom call."""
    program = """HloModule jit_f

%called_computation.5 (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %all-reduce.7 = f32[8,4]{1,0} all-reduce(%p), replica_groups={{0,1}}
}, execution_thread="sparsecore"

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %start = ((), (), (s32[8]{0})) custom-call-start(), async_execution_thread="sparsecore", \
custom_call_target="offload", called_computations={%called_computation.5}
  %update = ((f32[8,4]{1,0}), f32[8,4]{1,0}, (s32[8]{0})) custom-call-update(%start, %a)
  ROOT %done = f32[8,4]{1,0} custom-call-done(%update)
}
"""
    sums = hlo.totals(hlo.parse(program))
    assert dict(sums.collective_bytes) == {"all-reduce": 8 * 4 * 4} and not sums.hidden_bytes
    busy = "  %busy = f32[8]{0} copy(%a), cycles=5\n  %update ="
    sums = hlo.totals(hlo.parse(with_cycles(program.replace("  %update =", busy))))
    assert sums.hidden_bytes == sums.collective_bytes == {"all-reduce": 8 * 4 * 4}


def test_a_loop_without_a_bound_is_counted_once_and_named():
    unbounded = PROGRAM.replace("constant(12)", "parameter(0)")
    sums = hlo.totals(hlo.parse(unbounded))
    assert sums.cycles == 10 + 5
    assert sums.notes == ["loop loop: unknown trip count, counted once"]


def test_an_unrolled_loop_runs_as_often_as_its_counter_is_raised():
    raised = PROGRAM.replace(
        "ROOT %next = (s32[]{:T(128)}, bf16[8,4]{1,0}) tuple(%state.1)",
        "%old = s32[] get-tuple-element(%state.1), index=0\n"
        "  %two = s32[] constant(2)\n"
        "  %sum = s32[] add(%old, %two)\n"
        "  %raised = s32[] copy(%sum)\n"
        "  ROOT %next = (s32[]{:T(128)}, bf16[8,4]{1,0}) tuple(%raised, %rows)",
    )
    assert hlo.totals(hlo.parse(raised)).cycles == 12 // 2 * 10 + 5


FUSED_GATHER = """HloModule jit_f

%begins (w: bf16[2,4], x: bf16[8,8]) -> bf16[8,4] {
  %w = bf16[2,4]{1,0} parameter(0)
  %all-gather.1 = bf16[8,4]{1,0} all-gather(%w), channel_id=5, dimensions={0}, CHAIN
}

%ends (w.1: bf16[2,4], x.1: bf16[8,8]) -> bf16[8,4] {
  %w.1 = bf16[2,4]{1,0} parameter(0)
  %all-gather.2 = bf16[8,4]{1,0} all-gather(%w.1), channel_id=5, dimensions={0}, CHAIN
}

ENTRY %main (a: bf16[2,4]) -> bf16[8,4] {
  %a = bf16[2,4]{1,0} parameter(0)
  %first = bf16[8,4]{1,0} fusion(%a), kind=kCustom, calls=%begins, cycles=10
  ROOT %second = bf16[8,4]{1,0} fusion(%first), kind=kCustom, calls=%ends, cycles=10
}
"""


def test_a_collective_fused_with_several_computations_is_one_and_hidden():
    text = with_cycles(FUSED_GATHER).replace("CHAIN", 'frontend_attributes={chain_id="3"}')
    sums = hlo.totals(hlo.parse(text))
    assert dict(sums.collective_counts) == {"all-gather": 1}
    assert sums.collective_bytes == sums.hidden_bytes == {"all-gather": 2 * 8 * 4}


def test_collectives_that_only_share_a_channel_are_two_and_waited_for():
    sums = hlo.totals(hlo.parse(with_cycles(FUSED_GATHER).replace("CHAIN", "a=b")))
    assert dict(sums.collective_counts) == {"all-gather": 2} and not sums.hidden_bytes


@pytest.mark.parametrize("between", [True, False])
@pytest.mark.parametrize(
    "work",
    [
        "%other = f32[8]{0} copy(%b), cycles=7",
        '%other = f32[8]{0} custom-call(%b), custom_call_target="tpu_custom_call"',
    ],
    ids=["copy", "kernel"],
)
def test_a_collective_is_hidden_where_the_schedule_computes_before_its_end(work, between):
    end = "%done = f32[8]{0} all-reduce-done(%start)"
    lines = [work, end] if between else [end, work]
    program = f"""HloModule jit_f

ENTRY %main (a: f32[8], b: f32[8]) -> f32[8] {{
  %a = f32[8]{{0}} parameter(0)
  %b = f32[8]{{0}} parameter(1)
  %start = f32[8]{{0}} all-reduce-start(%a), channel_id=1, to_apply=%add
  {lines[0]}
  {lines[1]}
}}
"""
    sums = hlo.totals(hlo.parse(with_cycles(program)))
    assert sums.collective_bytes == {"all-reduce": 32}
    assert sums.hidden_bytes == ({"all-reduce": 32} if between else {})


def kernel(name, outputs="bf16[16,12,512,64]{3,2,1,0}", cost=""):
    """A program of one Pallas kernel over 16 rows of 12 heads, 512 tokens, heads of 64."""
    operand = "bf16[16,12,512,64]{3,2,1,0}"
    return f"""HloModule jit_f

ENTRY %main (q: bf16[16,12,512,64]) -> bf16[16,12,512,64] {{
  %q = {operand} parameter(0)
  ROOT %{name}.1 = ({outputs}) custom-call(%q, %q), custom_call_target="tpu_custom_call",
operand_layout_constraints={{s8[1,1,1]{{2,1,0}}, {operand}, {operand}, {operand}}},
frontend_attributes={{kernel_metadata={{
}}}}, backend_config={{"custom_call_config":{{"body":"x"{cost}}}}}
}}
"""


PRODUCT = 2 * 16 * 12 * 512 * 512 * 64


@pytest.mark.parametrize(
    ("name", "outputs", "products"),
    [
        ("splash_mha_fwd_segmented_residuals", "bf16[16,12,512,64]{3,2,1,0}", 2),
        ("splash_mha_dq_segmented_no_residuals", "bf16[16,12,512,64]{3,2,1,0}", 3),
        ("splash_mha_dkv_segmented_no_residuals", "bf16[16,12,512,64]{3,2,1,0}", 4),
        # Fused: the query's gradient comes out of the same kernel, in parts.
        ("splash_mha_dkv_segmented_no_residuals", "bf16[16,1,12,512,64]{4,3,2,1,0}", 5),
        # Mapped over a mesh it is called by the function around it, for both directions.
        ("_splash_attention", "bf16[16,12,512,64]{3,2,1,0}", 2),
        ("_splash_attention", "bf16[16,1,12,512,64]{4,3,2,1,0}", 5),
    ],
)
def test_attention_kernels_count_the_products_they_are_known_to_do(name, outputs, products):
    sums = hlo.totals(hlo.parse(kernel(name, outputs)))
    assert sums.kernel_flops == {name: products * PRODUCT}
    assert sums.kernel_calls == {name: 1} and sums.head_sizes == {name: 64}


def test_a_kernel_that_states_its_cost_is_believed():
    text = kernel("mine", cost=',"cost_estimate":{"flops":"77","bytes_accessed":"3"}')
    assert hlo.totals(hlo.parse(text)).kernel_flops == {"mine": 77}


def test_a_kernel_without_a_cost_is_named():
    assert hlo.totals(hlo.parse(kernel("mine"))).notes == [
        "kernel mine: no cost of its own, counted as 0"
    ]


@pytest.mark.parametrize(
    ("left", "right", "out", "attributes", "multiply_adds"),
    [
        # Batched products, as XLA:TPU writes them: each output position meets one input.
        (
            "64,12,512,64",
            "64,12,512,64",
            "64,12,512,512",
            "window={size=64x12 stride=63x11 lhs_dilate=64x12}, dim_labels=01bf_01oi->01bf",
            64 * 12 * 512 * 512 * 64,
        ),
        # The heads of q, k and v: kernel positions in the padding meet nothing.
        (
            "3,768,12,64,1",
            "64,512,768,1,1",
            "3,12,64,64,512",
            "window={size=1x1x64 pad=0_0x0_0x63_63 rhs_reversal=0x0x1}, "
            "dim_labels=0f1b2_2oi01->01b2f",
            64 * 512 * 768 * 3 * 12 * 64,
        ),
        # Heads summed over: a window of the size of its input.
        (
            "64,12,512,64",
            "12,64,768,1",
            "64,512,768,1",
            "window={size=1x12}, dim_labels=01bf_1io0->0bf1",
            64 * 512 * 12 * 64 * 768,
        ),
    ],
)
def test_products_written_as_convolutions_count_real_positions_only(
    left, right, out, attributes, multiply_adds
):
    text = f"""HloModule m

ENTRY %main (a: bf16[{left}], b: bf16[{right}]) -> bf16[{out}] {{
  %a = bf16[{left}]{{1,0}} parameter(0)
  %b = bf16[{right}]{{1,0}} parameter(1)
  ROOT %c = bf16[{out}]{{1,0}} convolution(%a, %b), {attributes}
}}
"""
    assert hlo.totals(hlo.parse(text)).flops == 2 * multiply_adds
