"""The Swin predictor by itself: where z enters, how weights start, precision (see also test_video_models)."""

import pytest
import torch
from torch import Tensor, nn

from vjvcr_fast.models.swin import SwinPredictor, WindowAttention

pytestmark = pytest.mark.usefixtures("one_thread")


def make(**options) -> SwinPredictor:
    torch.manual_seed(0)
    settings = {"map": (4, 8, 8), "frames_in": 2, "frames_out": 3, "dim": 12, "depth": 2, "heads": 3, "latent_dim": 3}
    return SwinPredictor(**{**settings, **options})


def inputs(n: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 2, 256, generator=generator), torch.randn(n, 3, generator=generator)


def test_parameters_of_the_papers_clevrer() -> None:
    dim, tables = 512, 8 * 7 * 7
    # Queries, keys, values and out; the MLP; two norms; one table a head.
    attention, mlp, norms = 4 * dim * dim + 4 * dim, 8 * dim * dim + 5 * dim, 2 * 2 * dim
    block = attention + mlp + norms + tables
    expected = (6 * 32 + 1) * dim + 8 * block + 2 * dim + (dim + 1) * 20 * 32
    assert sum(p.numel() for p in SwinPredictor((32, 8, 8), 6, 20).parameters()) == expected == 25_650_368


def test_weights_start_as_swins() -> None:
    model = make(dim=96, latent_dim=0)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            assert layer.weight.abs().max() <= 0.04
            assert layer.weight.std().item() == pytest.approx(0.0176, rel=0.1)  # of 0.02, cut at twice that
            assert not layer.bias.any()
        if isinstance(layer, WindowAttention):
            assert 0 < layer.table.abs().max() <= 0.04


def test_the_bias_is_of_the_offset_alone() -> None:
    layer = WindowAttention((6, 4), 4, 2, (3, 2), 0)
    nn.init.normal_(layer.table)
    bias, by_offset = layer._bias().unflatten(1, (-1, 2))[0, 0], {}  # of the first window, (heads, cells, cells)
    cells = [(i, j) for i in range(3) for j in range(2)]
    for i, one in enumerate(cells):
        for j, other in enumerate(cells):
            offset = one[0] - other[0], one[1] - other[1]
            assert by_offset.setdefault(offset, bias[:, i, j]).equal(bias[:, i, j])
    assert len(by_offset) == len({tuple(b.tolist()) for b in by_offset.values()}) == 5 * 3


def test_a_block_normalises_before_its_attention_and_its_mlp() -> None:
    """Against the definition, with the weights. That of the attention is in test_video_models."""
    block = make().double().blocks[1]
    x = torch.randn(2, 8, 8, 12, dtype=torch.float64)
    for name, p in block.named_parameters():
        if "norm" in name:
            nn.init.normal_(p)

    def normal(a: Tensor, norm: nn.LayerNorm) -> Tensor:
        variance, mean = torch.var_mean(a, dim=-1, correction=0, keepdim=True)
        return (a - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias

    first, _, second = block.mlp
    a = x + block.attention(normal(x, block.norm1))
    u = normal(a, block.norm2) @ first.weight.T + first.bias
    gelu = u * (1 + torch.erf(u / 2**0.5)) / 2
    torch.testing.assert_close(block(x), a + gelu @ second.weight.T + second.bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("window", "shifts"), [(2, [0, 1, 0, 1]), (4, [0, 2, 0, 2]), (8, [0] * 4), (20, [0] * 4)])
def test_every_second_block_shifts_by_half_a_window(window: int, shifts: list[int]) -> None:
    """And none does if one window covers the whole map."""
    assert [block.attention.shift for block in make(depth=4, window=window).blocks] == shifts


def test_the_last_norm_is_before_the_last_layer() -> None:
    model, (h_x, z) = make().double(), (t.double() for t in inputs())
    with torch.no_grad():
        model.last.bias.fill_(1.0)
        model.norm.weight.zero_()
        model.norm.bias.zero_()
    torch.testing.assert_close(model(h_x, z), h_x[:, -1:].expand(-1, 3, -1) + 1)


def test_the_latent_enters_every_token_alike_and_linearly() -> None:
    model, (h_x, z) = make().double(), (t.double() for t in inputs())
    tokens = []
    model.blocks[0].register_forward_pre_hook(lambda _, given: tokens.append(given[0]))
    for latent in (0 * z, z, 2 * z):
        model(h_x, latent)
    nothing, once, twice = tokens
    torch.testing.assert_close(once - nothing, (z @ model.latent_in.weight.T)[:, None, None].expand_as(once))
    torch.testing.assert_close(twice - nothing, 2 * (once - nothing))


def test_what_the_last_layer_says_is_added_to_the_last_frame() -> None:
    model, (h_x, z) = make(), inputs()
    nn.init.zeros_(model.last.weight)
    assert model(h_x, z).equal(h_x[:, -1:].expand(-1, 3, -1))


def test_frames_and_cells_are_where_the_encoder_lays_them() -> None:
    """Without attention, a cell of the prediction depends on that cell of the input only."""
    model, (h_x, z) = make(depth=0).double(), (t.double() for t in inputs())
    for t, row, column in [(0, 0, 0), (1, 3, 6), (0, 7, 1)]:
        changed = h_x.clone()
        changed.view(2, 2, 8, 8, 4)[:, t, row, column, 1] += 1
        cells = (model(h_x, z) != model(changed, z)).view(2, 3, 8, 8, 4).any(dim=-1)
        expected = torch.zeros(8, 8, dtype=torch.bool)
        expected[row, column] = True
        assert all(cells[n, frame].equal(expected) for n in range(2) for frame in range(3))


def test_a_single_video() -> None:
    model, (h_x, z) = make(), inputs()
    torch.testing.assert_close(model(h_x[:1], z[:1]), model(h_x, z)[:1], rtol=1e-5, atol=1e-6)


def test_precisions() -> None:
    model, (h_x, z) = make(), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(h_x.bfloat16(), z)
    exact = model.double()(h_x.double(), z.double())
    assert (rough.dtype, exact.dtype) == (torch.bfloat16, torch.float64)
    torch.testing.assert_close(rough.double(), exact, rtol=0.05, atol=0.05)


def test_checkpoint_runs_every_block_again() -> None:
    """In training only: in eval mode no backward follows, so there is nothing to save."""
    (h_x, z), plain, model, runs = inputs(), make(), make(checkpoint=True), []
    for block in model.blocks:
        block.norm1.register_forward_hook(lambda *_: runs.append(1))
    out = model(h_x, z)
    assert out.equal(plain(h_x, z))
    out.sum().backward()
    assert len(runs) == 4
    model.eval()(h_x, z)
    assert len(runs) == 6


def test_the_gradient_by_z_alone_as_inference_takes_it() -> None:
    """With torch.func under no_grad. Weights may require gradients there, but get none."""
    model, (h_x, z) = make().double(), (t.double() for t in inputs())
    z.requires_grad_()
    (expected,) = torch.autograd.grad(model(h_x, z).square().sum(), z)
    with torch.no_grad():
        value, pull_back = torch.func.vjp(lambda z: model(h_x, z).square().sum(), z.detach())
        torch.testing.assert_close(pull_back(torch.ones_like(value))[0], expected)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    (h_x, z), model, same = inputs(), make(), make()
    expected, out = same(h_x, z), torch.compile(model, backend=backend, fullgraph=True)(h_x, z)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    seen = torch.randn_like(out)
    (out * seen).sum().backward()
    (expected * seen).sum().backward()
    for one, other in zip(model.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)
