"""Run the literal implementation of the method in a separate process, with the system's default memory allocation."""

import argparse
import multiprocessing
from multiprocessing.connection import Connection

import torch

from data.store import PatchStore
from data.views import convert_hu_to_input
from tools.dev.literal import LiteralAugmentation, LiteralStep, encode_sample_by_sample, make_views_sample_by_sample
from tools.timing.measure import synchronize
from tools.timing.step import TimedStep, make_encoder

PUBLISHED_LOCATIONS = 581


def serve_jobs_of_literal_method(pipe: Connection, store_folder: str, K: int, batch: int, device: torch.device) -> None:
    """Receive names of jobs from ``pipe``, run each job with the literal implementation, and send back the result."""
    store = PatchStore(store_folder, require_grouped=True)
    fast = TimedStep(store, batch, K, device, bf16=False)  # weights and batches
    literal = LiteralStep(fast.model)
    encoder = make_encoder(device)
    augment = LiteralAugmentation("agc")
    x = torch.randn(batch, 1, 32, 32, 32, device=device)
    everywhere = torch.rand(fast.store.num_locations, 3, device=device)

    def compute_literal_loss() -> float:
        drawn = next(fast.batches)
        inputs = fast.make_inputs(drawn)
        views = fast.views(inputs.patches, inputs.neighbors, inputs.draws)
        return float(literal.compute_loss(drawn.location, *views, *fast.get_coordinates(drawn.location)).detach())

    def encode_and_backpropagate() -> None:
        encode_sample_by_sample(literal.encoder_q, x, everywhere[:1].expand(batch, 3))[0].sum().backward()

    def run_literal_step() -> None:
        drawn = next(fast.batches)
        views = make_views_sample_by_sample(drawn.patches, drawn.neighbors, augment)
        literal.step(drawn.location, *(view.to(device) for view in views), *fast.get_coordinates(drawn.location))

    @torch.no_grad()
    def compute_literal_features() -> None:
        patches = torch.zeros(len(everywhere), 32, 32, 32, dtype=torch.int16).to(device)
        encode_sample_by_sample(encoder, convert_hu_to_input(patches), everywhere)[1].cpu()

    jobs = {
        "loss": compute_literal_loss,
        "encode": encode_and_backpropagate,
        "step": run_literal_step,
        "features": compute_literal_features,
    }
    while (name := pipe.recv()) is not None:
        result = jobs[name]()
        synchronize()
        pipe.send(result)


class LiteralProcess:
    """A process that runs the slow reference implementation. Call the object with a job's name to run the job."""

    def __init__(self, store: PatchStore, K: int, args: argparse.Namespace):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        inputs = (theirs, str(store.layout.root), K, args.batch, args.device)
        self.process = context.Process(target=serve_jobs_of_literal_method, args=inputs, daemon=True)
        self.process.start()
        theirs.close()  # otherwise recv() would wait forever if the other process crashed

    def __call__(self, job_name: str) -> float | None:
        self.pipe.send(job_name)
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()
