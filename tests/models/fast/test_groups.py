"""Compare BatchNorm groups encoded in parallel with a single pass that splits the groups at every layer."""

import copy

import pytest
import torch

from models import cnn3d
from models import fast as switch
from models.cnn3d import Encoder
from models.fast.groups import encode_bn_groups_in_parallel


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("count", "locations"), [(2, 1), (1, 3), (3, 12)])
def test_parallel_groups_equal_a_single_pass(monkeypatch, threads, count, locations):
    """Compare values, gradients and statistics for batches of 12 samples at 1, 3 or 12 locations."""
    threads(count)
    torch.manual_seed(0)
    fast = Encoder(16, 8, 2, 1).double().train()
    fast.bn_groups = 2
    plain = copy.deepcopy(fast)
    x, loc = torch.randn(12, 1, 32, 32, 32, dtype=torch.float64), torch.rand(locations, 3, dtype=torch.float64)
    weights = torch.randn(12, 24, dtype=torch.float64)
    taken = []
    monkeypatch.setattr(
        cnn3d,
        "encode_bn_groups_in_parallel",
        lambda *given: taken.append(encode_bn_groups_in_parallel(*given)) or taken[-1],
    )

    def step(encoder):
        results = torch.cat(encoder(x, loc), dim=1)
        (results * weights).sum().backward()
        return results.detach()

    ours = step(fast)
    assert len(taken) == 1 and taken[0] is not None
    with switch.disable_fast_paths():
        wanted = step(plain)
    torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)
    for (name, value), other in zip(fast.named_parameters(), plain.parameters()):
        assert float((value.grad - other.grad).norm()) < 1e-8 * float(other.grad.norm()) + 1e-8, name
    for (name, value), other in zip(fast.named_buffers(), plain.buffers()):
        assert torch.allclose(value, other, rtol=1e-9, atol=1e-9), name


def test_passes_without_gradients_or_with_z_only():
    torch.manual_seed(0)
    encoder = Encoder(16, 8, 2, 1).train()
    encoder.bn_groups = 2
    x, loc = torch.randn(4, 1, 32, 32, 32), torch.rand(1, 3)
    z = encoder(x, loc)[0]
    z.sum().backward()
    assert encoder.conv4.weight.grad is not None and encoder.conv1._routing_fn.fc.weight.grad is not None
    with torch.no_grad():
        assert not encoder(x, loc)[0].requires_grad
        torch.testing.assert_close(encoder(x, loc)[0], z.detach())
    encoder.requires_grad_(False)
    assert not encoder(x, loc)[0].requires_grad


def test_an_error_within_a_group_reaches_the_caller():
    encoder = Encoder(16, 8, 2, 1).train()
    encoder.bn_groups = 2
    with pytest.raises(ValueError, match="among 3 locations"):
        encoder(torch.randn(4, 1, 32, 32, 32), torch.rand(3, 3))
