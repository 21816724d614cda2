"""Compare the frozen encoder with the ordinary encoder in eval mode."""

import pytest
import torch
from torch import nn

from models.cnn3d import Encoder
from models.fast.pieces import PATCHES_AT_ONCE
from models.frozen import freeze_at_locations


def trained_encoder():
    torch.manual_seed(0)
    encoder = Encoder(24, 6, 3, 1).eval()
    for norm in encoder.modules():
        if isinstance(norm, nn.BatchNorm3d):
            with torch.no_grad():
                norm.running_mean.normal_(0, 0.1)
                norm.running_var.uniform_(0.01, 0.2)
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(0, 0.3)
    return encoder


def test_representations_equal_the_encoders():
    encoder = trained_encoder()
    x = torch.rand(5, 1, 32, 32, 32) * 2 - 1
    for loc in (torch.tensor([[-1.0, 0.2, 1.0]]), torch.tensor([[0.5, -0.7, 0.1]])):
        with torch.no_grad():
            wanted = encoder(x, loc)[1]
        h = freeze_at_locations(encoder, loc)[0](x)
        assert h.dtype == torch.float32 and h.shape == (5, 24)
        assert float((h - wanted).norm() / wanted.norm()) < 1e-5
        half = freeze_at_locations(encoder, loc, torch.bfloat16)[0](x)
        assert half.dtype == torch.float32
        assert 1e-5 < float((half - wanted).norm() / wanted.norm()) < 1e-2


def test_the_encoder_is_copied():
    encoder = trained_encoder()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    x, loc = torch.rand(2, 1, 32, 32, 32), torch.zeros(1, 3)
    frozen = freeze_at_locations(encoder, loc)[0]
    first = frozen(x)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    with torch.no_grad():
        encoder.conv1.weight.mul_(2)
    assert torch.equal(frozen(x), first)


def test_several_locations_at_once():
    encoder = trained_encoder()
    x, locs = torch.rand(3, 1, 32, 32, 32) * 2 - 1, torch.rand(4, 3) * 2 - 1
    for loc, frozen in zip(locs, freeze_at_locations(encoder, locs), strict=True):
        with torch.no_grad():
            wanted = encoder(x, loc[None])[1]
        assert float((frozen(x) - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("threads", (1, 2, 3))
def test_parallel_pieces(threads):
    """Encoding a batch in pieces keeps the order and number of patches, and applies ``prepare`` to every piece."""
    encoder, count = trained_encoder(), 2 * PATCHES_AT_ONCE + 5
    loc, raw = torch.tensor([[0.5, -0.7, 0.1]]), torch.randint(0, 9, (count, 32, 32, 32), dtype=torch.int16)
    x = raw[:, None].float() / 8
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        frozen = freeze_at_locations(encoder, loc)[0]
        h, from_raw = frozen(x), frozen(raw, lambda piece, dtype: piece[:, None].to(dtype) / 8)
    finally:
        torch.set_num_threads(before)
    with torch.no_grad():
        wanted = encoder(x, loc)[1]
    assert torch.equal(h, from_raw) and h.shape == (count, 24) and not h.requires_grad
    assert float((h - wanted).norm(dim=1).max() / wanted.norm(dim=1).min()) < 1e-5
