"""A training step recorded as one CUDA graph, so that one call from Python launches all of its kernels.

A step launches about a thousand kernels that take a few microseconds each. Python takes longer to launch the kernels
of a step one by one than the GPU takes to run them.
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

WARM_UP = 3  # steps before recording, during which libraries choose algorithms and the optimiser creates its state


class Recorded(NamedTuple):
    """A CUDA graph with its input and output tensors."""

    graph: Any  # torch.cuda.CUDAGraph
    inputs: Inputs
    done: Done


class RecordedStep:
    """A WholeStep that is recorded once for each combination of input shapes and beta, and then replayed.

    A replay computes the same numbers as the original step. Recording requires one process and an optimiser update in
    each step.

    Args:
        step: the step to record. The tensor sizes in ``step.make_views`` must not depend on random draws.
        generators: random generators that the views use for noise. The caller may seed the generators before each
            step.
    """

    def __init__(self, step: WholeStep, generators: Sequence[torch.Generator]):
        self.step, self.generators = step, generators
        self.optimizer = step.descend.optimizer
        self._rate: torch.Tensor | None = None
        self._kind: tuple = ()  # loss weight beta and input shapes of the recorded step or warm-up steps
        self._seen = 0  # number of steps so far with this beta and these input shapes
        self._recorded: Recorded | None = None

    def __call__(self, inputs: Inputs, beta: float, force_update: bool = False) -> Done:
        """Run the step. The next call overwrites the returned tensors.

        Raises:
            UserError: the step cannot be recorded.
        """
        kind = (beta, *(None if value is None else (value.shape, value.dtype) for value in inputs))
        # Keep only one graph, because two graphs take too much memory, and beta changes at most once per run.
        if kind != self._kind:
            self._kind, self._seen, self._recorded = kind, 0, None
        for group in self.optimizer.param_groups:  # round the learning rate to float32, as in a recorded step
            group["lr"] = float(np.float32(group["lr"]))
        self._seen += 1
        if self._seen <= WARM_UP:
            return self.step(inputs, beta, force_update)
        if self._recorded is None:
            self._recorded = self._record_cuda_graph(inputs, beta)
        for given, kept in zip(inputs, self._recorded.inputs):
            if kept is not None:
                kept.copy_(given, non_blocking=True)
        self._rate.fill_(self.optimizer.param_groups[0]["lr"])
        self._recorded.graph.replay()
        return self._recorded.done

    def _record_cuda_graph(self, inputs: Inputs, beta: float) -> Recorded:
        """Record the step as a graph without running it. Raises UserError if the graph cannot be recorded."""
        kept = Inputs(*(None if value is None else value.clone() for value in inputs))
        self._rate = torch.zeros((), device=inputs.patches.device)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.zero_grad(set_to_none=True)  # remove the gradients, so that the graph allocates new ones
        torch.cuda.synchronize()
        gc.collect()  # delete older graphs now, because deleting one during the recording may break the recording
        graph = torch.cuda.CUDAGraph()
        try:
            for generator in self.generators:
                register_generator(graph, generator)
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate  # a tensor, so that the learning rate can change between replays
            # The data loader's thread pins memory during the recording, which only the mode "thread_local" allows.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                done = self.step(kept, beta)
        except RuntimeError as error:
            # The original error is more specific than the error raised when the recording ends.
            cause = error.__context__ or error
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            # Stop if recording fails, because some torch versions leave streams and memory in recording mode.
            raise UserError(
                f"the training step cannot be recorded as a CUDA graph ({str(cause).splitlines()[0]}); set the "
                "environment variable DRASCLR_FAST=off and continue with --resume auto"
            ) from cause
        finally:
            for group, rate in zip(self.optimizer.param_groups, rates):
                group["lr"] = rate
        return Recorded(graph, kept, done)


def register_generator(graph: torch.cuda.CUDAGraph, generator: torch.Generator) -> None:
    """Register a random generator with a CUDA graph, so that replays can use new seeds. Unnecessary with torch 2.14."""
    if hasattr(graph, "register_generator_state"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated in torch 2.14
            graph.register_generator_state(generator)


def can_record_cuda_graph(device: torch.device, step: WholeStep, args: argparse.Namespace) -> bool:
    """Return whether the steps of a run with these flags can be recorded.

    A CUDA graph cannot record steps with ``--accumulate``, because only some steps update the weights.
    A CUDA graph cannot record the elastic transform, because its offsets are too large to keep in memory twice.
    A CUDA graph is also not used with ``--compile`` or with several processes.
    """
    alone = isinstance(step.training_step, TrainingStep)  # not wrapped in DistributedDataParallel
    plain = args.accumulate == 1 and not args.compile and "e" not in args.augmentation
    return device.type == "cuda" and fast.is_enabled() and alone and plain
