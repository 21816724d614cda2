"""Test the encoder's shapes, names and sizes."""

import pytest
import torch

from models.cnn3d import Encoder


def test_sizes_of_the_published_encoder():
    encoder = Encoder(rep_dim=128, moco_dim=128, num_experts=8, num_coordinates=1)
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(8.25e6, rel=0.01)
    assert len(list(encoder.parameters())) == 80  # an MLP projection would add two tensors


def test_output_shapes_and_projection():
    torch.manual_seed(0)
    encoder = Encoder(24, 12, 2, 1).eval()
    with torch.no_grad():
        z, h = encoder(torch.randn(3, 1, 32, 32, 32), torch.zeros(1, 3))
        torch.testing.assert_close(z, encoder.fc(h))
    assert h.shape == (3, 24) and z.shape == (3, 12)


def test_location_changes_the_representation():
    torch.manual_seed(0)
    encoder = Encoder(8, 4, 4, 1).eval()
    patch = torch.randn(1, 1, 32, 32, 32).expand(2, -1, -1, -1, -1)
    with torch.no_grad():
        _, h = encoder(patch, torch.tensor([[-1.0, -1, -1], [1, 1, 1]]))
        _, alone = encoder(patch[:1], torch.tensor([[1.0, 1, 1]]))
    assert not torch.allclose(h[0], h[1], rtol=1e-3)
    torch.testing.assert_close(h[1:], alone)
