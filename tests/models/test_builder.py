"""Compare DrasCLR's training step with explicit loops, and test saving and loading of its state."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from models.builder import DrasCLR
from models.cnn3d import Encoder

from ..conftest import calibrate

L, K, DIM, B, NEAR = 3, 12, 6, 4, 2


def build(mlp=True, seed=0, T=0.2, m=0.9, K=K):
    torch.manual_seed(seed)
    return DrasCLR(Encoder, L, 8, DIM, 2, 1, K, m, T, mlp)


def draw_inputs(seed=1, k=NEAR):
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(2, B, 1, 32, 32, 32, generator=generator)
    neighbors = torch.randn(B, k, 32, 32, 32, generator=generator)
    locs = torch.rand(1 + k, 3, generator=generator) * 2 - 1
    return patches[0], patches[1], neighbors, locs[:1], locs[1:][None]


def literal_step(model, index, query, key, neighbors, here, near):
    """Compute the training step sample by sample; return the logits of both tasks and the location's new queue."""
    encoder_q, encoder_k = copy.deepcopy(model.encoder_q), copy.deepcopy(model.encoder_k)
    k = neighbors.shape[1]
    z = encoder_q(query, here.expand(B, 3))[0]
    r = encoder_q(neighbors.reshape(B * k, 1, 32, 32, 32), near.expand(B, k, 3).reshape(-1, 3))[0]
    for slow, fast in zip(encoder_k.parameters(), encoder_q.parameters()):
        slow.data = slow.data * model.m + fast.data * (1 - model.m)
    keys = encoder_k(key, here.expand(B, 3))[0]
    queue = model.state_dict()["queue"][:, :, index].clone()  # (dim, K)

    def unit(vector):
        return vector / vector.norm()

    patch_logits, neighbor_logits = [], []
    for i in range(B):
        own = unit(keys[i])
        around = [unit(r[i * k + j]) for j in range(k)]
        patch_logits.append([unit(z[i]) @ own] + [unit(z[i]) @ queue[:, n] for n in range(model.K)])
        neighbor_logits.append(
            [sum(v @ own for v in around)] + [sum(v @ queue[:, n] for v in around) for n in range(model.K)]
        )
    pointer = int(model.queue_ptr[index])
    for i in range(B):
        queue[:, (pointer + i) % model.K] = unit(keys[i])
    stacked = [torch.stack([torch.stack(row) for row in rows]) / model.T for rows in (patch_logits, neighbor_logits)]
    return *stacked, queue.detach()


@pytest.mark.parametrize(("training", "mlp", "k"), [(True, True, 2), (True, False, 3), (False, True, 1)])
def test_a_step_equals_a_literal_loop(training, mlp, k):
    # Use float64, because BatchNorm over the last layer's four values amplifies rounding errors.
    model = build(mlp).double().train(training)
    query, key, neighbors, here, near = (tensor.double() for tensor in draw_inputs(k=k))
    for step in range(2):
        wanted_patch, wanted_neighbor, wanted_queue = literal_step(model, 1, query, key, neighbors, here, near)
        others = model.state_dict()["queue"].clone()
        patch, neighbor, labels = model(1, [query, here], [key, here], [neighbors, near])
        torch.testing.assert_close(patch, wanted_patch, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(neighbor, wanted_neighbor, rtol=1e-9, atol=1e-9)
        after = model.state_dict()["queue"]
        torch.testing.assert_close(after[:, :, 1], wanted_queue, rtol=1e-9, atol=1e-9)
        assert torch.equal(after[:, :, [0, 2]], others[:, :, [0, 2]])
        assert labels.dtype == torch.int64 and not labels.any()
        assert model.queue_ptr.tolist() == [0, B * (step + 1), 0]


def test_one_location_row_per_sample_equals_one_row_for_all():
    query, key, neighbors, here, near = draw_inputs()
    first, second = build(), build()
    for model in (first, second):
        calibrate(model.eval().encoder_q, model.encoder_k)
    a = first(0, (query, here), (key, here), (neighbors, near))
    b = second(0, (query, here.expand(B, 3)), (key, here.expand(B, 3)), (neighbors, near.expand(B, NEAR, 3)))
    for fast, slow in zip(a, b):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_each_sample_uses_its_own_location_row():
    """Neighbours are flattened sample-major: row (i, j) is neighbour j of sample i."""
    query, key, neighbors, _, _ = draw_inputs()
    own = torch.rand(B, 3) * 2 - 1
    near = torch.rand(B, NEAR, 3) * 2 - 1
    model = build().eval()
    calibrate(model.encoder_q, model.encoder_k)
    encoder_q = copy.deepcopy(model.encoder_q)
    queue = model.state_dict()["queue"][:, :, 0].clone()
    patch, neighbor, _ = model(0, [query, own], [key, own], [neighbors, near])
    with torch.no_grad():
        for i in range(B):
            z = F.normalize(encoder_q(query[i : i + 1], own[i : i + 1])[0][0], dim=0)
            torch.testing.assert_close(patch[i, 1:], z @ queue / model.T, rtol=1e-4, atol=1e-5)
            r = [
                F.normalize(encoder_q(neighbors[i, j][None, None], near[i, j][None])[0][0], dim=0) for j in range(NEAR)
            ]
            torch.testing.assert_close(neighbor[i, 1:], sum(r) @ queue / model.T, rtol=1e-4, atol=1e-5)


def test_inputs_are_not_modified():
    query, key, neighbors, here, near = draw_inputs()
    given = [query, key, neighbors, here, near]
    copies = [tensor.clone() for tensor in given]
    pch_k = [key, here]
    build()(0, [query, here], pch_k, [neighbors, near])
    assert all(torch.equal(a, b) for a, b in zip(given, copies))
    assert pch_k[0] is key and pch_k[1] is here


def test_key_encoder_starts_as_a_copy_and_learns_nothing():
    model = build()
    for (name, q), k in zip(model.encoder_q.named_parameters(), model.encoder_k.parameters()):
        assert torch.equal(q, k) and q.requires_grad and not k.requires_grad, name
    query, key, neighbors, here, near = draw_inputs()
    patch, neighbor, labels = model(0, [query, here], [key, here], [neighbors, near])
    (F.cross_entropy(patch, labels) + F.cross_entropy(neighbor, labels)).backward()
    assert all(p.grad is None for p in model.encoder_k.parameters())
    assert all(p.grad is not None for p in model.encoder_q.parameters())


def test_queue_starts_as_unit_noise_and_pointers_at_zero():
    queue = build(K=2048).state_dict()["queue"]
    assert queue.shape == (DIM, 2048, L)
    torch.testing.assert_close(queue.norm(dim=0), torch.ones(2048, L))
    assert abs(float(queue.mean())) < 0.01
    # Each coordinate of a random unit vector in d dimensions has variance 1 / d.
    assert float(queue.var()) == pytest.approx(1 / DIM, rel=0.02)


def test_equal_logits_give_log_of_one_plus_k():
    """At a high temperature all logits are equal, so the loss is ln(1 + K)."""
    model = build(T=1e6)
    query, key, neighbors, here, near = draw_inputs()
    patch, neighbor, labels = model(0, [query, here], [key, here], [neighbors, near])
    for logits in (patch, neighbor):
        assert float(F.cross_entropy(logits, labels).detach()) == pytest.approx(math.log(1 + K), abs=1e-4)


def test_the_queue_pointer_wraps_around():
    model = build()
    model.queue_ptr[0] = K - 2
    query, key, neighbors, here, near = draw_inputs()
    model(0, [query, here], [key, here], [neighbors, near])
    assert int(model.queue_ptr[0]) == B - 2


def test_disk_layout_is_saved_and_loaded():
    model, other = build(seed=0), build(seed=5)
    query, key, neighbors, here, near = draw_inputs()
    model(2, [query, here], [key, here], [neighbors, near])
    state = model.state_dict()
    assert state["queue"].shape == (DIM, K, L) and state["queue_ptr"].shape == (L,)
    before = {name: tensor.clone() for name, tensor in state.items()}
    other.load_state_dict(state)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert state["queue"].shape == (DIM, K, L)


@pytest.mark.parametrize("what", ["pch_q", "pch_k", "ngb_q"])
def test_a_wrong_number_of_location_rows_is_refused(what):
    query, key, neighbors, here, near = draw_inputs()
    inputs = {"pch_q": [query, here], "pch_k": [key, here], "ngb_q": [neighbors, near]}
    inputs[what][1] = inputs[what][1].expand(3, *inputs[what][1].shape[1:])
    with pytest.raises(ValueError, match=f"{what} has 3 location rows for a batch of 4"):
        build()(0, **inputs)


def test_queue_must_hold_whole_batches():
    query, key, neighbors, here, near = draw_inputs()
    with pytest.raises(ValueError, match="K = 10 is not a multiple of the batch of 4 samples"):
        build(K=10)(0, [query, here], [key, here], [neighbors, near])


def test_num_coordinates_must_be_one():
    with pytest.raises(ValueError, match="num_coordinates is 2"):
        DrasCLR(Encoder, L, 8, DIM, 2, 2, K, 0.9, 0.2, True)


# ---------------------------------------------------------------- options that are not in the published method


def unit(x):
    return F.normalize(x, dim=-1)


def encoded(model, index, inputs):
    """Return a step's queries, summed neighbour vectors and keys.

    The encoders are in eval mode, so repeated calls give the same result.
    """
    query, key, neighbors, here, near = inputs
    q = unit(model.encoder_q(query, here)[0])
    flat = neighbors.reshape(B * NEAR, 1, 32, 32, 32)
    r = unit(model.encoder_q(flat, near.expand(B, NEAR, 3).reshape(-1, 3))[0].view(B, NEAR, -1)).sum(1)
    after = copy.deepcopy(model)
    after._update_key_encoder()
    return q, r, unit(after.encoder_k(key, here)[0])


def calibrated(**choices):
    torch.manual_seed(0)
    model = DrasCLR(Encoder, L, 8, DIM, 2, 1, K, 0.9, 0.2, True, **choices)
    calibrate(model.encoder_q, model.encoder_k)
    return model


def step(model, index, inputs, subjects=None):
    query, key, neighbors, here, near = inputs
    return model.step(index, [query, here], [key, here], [neighbors, near], subjects)


@torch.no_grad()
def test_negatives_from_the_batch():
    """Negatives of patches and of neighbours are the keys of the step's other subjects.

    The step also adds its keys to the queue.
    """
    model, inputs = calibrated(negatives="batch"), draw_inputs()
    q, r, keys = encoded(model, 1, inputs)
    patch, neighbor, labels = step(model, 1, inputs)[:3]
    assert patch.shape == neighbor.shape == (B, B) and not labels.any()
    for logits, left in ((patch, q), (neighbor, r)):
        for i in range(B):
            assert float(logits[i, 0]) == pytest.approx(float(left[i] @ keys[i]) / 0.2, abs=1e-4)
            others = sorted(float(left[i] @ keys[j]) / 0.2 for j in range(B) if j != i)
            assert sorted(logits[i, 1:].tolist()) == pytest.approx(others, abs=1e-4)
    torch.testing.assert_close(model.queue[1, :B], keys, rtol=1e-4, atol=1e-5)
    assert model.queue_ptr.tolist() == [0, B, 0]


@torch.no_grad()
def test_one_queue_holds_keys_of_all_locations():
    """With a single queue, a step at a second location uses the first location's keys as negatives."""
    model, inputs, others = calibrated(one_queue=True), draw_inputs(), draw_inputs()
    first = encoded(model, 1, inputs)[2]
    step(model, 1, inputs)
    q, _, second = encoded(model, 2, others)
    logits = step(model, 2, others)[0]
    torch.testing.assert_close(logits[:, 1 : 1 + B], q @ first.t() / 0.2, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.queue[0, : 2 * B], torch.cat([first, second]), rtol=1e-4, atol=1e-5)
    assert model.queue_ptr.tolist() == [2 * B % K, 0, 0]


@torch.no_grad()
def test_a_subjects_own_keys_are_masked():
    model, plain, inputs = calibrated(mask_own=True), calibrated(), draw_inputs()
    for one in (model, plain):
        step(one, 1, inputs, torch.tensor([7, 3, 5, 9]))  # fills queue rows 0 to 3
    subjects = torch.tensor([3, 8, 9, 9])
    masked, free = (step(one, 1, draw_inputs(2), subjects)[:2] for one in (model, plain))
    wanted = torch.zeros(B, 1 + K, dtype=torch.bool)
    for row, column in (
        (0, 1),
        (2, 3),
        (3, 3),
    ):  # queue row 1 holds a key of subject 3, and row 3 holds a key of subject 9
        wanted[row, 1 + column] = True
    for ours, theirs in zip(masked, free):
        assert torch.equal(torch.isneginf(ours), wanted)
        torch.testing.assert_close(ours[~wanted], theirs[~wanted])
    with pytest.raises(ValueError, match="mask_own is set, but no subjects are given"):
        step(model, 1, inputs)


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_a_step_without_neighbours_is_otherwise_equal(training):
    """Logits, keys and queue are equal with and without neighbours.

    In training without neighbours, BatchNorm's running statistics come from the patches only.
    """
    model = calibrated().train(training)
    twin, (query, key, *_, here, _near) = copy.deepcopy(model), draw_inputs()
    logits, none, labels = twin(1, [query, here], [key, here], None)
    assert none is None and not labels.any()
    assert torch.equal(logits, step(model, 1, draw_inputs()).logits_pch)
    ours = twin.state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, ours[name])}
    norms = {name for name in ours if name.startswith("encoder_q.") and ("running" in name or "batches" in name)}
    assert changed == (norms if training else set())
    assert int(model.encoder_q.bn1.num_batches_tracked - twin.encoder_q.bn1.num_batches_tracked) == training


@torch.no_grad()
def test_statistics_equal_loops():
    model, inputs = calibrated(), draw_inputs()
    q, _, keys = encoded(model, 1, inputs)
    first = step(model, 1, inputs, torch.arange(B))
    probe = {name: float(value) for name, value in first.statistics.items()}
    nearest = [max(range(B), key=lambda j: float(q[i] @ keys[j])) for i in range(B)]
    assert probe["accuracy_fresh"] == pytest.approx(100 * sum(i == j for i, j in enumerate(nearest)) / B)
    assert probe["alignment"] == pytest.approx(
        sum(float((q[i] - keys[i]).square().sum()) for i in range(B)) / B, rel=1e-3
    )
    pairs = [math.exp(-2 * float((keys[i] - keys[j]).square().sum())) for i in range(B) for j in range(B) if i != j]
    assert probe["uniformity"] == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-3, abs=1e-4)
    assert probe["queue_own"] == 0 and probe["queue_age"] == 0  # the initial keys are noise, without subject or age
    assert first.representation.shape == (B, 8)
    step(model, 0, draw_inputs(3), torch.arange(B))  # a step at another location makes the keys older
    third = step(model, 1, draw_inputs(4), torch.tensor([2, 2, 6, 7])).statistics
    assert float(third["queue_age"]) == 2.0  # the keys of step 1 are 2 steps old in step 3
    assert float(third["queue_own"]) == pytest.approx(100 * 2 / (B * K))


@torch.no_grad()
def test_the_queue_origin_is_saved_and_loaded():
    model = calibrated()
    step(model, 2, draw_inputs(), torch.tensor([4, 1, 0, 2]))
    assert not any("subject" in name or "step" in name for name in model.state_dict())  # only the published keys
    other = calibrated()
    other.restore_key_subjects_and_steps(copy.deepcopy(model.export_key_subjects_and_steps()))
    assert torch.equal(other.queue_subject, model.queue_subject) and other.steps == 1
    assert other.queue_subject[2, :B].tolist() == [4, 1, 0, 2] and (other.queue_subject[:2] == -1).all()


def test_an_unknown_negatives_option_is_refused():
    with pytest.raises(ValueError, match="negatives is 'both'"):
        calibrated(negatives="both")
