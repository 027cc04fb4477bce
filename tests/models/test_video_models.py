"""SimVP's encoder and decoder and the Swin predictor, against their definitions."""

import pytest
import torch
from torch import Tensor, nn

from vjvcr_fast.models import simvp, swin
from vjvcr_fast.models.energy import ROWS, EnergyModel
from vjvcr_fast.models.simvp import SimVPDecoder, SimVPEncoder
from vjvcr_fast.models.swin import SwinPredictor, WindowAttention

pytestmark = pytest.mark.usefixtures("one_thread")

MAP = (4, 8, 8)


def encoder(**options) -> SimVPEncoder:
    torch.manual_seed(0)
    return SimVPEncoder(3, 16, **{"channels": (4, 6), "features": 5, **options})


def decoder(**options) -> SimVPDecoder:
    torch.manual_seed(1)
    return SimVPDecoder(3, 16, **{"channels": (4, 6), "features": 5, **options})


def predictor(**options) -> SwinPredictor:
    torch.manual_seed(2)
    settings = {"map": MAP, "frames_in": 2, "frames_out": 3, "dim": 12, "depth": 3, "heads": 3, "window": 4, **options}
    model = SwinPredictor(**settings)
    for name, parameter in model.named_parameters():  # with values around 0.02 the table would hardly matter
        if name.endswith("table"):
            nn.init.normal_(parameter)
    return model


def model(row: str = "vj-vcr-decoder", **options) -> EnergyModel:
    torch.manual_seed(3)
    parts = SimVPEncoder(3, 16, (4, 6), 5, **options), SwinPredictor((5, 4, 4), 2, 3, 8, 2, 2, 2, **options)
    decoding = SimVPDecoder(3, 16, (4, 6), 5, **options) if ROWS[row].pixel else None
    return EnergyModel(*parts, decoding, row, alpha=1.0, beta=0.1, gamma=1.0)


# -- Sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "channels", "features", "d"),
    [(64, (64, 64, 64), 32, 2048), (128, (32, 32, 32, 32), 32, 2048), (32, (16, 32, 32), 16, 256), (16, (2,), 3, 192)],
)
def test_shapes(size: int, channels: tuple[int, ...], features: int, d: int) -> None:
    encode, decode = (kind(3, size, channels, features) for kind in (SimVPEncoder, SimVPDecoder))
    frames = torch.rand(2, 3, 3, size, size)
    h = encode(frames)
    assert h.shape == (2, 3, d)
    assert encode.d == d
    assert encode.map == (features, size >> len(channels), size >> len(channels))
    assert decode(h).shape == frames.shape
    y = SwinPredictor(encode.map, 3, 5, dim=8, depth=2, heads=2, window=4)(h)
    assert y.shape == (2, 5, d)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: simvp.check_sizes((4, 3), 16, 4), r"channels=\(4, 3\)"),
        (lambda: simvp.check_sizes((), 16, 4), r"channels=\(\)"),
        (lambda: simvp.check_sizes((4, 4), 18, 4), "size=18: .* multiple of 4"),
        (lambda: simvp.check_sizes((4, 4), 16, 0), "features=0"),
        (lambda: swin.check_sizes((8, 8), 12, 5, 4), "heads=5: must divide dim=12"),
        (lambda: swin.check_sizes((8, 8), 12, 3, 3), "window=3: must divide the 8x8 map"),
        (lambda: swin.check_sizes((8, 8), 12, 3, 0), "window=0"),
        (lambda: predictor()(torch.zeros(2, 2, 256), torch.zeros(2, 3)), "has no latent, so takes no z"),
        (lambda: predictor(latent_dim=3)(torch.zeros(2, 2, 256)), r"needs z \(2, 3\)"),
        (lambda: predictor(latent_dim=3)(torch.zeros(2, 2, 256), torch.zeros(2, 4)), r"z has shape \(2, 4\)"),
    ],
)
def test_what_does_not_fit_is_named(make, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


# -- The batch has no influence -------------------------------------------------------------------------------------


def test_a_sample_does_not_depend_on_the_others() -> None:
    frames, other = torch.rand(2, 4, 3, 3, 16, 16).double()
    encode, decode, predict = encoder().double(), decoder().double(), predictor(map=(5, 4, 4), window=2).double()
    mixed = torch.cat([frames[:1], other[1:]])
    h, h_mixed = encode(frames), encode(mixed)
    torch.testing.assert_close(h[:1], h_mixed[:1], rtol=0, atol=1e-12)
    torch.testing.assert_close(decode(h)[:1], decode(h_mixed)[:1], rtol=0, atol=1e-12)
    torch.testing.assert_close(predict(h[:, :2])[:1], predict(h_mixed[:, :2])[:1], rtol=0, atol=1e-12)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model().modules())


def test_a_frame_does_not_depend_on_the_others() -> None:
    frames = torch.rand(2, 4, 3, 16, 16).double()
    encode, decode = encoder().double(), decoder().double()
    h = encode(frames)
    torch.testing.assert_close(encode(frames[:, 2:3])[:, 0], h[:, 2], rtol=0, atol=1e-12)
    torch.testing.assert_close(decode(h[:, 2:3])[:, 0], decode(h)[:, 2], rtol=0, atol=1e-12)


def test_the_mirror_has_the_encoders_layers() -> None:
    """And one more, from features to channels; strided convolutions become transposed ones."""
    down, up = encoder(), decoder()
    assert len([*down.parameters()]) + 2 == len([*up.parameters()])
    assert [m.stride for m in down.modules() if isinstance(m, nn.Conv2d)] == [(1, 1), (2, 2), (1, 1), (2, 2), (1, 1)]
    assert sum(isinstance(m, nn.ConvTranspose2d) for m in up.modules()) == 2


def test_the_last_convolutions_have_no_norm_behind_them() -> None:
    """The hinge has to change the scale of the representations, and doubling one layer doubles it."""
    encode, frames = encoder(), torch.rand(1, 2, 3, 16, 16)
    before = encode(frames)
    with torch.no_grad():
        encode.last.weight *= 2
        encode.last.bias *= 2
    torch.testing.assert_close(encode(frames), 2 * before)


# -- Attention ------------------------------------------------------------------------------------------------------


def naive_attention(layer: WindowAttention, x: Tensor, shift: int) -> Tensor:
    """The definition, cell by cell. Which cells attend to each other is computed from their coordinates."""
    _, height, width, dim = x.shape
    a, b = layer.window
    size = dim // layer.heads
    q, k, v = (part.unflatten(-1, (layer.heads, size)) for part in layer.qkv(x).chunk(3, dim=-1))
    cells = [(i, j) for i in range(height) for j in range(width)]

    def home(cell: tuple[int, int]) -> tuple[int, ...]:
        """The window of a cell and, if windows wrap around, on which side of the edge the cell lies."""
        i, j = cell
        row, column = (i - shift) % height, (j - shift) % width
        return row // a, column // b, int(i < shift), int(j < shift)

    out = torch.zeros_like(q)
    for i, j in cells:
        seen = [cell for cell in cells if home(cell) == home((i, j))]
        for head in range(layer.heads):
            logits = []
            for r, c in seen:
                # Offsets within the window, where the grid wraps around.
                rows = ((i - shift) % height) % a - ((r - shift) % height) % a
                columns = ((j - shift) % width) % b - ((c - shift) % width) % b
                bias = layer.table[head, (rows + a - 1) * (2 * b - 1) + columns + b - 1]
                logits.append((q[:, i, j, head] * k[:, r, c, head]).sum(-1) / size**0.5 + bias)
            weights = torch.stack(logits, dim=-1).softmax(dim=-1)
            values = torch.stack([v[:, r, c, head] for r, c in seen], dim=1)
            out[:, i, j, head] = (weights[..., None] * values).sum(dim=1)
    return layer.out(out.flatten(-2))


@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    [((8, 8), (4, 4), 0), ((8, 8), (4, 4), 2), ((6, 4), (2, 2), 1), ((6, 9), (3, 3), 1), ((4, 4), (4, 4), 0)],
)
def test_attention_is_the_definition(grid, window, shift: int) -> None:
    torch.manual_seed(0)
    layer = WindowAttention(grid, 6, 2, window, shift).double()
    nn.init.normal_(layer.table)
    x = torch.randn(2, *grid, 6, dtype=torch.float64, requires_grad=True)
    ours, theirs = layer(x), naive_attention(layer, x, shift)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    seen = torch.randn_like(ours)
    for one, other in zip(
        torch.autograd.grad((ours * seen).sum(), [x, layer.table]),
        torch.autograd.grad((theirs * seen).sum(), [x, layer.table]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def reached(model: SwinPredictor, row: int, column: int) -> Tensor:
    """(H, W) bool: which output cells change if one input cell does."""
    h_x = torch.randn(1, 2, *MAP[1:], MAP[0], dtype=torch.float64)
    changed = h_x.clone()
    changed[:, :, row, column] += 1
    with torch.no_grad():
        one, other = (model(h.flatten(2)).unflatten(2, (*MAP[1:], MAP[0])) for h in (h_x, changed))
    return (one != other).any(dim=(0, 1, 4) if one.ndim == 6 else (0, 1, -1))[..., :]


def test_information_crosses_windows_by_shifts_alone() -> None:
    one = reached(predictor(depth=1).double(), 0, 0)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:4, :4] = True
    assert one.equal(expected)
    # Block 1 reaches cells 0 to 3, from there block 2 its shifted window 2 to 5. Cells that wrap around reach nothing.
    two = reached(predictor(depth=2).double(), 3, 3)
    expected[:6, :6] = True
    assert two.equal(expected)
    assert reached(predictor(depth=4).double(), 0, 0).all()


def test_a_window_as_large_as_the_map_sees_all_of_it_at_once() -> None:
    for window in (8, 20):
        model = predictor(depth=1, window=window).double()
        assert reached(model, 0, 0).all()
        assert all(block.attention.shift == 0 for block in model.blocks)


def test_every_target_depends_on_every_input_and_on_z() -> None:
    model = predictor(latent_dim=3)
    h_x, z = torch.randn(2, 2, 256, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    predicted = model(h_x, z)
    for t in range(3):
        by_x, by_z = torch.autograd.grad(predicted[:, t].square().sum(), [h_x, z], retain_graph=True)
        assert (by_x.abs().sum(dim=2) > 0).all()
        assert (by_z.abs() > 0).all()


def test_columns_of_the_latent_have_unit_norm() -> None:
    model = predictor(latent_dim=3)
    with torch.no_grad():
        model.latent_in.weight.mul_(7)
    model.normalize_latent()
    torch.testing.assert_close(model.latent_in.weight.norm(dim=0), torch.ones(3))
    predictor().normalize_latent()


# -- As the training loop uses them ---------------------------------------------------------------------------------


def frames(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(4, t, 3, 16, 16, generator=generator, dtype=dtype) for t in (2, 3))
    return x, y


def gradients(of: EnergyModel, x: Tensor, y: Tensor) -> list[Tensor]:
    of.zero_grad()
    of(x, y).loss.backward()
    return [p.grad.clone() for p in of.parameters()]


def test_recomputed_activations_give_the_same_gradient_to_the_bit() -> None:
    x, y = frames()
    for one, other in zip(gradients(model(), x, y), gradients(model(checkpoint=True), x, y), strict=True):
        assert one.equal(other)


def test_channels_last_changes_the_layout_only() -> None:
    x, y = frames(torch.float64)
    plain, moved = model().double(), model().double().to(memory_format=torch.channels_last)
    for one, other in zip(gradients(plain, x, y), gradients(moved, x, y), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_representations_of_channels_last_maps_are_views(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = encoder().to(memory_format=torch.channels_last)
    maps = []
    encode.last.register_forward_hook(lambda module, inputs, output: maps.append(output))
    h = encode(torch.rand(2, 3, 3, 16, 16))
    assert maps[0].is_contiguous(memory_format=torch.channels_last)
    assert h.data_ptr() == maps[0].data_ptr()


@pytest.mark.parametrize("row", ROWS)
def test_every_row_trains(row: str) -> None:
    x, y = frames()
    of = model(row)
    optimizer = torch.optim.Adam(of.parameters(), 3e-3)
    first = of(x, y).loss.item()
    for _ in range(15):
        optimizer.zero_grad()
        of(x, y).loss.backward()
        optimizer.step()
    assert of(x, y).loss.item() < first


def test_bfloat16_autocast() -> None:
    x, y = frames()
    of = model()
    exact = of(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = of(x, y)
    assert rough.loss.dtype == torch.float32
    torch.testing.assert_close(rough.loss, exact.loss, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("checkpoint", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiles_as_one_graph(checkpoint: bool) -> None:
    torch._dynamo.reset()
    x, y = frames()
    of = model(checkpoint=checkpoint)
    expected = gradients(of, x, y)
    of.zero_grad()
    torch.compile(of, backend="aot_eager", fullgraph=True)(x, y).loss.backward()
    for one, p in zip(expected, of.parameters(), strict=True):
        torch.testing.assert_close(p.grad, one, rtol=1e-4, atol=1e-5)


def test_functional_gradient_by_z() -> None:
    of = predictor(latent_dim=3).double().requires_grad_(False)
    h_x, target = torch.randn(2, 2, 256).double(), torch.randn(2, 3, 256).double()
    energy = lambda z: (of(h_x, z) - target).square().sum()  # noqa: E731
    z = torch.randn(2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(energy, z.clone().requires_grad_())
    by_func = torch.func.grad(energy)(z)
    z.requires_grad_()
    torch.testing.assert_close(by_func, torch.autograd.grad(energy(z), z)[0])
