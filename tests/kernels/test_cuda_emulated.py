"""The CUDA kernels' own source, run on the CPU by tests/kernels/cuda/emulator.h, against the plain loop in torch.

The tests marked cuda, at the end, check what only a GPU has: the instructions themselves and memory ordering.
"""

import ctypes
import itertools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import tolerances
import torch
from tolerances import relative
from torch import Tensor

from vjvcr_fast import native
from vjvcr_fast.latents import ExpandedMLPEnergy, MLPEnergy
from vjvcr_fast.latents.descent import Rule, _start, _State, _step

SOURCE = Path(__file__).parent / "cuda" / "emulated.cpp"
FLAGS = (
    "-std=c++20",
    "-O2",
    "-shared",
    "-fPIC",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-clobbered",
)
HOPPER = 232448  # bytes of shared memory a block may have
BARRIERS = 10  # how many of a step's barriers can be left out


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("there is no C++ compiler" if compiler is None else "the emulator needs Linux")
    library = tmp_path_factory.mktemp("emulator") / "emulated.so"
    done = subprocess.run([compiler, *FLAGS, SOURCE, "-o", library], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    emulator = ctypes.CDLL(str(library))
    emulator.fista_mlp.restype = ctypes.c_char_p
    return emulator


class Result(NamedTuple):
    z: Tensor
    energy: Tensor
    step: Tensor
    steps: Tensor
    lost: Tensor
    streams: bool = False  # some of the weights, step by step


def rule(latent: int, **changes) -> Rule:
    default = {"momentum": None, "step_rule": "backtracking", "lr": 1.0, "tolerance": 1e-4, "weight": 0.02}
    return Rule(**({"shape": (latent,)} | default | changes))


def problem(n: int, hidden: int, latent: int, outputs: int = 50, seed: int = 0) -> tuple[MLPEnergy, Tensor]:
    """An energy and a start, in float64, with numbers that float32 can represent."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).double()

    w1z = random(hidden, latent)
    w1z = (w1z / w1z.norm(dim=0)).float().double()
    w2, w3 = ((random(rows, hidden) / hidden**0.5).float().double() for rows in (hidden, outputs))
    energy = MLPEnergy(random(n, hidden), w1z, w2, random(hidden) / 8, w3, random(outputs) / 8, random(n, outputs))
    return energy, random(n, latent) / 16


def plain(energy: MLPEnergy, z0: Tensor, rule: Rule, steps: int, dtype: torch.dtype = torch.float64) -> Result:
    z0 = rule.project(z0.to(dtype))
    inner = energy.to(dtype).expand(z0)
    state: _State = _start(inner, rule, z0)
    for _ in range(steps):
        state = _step(inner, rule, state)
    return Result(state.z, *(x.flatten() for x in (state.energy, state.step, state.steps, state.lost)))


def of_rule(rule: Rule, scale: float) -> list[float | bool]:
    """The operator's arguments from scale to tolerance."""
    momentum = -1.0 if rule.momentum is None else rule.momentum
    return [
        scale,
        rule.weight,
        rule.low,
        rule.high,
        momentum,
        rule.step_rule == "backtracking",
        rule.lr,
        rule.tolerance,
    ]


def operands(energy: MLPEnergy, z0: Tensor, rule: Rule) -> tuple[Tensor, MLPEnergy, ExpandedMLPEnergy]:
    """In float32: the start, the energy, and the energy expanded about the start."""
    z0, energy = rule.project(z0.float()).contiguous(), energy.to(torch.float32)
    return z0, energy, energy.expand(z0)


def pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    assert all(t.is_contiguous() for t in tensors)
    return [ctypes.c_void_p(t.data_ptr()) for t in tensors]


def emulated(
    emulator: ctypes.CDLL,
    energy: MLPEnergy,
    z0: Tensor,
    rule: Rule,
    steps: int,
    cluster: int = 2,
    samples: int = 8,
    *,
    bf16: bool = False,
    shared: int = HOPPER,
    seed: int = 0,
    skip: int = -1,
) -> Result:
    z0, of, about = operands(energy, z0, rule)
    (n, hidden), latent = of.p.shape, z0.shape[1]
    inputs = (z0, of.p, of.w1z, of.w2, of.b2, about.G, about.r, about.start)
    z, number, steps_taken = torch.empty(n, latent), torch.empty(2, n), torch.empty(n, dtype=torch.int64)
    lost, fragments = torch.empty(n, dtype=torch.bool), torch.zeros(2, dtype=torch.int32)
    numbers = [ctypes.c_bool(x) if isinstance(x, bool) else ctypes.c_float(x) for x in of_rule(rule, about.scale)]
    where = (steps, ctypes.c_bool(bf16), cluster, samples, shared, seed, skip)
    outputs = (z, *number, steps_taken, lost, fragments)
    error = emulator.fista_mlp(*pointers(*inputs), n, hidden, latent, *numbers, *where, *pointers(*outputs))
    assert error is None, error
    return Result(z, *number, steps_taken, lost, bool(fragments[0] < fragments[1]))


def same(a: Result, b: Result) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:5], b[:5], strict=True))


# -- fista_mlp --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("n", "hidden", "latent", "cluster", "samples"),
    [
        (1, 16, 1, 1, 8),
        (5, 40, 7, 2, 8),
        (19, 64, 20, 4, 16),
        (9, 100, 33, 8, 8),
        (33, 24, 5, 1, 32),
        (3, 300, 9, 1, 8),  # more pairs of tiles than warps
        (4, 48, 200, 2, 8),
    ],
)
def test_it_is_the_plain_loop(emulator, n, hidden, latent, cluster, samples, streams):
    """After six steps a float32 loop is still close to the float64 one, if no sample is at a kink."""
    energy, z0 = problem(n, hidden, latent)
    least = emulator.least_shared(n, hidden, latent, False, cluster, samples)
    where = {"cluster": cluster, "samples": samples, "shared": least + 4096 if streams else 1 << 21}
    made, right = emulated(emulator, energy, z0, rule(latent), 6, **where), plain(energy, z0, rule(latent), 6)
    assert made.streams == streams
    assert ((made.energy - right.energy).abs() <= tolerances.FLOAT32 * right.energy).all()
    assert relative(made.z, right.z) <= tolerances.LATENT_SIX_STEPS
    assert relative(made.step, right.step) <= tolerances.LATENT_SIX_STEPS
    assert torch.equal(made.steps, right.steps)
    assert not made.lost.any()


@pytest.mark.parametrize(
    "changes",
    [
        {"weight": 0.0},
        {"weight": 0.1, "low": 0.0},
        {"momentum": 0.0},
        {"momentum": 0.9, "weight": 0.0},
        {"weight": 0.0, "momentum": 0.9, "low": -0.25, "high": 0.5},
        {"step_rule": "fixed", "lr": 0.5},
        {"step_rule": "fixed", "lr": 300.0, "momentum": 0.9},  # fails, restarts, fails, is frozen
        {"lr": 1e-3},
        {"lr": 1e4},
    ],
)
def test_all_rules(emulator, changes):
    energy, z0 = problem(6, 32, 5, seed=1)
    made = emulated(emulator, energy, z0, rule(5, **changes), 6)
    right = plain(energy, z0, rule(5, **changes), 6)
    assert ((made.energy - right.energy).abs() <= tolerances.FLOAT32 * right.energy).all()
    assert relative(made.z, right.z) <= tolerances.LATENT_SIX_STEPS
    assert relative(made.step, right.step) <= tolerances.LATENT_SIX_STEPS
    assert torch.equal(made.steps, right.steps)
    assert torch.equal(made.z == 0, right.z == 0)


@pytest.mark.parametrize("bf16", [False, True])
def test_frozen_samples_stay(emulator, bf16):
    energy, z0 = problem(5, 32, 4)
    early, late = (emulated(emulator, energy, z0, rule(4, weight=0.1), steps, bf16=bf16) for steps in (80, 90))
    assert early.steps.max() < 80
    assert len(early.steps.unique()) > 1
    assert same(early, late)


@pytest.mark.parametrize("bf16", [False, True])
def test_long_runs_end_where_the_plain_loop_does(emulator, bf16):
    """Compares the mean of the true residual energy; 1% is the issue's bound for bfloat16."""
    energy, z0 = problem(10, 64, 12, outputs=30)

    def true(z: Tensor) -> Tensor:
        return (energy(z.double()) + 0.005 * z.double().abs().sum(dim=1)).mean()

    made = emulated(emulator, energy, z0, rule(12, weight=0.005), 60, cluster=4, samples=16, bf16=bf16)
    right = plain(energy, z0, rule(12, weight=0.005), 60)
    assert true(right.z) < 0.9 * true(z0)
    assert relative(true(made.z), true(right.z)) <= (
        tolerances.LATENT_BFLOAT16 if bf16 else tolerances.LATENT_OPTIMUM / 10
    )
    assert relative(made.energy.double().mean(), true(made.z)) <= (tolerances.LATENT_BFLOAT16 if bf16 else 1e-6)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_order_of_threads_changes_nothing(emulator, bf16):
    energy, z0 = problem(11, 64, 6)
    where = {"cluster": 4, "bf16": bf16, "shared": emulator.least_shared(11, 64, 6, bf16, 4, 8) + 8192}
    results = [emulated(emulator, energy, z0, rule(6), 5, seed=seed, **where) for seed in (0, 1, 100)]
    assert same(results[0], results[1])
    assert same(results[0], results[2])


@pytest.mark.parametrize("skip", range(BARRIERS))
def test_the_emulator_finds_a_missing_barrier(emulator, skip):
    """Otherwise the test above would prove nothing."""
    energy, z0 = problem(8, 64, 6)
    right = emulated(emulator, energy, z0, rule(6), 3, samples=16)

    def unnoticed(seed: int) -> bool:
        try:
            return same(right, emulated(emulator, energy, z0, rule(6), 3, samples=16, seed=seed, skip=skip))
        except AssertionError:  # threads wait for what never comes
            return False

    assert not all(unnoticed(seed) for seed in range(3))


@pytest.mark.parametrize("bf16", [False, True])
def test_where_weights_lie_changes_little(emulator, bf16):
    """They make 20 tiles by 19 k-steps (float32: 38) for each of three products, of which the last are streamed."""
    energy, z0 = problem(2, 300, 9)
    where = {"cluster": 1, "samples": 8, "bf16": bf16}
    whole = emulated(emulator, energy, z0, rule(9), 2, shared=1 << 21, **where)
    steps, outer, k_step = 19 if bf16 else 38, 20 * 2 + 2 * 38, 3 * 20  # the last two in fragments of 512 bytes
    least = emulator.least_shared(2, 300, 9, bf16, 1, 8)
    for streamed in (1, 4, 6, 15):
        shared = least + 512 * (outer + (steps - streamed) * k_step)
        made = emulated(emulator, energy, z0, rule(9), 2, shared=shared, **where)
        assert made.streams
        if bf16:  # tensor cores add up all k-steps, in the same order
            assert same(made, whole)
        assert relative(made.z, whole.z) <= tolerances.LATENT_SIX_STEPS
    assert not whole.streams


def test_clusters_agree(emulator):
    energy, z0 = problem(10, 32, 6)
    whole = emulated(emulator, energy, z0, rule(6), 4, cluster=1, samples=32)
    for cluster, samples in ((2, 16), (2, 8), (1, 8)):
        made = emulated(emulator, energy, z0, rule(6), 4, cluster=cluster, samples=samples)
        assert relative(made.z, whole.z) <= tolerances.LATENT_SIX_STEPS


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_lost_alone(emulator, value, bf16):
    energy, z0 = problem(10, 32, 6)
    right = emulated(emulator, energy, z0, rule(6), 4, bf16=bf16)
    energy.p[3, 7] = value
    energy.target[6, 5] = value
    made = emulated(emulator, energy, z0, rule(6), 4, bf16=bf16)
    others = [0, 1, 2, 4, 5, 7, 8, 9]
    assert made.lost.tolist() == [i in (3, 6) for i in range(10)]
    assert torch.equal(made.z[[3, 6]], z0[[3, 6]].float())
    assert not made.energy[[3, 6]].isfinite().any()
    assert all(torch.equal(a[others], b[others]) for a, b in zip(made[:5], right[:5], strict=True))
    expected = plain(energy, z0, rule(6), 4, torch.float32)
    assert torch.equal(made.lost, expected.lost)
    assert torch.equal(made.steps, expected.steps)


def test_weights_that_are_not_finite_lose_all(emulator):
    energy, z0 = problem(4, 32, 6)
    energy.w2[0, 0] = torch.nan
    made = emulated(emulator, energy, z0, rule(6), 3)
    assert made.lost.all()
    assert torch.equal(made.z, z0.float())


# -- Plans ------------------------------------------------------------------------------------------------------------


class Gpu(NamedTuple):
    multiprocessors: int
    shared: int  # bytes of shared memory that a block may have
    capacity: tuple[int, int, int, int]  # how many clusters of 1, 2, 4 and 8 blocks run at once


H100, SMALL = Gpu(132, HOPPER, (132, 66, 33, 15)), Gpu(60, 166912, (60, 30, 14, 6))
GPUS = [
    H100,
    SMALL,
    H100._replace(capacity=(132, 66, 33, 16)),
    H100._replace(capacity=(132, 66, 31, 13)),
    H100._replace(capacity=(132, 60, 16, 1)),
    H100._replace(capacity=(132, 66, 33, 0)),
    H100._replace(capacity=(264, 132, 66, 30)),  # small blocks, two on a multiprocessor
]


class Plan(NamedTuple):
    cluster: int
    samples: int
    blocks: int
    rows: int
    resident: int  # fragments in shared memory
    fragments: int
    bytes: int
    at_once: int
    cycles: dict[tuple[int, int], float]  # of all plans that serve, by cluster and samples

    @property
    def waves(self) -> int:
        return -(-self.blocks // (self.cluster * self.at_once))


def plan_of(emulator: ctypes.CDLL, n: int, hidden: int, latent: int, bf16: bool, gpu: Gpu) -> Plan:
    found, cycles = (ctypes.c_int * 8)(), (ctypes.c_double * 12)()
    capacity = (ctypes.c_int * 4)(*gpu.capacity)
    emulator.launch_plan(n, hidden, latent, ctypes.c_bool(bf16), *gpu[:2], capacity, found, cycles)
    layouts = itertools.product((1, 2, 4, 8), (8, 16, 32))
    return Plan(*found, {layout: of for layout, of in zip(layouts, cycles, strict=True) if of > 0})


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("hidden", [1, 100, 256, 512])
def test_every_usual_shape_has_the_best_plan(emulator, hidden, bf16, gpu):
    for n, latent in itertools.product((1, 256, 1000), (1, 20, 64)):
        plan = plan_of(emulator, n, hidden, latent, bf16, gpu)
        assert plan.cluster * plan.rows >= hidden
        assert plan.blocks // plan.cluster * plan.samples >= n
        assert 0 <= plan.resident <= plan.fragments
        assert plan.bytes <= gpu.shared
        assert 1 <= plan.at_once <= gpu.capacity[(1, 2, 4, 8).index(plan.cluster)]
        assert plan.at_once * plan.cluster <= gpu.multiprocessors
        assert plan.cycles[plan.cluster, plan.samples] == min(plan.cycles.values())


@pytest.mark.parametrize("gpu", [gpu for gpu in GPUS if gpu.multiprocessors == 132])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("hidden", [256, 512])
def test_there_is_no_second_wave_for_256_samples(emulator, hidden, bf16, gpu):
    """It would double the time. For hidden 1024 it can pay, because larger clusters read less from L2."""
    assert plan_of(emulator, 256, hidden, 20, bf16, gpu).waves == 1


def test_the_plans_for_the_issues_shapes(emulator):
    """15 clusters of 8 run at once on an H100. With 16, hidden 512 and 1024 would be 16 clusters of 8."""
    small, middle, large = (plan_of(emulator, 256, hidden, 20, True, H100) for hidden in (256, 512, 1024))
    assert [plan[:3] for plan in (small, middle, large)] == [(4, 8, 128), (8, 32, 64), (4, 16, 64)]
    assert small.resident == small.fragments
    full = H100._replace(capacity=(132, 66, 33, 16))
    middle, large = (plan_of(emulator, 256, hidden, 20, True, full) for hidden in (512, 1024))
    assert middle[:3] == large[:3] == (8, 16, 128)
    assert middle.resident > 0.6 * middle.fragments
    assert plan_of(emulator, 256, 256, 129, True, H100).cluster == 0
    assert plan_of(emulator, 256, 4096, 20, False, H100).cluster == 0  # does not fit


@pytest.mark.parametrize("runs", [(0, 0, 0, 0), (132, 0, 0, 0), (0, 0, 33, 0)])
def test_a_plan_of_which_no_cluster_runs_is_not_served(emulator, runs):
    plan = plan_of(emulator, 256, 512, 20, True, H100._replace(capacity=runs))
    assert plan.cluster == (4 if runs[2] else 1 if runs[0] else 0)
    assert all(runs[(1, 2, 4, 8).index(cluster)] > 0 for cluster, _ in plan.cycles)


# -- The real launch --------------------------------------------------------------------------------------------------


def launched(energy: MLPEnergy, z0: Tensor, rule: Rule, steps: int, bf16: bool) -> Result:
    z0, of, about = operands(energy, z0, rule)
    inputs = (z0, of.p, of.w1z, of.w2, of.b2, about.G, about.u0, about.r, about.start)
    inputs = tuple(x.cuda() for x in inputs)
    return Result(*torch.ops.vjvcr.fista_mlp(*inputs, *of_rule(rule, about.scale), steps, bf16))


@pytest.mark.cuda
@pytest.mark.skipif(native.MISSING is not None, reason=f"the operators are {native.MISSING}")
class TestOnAGPU:
    @pytest.mark.parametrize("bf16", [False, True])
    @pytest.mark.parametrize("shape", [(5, 40, 7), (19, 64, 20), (9, 100, 33), (33, 300, 9), (4, 48, 128)])
    def test_it_is_what_was_emulated(self, emulator, shape, bf16):
        """Both round alike, except for how tensor cores add up: so what the emulator finds holds for the GPU."""
        energy, z0 = problem(*shape)
        made = launched(energy, z0, rule(shape[2]), 6, bf16)
        expected = emulated(emulator, energy, z0, rule(shape[2]), 6, bf16=bf16, shared=1 << 21)
        assert relative(made.energy.cpu(), expected.energy) <= (
            tolerances.LATENT_BFLOAT16 if bf16 else tolerances.FLOAT32
        )
        assert relative(made.z.cpu(), expected.z) <= (0.05 if bf16 else tolerances.LATENT_SIX_STEPS)

    @pytest.mark.parametrize("bf16", [False, True])
    @pytest.mark.parametrize("outputs", [3 * 256, 12 * 512])
    @pytest.mark.parametrize("hidden", [256, 512, 1024])
    def test_the_issues_shapes(self, hidden, outputs, bf16):
        energy, z0 = problem(256, hidden, 20, outputs)
        made = launched(energy, z0, rule(20), 100, bf16)
        energy = MLPEnergy(*(x.cuda() for x in vars(energy).values()))
        right = plain(energy, z0.cuda(), rule(20), 100)

        def true(z: Tensor) -> Tensor:
            return (energy(z.double()) + 0.02 * z.double().abs().sum(dim=1)).mean()

        bound = tolerances.LATENT_BFLOAT16 if bf16 else tolerances.LATENT_OPTIMUM / 10
        assert relative(true(made.z), true(right.z)) <= bound
        assert not made.lost.any()

    @pytest.mark.parametrize("bf16", [False, True])
    def test_twice_the_same_also_in_a_graph(self, bf16):
        energy, z0 = problem(40, 256, 20)
        z0, of, about = operands(energy, z0, rule(20))
        inputs = [x.cuda() for x in (z0, of.p, of.w1z, of.w2, of.b2, about.G, about.u0, about.r, about.start)]
        numbers = (*of_rule(rule(20), about.scale), 30, bf16)
        first = torch.ops.vjvcr.fista_mlp(*inputs, *numbers)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = torch.ops.vjvcr.fista_mlp(*inputs, *numbers)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))

    def test_what_does_not_fit_is_named(self):
        energy, z0 = problem(4, 16, 129)
        with pytest.raises(RuntimeError, match="129 latents are not served"):
            launched(energy, z0, rule(129), 1, False)
