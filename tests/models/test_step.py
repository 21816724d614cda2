"""Test that an optimiser step averages accumulated gradients, and that the key encoder changes only after a step."""

import copy

import pytest
import torch

from misc.sizes import OPTIMIZERS
from models.builder import DrasCLR
from models.cnn3d import Encoder
from models.step import Descent, make_optimizer


def build():
    torch.manual_seed(0)
    return DrasCLR(Encoder, 2, 8, 6, 2, 1, 8, 0.9, 0.2, True).train()


def draw(seed):
    generator = torch.Generator().manual_seed(seed)
    loc = torch.rand(1, 3, generator=generator)
    volumes = torch.rand(3, 4, 1, 32, 32, 32, generator=generator) * 2 - 1
    return 0, [volumes[0], loc], [volumes[1], loc], [volumes[2], loc[:, None]]


def losses(model, seed, move_keys=True):
    step = model.step(*draw(seed), move_keys=move_keys)
    return torch.nn.functional.cross_entropy(step.logits_pch, step.labels)


def test_accumulated_gradients_are_averaged_and_keys_stay():
    """Accumulate two batches before a step, and compare with an explicit computation."""
    ours, wanted = build(), build()
    descend = Descent(make_optimizer(ours, 0.1, 0.9, 1e-4), accumulate=2)
    assert not descend(losses(ours, 1))
    assert torch.equal(ours.encoder_q.conv1.weight, wanted.encoder_q.conv1.weight)
    assert descend(losses(ours, 2, move_keys=False))

    optimizer = make_optimizer(wanted, 0.1, 0.9, 1e-4)
    first = losses(wanted, 1)
    keys = copy.deepcopy(wanted.encoder_k.state_dict())
    wanted.m = 1.0  # the key encoder does not change between the two batches
    second = losses(wanted, 2)
    wanted.m = 0.9
    ((first + second) / 2).backward()
    optimizer.step()
    for (name, value), other in zip(ours.named_parameters(), wanted.parameters()):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6, msg=name)
    assert torch.equal(ours.encoder_k.conv1.weight, keys["conv1.weight"])
    losses(ours, 3)
    assert not torch.equal(ours.encoder_k.conv1.weight, keys["conv1.weight"])


def test_the_last_batch_of_an_epoch_makes_a_step():
    model = build()
    descend = Descent(make_optimizer(model, 0.1, 0.9, 0.0), accumulate=3)
    before = model.encoder_q.conv1.weight.clone()
    assert [descend(losses(model, seed), force_update=seed == 4) for seed in range(1, 5)] == [False, False, True, True]
    assert descend.waiting == 0 and not torch.equal(before, model.encoder_q.conv1.weight)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_has_all_parameters_and_lowers_the_loss(name):
    model = build()
    optimizer = make_optimizer(model, 1e-3, 0.9, 1e-4, name)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    descend = Descent(optimizer)
    values, queue = [], model.queue.clone()
    for _ in range(8):
        model.queue.copy_(queue)
        loss = losses(model, 1)
        descend(loss)
        values.append(float(loss))
    assert values[-1] < values[0]
