"""Test that a GPU gives the same numbers as the CPU, and that a training step never makes the CPU wait for the GPU."""

import copy

import pytest
import torch

from data.augment import Augmentation
from data.dataset import PatchBatch
from data.device import BatchCarrier
from data.sampler import BatchIndex
from data.views import StepDraws, StepViews
from models.builder import DrasCLR
from models.cnn3d import Encoder
from models.frozen import freeze_at_locations
from models.step import Descent, Inputs, LocationTable, TrainingStep, WholeStep, make_optimizer

from .conftest import calibrate

pytestmark = pytest.mark.gpu

B, NEAR, L = 6, 2, 4


@pytest.fixture
def gpu():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda", 0)


def build(seed=0):
    torch.manual_seed(seed)
    return DrasCLR(Encoder, L, 16, 8, 2, 1, 2 * B, 0.9, 0.2, True)


def draw_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randint(-1024, 241, (B, 1 + NEAR, 32, 32, 32), dtype=torch.int16, generator=generator)
    return PatchBatch(0, 1, seed, patches[:, 0].contiguous(), patches[:, 1:].contiguous())


def test_a_gpu_step_equals_a_cpu_step(gpu):
    models = {"cpu": build().double()}
    models["cuda"] = copy.deepcopy(models["cpu"]).to(gpu)
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, B, 1, 32, 32, 32, dtype=torch.float64, generator=generator)
    around = torch.randn(B, NEAR, 32, 32, 32, dtype=torch.float64, generator=generator)
    here, near = torch.rand(1, 3, dtype=torch.float64), torch.rand(1, NEAR, 3, dtype=torch.float64)
    results = {}
    for device, model in models.items():
        inputs = [tensor.to(device) for tensor in (query, key, around, here, near)]
        patch, neighbor, _ = model(2, [inputs[0], inputs[3]], [inputs[1], inputs[3]], [inputs[2], inputs[4]])
        (patch.sum() + neighbor.logsumexp(1).sum()).backward()
        gradients = {name: p.grad.cpu() for name, p in model.encoder_q.named_parameters()}
        state = {name: value.cpu() for name, value in model.state_dict().items()}
        results[device] = (patch.detach().cpu(), neighbor.detach().cpu(), gradients, state)
    torch.testing.assert_close(results["cuda"], results["cpu"], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("letters", ["f", "a", "e", "c", "s", "i", "b", "k", "t", "fac"])
def test_gpu_augmentation_equals_the_cpus(gpu, letters):
    volumes = torch.rand(B, 2, 32, 32, 32, generator=torch.Generator().manual_seed(2)) * 1264
    augmentation = Augmentation(letters)
    drawn = augmentation.draw_parameters(B, (32, 32, 32), torch.Generator().manual_seed(3))
    for parameters in drawn:
        if "magnitude" in parameters:
            parameters["magnitude"] = parameters["magnitude"] / 8  # keep most sampled positions inside the patch
    prepared = augmentation.prepare_parameters(drawn, (32, 32, 32))
    ours = augmentation.apply(volumes.to(gpu), prepared, torch.zeros_like, dense=True)
    wanted = augmentation.apply(volumes, prepared, torch.zeros_like)
    torch.testing.assert_close(ours.cpu(), wanted, rtol=0, atol=1e-3 * 1264)


def test_gpu_features_equal_the_cpus(gpu):
    encoder = build().encoder_q
    calibrate(encoder)
    x, loc = torch.rand(B, 1, 32, 32, 32) * 2 - 1, torch.tensor([[0.1, -0.5, 0.9]])
    wanted = freeze_at_locations(encoder, loc)[0](x)
    ours = freeze_at_locations(encoder.to(gpu), loc.to(gpu))[0](x.to(gpu)).cpu()
    assert float((ours - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_step_does_not_wait_for_the_device(gpu, amp):
    model = build().to(gpu)
    locations = (torch.rand(L, 3) * 2 - 1).to(gpu)
    neighbors = torch.tensor([[1, 2], [2, 3], [3, 0], [0, 1]])
    table = LocationTable(locations, locations[neighbors.to(gpu)])
    views, carry = StepViews(StepDraws(Augmentation("agcf"), 0, range(1)), gpu), BatchCarrier(gpu)
    descend = Descent(make_optimizer(model, 0.01, 0.9, 1e-4))
    advance = WholeStep(views, TrainingStep(model, table, amp == "bf16"), descend)
    try:
        for step in range(4):
            batch = draw_batch(step)
            draws = views.draws(BatchIndex(0, 1, step, range(B)), True)
            batch = PatchBatch(
                *(x.pin_memory() if isinstance(x, torch.Tensor) else x for x in batch._replace(draws=draws))
            )
            torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")  # steps 0 and 1 may wait for the GPU
            views.seed_noise(0, 1, step)
            advance(Inputs(*carry(batch)), 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
