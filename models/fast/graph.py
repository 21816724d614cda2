"""A training step recorded as one CUDA graph: its kernels are launched together, not one after another from Python.

A step is some thousand kernels of a few microseconds, and Python takes longer to launch them than a GPU to run them.
"""

import argparse
import gc
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from misc.command import UserError
from models import fast
from models.step import Done, Inputs, TrainingStep, WholeStep

WARM_UP = 3  # steps before one is recorded: libraries choose their algorithms, the optimiser makes its state


class Recorded(NamedTuple):
    """A graph, the tensors that it reads, and those that it writes."""

    graph: Any  # torch.cuda.CUDAGraph
    inputs: Inputs
    done: Done


class RecordedStep:
    """A WholeStep that is recorded once for each shape of its inputs and each beta, and replayed after that.

    A replay computes what the step would. It is possible for one process that takes an optimiser step every time.

    Args:
        step: with a view function whose sizes no draw decides.
        generators: that the views draw noise from; they may be seeded before every step.
    """

    def __init__(self, step: WholeStep, generators: Sequence[torch.Generator]):
        self.step, self.generators = step, generators
        self.optimizer = step.descend.optimizer
        self._rate: torch.Tensor | None = None
        self._kind: tuple = ()  # what was recorded, or is being warmed up for
        self._seen = 0  # steps of that kind so far
        self._recorded: Recorded | None = None

    def __call__(self, inputs: Inputs, beta: float, last: bool = False) -> Done:
        """The step. What it returns is overwritten by the next one.

        Raises:
            UserError: the step cannot be recorded.
        """
        kind = (beta, *(None if value is None else (value.shape, value.dtype) for value in inputs))
        if kind != self._kind:  # beta changes once, after the warm-up: two graphs' memory would be too much
            self._kind, self._seen, self._recorded = kind, 0, None
        for group in self.optimizer.param_groups:  # a graph's rate is float32: every step's is, recorded or not
            group["lr"] = float(np.float32(group["lr"]))
        self._seen += 1
        if self._seen <= WARM_UP:
            return self.step(inputs, beta, last)
        if self._recorded is None:
            self._recorded = self._record(inputs, beta)
        for given, kept in zip(inputs, self._recorded.inputs):
            if kept is not None:
                kept.copy_(given, non_blocking=True)
        self._rate.fill_(self.optimizer.param_groups[0]["lr"])
        self._recorded.graph.replay()
        return self._recorded.done

    def _record(self, inputs: Inputs, beta: float) -> Recorded:
        """The step as a graph, not run yet. Raises UserError."""
        kept = Inputs(*(None if value is None else value.clone() for value in inputs))
        self._rate = torch.zeros((), device=inputs.patches.device)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.zero_grad(set_to_none=True)  # so that the graph's own gradients are new ones
        torch.cuda.synchronize()
        gc.collect()  # an older graph that is collected within a recording may spoil it
        graph = torch.cuda.CUDAGraph()
        try:
            for generator in self.generators:
                register_generator(graph, generator)
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate  # a tensor, which a replay may find changed
            # The loader's thread pins memory meanwhile, which only its own mode allows.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                done = self.step(kept, beta)
        except RuntimeError as error:
            cause = error.__context__ or error  # the recording's own end fails too, and says less
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            # Not every torch can go on after this: streams, generators and memory are left as within a recording.
            raise UserError(
                f"the training step cannot be recorded as a CUDA graph ({str(cause).splitlines()[0]}); set the "
                "environment variable DRASCLR_FAST=off, and go on with --resume auto"
            ) from cause
        finally:
            for group, rate in zip(self.optimizer.param_groups, rates):
                group["lr"] = rate
        return Recorded(graph, kept, done)


def register_generator(graph: torch.cuda.CUDAGraph, generator: torch.Generator) -> None:
    """Let a graph draw from a generator that is seeded between replays; torch 2.14 needs no telling."""
    if hasattr(graph, "register_generator_state"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated there
            graph.register_generator_state(generator)


def can_record(device: torch.device, step: WholeStep, args: argparse.Namespace) -> bool:
    """Whether the steps of a run with these flags can be recorded.

    Not with ``--accumulate``, where two steps differ; nor with the elastic transform, whose offsets are too large to be
    kept twice.
    """
    alone = isinstance(step.training_step, TrainingStep)  # not DistributedDataParallel's
    plain = args.accumulate == 1 and not args.compile and "e" not in args.augmentation
    return device.type == "cuda" and fast.enabled() and alone and plain
