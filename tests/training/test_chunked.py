"""A batch in chunks against one pass over the whole batch."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vjvcr_fast.config import override, preset
from vjvcr_fast.losses import vcr_loss
from vjvcr_fast.models.convnet import ConvDecoder, ConvEncoder, MLPPredictor
from vjvcr_fast.models.energy import ROWS, Energy, EnergyModel
from vjvcr_fast.models.simvp import SimVPDecoder, SimVPEncoder
from vjvcr_fast.models.swin import SwinPredictor
from vjvcr_fast.training import chunked
from vjvcr_fast.training.build import build_model
from vjvcr_fast.training.chunked import backward_chunked, check_no_mixing, energy_chunked

pytestmark = pytest.mark.usefixtures("one_thread")

N = 7


def model(row: str, dtype: torch.dtype = torch.float64, latent: int = 0, checkpoint: bool = False, **options):
    torch.manual_seed(0)
    encoder = SimVPEncoder(3, 16, (4, 6), 5, checkpoint=checkpoint)
    predictor = SwinPredictor((5, 4, 4), 2, 3, 8, 2, 2, 2, latent_dim=latent, checkpoint=checkpoint)
    decoder = SimVPDecoder(3, 16, (4, 6), 5, checkpoint=checkpoint) if ROWS[row].pixel else None
    settings = {"alpha": 1.0, "beta": 0.4, "gamma": 0.7, **options}
    return EnergyModel(encoder, predictor, decoder, row, **settings).to(dtype)


def batch(dtype: torch.dtype = torch.float64, n: int = N, latent: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.rand(n, t, 3, 16, 16, generator=generator, dtype=dtype) for t in (2, 3))
    return x, y, torch.rand(n, latent, generator=generator, dtype=dtype) if latent else None


def one_pass(of: EnergyModel, x: Tensor, y: Tensor, z: Tensor | None) -> tuple[Energy, list[Tensor | None]]:
    of.zero_grad()
    energy = of(x, y, z)
    energy.loss.backward()
    return Energy(*(term.detach() for term in energy)), [p.grad for p in of.parameters()]


def in_chunks(of: EnergyModel, x: Tensor, y: Tensor, z: Tensor | None, chunk: int):
    of.zero_grad()
    energy = backward_chunked(of, x, y, z, chunk=chunk)
    return energy, [p.grad for p in of.parameters()]


def assert_equal(found, right, bound: float) -> None:
    for ours, theirs in zip(found[0], right[0], strict=True):
        assert not ours.requires_grad
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)
    assert len(found[1]) == len(right[1])
    largest = max(g.abs().max() for g in right[1] if g is not None)
    for ours, theirs in zip(found[1], right[1], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert (ours - theirs).abs().max() <= bound * largest


@pytest.mark.parametrize("chunk", [1, 2, 3, N, N + 5])
@pytest.mark.parametrize("row", ROWS)
def test_loss_and_gradient_are_those_of_one_pass(row: str, chunk: int) -> None:
    of, inputs = model(row), batch()
    right = one_pass(of, *inputs)
    assert_equal(in_chunks(of, *inputs, chunk), right, 1e-12)
    torch.testing.assert_close(energy_chunked(of, *inputs, chunk=chunk), right[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(
    "options",
    [
        {"latent": 4},
        {"checkpoint": True},
        {"threshold": 1e-6},
        {"threshold": 10.0},
        {"gamma": 0.0},
        {"beta": 0.0},
        {"distance": "sum"},
    ],
    ids=str,
)
def test_with_a_latent_and_other_settings(row: str, options: dict) -> None:
    """The hinge off and on everywhere, terms of weight zero, recomputed activations."""
    of, inputs = model(row, **options), batch(latent=options.get("latent", 0))
    right = one_pass(of, *inputs)
    assert_equal(in_chunks(of, *inputs, 3), right, 1e-12)
    torch.testing.assert_close(energy_chunked(of, *inputs, chunk=3), right[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("row", ROWS)
def test_in_float32(row: str) -> None:
    of, inputs = model(row, torch.float32), batch(torch.float32)
    assert_equal(in_chunks(of, *inputs, 2), one_pass(of, *inputs), 1e-5)


@pytest.mark.parametrize("row", ROWS)
def test_under_autocast(row: str) -> None:
    """Activations of a sample round in the same way in both. Sums over samples, as gradients of weights, do not."""
    of, (x, y, z) = model(row, torch.float32), batch(torch.float32)
    of.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        right = of(x, y, z)
    right.loss.backward()
    gradients = [p.grad for p in of.parameters()]
    of.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = backward_chunked(of, x, y, z, chunk=3)
    assert_equal((found, [p.grad for p in of.parameters()]), (Energy(*(t.detach() for t in right)), gradients), 3e-2)


def test_gradients_are_added_to_what_is_there() -> None:
    of, inputs = model("vj-vcr-decoder"), batch()
    _, right = one_pass(of, *inputs)
    right = [2 * g for g in right]
    in_chunks(of, *inputs, 2)
    backward_chunked(of, *inputs, chunk=3)
    for p, theirs in zip(of.parameters(), right, strict=True):
        torch.testing.assert_close(p.grad, theirs, rtol=1e-10, atol=1e-12)


def test_frozen_parameters_stay_without_a_gradient() -> None:
    of, inputs = model("vj-vcr-decoder"), batch()
    of.encoder.requires_grad_(False)
    assert_equal(in_chunks(of, *inputs, 2), one_pass(of, *inputs), 1e-12)
    assert all(p.grad is None for p in of.encoder.parameters())


class Dropping(nn.Module):
    """A module followed by dropout."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.of = of

    def forward(self, *inputs: Tensor) -> Tensor:
        return nn.functional.dropout(self.of(*inputs), 0.4)


def test_random_layers_draw_the_same_numbers_twice() -> None:
    """Against one graph with the same draws: first the encoder chunk by chunk, then predictor and decoder."""
    of, (x, y, _) = model("vj-vcr-decoder"), batch()
    of.encoder, of.predictor = Dropping(of.encoder), Dropping(of.predictor)
    parts = [slice(0, 3), slice(3, 6), slice(6, 7)]
    torch.manual_seed(5)
    h = [(of.encoder(x[p]), of.encode_targets(y[p])) for p in parts]
    h_x, h_y = (torch.cat(frames) for frames in zip(*h, strict=True))
    vcr = vcr_loss([h_x, h_y], alpha=of.alpha, beta=of.beta)
    predicted = torch.cat([of.predictor(h_x[p]) for p in parts])
    hidden, pixel = (predicted - h_y).square().mean(), (of.decoder(predicted) - y).square().mean()
    of.zero_grad()
    (vcr.loss + hidden + of.gamma * pixel).backward()
    right = [p.grad for p in of.parameters()]
    after = torch.get_rng_state()
    torch.manual_seed(5)
    found = in_chunks(of, x, y, None, 3)
    assert torch.get_rng_state().equal(after)
    energy = Energy(
        *(t.detach() for t in (vcr.loss + hidden + of.gamma * pixel, hidden, pixel, vcr[1], vcr[2], 0 * vcr[0]))
    )
    assert_equal(found, (energy, right), 1e-12)


def test_y_is_not_encoded_where_nothing_asks_for_it() -> None:
    of, inputs = model("generative"), batch()
    encoded = []
    of.encoder.register_forward_hook(lambda *_: encoded.append(1))
    backward_chunked(of, *inputs, chunk=4)
    assert len(encoded) == 2


def saved_at_most(of: EnergyModel, n: int, chunk: int) -> int:
    """The most bytes that autograd keeps for backward at the same time."""
    alive, most = 0, 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal alive, most
            self.tensor, self.bytes = tensor, tensor.nbytes
            alive += self.bytes
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= self.bytes

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        backward_chunked(of, *batch(torch.float32, n), chunk=chunk)
    return most


def test_activations_are_those_of_one_chunk() -> None:
    """32 videos in chunks of 4 need hardly more than 8 videos: the rest is weights, and N T d numbers for VCR."""
    of = model("vj-vcr-decoder", torch.float32)
    small, large, whole = saved_at_most(of, 8, 4), saved_at_most(of, 32, 4), saved_at_most(of, 32, 32)
    assert large < 1.15 * small
    assert whole > 6 * large


class Peak(TorchDispatchMode):
    """The most bytes of all tensors that are alive at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.most = 0
        self.known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def drop(self, count: int) -> None:
        self.alive -= count

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage not in self.known:
                self.known[storage] = storage.nbytes()
                self.alive += storage.nbytes()
                self.most = max(self.most, self.alive)
                weakref.finalize(storage, self.drop, storage.nbytes())
        return out


def peak_of_cater(
    monkeypatch: pytest.MonkeyPatch, row: str, chunk: int, checkpoint: bool, work: Any = backward_chunked
) -> float:
    """GiB that a step of the preset needs, with inputs and gradients, counted on tensors without data. work:
    energy_chunked for a validation."""
    config = override(preset("cater"), {"model.row": row, "model.checkpoint": checkpoint})
    n, t, side = config.train.batch, config.data.frames_in, config.data.canvas
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, **_: tensor)  # looks at numbers
    monkeypatch.setattr(nn.Module, "to", lambda self, *_, **__: self)  # as does swapping weights
    monkeypatch.setattr(chunked, "_random_state", lambda device: (None, None))
    monkeypatch.setattr(chunked, "_set_random_state", lambda state, device: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        of = build_model(config, torch.device("cpu"))
        with Peak() as peak, torch.autocast("cpu", dtype=torch.bfloat16):
            x, y, z = torch.rand(n, t, 3, side, side), torch.rand(n, t, 3, side, side), torch.rand(n, 14 * t)
            work(of, x, y, z, chunk=chunk)
    return peak.most / 2**30


@pytest.mark.slow
def test_a_batch_of_cater_fits_a_gpu_of_80_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    """160 x 100 frames of 128x128 in bfloat16 do not fit as they are. With recomputation they fit, in chunks easily."""
    assert peak_of_cater(monkeypatch, "vj-vcr", 160, False) > 80
    assert peak_of_cater(monkeypatch, "vj-vcr", 160, True) < 50
    assert peak_of_cater(monkeypatch, "vj-vcr", 16, True) < 10
    assert peak_of_cater(monkeypatch, "generative", 16, True) < 12
    assert peak_of_cater(monkeypatch, "generative", 160, True, energy_chunked) > 24
    assert peak_of_cater(monkeypatch, "generative", 16, True, energy_chunked) < 12


def test_layers_that_mix_samples_are_refused_by_name() -> None:
    sizes = (3, (4, 4, 4), 16, 2)
    encoder = ConvEncoder(*sizes)
    of = EnergyModel(
        encoder, MLPPredictor(encoder.d, 2, 3, 8), ConvDecoder(*sizes), "vj-vcr-decoder", alpha=1, beta=1, gamma=1
    )
    with pytest.raises(ValueError, match=r"encoder\.spatial\.0\.1 \(BatchNorm2d\), .* and \d+ more"):
        backward_chunked(of, *batch(torch.float32), chunk=2)
    with pytest.raises(ValueError, match="SyncBatchNorm"):
        check_no_mixing(nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(4)))
    check_no_mixing(build_model(override(preset("cater"), {"train.device": "cpu"}), torch.device("cpu")))


def test_wrong_arguments() -> None:
    of, (x, y, z) = model("vj-vcr", latent=4), batch(latent=4)
    with pytest.raises(ValueError, match="chunk=0"):
        backward_chunked(of, x, y, z, chunk=0)
    assert z is not None
    with pytest.raises(ValueError, match="z requires a gradient"):
        backward_chunked(of, x, y, z.requires_grad_(), chunk=2)


@pytest.mark.cuda
@pytest.mark.parametrize("row", ROWS)
def test_on_a_gpu(row: str) -> None:
    of = model(row, torch.float32).cuda()
    x, y, _ = batch(torch.float32)
    assert_equal(in_chunks(of, x.cuda(), y.cuda(), None, 3), one_pass(of, x.cuda(), y.cuda(), None), 1e-4)
