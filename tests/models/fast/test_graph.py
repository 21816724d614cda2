"""Test the recording of a training step as a CUDA graph, without a GPU: traced operations and simulated recordings."""

import argparse
import contextlib
import copy

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data.augment import Augmentation
from data.sampler import BatchIndex
from data.views import StepDraws, StepViews
from misc.command import UserError
from misc.run.augmentation import PUBLISHED
from models import fast
from models.builder import DrasCLR
from models.cnn3d import Encoder
from models.fast import graph
from models.fast.graph import RecordedStep, can_record_cuda_graph
from models.step import Descent, Inputs, LocationTable, TrainingStep, WholeStep, make_optimizer

B, NEAR, L, CPU = 4, 2, 5, torch.device("cpu")
GROUPS = range(2)


def build(letters="agcfsi", lr=0.01, optimizer="sgd", **variants):
    """Build a complete training step. As on a GPU, tensor sizes do not depend on the random draws."""
    torch.manual_seed(0)
    model = DrasCLR(Encoder, L, 16, 8, 2, 1, 2 * B, 0.9, 0.2, True, bn_groups=len(GROUPS), **variants).train()
    neighbors = np.array([[1, 2], [2, 3], [3, 4], [4, 0], [0, 1]])
    table = LocationTable.from_arrays(np.random.default_rng(0).random((L, 3), dtype=np.float32), neighbors, CPU)
    views = StepViews(StepDraws(Augmentation(letters), 0, GROUPS), CPU, dense=True)
    return WholeStep(views, TrainingStep(model, table), Descent(make_optimizer(model, lr, 0.9, 1e-4, optimizer)))


def begin(step: WholeStep, location: int, number: int) -> Inputs:
    """Seed a step's noise and return the step's inputs."""
    generator = torch.Generator().manual_seed(number)
    hu = torch.randint(-1024, 241, (B, 1 + NEAR, 32, 32, 32), dtype=torch.int16, generator=generator)
    views = step.make_views
    views.seed_noise(0, location, number)
    draws = views.draws(BatchIndex(0, location, number, np.arange(B)), True)
    return Inputs(torch.tensor([location]), hu[:, 0].clone(), hu[:, 1:].clone(), draws, torch.arange(B) + number)


# ---------------------------------------------------------------- the recorded operations of a step


class Trace(TorchDispatchMode):
    """Record each operation's name, the shapes and dtypes of its tensors, and its other Python arguments."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, given=(), named=None):
        def describe(value):
            if isinstance(value, torch.Tensor):
                return tuple(value.shape), value.dtype
            if isinstance(value, list | tuple):
                return tuple(map(describe, value))
            return "a generator" if isinstance(value, torch.Generator) else str(value)

        facts = [describe(value) for value in (*given, *(named or {}).items())]
        self.operations.append((str(operation), *facts))
        return operation(*given, **(named or {}))


# Operations that make the CPU wait for a value from the GPU.
READ_BACK = ("_local_scalar_dense", "item", "is_nonzero", "equal.")
SIZED_BY_VALUES = ("nonzero", "masked_select", "unique", "repeat_interleave.Tensor", "bincount")
MOVED = ("pin_memory", "_copy_from", "to.device")


def trace_of(step: WholeStep, location: int, number: int) -> list:
    inputs = begin(step, location, number)
    with Trace() as trace, fast.disable_fast_paths():
        step(inputs, 1.0)
    return trace.operations


@pytest.mark.parametrize("variants", [{}, {"negatives": "batch"}, {"mask_own": True}, {"one_queue": True}])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_two_steps_have_the_same_operations(variants, optimizer):
    """All steps have the same operations, tensor sizes and Python numbers, so that a CUDA graph can replay a step."""
    step = build(optimizer=optimizer, **variants)
    with fast.disable_fast_paths():
        step(begin(step, 0, 0), 1.0)  # creates the optimiser's state
    first, second = trace_of(step, 1, 1), trace_of(step, 4, 2)
    apart = [pair for pair in zip(first, second) if pair[0] != pair[1]]
    # On a CPU, AdamW uses the step count as a Python number, so the recorded operations of two steps differ.
    assert len(first) == len(second) and (optimizer == "adamw" or not apart), apart[:3]
    words = READ_BACK + SIZED_BY_VALUES + MOVED
    if optimizer == "sgd":
        assert not [entry for entry in first if any(word in entry[0] for word in words)]
    indexed = [entry for entry in first if entry[0].startswith("aten.index.Tensor")]
    # With a boolean mask as an index, the size of the result would depend on the values of the mask.
    assert indexed and not any("torch.bool" in str(entry) for entry in indexed)


def test_the_trace_shows_differences():
    """Without ``dense``, as on a CPU, tensor sizes are random, so the sequence of operations differs between steps."""
    step = build("agc")
    step.make_views.dense = False
    first, second = trace_of(step, 1, 1), trace_of(step, 1, 2)
    assert first != second and any("nonzero" in entry[0] for entry in first)


# ---------------------------------------------------------------- dense views


@pytest.mark.parametrize("letters", ["agc", "fag", "ecsi", ""])
def test_dense_views_equal_sparse_views(letters):
    """The noise SD is 0, because dense views draw noise for every sample, and sparse views only for some samples."""
    draws = StepDraws(Augmentation(letters, PUBLISHED._replace(noise_std=0.0)), 0, GROUPS)
    inputs = begin(build(letters), 2, 3)._replace(draws=draws(BatchIndex(0, 2, 3, np.arange(B)), True))
    results = [StepViews(draws, CPU, dense)(inputs.patches, inputs.neighbors, inputs.draws) for dense in (True, False)]
    for ours, wanted in zip(*results):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-6)


def test_dense_noise_depends_only_on_the_group():
    """The noise of a BatchNorm group is the same with and without other groups on the same rank."""
    hu = torch.full((4, 32, 32, 32), -500, dtype=torch.int16)
    augmentation = Augmentation("g", PUBLISHED._replace(noise_prob=1.0))

    def views_of(groups, rows):
        views = StepViews(StepDraws(augmentation, 7, groups), CPU, dense=True)
        views.seed_noise(1, 2, 3)
        near = hu[rows][:, None].expand(-1, 2, -1, -1, -1)
        return views(hu[rows], near, views.draws(BatchIndex(1, 2, 3, np.arange(4)[rows]), True))

    together = views_of(range(2), slice(0, 4))
    for group in range(2):
        rows = slice(2 * group, 2 * group + 2)
        for whole, alone in zip(together, views_of(range(group, group + 1), rows)):
            assert torch.equal(whole[rows], alone)
    query, key, _ = together
    assert not torch.equal(query[0], query[2]) and not torch.equal(query, key)
    # The SD of each view's noise is drawn from 0 to 50 HU.
    assert float((query + 1 - 524 / 632).std() * 632) == pytest.approx(29, abs=20)


# ---------------------------------------------------------------- the recording


class Graph:
    """Replace torch.cuda.CUDAGraph. A replay runs the recorded work again on the recorded tensors."""

    def register_generator_state(self, generator):
        pass


@pytest.fixture
def recording(monkeypatch):
    """Replace torch's CUDA graphs, so that graph.py records steps on the CPU.

    Recording a CUDA graph executes no kernel, so the state must stay unchanged.
    """
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def record(self, inputs, beta, way=RecordedStep._record_cuda_graph):
        model, optimizer = self.step.training_step.model, self.optimizer
        before = copy.deepcopy((model.state_dict(), model.export_key_subjects_and_steps(), optimizer.state_dict()))
        streams = [generator.get_state() for generator in (torch.default_generator, *self.generators)]
        recorded = way(self, inputs, beta)
        model.load_state_dict(before[0])
        model.restore_key_subjects_and_steps(before[1])
        optimizer.load_state_dict(before[2])
        for generator, state in zip((torch.default_generator, *self.generators), streams):
            generator.set_state(state)
        rate = self._rate

        def replay():
            given, self.optimizer.param_groups[0]["lr"] = self.optimizer.param_groups[0]["lr"], float(rate)
            done = self.step(recorded.inputs, beta)
            self.optimizer.param_groups[0]["lr"] = given
            recorded.done.outcome.statistics.copy_(done.outcome.statistics)
            self.replays = getattr(self, "replays", 0) + 1

        recorded.graph.replay = replay
        return recorded

    monkeypatch.setattr(RecordedStep, "_record_cuda_graph", record)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())


def test_a_recorded_run_equals_an_unrecorded_run(recording):
    """Recorded and unrecorded steps give the same losses and weights, even if the learning rate changes."""
    results = []
    for wrap in (lambda step: step, lambda step: RecordedStep(step, step.make_views.generators)):
        whole = build()
        step, statistics = wrap(whole), []
        for number in range(7):
            whole.descend.optimizer.param_groups[0]["lr"] = 0.01 if number < 5 else 0.002
            done = step(begin(whole, number % L, number), 1.0)
            assert done.stepped
            statistics.append(done.outcome.statistics.clone())
        results.append((torch.stack(statistics), whole.training_step.model.state_dict()))
    assert step.replays == 7 - graph.WARM_UP
    assert isinstance(whole.descend.optimizer.param_groups[0]["lr"], float)  # as in a checkpoint
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_another_beta_needs_a_new_recording(recording):
    whole = build()
    step = RecordedStep(whole, whole.make_views.generators)
    for number in range(6):
        step(begin(whole, 0, number), 0.0)
    first = step._recorded
    for number in range(5):
        step(begin(whole, 0, number), 1.0)
    assert step.replays == 6 + 5 - 2 * graph.WARM_UP and step._recorded is not first


def test_a_failed_recording_suggests_a_solution(recording, monkeypatch):
    class Refused:
        """Fail like torch's CUDA graph: after a failed step, ending the recording fails, too."""

        def __enter__(self):
            pass

        def __exit__(self, *_):
            raise RuntimeError("operation failed due to a previous error during capture")

    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    whole = build()
    step = RecordedStep(whole, whole.make_views.generators)
    for number in range(3):
        step(begin(whole, 0, number), 1.0)
    inputs = begin(whole, 0, 3)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: Refused())
    monkeypatch.setattr(whole, "make_views", refuse)
    with pytest.raises(
        UserError, match=r"\(operation not permitted when stream is capturing\); set .*DRASCLR_FAST=off"
    ):
        step(inputs, 1.0)
    assert isinstance(whole.descend.optimizer.param_groups[0]["lr"], float)


def test_which_runs_are_recorded(monkeypatch):
    step, gpu = build(), torch.device("cuda")
    flags = argparse.Namespace(accumulate=1, compile=False, augmentation="agc")
    assert can_record_cuda_graph(gpu, step, flags) and not can_record_cuda_graph(CPU, step, flags)
    for name, value in (("accumulate", 2), ("compile", True), ("augmentation", "age")):
        assert not can_record_cuda_graph(gpu, step, argparse.Namespace(**{**vars(flags), name: value}))
    with fast.disable_fast_paths():
        assert not can_record_cuda_graph(gpu, step, flags)
    step.training_step = torch.nn.Module()  # stands for a wrapper such as DistributedDataParallel
    assert not can_record_cuda_graph(gpu, step, flags)


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True])
def test_a_replay_on_a_gpu_equals_the_step(bf16):
    gpu, results = torch.device("cuda", 0), []
    for recorded in (False, True):
        whole = build()
        model, table = whole.training_step.model.to(gpu), whole.training_step.table
        views = StepViews(whole.make_views.draws, gpu)
        step = whole = WholeStep(
            views,
            TrainingStep(model, LocationTable(*(part.to(gpu) for part in table)), bf16),
            Descent(make_optimizer(model, 0.01, 0.9, 1e-4)),
        )
        if recorded:
            step = RecordedStep(whole, views.generators)
        torch.cuda.manual_seed(3)
        statistics = []
        for number in range(6):
            inputs = begin(whole, number % L, number)
            inputs = Inputs(*(value.to(gpu) for value in inputs))
            statistics.append(step(inputs, 1.0).outcome.statistics.clone())
        results.append(torch.stack(statistics)[:, :5].cpu())
    torch.testing.assert_close(*results, rtol=2e-2 if bf16 else 1e-3, atol=1e-2)
