"""The networks, and the energy against the equations written out in reference.py."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import FLOAT64, GRADIENT_FLOOR, relative
from torch import Tensor, nn

from vjvcr_fast import reference
from vjvcr_fast.config import Config, override
from vjvcr_fast.latents import HeadEnergy, MLPEnergy
from vjvcr_fast.models.convnet import ConvDecoder, ConvEncoder, MLPPredictor
from vjvcr_fast.models.energy import ROWS, EnergyModel
from vjvcr_fast.training.build import build_model

N, T_X, T_Y, SIZE = 6, 2, 3, 16
CHANNELS = (4, 5, 6)
WEIGHTS = {"alpha": 0.7, "beta": 0.3, "gamma": 1.9}
CPU = torch.device("cpu")
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def encoder(pool: int = 2, size: int = SIZE, **settings: Any) -> ConvEncoder:
    return ConvEncoder(**{"in_channels": 1, "channels": CHANNELS, "size": size, "pool": pool, **settings})


def energy(row: str) -> EnergyModel:
    """A model in float64, with other running statistics than a new BatchNorm has."""
    enc = encoder()
    decoder = ConvDecoder(1, CHANNELS, SIZE, 2) if ROWS[row].pixel else None
    model = EnergyModel(enc, MLPPredictor(enc.d, T_X, T_Y, 32), decoder, row, **WEIGHTS).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
    return model


def frames(t: int, n: int = N, size: int = SIZE) -> Tensor:
    return torch.rand(n, t, 1, size, size, dtype=torch.float64)


class Calls:
    """Records the inputs and outputs of every call of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        module.register_forward_hook(self._record)

    def _record(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.inputs.append(inputs[0])
        self.outputs.append(output)


# -- Networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 2, 3, 12])
@pytest.mark.parametrize("unpool", ["nearest", "learned"])
@pytest.mark.parametrize(("size", "pool"), [(8, 1), (16, 1), (16, 2), (32, 2), (64, 4)])
def test_shapes(size: int, pool: int, unpool: str, t: int) -> None:
    enc, dec = encoder(pool, size), ConvDecoder(1, CHANNELS, size, pool, unpool=unpool)
    h = enc(torch.rand(2, t, 1, size, size))
    assert enc.d == CHANNELS[-1] * pool**2
    assert h.shape == (2, t, enc.d)
    assert dec(h).shape == (2, t, 1, size, size)


def test_colour() -> None:
    h = encoder(in_channels=3)(torch.rand(2, 4, 3, SIZE, SIZE))
    assert ConvDecoder(3, CHANNELS, SIZE, 2)(h).shape == (2, 4, 3, SIZE, SIZE)


@pytest.mark.parametrize("part", [ConvEncoder, ConvDecoder])
@pytest.mark.parametrize(
    ("channels", "size", "pool", "message"),
    [
        ((4, 4), 16, 2, r"channels=\(4, 4\): three positive numbers"),
        ((4, 4, 4, 4), 16, 2, r"channels=\(4, 4, 4, 4\)"),
        ((4, 0, 4), 16, 2, r"channels=\(4, 0, 4\)"),
        ((4, 4, 4), 20, 2, "size=20: .* multiple of 8"),
        ((4, 4, 4), 0, 1, "size=0"),
        ((4, 4, 4), -8, 1, "size=-8"),
        ((4, 4, 4), 24, 2, "pool=2: must divide the 3x3 map that 24x24 frames give"),
        ((4, 4, 4), 16, 4, "pool=4"),
        ((4, 4, 4), 16, 0, "pool=0"),
    ],
)
def test_sizes_that_do_not_fit(part: Any, channels: tuple[int, ...], size: int, pool: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        part(1, channels, size, pool)


@pytest.mark.parametrize(("kernel", "reach"), [(3, 15), (5, 29), (7, 43)])
def test_what_a_cell_sees(kernel: int, reach: int) -> None:
    """Far from the border, and before pooling."""
    enc, frame = encoder(size=96, kernel=kernel).double().eval(), frames(1, 1, 96)[:, 0].requires_grad_()
    for block in enc.spatial:
        block[2] = nn.Identity()  # a ReLU may hide a pixel
    enc.spatial(frame)[0, :, 6, 6].sum().backward()
    rows, columns = frame.grad[0, 0].nonzero().unbind(1)
    assert [int(side.max() - side.min() + 1) for side in (rows, columns)] == [reach, reach]


@pytest.mark.parametrize("kernel", [0, -1, 4])
def test_a_kernel_without_a_centre(kernel: int) -> None:
    with pytest.raises(ValueError, match=f"kernel={kernel}: must be odd and above 0"):
        encoder(kernel=kernel)


@pytest.mark.parametrize(("name", "message"), [("unpool", "nearest or learned"), ("padding", "zeros or replicate")])
def test_unknown_choices(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"{name}='learnt': must be {message}"):
        ConvDecoder(1, CHANNELS, SIZE, 2, **{name: "learnt"})


def encoded_by_definition(enc: ConvEncoder, x: Tensor) -> Tensor:
    """The encoder frame by frame, with 3-D convolutions on (N, C, T, H, W) and running statistics."""
    maps = torch.stack([enc.spatial(frame) for frame in x.unbind(1)], dim=2)
    for conv, norm, _ in enc.temporal:
        maps = F.conv3d(maps, conv.weight.unsqueeze(-1), padding=(1, 0, 0))
        maps = F.batch_norm(maps, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps).relu()
    return F.avg_pool3d(maps, (1, enc.window, enc.window)).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("pool", [1, 2])
def test_encoder_is_its_definition(pool: int) -> None:
    """Folding axes into one another mixes up no frames, videos or cells."""
    enc = encoder(pool, size=32).double().eval()
    x = frames(5, size=32)
    assert relative(enc(x), encoded_by_definition(enc, x)) < FLOAT64


@pytest.mark.parametrize("padding", ["zeros", "replicate"])
def test_with_replicate_padding_what_stands_still_is_the_same_at_the_ends(padding: str) -> None:
    """A constant sequence gives a constant one. With zeros its first two and last two steps are others."""
    decoder = ConvDecoder(1, CHANNELS, SIZE, 2, padding).double().eval()
    out = decoder(h(1, 24).expand(-1, 6, -1))
    same = [relative(step, out[:, 2]) < FLOAT64 for step in out.unbind(1)]
    assert same == [padding == "replicate"] * 2 + [True] * 2 + [padding == "replicate"] * 2


def test_replicate_padding_is_that_of_torch() -> None:
    """Forward and gradient."""
    ours = ConvDecoder(1, CHANNELS, SIZE, 2, "replicate").double().temporal[0][0]
    x = torch.randn(2, CHANNELS[-1], 5, 4, dtype=torch.float64, requires_grad=True)
    sizes = CHANNELS[-1], CHANNELS[-1], (3, 1)
    theirs = nn.Conv2d(*sizes, padding=(1, 0), padding_mode="replicate", bias=False).double()
    theirs.load_state_dict(ours.state_dict())
    out = [conv(x) for conv in (ours, theirs)]
    assert relative(out[0], out[1]) < FLOAT64
    a, b = (torch.autograd.grad(y.square().sum(), x)[0] for y in out)
    assert relative(a, b) < FLOAT64


@pytest.mark.parametrize("unpool", ["nearest", "learned"])
def test_inside_a_place_only_learned_unpooling_draws_different_things(unpool: str) -> None:
    """One place of 16x16 cells, each of 8x8 pixels; two cells from the edge nothing else is seen."""
    decoder = ConvDecoder(1, CHANNELS, 128, 1, unpool=unpool).double().eval()
    cells = decoder(h(1, 6)).unfold(-2, 8, 8).unfold(-2, 8, 8)[0, 0, 0, 2:-2, 2:-2]
    same = all(relative(cell, cells[0, 0]) < FLOAT64 for cell in cells.flatten(0, 1))
    assert same == (unpool == "nearest")


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_frame_reaches_two_frames_around_it_and_no_other_video(part: str) -> None:
    module = (encoder() if part == "encoder" else ConvDecoder(1, CHANNELS, SIZE, 2)).double().eval()
    x = (frames(7, n=2) if part == "encoder" else torch.randn(2, 7, 24, dtype=torch.float64)).requires_grad_()
    (gradient,) = torch.autograd.grad(module(x)[0, 3].square().sum(), x)
    touched = gradient.flatten(2).abs().sum(dim=2) > 0
    assert touched.tolist() == [[False, True, True, True, True, True, False], [False] * 7]


def test_the_pooled_map_keeps_the_position() -> None:
    enc = encoder().double().eval()
    x = torch.zeros(2, 1, 1, SIZE, SIZE, dtype=torch.float64)
    x[0, ..., 2:6, 2:6] = x[1, ..., 10:14, 10:14] = 1
    near, far = enc(x).view(2, CHANNELS[-1], 2, 2)
    assert relative(near, far) > 0.01


def test_channels_last_changes_nothing() -> None:
    model, x, y = energy("vj-vcr-decoder"), frames(T_X), frames(T_Y)
    before = model(x, y)
    after = model.to(memory_format=torch.channels_last)(x, y)
    for name, a, b in zip(before._fields, before, after, strict=True):
        assert relative(b, a) < FLOAT64, name


def test_predictor_makes_all_target_frames_at_once() -> None:
    predictor = MLPPredictor(d=8, frames_in=T_X, frames_out=12, hidden=16).double()
    linear = [m for m in predictor.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(16, 16), (16, 16), (16, 12 * 8)]
    h_x = torch.randn(N, T_X, 8, dtype=torch.float64, requires_grad=True)
    predicted = predictor(h_x)
    assert predicted.shape == (N, 12, 8)
    for t in range(12):  # each depends on all input frames of its own video, and on no other
        (gradient,) = torch.autograd.grad(predicted[0, t].sum(), h_x, retain_graph=True)
        assert gradient[0].abs().sum(dim=1).gt(0).all()
        assert gradient[1:].count_nonzero() == 0


# -- Predictors with a latent ---------------------------------------------------------------------------------------


def predictor(**latent: int) -> MLPPredictor:
    return MLPPredictor(d=8, frames_in=T_X, frames_out=T_Y, hidden=16, **latent).double()


def h(t: int = T_X, d: int = 8) -> Tensor:
    return torch.randn(N, t, d, dtype=torch.float64)


def test_predictor_without_latent_has_the_parameters_it_had() -> None:
    names = [f"layers.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
    assert list(predictor().state_dict()) == names
    torch.manual_seed(1)
    plain = predictor().state_dict()
    torch.manual_seed(1)
    latent = predictor(latent_dim=5).state_dict()  # draws the same weights first
    assert all(latent[name].equal(plain[name]) for name in names)
    assert set(latent) - set(names) == {"latent_in.weight"}


def test_latent_is_concatenated_to_h_x() -> None:
    model, h_x, z = predictor(latent_dim=5), h(), torch.randn(N, 5, dtype=torch.float64)
    first, _, second, _, last = model.layers
    weight = torch.cat([first.weight, model.latent_in.weight], dim=1)
    a = F.linear(torch.cat([h_x.flatten(1), z], dim=1), weight, first.bias).relu()
    right = last(second(a).relu()).reshape(N, T_Y, 8)
    assert relative(model(h_x, z), right) < FLOAT64


def test_columns_of_the_latent_have_unit_norm() -> None:
    model = predictor(latent_dim=5)
    assert relative(model.latent_in.weight.norm(dim=0), torch.ones(5)) < 1e-6  # drawn in float32
    with torch.no_grad():
        model.latent_in.weight.mul_(torch.tensor([0.1, 1, 2, 3, 1e-8]))
        model.latent_in.weight[:, 3] = 0
    kept, before = model.latent_in.weight, model.latent_in.weight.clone()
    model.normalize_latent()
    assert model.latent_in.weight is kept
    assert kept.grad_fn is None
    assert kept.requires_grad
    used = torch.tensor([0, 1, 2, 4])
    assert relative(kept[:, used], before[:, used] / before[:, used].norm(dim=0)) < FLOAT64
    assert kept[:, 3].count_nonzero() == 0
    predictor().normalize_latent()  # nothing to do


def test_heads_are_selected_and_weighed() -> None:
    model, h_x = predictor(heads=3), h()
    u = model.layers(h_x.flatten(1))
    outputs = torch.stack([last(u).reshape(N, T_Y, 8) for last in model.last], dim=1)
    z = torch.rand(N, 3, dtype=torch.float64, requires_grad=True)
    assert relative(model(h_x, z), torch.einsum("nk,nktd->ntd", z, outputs)) < FLOAT64
    for i, one_hot in enumerate(torch.eye(3, dtype=torch.float64)):
        assert relative(model(h_x, one_hot.expand(N, -1)), outputs[:, i]) < FLOAT64
        assert relative(model.head(i, model.hidden(h_x)), outputs[:, i]) < FLOAT64
    (gradient,) = torch.autograd.grad(model(h_x, z).sum(), z)
    assert relative(gradient, outputs.sum(dim=(2, 3))) < FLOAT64


@pytest.mark.parametrize("sizes", [{"latent_dim": -1}, {"heads": 0}, {"latent_dim": 2, "heads": 2}], ids=str)
def test_latents_that_do_not_exist(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="one latent, latent_dim > 0 or heads > 1"):
        predictor(**sizes)


@pytest.mark.parametrize(
    ("sizes", "width", "message"),
    [
        ({}, 5, "has no latent, so takes no z"),
        ({"latent_dim": 5}, None, r"needs z \(6, 5\)"),
        ({"heads": 5}, None, r"needs z \(6, 5\)"),
        ({"latent_dim": 5}, 4, r"z has shape \(6, 4\): \(6, 5\) is needed"),
        ({"heads": 5}, 1, r"z has shape \(6, 1\): \(6, 5\) is needed"),
    ],
)
def test_z_missing_or_not_wanted(sizes: dict[str, int], width: int | None, message: str) -> None:
    z = None if width is None else torch.zeros(N, width, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        predictor(**sizes)(h(), z)


# -- Energy ---------------------------------------------------------------------------------------------------------


def by_definition(model: EnergyModel, row: str, x: Tensor, y: Tensor) -> Tensor:
    h_x, h_y = model.encoder(x), model.encode_targets(y)
    predicted = model.predictor(h_x)
    alpha, beta, gamma = WEIGHTS.values()
    if row == "vj-vcr":
        return reference.energy_vjvcr(h_x, h_y, predicted, alpha, beta)
    decoded = model.decoder(predicted)
    if row == "vj-vcr-decoder":
        return reference.energy_vjvcr(h_x, h_y, predicted, alpha, beta, gamma, decoded, y)
    unit = gamma**0.5  # equation (7) has no gamma, but pixels may have another unit
    if row == "generative-vcr":
        return reference.energy_generative(unit * decoded, unit * y, torch.cat([h_x, h_y], dim=1), alpha, beta)
    return reference.energy_generative(unit * decoded, unit * y)


@MODES
@pytest.mark.parametrize("row", ROWS)
def test_energy_is_the_equation(row: str, training: bool) -> None:
    model, x, y = energy(row).train(training), frames(T_X), frames(T_Y)
    names, parameters = zip(*model.named_parameters(), strict=True)
    right = by_definition(model, row, x, y)
    expected = torch.autograd.grad(right, parameters)
    terms = model(x, y)
    assert relative(terms.loss, right) < FLOAT64
    for name, a, b in zip(names, torch.autograd.grad(terms.loss, parameters), expected, strict=True):
        assert relative(a, b, scale=b.norm().clamp_min(GRADIENT_FLOOR)) < FLOAT64, name


@pytest.mark.parametrize("row", ROWS)
def test_terms_are_unweighted_and_absent_ones_zero(row: str) -> None:
    model, x, y = energy(row), frames(T_X), frames(T_Y)
    terms, has = model(x, y), ROWS[row]
    assert {name: bool(value != 0) for name, value in terms._asdict().items()} == {
        "loss": True,
        "hidden": has.hidden,
        "pixel": has.pixel,
        "variance": has.vcr,
        "covariance": has.vcr,
        "sigreg": False,
    }
    alpha, beta, gamma = WEIGHTS.values()
    total = terms.hidden + gamma * terms.pixel + alpha * terms.variance + beta * terms.covariance
    assert relative(terms.loss, total) < FLOAT64


@MODES
@pytest.mark.parametrize("row", ROWS)
def test_no_gradient_from_h_x_to_y(row: str, training: bool) -> None:
    model = energy(row).train(training)
    calls, x, y = Calls(model.encoder), frames(T_X), frames(T_Y).requires_grad_()
    model(x, y)
    (gradient,) = torch.autograd.grad(calls.outputs[0].square().sum(), y, allow_unused=True)
    assert calls.inputs[0] is x
    assert gradient is None or gradient.count_nonzero() == 0


@MODES
@pytest.mark.parametrize("row", ROWS)
def test_h_x_is_bit_identical_whatever_y_is(row: str, training: bool) -> None:
    """If x and y shared batch statistics it would show here, even with the gradient cut."""
    x, y, seen = frames(T_X), frames(T_Y), []
    for target in (y, torch.zeros_like(y), torch.full_like(y, torch.nan)):
        torch.manual_seed(1)
        model = energy(row).train(training)
        calls = Calls(model.encoder)
        model(x, target)
        seen.append(calls.outputs[0])
    assert seen[0].equal(seen[1])
    assert seen[0].equal(seen[2])


@MODES
def test_generative_model_without_vcr_never_encodes_y(training: bool) -> None:
    model, x = energy("generative").train(training), frames(T_X)
    calls = Calls(model.encoder)
    model(x, torch.full_like(frames(T_Y), torch.nan))
    assert len(calls.inputs) == 1
    assert calls.inputs[0] is x
    assert all(buffer.isfinite().all() for buffer in model.buffers())


@pytest.mark.parametrize("row", ["vj-vcr", "vj-vcr-decoder", "generative-vcr"])
def test_other_rows_encode_x_and_y_once_each(row: str) -> None:
    model, x, y = energy(row), frames(T_X), frames(T_Y)
    of_x, of_y = Calls(model.encoder), Calls(model.twin)
    model(x, y)
    assert len(of_x.inputs) == len(of_y.inputs) == 1
    assert of_x.inputs[0] is x
    assert of_y.inputs[0] is y


def test_x_and_y_have_statistics_of_their_own_and_the_same_weights() -> None:
    model, x, y = energy("vj-vcr").train(), frames(T_X), 0.2 + 0.1 * frames(T_Y)
    assert model.twin is not None
    of_x, of_y = (dict(encoder.named_buffers()) for encoder in (model.encoder, model.twin))
    before = {name: buffer.clone() for name, buffer in of_x.items()}
    model.encode_targets(y)
    assert all(of_x[name].equal(before[name]) for name in of_x)
    model(x, y).loss.backward()
    assert not of_x["spatial.0.1.running_mean"].equal(of_y["spatial.0.1.running_mean"])
    weights = [*model.encoder.parameters()]
    assert all(a is b for a, b in zip(weights, model.twin.parameters(), strict=True))
    assert len([*model.parameters()]) == len([*weights, *model.predictor.parameters()])


def test_an_encoder_without_statistics_has_no_twin() -> None:
    enc = encoder()
    for name, module in [*enc.named_modules()]:
        if isinstance(module, nn.BatchNorm2d):
            enc.set_submodule(name, nn.GroupNorm(1, module.num_features))
    model = EnergyModel(enc, MLPPredictor(enc.d, T_X, T_Y, 8), None, "vj-vcr", **WEIGHTS)
    assert model.twin is None
    y = frames(T_Y).float()
    assert model.encode_targets(y).equal(enc(y))


def test_a_row_that_never_encodes_y_takes_the_statistics_of_x() -> None:
    model, y = energy("generative").eval(), frames(T_Y)
    assert model.twin is None
    assert model.encode_targets(y).equal(model.encoder(y))
    twin = {f"twin.{name}": value for name, value in model.encoder.state_dict().items()}
    model.load_state_dict({**model.state_dict(), **twin})


def test_a_state_of_one_statistics_serves_both() -> None:
    model = energy("vj-vcr")
    old = {name: value for name, value in model.state_dict().items() if not name.startswith("twin.")}
    other = energy("vj-vcr")
    other.load_state_dict(old)
    for name, buffer in other.twin.named_buffers():
        assert buffer.equal(model.state_dict()[f"encoder.{name}"])
    with pytest.raises(RuntimeError, match="encoder"):
        other.load_state_dict({name: value for name, value in old.items() if "encoder" not in name})


def test_hidden_term_trains_the_encoder_through_both_sides() -> None:
    model, x, y = energy("vj-vcr"), frames(T_X), frames(T_Y)
    weights = tuple(model.encoder.parameters())
    h_x, h_y = model.encoder(x), model.encode_targets(y)
    predicted = model.predictor(h_x)
    through_x = torch.autograd.grad(F.mse_loss(predicted, h_y.detach()), weights, retain_graph=True)
    through_y = torch.autograd.grad(F.mse_loss(predicted.detach(), h_y), weights)
    whole = torch.autograd.grad(model(x, y).hidden, weights)
    for a, b, both in zip(through_x, through_y, whole, strict=True):
        assert a.count_nonzero() > 0
        assert b.count_nonzero() > 0
        assert relative(both, a + b, scale=both.norm().clamp_min(GRADIENT_FLOOR)) < FLOAT64


class Constant(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, h_x: Tensor) -> Tensor:
        return self.value


@pytest.mark.parametrize("row", ["vj-vcr-decoder", "generative-vcr", "generative"])
def test_decoder_sees_the_predicted_representation_only(row: str) -> None:
    model, y = energy(row), frames(T_Y)
    predicted = torch.randn(N, T_Y, model.encoder.d, dtype=torch.float64)
    model.predictor = Constant(predicted)
    calls = Calls(model.decoder)
    for _ in range(2):
        model(frames(T_X), y)
    assert all(seen is predicted for seen in calls.inputs)
    assert calls.outputs[0].equal(calls.outputs[1])


def test_predict_is_the_predictor_of_the_encoder() -> None:
    model, x = energy("vj-vcr").eval(), frames(T_X)
    assert model.predict(x).equal(model.predictor(model.encoder(x)))


def test_energy_is_float32_under_bfloat16() -> None:
    model = energy("vj-vcr-decoder").float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = model(frames(T_X).float(), frames(T_Y).float())
    assert {term.dtype for term in terms} == {torch.float32}


LATENTS = pytest.mark.parametrize("latent", [{"latent_dim": 4}, {"heads": 4}], ids=["sparse", "discrete"])


def energy_with(row: str, latent: dict[str, int]) -> EnergyModel:
    model = energy(row)
    model.predictor = MLPPredictor(model.encoder.d, T_X, T_Y, 32, **latent).double()
    return model


@LATENTS
@pytest.mark.parametrize("row", ROWS)
def test_energy_with_a_latent(row: str, latent: dict[str, int]) -> None:
    """z reaches the prediction and nothing else; the energy is differentiable in z."""
    model, x, y = energy_with(row, latent).eval(), frames(T_X), frames(T_Y)
    z = torch.rand(N, 4, dtype=torch.float64, requires_grad=True)
    predicted = model.predictor(model.encoder(x), z)
    assert model.predict(x, z).equal(predicted)
    terms, without = model(x, y, z), energy(row)
    without.load_state_dict({k: v for k, v in model.state_dict().items() if "predictor" not in k}, strict=False)
    without.predictor = Constant(predicted)
    for name, a, b in zip(terms._fields, terms, without.eval()(x, y), strict=True):
        assert relative(a, b) < FLOAT64, name
    (gradient,) = torch.autograd.grad(terms.loss, z)
    assert gradient.abs().sum(dim=1).gt(0).all()


@LATENTS
@pytest.mark.parametrize("gamma", [1.9, 0.0])
@pytest.mark.parametrize("row", ROWS)
def test_latent_energy_is_the_part_that_z_enters(row: str, gamma: float, latent: dict[str, int]) -> None:
    model, x, y = energy_with(row, latent).eval(), frames(T_X), frames(T_Y)
    model.gamma = gamma if gamma > 0 or model.terms.hidden else 1.0
    z = torch.rand(N, 4, dtype=torch.float64)
    h_x, h_y = model.encoder(x), model.encode_targets(y)
    predicted = model.predictor(h_x, z)
    right = torch.zeros(N, dtype=torch.float64)
    if model.terms.hidden:
        right = right + reference.energy_per_sample(predicted, h_y)
    if model.decoder is not None:
        right = right + model.gamma * reference.energy_per_sample(model.decoder(predicted), y)
    found = model.latent_energy(h_x, h_y, y)(z)
    assert relative(found, right) < FLOAT64
    terms = model(x, y, z)
    assert relative(found.mean(), terms.hidden + model.gamma * terms.pixel) < FLOAT64


def test_latent_energy_of_any_predictor() -> None:
    class Doubled(MLPPredictor):
        """A predictor whose forward is not the one that the closed form describes."""

        def forward(self, h_x: Tensor, z: Tensor | None = None) -> Tensor:
            return 2 * super().forward(h_x, z)

    model, h_x, h_y = energy("vj-vcr"), h(T_X, 24), h(T_Y, 24)
    model.predictor = Doubled(24, T_X, T_Y, 8, latent_dim=4).double()
    z = torch.rand(N, 4, dtype=torch.float64)
    right = reference.energy_per_sample(model.predictor(h_x, z), h_y)
    found = model.latent_energy(h_x, h_y)
    assert not isinstance(found, MLPEnergy)
    assert relative(found(z), right) < FLOAT64


def test_what_latent_energy_knows_more_about() -> None:
    h_x, h_y, y = h(T_X, 24), h(T_Y, 24), frames(T_Y)
    sparse, discrete = {"latent_dim": 4}, {"heads": 4}
    assert isinstance(energy_with("vj-vcr", sparse).latent_energy(h_x, h_y), MLPEnergy)
    assert not isinstance(energy_with("vj-vcr-decoder", sparse).latent_energy(h_x, h_y, y), MLPEnergy)
    assert not isinstance(energy_with("generative", sparse).latent_energy(h_x, None, y), MLPEnergy)
    assert isinstance(energy_with("vj-vcr-decoder", discrete).latent_energy(h_x, h_y, y), HeadEnergy)
    without_pixels = energy_with("vj-vcr-decoder", sparse)
    without_pixels.gamma = 0.0
    assert isinstance(without_pixels.latent_energy(h_x, h_y), MLPEnergy)


@pytest.mark.parametrize(
    ("row", "missing"), [("vj-vcr", "h_y"), ("vj-vcr-decoder", "y"), ("generative-vcr", "y"), ("generative", "y")]
)
def test_latent_energy_misses_a_target(row: str, missing: str) -> None:
    model, h_y = energy_with(row, {"latent_dim": 4}), h(T_Y, 24)
    with pytest.raises(ValueError, match=rf"^{missing} is missing"):
        model.latent_energy(h(T_X, 24), None if missing == "h_y" else h_y, None)


def test_unknown_row() -> None:
    enc = encoder()
    with pytest.raises(ValueError, match=r"row='jepa': choose one of vj-vcr, vj-vcr-decoder, generative-vcr, gen"):
        EnergyModel(enc, MLPPredictor(enc.d, T_X, T_Y, 8), None, "jepa", **WEIGHTS)


@pytest.mark.parametrize("row", ROWS)
def test_decoder_missing_or_not_wanted(row: str) -> None:
    enc, wanted = encoder(), ROWS[row].pixel
    decoder = None if wanted else ConvDecoder(1, CHANNELS, SIZE, 2)
    with pytest.raises(ValueError, match=f"row='{row}' {'needs a' if wanted else 'has no pixel term, so no'} decoder"):
        EnergyModel(enc, MLPPredictor(enc.d, T_X, T_Y, 8), decoder, row, **WEIGHTS)


# -- build_model ----------------------------------------------------------------------------------------------------


def state(config: Config, **changes: Any) -> dict[str, Tensor]:
    return build_model(override(config, {k.replace("_", ".", 1): v for k, v in changes.items()}), CPU).state_dict()


def equal(a: dict[str, Tensor], b: dict[str, Tensor], part: str = "") -> bool:
    names = [name for name in a if name.startswith(part)]
    assert names
    return all(a[name].equal(b[name]) for name in names)


def test_same_seed_same_weights(tiny: Config) -> None:
    assert equal(state(tiny), state(tiny))
    assert not equal(state(tiny), state(tiny, train_seed=1))


@pytest.mark.parametrize("row", ROWS)
def test_encoder_and_predictor_do_not_depend_on_the_row(tiny: Config, row: str) -> None:
    model = state(tiny, model_row=row)
    assert equal(state(tiny), model, "encoder.")
    assert equal(state(tiny), model, "predictor.")
    assert any(name.startswith("decoder.") for name in model) == ROWS[row].pixel


def test_building_leaves_the_callers_random_numbers_alone(tiny: Config) -> None:
    before = torch.get_rng_state()
    build_model(override(tiny, {"model.row": "vj-vcr-decoder"}), CPU)
    assert torch.get_rng_state().equal(before)


def test_built_as_configured(tiny: Config) -> None:
    settings = {"model.alpha": 3, "model.beta": 4, "model.threshold": 2, "model.eps": 0.1}
    model = build_model(override(tiny, settings), CPU)
    assert (model.alpha, model.beta, model.threshold, model.eps) == (3, 4, 2, 0.1)
    assert model.training
    x, y = torch.rand(4, 2, 1, 16, 16), torch.rand(4, 3, 1, 16, 16)
    assert model.predict(x).shape == (4, 3, 32)
    assert model(x, y).loss.isfinite()
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d) and m.in_channels > 1)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("row", ROWS)
def test_distance_as_a_sum(row: str) -> None:
    """The sum over a frame's elements: d times the hidden term, C H W times the pixel term; VCR does not change."""
    of, x, y = energy(row), frames(T_X), frames(T_Y)
    right = of(x, y)
    of.sums = True
    summed = of(x, y)
    d = of.encoder.d
    torch.testing.assert_close(summed.hidden, d * right.hidden)
    torch.testing.assert_close(summed.pixel, SIZE * SIZE * right.pixel)
    torch.testing.assert_close(summed.variance, right.variance)
    weighted = summed.hidden + of.gamma * summed.pixel + of.alpha * summed.variance + of.beta * summed.covariance
    torch.testing.assert_close(summed.loss, weighted)
    with pytest.raises(ValueError, match="distance=sum"):
        of.latent_energy(x, x, y)


def test_an_unknown_distance() -> None:
    enc = encoder()
    with pytest.raises(ValueError, match="distance='max': must be mean or sum"):
        EnergyModel(enc, MLPPredictor(enc.d, T_X, T_Y, 8), None, "vj-vcr", **WEIGHTS, distance="max")


def test_scale_of_the_last_norm() -> None:
    torch.manual_seed(0)
    one = encoder()
    torch.manual_seed(0)
    three = encoder(norm_scale=3.0)
    x = frames(T_X).float()
    torch.testing.assert_close(three(x), 3 * one(x))  # ReLU and pooling keep the factor
