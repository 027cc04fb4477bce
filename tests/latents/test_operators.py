"""The compiled operators against their formulas in float64, and under torch's compiler."""

import dataclasses
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tolerances
import torch
import ways
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import relative
from torch import Tensor

from vjvcr_fast import native, native_build, reference
from vjvcr_fast.latents import ContinuousLatent, LatentResult, MLPEnergy, NonFiniteEnergyError, SparseLatent, descent

pytestmark = pytest.mark.skipif(native.MISSING is not None, reason=f"the operators are {native.MISSING}")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
LIMITS = [(-math.inf, math.inf), (0.0, math.inf), (0.0, 1.0)]


def arguments(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """z, v, gradient, step, momentum; the second sample is frozen."""
    generator = torch.Generator().manual_seed(0)
    z, v, gradient = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    step, momentum = (torch.rand(shape[0], generator=generator, dtype=torch.float64) for _ in range(2))
    step[1:2] = 0
    return [x.to(device, dtype) for x in (z, v, gradient, step, momentum)]


def formula(
    z: Tensor, v: Tensor, gradient: Tensor, step: Tensor, momentum: Tensor, weight: float, lower: float, upper: float
) -> tuple[Tensor, Tensor]:
    z, v, gradient = z.double(), v.double(), gradient.double()
    step, momentum = (x.double().view(-1, *[1] * (z.ndim - 1)) for x in (step, momentum))
    moved = v - step * gradient
    after = (moved.sign() * (moved.abs() - step * weight).clamp(min=0)).clamp(lower, upper)
    ahead = after + momentum * (after - z)
    if weight > 0:
        ahead = torch.where(ahead * after > 0, ahead, 0)
    ahead = ahead.clamp(lower, upper)
    return torch.where(step == 0, z, after), torch.where(step == 0, v, ahead)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 20), (2, 1), (7,), (3, 4, 5), (300, 123), (4, 0), (0, 4)])
def test_proximal_step(shape, dtype, limits, weight, device):
    z, v, *others = arguments(*shape, dtype=dtype, device=device)
    expected = formula(z, v, *others, weight, *limits)
    assert torch.ops.vjvcr.proximal_step(z, v, *others, weight, *limits) is None
    bound = tolerances.FLOAT32 if dtype == torch.float32 else tolerances.FLOAT64
    for made, right in zip((z, v), expected, strict=True):
        assert relative(made, right) <= bound


def test_zeros_are_exact_and_nan_is_not_hidden():
    z, v, gradient, step, momentum = arguments(4, 6)
    gradient[2, 3] = math.nan
    torch.ops.vjvcr.proximal_step(z, v, gradient, step, momentum, 1e9, -math.inf, math.inf)
    assert z[2, 3].isnan()
    z[2, 3] = 0
    assert not z[[0, 2, 3]].any()


@given(st.integers(1, 5), st.integers(0, 9), st.floats(0, 2), st.integers(0, 2**16))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_it_lowers_what_it_minimises(n, width, weight, seed):
    """(x - v)^2 / 2 + weight |x| is lower at the step's result than at a thousand other points x."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(n, width, generator=generator, dtype=torch.float64)
    z, one, zero = torch.zeros_like(v), torch.ones(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    torch.ops.vjvcr.proximal_step(z, v.clone(), torch.zeros_like(v), one, zero, weight, -math.inf, math.inf)
    others = torch.linspace(-4, 4, 1000, dtype=torch.float64)[:, None, None]
    value = (z - v) ** 2 / 2 + weight * z.abs()
    assert (value <= (others - v) ** 2 / 2 + weight * others.abs() + 1e-12).all()


@pytest.mark.cuda
def test_both_devices_round_alike():
    on_cpu, on_gpu = arguments(64, 40), arguments(64, 40, device="cuda")
    for made in (on_cpu, on_gpu):
        torch.ops.vjvcr.proximal_step(*made, 0.3, 0.0, 1.0)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(on_cpu, on_gpu, strict=True))


@pytest.mark.parametrize(
    ("at", "change", "words"),
    [
        (0, lambda x: x.half(), "float32 or float64"),
        (1, lambda x: x[:2], "z's shape"),
        (2, lambda x: x.double(), "dtype and device"),
        (3, lambda x: x[:2], "one number a sample"),
        (2, lambda x: x.mT.contiguous().mT, "contiguous"),
    ],
)
def test_what_does_not_fit_is_named(at, change, words):
    tensors = arguments(3, 4)
    tensors[at] = change(tensors[at])
    with pytest.raises(RuntimeError, match=words):
        torch.ops.vjvcr.proximal_step(*tensors, 0.3, -1.0, 1.0)


def test_opcheck():
    torch.library.opcheck(torch.ops.vjvcr.proximal_step.default, (*arguments(3, 4), 0.3, -1.0, 1.0))


def test_compiled():
    def twice(z, v, *others):
        z, v = z.clone(), v.clone()
        for _ in range(2):
            torch.ops.vjvcr.proximal_step(z, v, *others, 0.3, -1.0, 1.0)
        return z, v

    tensors = arguments(3, 4)
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(*tensors), twice(*tensors), strict=True))


def test_the_step_size_changes_alike_in_the_sources_and_in_python():
    host = pytest.importorskip("vjvcr_fast._native", reason="pybind11 was not there when the operators were built")
    for name in ("GROWTH_AT_FIRST", "GROWTH", "SHRINKAGE"):
        assert getattr(host, name) == getattr(reference, name)


# -- All steps for an MLP predictor ---------------------------------------------------------------------------------

RULES = {
    "fista": SparseLatent(5, 1e-2, 30),
    "ista": SparseLatent(5, 1e-2, 30, method="ista"),
    "nonnegative": SparseLatent(5, 1e-2, 30, nonnegative=True),
    "no penalty": SparseLatent(5, 0.0, 30),
    "fixed": SparseLatent(5, 1e-2, 30, step_rule="fixed", lr=0.1),
    "too long": SparseLatent(5, 1e-2, 12, step_rule="fixed", lr=1e3, tolerance=0.0),
    "momentum": ContinuousLatent((5,), 30, lr=0.3),
    "box": ContinuousLatent((5,), 30, lr=0.3, clamp=(0.0, 1.0)),
}


def mlp(n: int = 9, latent: int = 5, hidden: int = 24, width: int = 30, seed: int = 0) -> MLPEnergy:
    """In float64."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    scale = hidden**-0.5
    w1z = torch.nn.functional.normalize(random(hidden, latent), dim=0)
    w2, w3 = random(hidden, hidden) * scale, random(width, hidden) * scale
    return MLPEnergy(random(n, hidden), w1z, w2, random(hidden), w3, random(width), random(n, width))


def moved(energy: MLPEnergy, device: str) -> MLPEnergy:
    return MLPEnergy(**{name: tensor.to(device) for name, tensor in vars(energy).items()})


def infer(latent, energy: MLPEnergy, dtype: torch.dtype = torch.float64, z0: Tensor | None = None) -> LatentResult:
    """By the operator, which must really be called."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(descent, "_fused", lambda *a, fused=descent._fused: calls.append(1) or fused(*a))
        result = latent.infer(energy, len(energy.p), device=energy.p.device, dtype=dtype, z0=z0)
    assert calls, "the operator was not asked"
    return result


def infer_in_torch(latent, energy: MLPEnergy, z0: Tensor | None = None) -> LatentResult:
    """In torch operations, float64, on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "MISSING", "not wanted")
        return latent.infer(energy, len(energy.p), device="cpu", dtype=torch.float64, z0=z0)


def assert_same(found: LatentResult, right: LatentResult, bound: float) -> None:
    assert torch.equal(found.steps.cpu(), right.steps)
    assert torch.equal(found.z.cpu() == 0, right.z == 0)
    assert relative(found.z, right.z) <= bound
    assert relative(found.energy, right.energy) <= bound


@pytest.fixture(params=ways.HERE)
def instructions(request, monkeypatch):
    """Each instruction set of this CPU."""
    ways.take(request.param, monkeypatch)


@pytest.fixture
def threads():
    """torch.set_num_threads, for this test only."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("rule", RULES)
def test_fista_mlp_is_the_loop_in_torch(rule):
    assert_same(infer(RULES[rule], mlp()), infer_in_torch(RULES[rule], mlp()), tolerances.LATENT_PLAIN)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("size", [{"n": 1}, {"n": 2, "hidden": 1}, {"hidden": 17, "width": 1}, {"n": 70, "hidden": 33}])
@pytest.mark.parametrize("latent", [1, 3, 20])
def test_fista_mlp_of_other_sizes(size, latent):
    rule, energy = SparseLatent(latent, 1e-2, 25), mlp(latent=latent, **size)
    z0 = torch.linspace(-2, 2, len(energy.p) * latent, dtype=torch.float64).view(-1, latent)
    assert_same(infer(rule, energy, z0=z0), infer_in_torch(rule, energy, z0), tolerances.LATENT_PLAIN)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES)
def test_fista_mlp_in_float32(rule, device):
    """Rounding changes the steps, so we compare the energy."""
    energy = mlp(n=40)
    found = infer(RULES[rule], moved(energy.to(torch.float32), device), torch.float32)
    right = infer_in_torch(RULES[rule], energy)
    assert relative(found.energy.mean(), right.energy.mean()) <= tolerances.LATENT_ROUTES


def test_samples_leave_the_batch_as_they_are():
    """Samples that froze after different steps, in a batch that shrinks, and each alone."""
    energy, rule = mlp(n=64, seed=1), SparseLatent(5, 3e-2, 400, tolerance=1e-3)
    together = infer(rule, energy)
    assert len(together.steps.unique()) > 8
    assert together.steps.max() < 400
    fields = vars(energy)
    for i in (0, 17, 63):
        own = {name: fields[name][i : i + 1] for name in ("p", "target")}
        alone = infer(rule, MLPEnergy(**{**fields, **own}))
        assert relative(alone.z[0], together.z[i]) <= tolerances.LATENT_PLAIN
        assert alone.steps[0] == together.steps[i]


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["fista_mlp", "newton_mlp"])
def test_a_sample_has_the_same_bits_in_any_batch_and_on_any_number_of_threads(name, dtype, threads):
    """Samples that are frozen after different steps, and one without a finite energy."""
    n = 70
    energy = mlp(n=n, seed=1, hidden=100).to(dtype)
    energy.p[1, 2] = math.nan
    z0 = torch.zeros(n, 5, dtype=dtype)
    made = energy.expand(z0)
    tensors = dict(zip(("z0", "p", "w1z", "w2", "b2", "gram", "u0", "r", "start"), made.operands(z0), strict=True))
    options = {"scale": made.scale, "weight": 1e-2, "tolerance": 1e-3, "steps": 60}
    if name == "fista_mlp":
        options |= {"lower": -math.inf, "upper": math.inf, "momentum": -1.0, "backtracking": True, "lr": 1.0}
        options["bf16"] = False
    else:
        tensors["B"] = reference.with_ridge(made.curvature())
        options |= {"low": -math.inf, "sweeps": 4, "settled": 1e-3, "damped": 0.2, "least": 1e-2, "most": 1e2}

    def call(part: slice, count: int) -> list[Tensor]:
        threads(count)
        own = {key: tensors[key][part] for key in ("z0", "p", "u0", "r", "start")}
        found = getattr(torch.ops.vjvcr, name)(**{**tensors, **own}, **options)
        return [x.nan_to_num(nan=-1.0) for x in found]

    right = call(slice(None), 1)
    assert len(right[3].unique()) > 8
    assert right[4].nonzero().tolist() == [[1]]
    for part in (slice(None), slice(0, 1), slice(1, 4), slice(20, 53)):
        for count in (1, 2, 5):
            assert all(a.equal(b[part]) for a, b in zip(call(part, count), right, strict=True))


def test_the_energy_of_long_runs_in_float64():
    found = infer(SparseLatent(5, 1e-2, 100), mlp(n=64).to(torch.float32), torch.float32)
    long = infer_in_torch(SparseLatent(5, 1e-2, 3000, tolerance=0.0), mlp(n=64))
    assert found.energy.mean() <= long.energy.mean() * (1 + tolerances.LATENT_OPTIMUM)


def test_twice_the_same_bits_of_fista_mlp():
    first, second = (infer(RULES["fista"], mlp(n=100).to(torch.float32), torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_lost(value):
    energy = mlp()
    energy.p[3, 2] = value
    quiet, clean = dataclasses.replace(RULES["fista"], check=False), mlp()
    found, right = infer(quiet, energy), infer(quiet, clean)
    others = [i for i in range(9) if i != 3]
    assert relative(found.z[others], right.z[others]) <= tolerances.LATENT_PLAIN
    assert not found.z[3].any(), "it keeps z0"
    with pytest.raises(NonFiniteEnergyError, match="not finite at z0 for 1 of 9 samples"):
        infer(RULES["fista"], energy)


def arguments_of_fista(dtype: torch.dtype = torch.float64) -> list[object]:
    z0 = torch.zeros(9, 5, dtype=dtype)
    energy = mlp().to(dtype)
    made = energy.expand(z0)
    tensors = [z0, energy.p, energy.w1z, energy.w2, energy.b2, made.G, made.u0, made.r, made.start]
    return [*tensors, made.scale, 0.01, -math.inf, math.inf, -1.0, True, 1.0, 1e-4, 7, False]


@pytest.mark.parametrize(
    ("at", "change", "words"),
    [
        (0, lambda x: x[0], r"z0 must be \(N, m\)"),
        (1, lambda x: x[:3], r"p must be \(N, H\)"),
        (2, lambda x: x.T.contiguous(), r"w1z must be \(H, m\) = \(24, 5\)"),
        (3, lambda x: x[:, :-1].contiguous(), r"w2 and gram must be \(H, H\), H = 24"),
        (4, lambda x: x[:-1], r"b2 must be \(H,\), H = 24"),
        (6, lambda x: x[:-1], "u0 and r must have p's shape"),
        (8, lambda x: x[:-1], r"start must be \(N,\), N = 9"),
        (7, lambda x: x.float(), "dtype and device"),
        (5, lambda x: x.T, "contiguous"),
        (18, lambda x: True, "bf16=True needs a CUDA GPU"),
    ],
)
def test_what_fista_mlp_cannot_take_is_named(at, change, words):
    given = arguments_of_fista()
    given[at] = change(given[at])
    with pytest.raises(RuntimeError, match=words):
        torch.ops.vjvcr.fista_mlp(*given)


def test_opcheck_of_fista_mlp():
    torch.library.opcheck(torch.ops.vjvcr.fista_mlp.default, tuple(arguments_of_fista()))


def test_inference_compiled():
    def whole(p: Tensor) -> Tensor:
        quiet = dataclasses.replace(RULES["fista"], check=False)
        return quiet.infer(dataclasses.replace(mlp_energy, p=p), len(p), device="cpu", dtype=torch.float64).z

    mlp_energy = mlp()
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    assert relative(compiled(mlp_energy.p), whole(mlp_energy.p)) <= tolerances.LATENT_PLAIN


def test_compile_takes_the_operator_as_well():
    """And compiles nothing, so it does not change a bit."""
    settings = dataclasses.replace(RULES["fista"], compile=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", None)
        found = infer(settings, mlp())
    assert all(torch.equal(a, b) for a, b in zip(found, infer(RULES["fista"], mlp()), strict=True))


# -- Which GPUs are served, and how it is launched there ------------------------------------------------------------


def test_the_launch_plan_of_an_h100():
    """It has no more clusters than run at once: a second wave would double the time."""
    for hidden in (256, 512, 1024):
        for bf16 in (True, False):
            found = native.plan(hidden, bf16=bf16)
            assert found["cluster"] * found["clusters"] <= 132
            assert found["clusters"] * found["samples"] >= 256
            assert found["shared_bytes"] <= 227 << 10
            assert found["clusters"] <= found["at_once"] or (hidden, bf16) == (1024, False)  # there is no such plan
    assert native.plan(256)["resident"] == 1
    assert native.plan(512, latent=128)["refusal"] is None
    assert native.plan(512, latent=129) == {
        "refusal": "at most 128 latents, and no more of both than fits into shared memory"
    }
    assert "hidden 512: 8 clusters of 8 blocks (15 run at once), 32 samples each" in native.explain_plan()


@pytest.mark.parametrize(("n", "hidden", "latent"), [(0, 8, 4), (8, 0, 4), (8, 8, 0)])
def test_a_plan_needs_sizes(n, hidden, latent):
    with pytest.raises(RuntimeError, match=f"n={n}, hidden={hidden}, latent={latent}: positive numbers are needed"):
        native.plan(hidden, n, latent)


BUILT = "sm_80 sm_90a compute_80"  # what native_build.py asks of nvcc


def on_a_gpu(patch: pytest.MonkeyPatch, capability: tuple[int, int], built: str = BUILT) -> None:
    """As if there were a GPU of this compute capability with the clusters of an H100, and operators that were built for
    these architectures."""
    plan = torch.ops.vjvcr.fista_plan
    patch.setattr(native, "ARCHITECTURES", built)
    patch.setattr(torch.ops.vjvcr, "fista_plan", lambda *sizes: plan(*sizes[:-1], -1))
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "current_device", lambda: 0)
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


class OnAGPU(SimpleNamespace):
    """The parts of a tensor that native looks at."""

    is_cuda, device, dtype, shape = True, torch.device("cuda", 0), torch.float32, (256, 20)

    def get_device(self) -> int:
        return 0

    def __len__(self) -> int:
        return self.shape[0]


@pytest.mark.parametrize(
    ("built", "capability", "step", "fista"),
    [
        (BUILT, (7, 5), False, False),
        (BUILT, (8, 0), True, False),
        (BUILT, (8, 6), True, False),
        (BUILT, (8, 9), True, False),
        (BUILT, (9, 0), True, True),
        (BUILT, (10, 0), True, False),
        (BUILT, (12, 0), True, False),
        ("sm_80 sm_90a", (9, 0), True, True),
        ("sm_80 sm_90a", (10, 0), False, False),
        ("sm_80 sm_90a", (12, 0), False, False),
        ("sm_90a", (8, 0), False, False),
        ("sm_90a", (9, 0), True, True),
        ("sm_86", (8, 0), False, False),
        ("sm_86", (8, 9), True, False),
        ("sm_86 compute_86", (9, 0), True, False),  # fista_mlp's kernels are empty in it
        ("compute_90a", (9, 0), True, True),
        ("compute_90a", (10, 0), False, False),
        ("sm_100 sm_120", (10, 3), True, False),
        ("", (8, 0), False, False),
        ("", (9, 0), False, False),
    ],
)
def test_what_was_built_decides(built, capability, step, fista, monkeypatch):
    """Machine code serves its own major version from its minor version on, "a" one capability alone, PTX all newer
    ones; fista_mlp needs code for 9.0."""
    on_a_gpu(monkeypatch, capability, built)
    assert native.serves(OnAGPU()) is step
    assert native.serves_fista(OnAGPU(), 512, True) is fista
    assert not native.serves(OnAGPU(dtype=torch.float16))
    assert not native.serves_fista(OnAGPU(dtype=torch.float64), 512, True)
    assert not native.serves_fista(OnAGPU(shape=(256, 129)), 512, True)

    this = f"this GPU has compute capability {capability[0]}.{capability[1]}, "
    no_code = f"{this}the operators were built for {built}" if built else "the operators were not built for CUDA"
    assert native.explain() == (f"CPU, CUDA for {built}" if step else f"CPU only: {no_code}")
    refusal = None if fista else f"{this}fista_mlp needs 9.0" if built and capability != (9, 0) else no_code
    assert native.plan(512)["refusal"] == refusal
    said = native.explain_plan()
    assert said.startswith("this GPU, N = 256, bf16: hidden 256: ") if fista else said == f"not served: {refusal}"


def test_no_plan_is_served_if_cuda_says_that_none_runs(monkeypatch):
    on_a_gpu(monkeypatch, (9, 0))
    why = "CUDA says that no cluster of thread blocks with 1000 bytes of shared memory each can run on this GPU"
    monkeypatch.setattr(torch.ops.vjvcr, "fista_plan", lambda *sizes: ([], why))
    assert not native.serves_fista(OnAGPU(), 512, True)
    assert native.serves(OnAGPU())
    assert native.plan(512) == {"refusal": why}
    assert native.explain_plan() == f"not served: {why}"


def test_operators_of_older_sources_are_not_used(monkeypatch):
    monkeypatch.setattr(torch.ops, "vjvcr", SimpleNamespace())
    assert native._load() == f"built from older sources: {native_build.COMMAND}"


# -- In a CUDA graph ------------------------------------------------------------------------------------------------

CAPTURE = """if True:
    import sys
    import torch
    from vjvcr_fast import native
    z, v, gradient = (torch.ones(4, 3, device="cuda") for _ in range(3))
    p, w2, one = (torch.ones(shape, device="cuda") for shape in ((4, 8), (8, 8), 4))
    limits, step_rule = (0.0, -9.0, 9.0), (-1.0, True, 1.0, 0.0)

    def proximal_step():
        torch.ops.vjvcr.proximal_step(z, v, gradient, one, one, *limits)

    def fista_mlp():
        tensors = (z, p, w2[:, :3].contiguous(), w2, w2[0].contiguous(), w2, p, p, one)
        torch.ops.vjvcr.fista_mlp(*tensors, 1.0, *limits, *step_rule, 3, True)

    def capture():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        torch.cuda.synchronize()

    call = {"proximal_step": proximal_step, "fista_mlp": fista_mlp}[sys.argv[1]]
    torch.cuda.synchronize()
    try:
        capture()
    except RuntimeError as error:
        print(error)
    call()
    capture()
    print("captured")
"""


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["proximal_step", "fista_mlp"])
def test_a_first_call_in_a_capture_says_what_to_do(name):
    """In a process of its own, where nothing is loaded yet."""
    if name == "fista_mlp" and (why := native.plan(8, 4, 3)["refusal"]):
        pytest.skip(why)
    done = subprocess.run([sys.executable, "-c", CAPTURE, name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{name}: this is its first call with these sizes on this GPU, inside the capture" in done.stdout
    assert done.stdout.endswith("captured\n")
