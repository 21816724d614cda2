"""Test that every layer runs channels-last. In a tensor with one channel, only the strides show the layout."""

import pytest
import torch
import torch.nn.functional as F

from models import cnn3d, fast, frozen
from models.builder import DrasCLR
from models.cnn3d import Encoder
from models.condconv3d import CondConv3D, channels_last
from models.frozen import encode_patch_per_location, freeze_at_locations

from ..conftest import calibrate


def is_channels_last(x: torch.Tensor) -> bool:
    """Return whether all strides are channels-last, including the strides of axes with one element."""
    _, channels, depth, height, width = x.shape
    wanted = (channels * depth * height * width, 1, channels * height * width, channels * width, channels)
    return x.stride() == wanted or (x.shape[2:] == (1, 1, 1) and x.is_contiguous())


@pytest.mark.parametrize("channels", [1, 8])
def test_channels_last(channels):
    x = torch.randn(4, channels, 6, 5, 4)
    for given in (x, x[1:3], x.transpose(2, 4)):
        found = channels_last(given)
        assert torch.equal(found, given) and is_channels_last(found)
    assert channels > 1 or channels_last(x).data_ptr() == x.data_ptr()  # with one channel, the result is a view of x


def test_strides_of_one_channel_decide_the_output_layout():
    """With torch's own ``contiguous``, the first convolution would run channels-first."""
    x, kernel = torch.randn(2, 1, 8, 8, 8), torch.randn(4, 1, 3, 3, 3)
    same = x.contiguous(memory_format=torch.channels_last_3d)
    found = [F.conv3d(value, kernel, padding=1) for value in (same, channels_last(x))]
    assert [is_channels_last(value) for value in found] == [False, True]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("groups", [1, 2])
def test_every_layer_of_a_training_step(monkeypatch, groups):
    """Check the layout of the inputs of every convolution and BatchNorm, and of the inputs' gradients."""
    seen = []

    def note(name, x):
        seen.append((name, x.stride(), is_channels_last(x)))
        if x.requires_grad:
            x.register_hook(lambda grad: seen.append((f"gradient of {name}", grad.stride(), is_channels_last(grad))))

    convolve, norm_elu = CondConv3D._convolve, cnn3d._norm_elu_in_training
    monkeypatch.setattr(CondConv3D, "_convolve", lambda self, x, kernel: note("conv", x) or convolve(self, x, kernel))
    monkeypatch.setattr(
        cnn3d, "_norm_elu_in_training", lambda norm, x, track: note("norm", x) or norm_elu(norm, x, track)
    )
    torch.manual_seed(0)
    model = DrasCLR(Encoder, 4, 16, 8, 2, 1, 4, 0.9, 0.2, True, bn_groups=groups)
    x, loc = torch.randn(4, 1, 32, 32, 32), torch.rand(1, 3)
    with fast.disable_fast_paths():
        patch, near, _ = model(1, [x, loc], [x, loc], [torch.randn(4, 2, 32, 32, 32), torch.rand(1, 2, 3)])
    (patch.logsumexp(1).sum() + near.logsumexp(1).sum()).backward()
    assert len(seen) > 13 * (4 + 3 * groups)
    assert not [entry for entry in seen if not entry[2]]


def test_every_layer_of_the_frozen_encoder(monkeypatch):
    encoder = Encoder(16, 8, 2, 1)
    calibrate(encoder)
    seen = []
    convolve = frozen.dense_conv3d
    monkeypatch.setattr(
        frozen, "dense_conv3d", lambda x, *rest, **more: seen.append(is_channels_last(x)) or convolve(x, *rest, **more)
    )
    x, loc = torch.rand(3, 1, 32, 32, 32) * 2 - 1, torch.rand(1, 3)
    with fast.disable_fast_paths(), torch.no_grad():
        ours = freeze_at_locations(encoder, loc)[0](x)
        wanted = encoder(x, loc)[1]
    assert len(seen) == 13 and all(seen)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


def test_encoding_all_locations_equals_encoding_each():
    torch.manual_seed(0)
    encoder = Encoder(24, 6, 3, 1)
    calibrate(encoder)
    x, locs = torch.rand(5, 1, 32, 32, 32) * 2 - 1, torch.rand(5, 3) * 2 - 1
    ours = encode_patch_per_location(encoder, x, locs, patches_at_once=2)
    wanted = torch.cat([one(x[index : index + 1]) for index, one in enumerate(freeze_at_locations(encoder, locs))])
    assert float((ours - wanted).norm() / wanted.norm()) < 1e-5
