"""SimVP's encoder and decoder by themselves: their sizes, layout and precision (see also test_video_models)."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjvcr_fast.models.simvp import SimVPDecoder, SimVPEncoder

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = [SimVPEncoder, SimVPDecoder]


def make(kind: type[nn.Module], **options) -> tuple[nn.Module, Tensor]:
    """A network for 16x16 frames and an input for it, two videos of three frames."""
    torch.manual_seed(0)
    return kind(3, 16, (4, 6), 5, **options), torch.rand(2, 3, *((3, 16, 16) if kind is SimVPEncoder else (80,)))


def test_parameters_of_the_papers_clevrer() -> None:
    """A convolution has weights and biases and, unless it is 1x1, a scale and a shift for every channel."""
    half = 64 * 64 * 9 + 3 * 64
    down = (3 * 64 * 9 + 3 * 64) + 5 * half + (64 * 32 + 32)
    up = (32 * 64 + 64) + 3 * (64 * 64 * 16 + 3 * 64 + half) + (64 * 3 + 3)
    assert sum(p.numel() for p in SimVPEncoder(3, 64).parameters()) == down == 189_280
    assert sum(p.numel() for p in SimVPDecoder(3, 64).parameters()) == up == 310_659
    assert SimVPEncoder(3, 64).map == SimVPDecoder(3, 64).map == (32, 8, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_convolution_group_norm_silu(kind: type[nn.Module]) -> None:
    """Against the definition, with the weights in their order. GroupNorm normalises each half of the channels."""
    model, x = make(kind)
    x, weights = x.double(), list(model.double().parameters())
    for scale in weights[2:-2]:
        if scale.ndim == 1:
            nn.init.normal_(scale)

    def block(maps: Tensor, layer, stride: int) -> Tensor:
        weight, bias, scale, shift = (weights.pop(0) for _ in range(4))
        halves = layer(maps, weight, bias, stride, padding=1).unflatten(1, (2, -1))
        variance, mean = torch.var_mean(halves, dim=(2, 3, 4), correction=0, keepdim=True)
        normal = ((halves - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)
        a = normal * scale[:, None, None] + shift[:, None, None]
        return a * a.sigmoid()

    if kind is SimVPEncoder:
        maps = x.flatten(0, 1)
        for stride in (1, 2, 1, 2):
            maps = block(maps, F.conv2d, stride)
        expected = F.conv2d(maps, *weights).permute(0, 2, 3, 1).reshape(2, 3, 80)
    else:
        maps = F.conv2d(x.view(6, 4, 4, 5).permute(0, 3, 1, 2), weights.pop(0), weights.pop(0))
        for layer, stride in [(F.conv_transpose2d, 2), (F.conv2d, 1)] * 2:
            maps = block(maps, layer, stride)
        expected = F.conv2d(maps, *weights).view(2, 3, 3, 16, 16)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_the_channels_of_a_cell_lie_together() -> None:
    encode, frames = make(SimVPEncoder)
    maps = encode.last(encode.stages(frames.flatten(0, 1)))
    cells = encode(frames).view(6, 4, 4, 5)
    assert all(cells[:, i, j].equal(maps[:, :, i, j]) for i in range(4) for j in range(4))


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_keeps_channels_last(kind: type[nn.Module]) -> None:
    model, x = make(kind)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    outputs = {}
    for name, layer in model.named_modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda _, inputs, output, name=name: outputs.update({name: output}))
    model(x)
    assert len(outputs) == 13 + (kind is SimVPDecoder)  # the 1x1 convolution before the stages
    assert [n for n, o in outputs.items() if not o.is_contiguous(memory_format=torch.channels_last)] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_frame(kind: type[nn.Module]) -> None:
    model, x = make(kind)
    torch.testing.assert_close(model(x[:1, :1]), model(x)[:1, :1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_precisions(kind: type[nn.Module]) -> None:
    model, x = make(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(x)
    exact = model.double()(x.double())
    assert (rough.dtype, exact.dtype) == (torch.bfloat16, torch.float64)
    torch.testing.assert_close(rough.double(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_runs_every_stage_again(kind: type[nn.Module]) -> None:
    """In training only: in eval mode no backward follows, so there is nothing to save."""
    (plain, x), (model, _) = make(kind), make(kind, checkpoint=True)
    runs = []
    for stage in model.stages:
        stage[0][0].register_forward_hook(lambda *_: runs.append(1))
    out = model(x)
    assert out.equal(plain(x))
    out.sum().backward()
    assert len(runs) == 4
    model.eval()(x)
    assert len(runs) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_as_one_graph(kind: type[nn.Module]) -> None:
    check_compiled(kind, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_to_kernels(kind: type[nn.Module]) -> None:
    check_compiled(kind, "inductor")


def check_compiled(kind: type[nn.Module], backend: str) -> None:
    torch._dynamo.reset()
    (model, x), (same, _) = make(kind), make(kind)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    expected, out = same(x), torch.compile(model, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    seen = torch.randn_like(out)
    (out * seen).sum().backward()
    (expected * seen).sum().backward()
    for one, other in zip(model.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)
