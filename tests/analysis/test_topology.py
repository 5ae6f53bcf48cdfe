"""Compiling for TPU slices that are not there: verdicts, memory, collectives, bad names."""

import dataclasses
from pathlib import Path

import jax
import pytest

from flaxpretrain.analysis import topology
from flaxpretrain.analysis.pods import pod_of
from flaxpretrain.config import Mesh, Phase, Precision, load_recipe
from flaxpretrain.errors import UserError
from flaxpretrain.models.functional import model_of
from tests import toys
from tests.tolerances import COLLECTIVE_BYTES

CONFIGS = Path(__file__).parent.parent.parent / "configs"


@pytest.fixture(scope="module")
def libtpu():
    """The compiler for TPUs, ready."""
    pytest.importorskip("libtpu")
    topology.prepare_environment()


def test_the_compiler_s_sentence_about_memory_is_read():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (24.40G) exceeds available HBM (15.75G). HLO module: jit_f.\n"
        "See https://openxla.org/xla/errors/error_1000 for more details."
    )
    verdict = topology.out_of_memory(message)
    assert verdict == (
        "Ran out of memory on HBM, the total memory required for HLO temporaries (24.40G) exceeds "
        "available HBM (15.75G)"
    )
    assert topology.memory_sizes(verdict) == (int(24.40 * 2**30), int(15.75 * 2**30))


def test_the_older_sentence_is_read_too():
    verdict = topology.out_of_memory(
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.47G of 15.75G hbm. "
        "Exceeded hbm capacity by 2.72G."
    )
    assert verdict is not None
    assert topology.memory_sizes(verdict) == (int(18.47 * 2**30), int(15.75 * 2**30))


def test_another_error_is_not_taken_for_a_verdict():
    assert topology.out_of_memory("INTERNAL: Mosaic failed to compile TPU kernel") is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("v9:2x2", "expected one of v4, v5e"),
        ("v5e", "expected one of v4, v5e"),
        ("v5e:4x", "expected one of v4, v5e"),
        ("v5e:2x2x2", "a slice of v5e has 2 sizes"),
        ("v5p:4x4", "a slice of v5p has 3 sizes"),
        ("v5e:32x32", "1 to 256 chips"),
        ("v5e:0x2", "1 to 256 chips"),
    ],
)
def test_a_topology_that_does_not_exist_is_one_clear_line(name, reason):
    with pytest.raises(UserError, match=f"topology '{name}' does not exist: .*{reason}"):
        topology.devices_of(name)


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("name", "slices", "devices", "kind"),
    [
        ("v4:2x2x1", 1, 4, "TPU v4"),
        ("v5e:1x1", 1, 1, "TPU v5 lite"),
        ("v5e:16x16", 1, 256, "TPU v5 lite"),
        ("v5e:2x2", 2, 8, "TPU v5 lite"),
        ("v5p:2x2x1", 1, 4, "TPU v5"),
        ("v6e:2x2", 1, 4, "TPU v6 lite"),
        ("tpu7x:2x2x1", 1, 8, "TPU7x"),
    ],
)
def test_slices_have_the_devices_that_jax_would_see(libtpu, name, slices, devices, kind):
    found = topology.devices_of(name, slices)
    assert len(found) == devices and found[0].device_kind == kind


@pytest.mark.tpu
def test_a_slice_that_hosts_do_not_divide_is_refused(libtpu):
    with pytest.raises(UserError, match="topology 'v5e:3x5' does not exist"):
        topology.devices_of("v5e:3x5")


@pytest.mark.tpu
def test_a_mesh_that_does_not_fit_the_slice_is_refused(libtpu):
    run = toys.run(mesh=Mesh(data=3))
    with pytest.raises(UserError, match="does not fit 4 devices"):
        topology.compile_step(run, "v5e:2x2", 0)


def gradient_bytes(report):
    """Of the float32 gradient of all parameters, which lie whole on each device here."""
    return report.parameter_bytes


@pytest.mark.tpu
@pytest.mark.parametrize(
    "name",
    # The same step with 64 rows a chip in place of one: minutes.
    ["v5e:16x16", pytest.param("v5e:2x2", marks=pytest.mark.slow)],
)
def test_bert_base_at_512_compiles_and_fits(libtpu, name):
    # Without its hardware rules, by which it unrolls the layers: the compiler takes minutes for it.
    run = load_recipe(CONFIGS / "bert_base.py")
    report, text = topology.compile_step(run, name, 1)
    assert report.fits, report.verdict
    assert (report.length, report.batch_size, report.attention) == (512, 256, "rows")
    assert report.tokens_per_step_per_chip == 256 * 512 / report.chips
    # One all-reduce of each gradient and nothing else: the tied table is not reduced twice.
    assert report.collective_bytes.keys() == {"all-reduce"}
    reduced = report.collective_bytes["all-reduce"]
    assert gradient_bytes(report) <= reduced <= COLLECTIVE_BYTES * gradient_bytes(report)
    # Every product is counted: no loop is taken once, no kernel for nothing.
    assert 1.0 <= report.compiled_flops / report.formula_flops < 1.1
    assert not [note for note in report.notes if "count" in note]
    assert report.estimated_step_seconds > report.custom_call_seconds > 0
    assert text is not None and "row_attention_forward" in text


@pytest.mark.tpu
@pytest.mark.parametrize("name", ["electra_tiny", "t5_tiny", "gpt2_tiny"])
def test_a_recipe_of_each_other_family_compiles_for_the_slice_it_names(libtpu, name):
    """tools/compile_all.py does so with every recipe, its hardware rules and each phase."""
    recipe = CONFIGS / f"{name}.py"
    report, text = topology.compile_step(load_recipe(recipe), pod_of(recipe), 0)
    assert report.fits, report.verdict
    assert report.topology == pod_of(recipe) and report.recipe == name
    assert report.estimated_step_seconds > 0 and text is not None
    assert 1.0 <= report.compiled_flops / report.formula_flops


@pytest.mark.tpu
def test_four_microbatches_reduce_no_more_than_one(libtpu):
    phase = Phase(steps=1, length=32, batch_size=32, microbatches=4)
    report, _ = topology.compile_step(toys.run(phases=(phase,), attention="xla"), "v5e:2x2", 0)
    assert report.fits and report.collective_bytes is not None
    reduced = report.collective_bytes["all-reduce"]
    assert gradient_bytes(report) <= reduced <= COLLECTIVE_BYTES * gradient_bytes(report)


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "products", "gathered", "reduced"),
    [
        # Parameters in bfloat16 once in each pass, float32 gradients once, and what lies whole.
        (Mesh(data=1, fsdp=4), 1.03, 2.0 / 2, 1.4),
        # Two heads a device: the kernel whose blocks hold two of 64 would have to see all four.
        (Mesh(data=1, tensor=4), 1.06, 0.1, None),
    ],
    ids=["fsdp", "tensor"],
)
def test_a_mesh_divides_products_and_moves_no_more_than_it_must(
    libtpu, mesh, products, gathered, reduced
):
    model = toys.bert(
        hidden_size=256,
        intermediate_size=1_024,
        max_position_embeddings=128,
        attention_probs_dropout_prob=0.0,
    )
    run = toys.run(
        model=model,
        phases=(Phase(steps=1, length=128, batch_size=128),),
        mesh=mesh,
        precision=Precision(compute="bfloat16"),
    )
    report, _ = topology.compile_step(run, "v5e:2x2", 0)
    assert report.fits and report.collective_bytes is not None
    assert report.compiled_flops / report.formula_flops < products
    whole = 4 * sum(leaf.size for leaf in jax.tree.leaves(model_of(model.build).abstract()))
    assert report.collective_bytes["all-gather"] < gathered * whole
    if reduced is not None:
        sums = ("all-reduce", "reduce-scatter")
        assert sum(report.collective_bytes.get(kind, 0) for kind in sums) < reduced * whole


@pytest.mark.tpu
def test_gradients_in_bfloat16_take_half_the_bytes_of_a_sum(libtpu):
    run = toys.run(precision=Precision(reduce="bfloat16"), attention="xla")
    report, _ = topology.compile_step(run, "v5e:2x2", 0)
    assert report.fits and report.collective_bytes is not None
    reduced = report.collective_bytes["all-reduce"]
    assert 0.5 <= reduced / gradient_bytes(report) <= 0.5 * COLLECTIVE_BYTES


@pytest.mark.tpu
@pytest.mark.slow
def test_what_is_offloaded_leaves_a_chip_for_its_host(libtpu):
    def memory(remat):
        run = toys.run(
            model=toys.bert(num_hidden_layers=12),
            phases=(Phase(steps=1, length=32, batch_size=1_024),),
            attention="xla",
            remat=remat,
        )
        report, text = topology.compile_step(run, "v5e:2x2", 0)
        assert report.fits and report.temporary_bytes is not None and text is not None
        return report.temporary_bytes, "S(5)" in text  # the host's memory in XLA's layouts

    kept, offloaded = memory("dots_no_batch"), memory("offload_dots")
    assert (kept[1], offloaded[1]) == (False, True)
    # At least the query, key and value of all layers, 3 x 32 float32 a token, are gone.
    assert kept[0] - offloaded[0] > 12 * (1_024 // 4 * 32) * 3 * 32 * 4


@pytest.mark.tpu
def test_what_does_not_fit_is_told_with_the_compiler_s_numbers(libtpu):
    run = toys.run(
        phases=(Phase(steps=1, length=32, batch_size=2**22),),
        precision=Precision(compute="bfloat16"),
    )
    report, text = topology.compile_step(run, "v5e:2x2", 0)
    assert not report.fits and text is None and report.estimated_mfu is None
    assert "exceeds available HBM" in report.verdict
    assert report.needed_bytes > report.available_bytes > 15 * 2**30


def test_bytes_of_a_device_follow_the_shardings():
    from flaxpretrain.training import sharding
    from flaxpretrain.training.assembly import assemble

    run = toys.run()
    whole, split = (assemble(run, sharding.make_mesh(*axes), 1) for axes in ((8, 1, 1), (1, 4, 2)))
    total = sum(leaf.size * 4 for leaf in jax.tree.leaves(whole.state.params))
    assert topology.device_bytes(whole.state.params) == total
    assert total / 8 < topology.device_bytes(split.state.params) < total / 4


def test_a_report_is_json():
    fields = dataclasses.fields(topology.Report)
    for name in (
        "fits",
        "tokens_per_step_per_chip",
        "custom_call_seconds",
        "estimated_step_seconds",
        "formula_flops",
        "compiled_flops",
        "collective_bytes",
    ):
        assert name in {field.name for field in fields}
