"""A training step recorded as one CUDA graph: its kernels are launched together, not one after another from Python.

A step is some thousand kernels of a few microseconds, and Python takes longer to launch them than a GPU to run them.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

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
        say: prints a line if a step cannot be recorded.
    """

    def __init__(self, step: WholeStep, generators: Sequence[torch.Generator], say: Callable[[str], Any] = print):
        self.step, self.generators, self.say = step, generators, say
        self.optimizer = step.descend.optimizer
        self._rate: torch.Tensor | None = None
        self._seen: dict[tuple, int] = {}
        self._recorded: dict[tuple, Recorded | None] = {}

    def __call__(self, inputs: Inputs, beta: float, last: bool = False) -> Done:
        """The step. What it returns is overwritten by the next one."""
        shapes = [None if value is None else (value.shape, value.dtype) for value in inputs]
        key = (beta, *shapes)
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] > WARM_UP and key not in self._recorded:
            self._recorded[key] = self._record(inputs, beta)
        recorded = self._recorded.get(key)
        if recorded is None:
            return self.step(inputs, beta, last)
        for given, kept in zip(inputs, recorded.inputs):
            if kept is not None:
                kept.copy_(given, non_blocking=True)
        self._rate.fill_(self.optimizer.param_groups[0]["lr"])
        recorded.graph.replay()
        return recorded.done

    def _record(self, inputs: Inputs, beta: float) -> Recorded | None:
        """The step as a graph, not run yet; None, and a line, if it cannot be."""
        kept = Inputs(*(None if value is None else value.clone() for value in inputs))
        self._rate = torch.zeros((), device=inputs.patches.device) if self._rate is None else self._rate
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.zero_grad(set_to_none=True)  # so that the graph's own gradients are new ones
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            for generator in self.generators:
                graph.register_generator_state(generator)
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate  # a tensor, which a replay may find changed
            # The loader's thread pins memory meanwhile, which only its own mode allows.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                done = self.step(kept, beta)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            self.say(f"note: steps are not recorded as a CUDA graph, which is slower ({reason}); results are the same")
            self.optimizer.zero_grad(set_to_none=True)
            return None
        finally:
            for group, rate in zip(self.optimizer.param_groups, rates):
                group["lr"] = rate
        return Recorded(graph, kept, done)


def can_record(device: torch.device, step: WholeStep, args: argparse.Namespace) -> bool:
    """Whether the steps of a run with these flags can be recorded.

    Not with ``--accumulate``, where two steps differ; nor with the elastic transform, whose offsets are too large to be
    kept twice.
    """
    alone = isinstance(step.training_step, TrainingStep)  # not DistributedDataParallel's
    plain = args.accumulate == 1 and not args.compile and "e" not in args.augmentation
    return device.type == "cuda" and fast.enabled() and alone and plain
