"""A pipeline of one rank on a CUDA device trains as its layers after one another do there; ``make gpu`` runs this."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from pipelines import CELLS, Network, padded, spliced
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import seqbatch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE, BACKEND = "cuda", "cpu:gloo,cuda:nccl"
F32, F64 = torch.float32, torch.float64
TOLERANCE = {F64: 1e-10, F32: 1e-4}
MODES = {"full": {"chunk_size": 3}, "truncated": {"chunk_size": 3}, "microbatch": {"num_microbatches": 2}}
NAMES = ["SRU", "LSTM", "GRU"]
LENGTHS = [(9, 4, 7, 1), (5, 5), (3, 2, 2, 2, 6)]


@pytest.fixture(scope="module")
def mesh():
    """One rank, connected by itself, whatever other tests have left."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group(BACKEND, store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh(DEVICE, (1,), mesh_dim_names=("pp",))
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def exact():
    """cuDNN rounds to TF32 by default, which is far more than what is looked for."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, was in zip(backends, before, strict=True):
        backend.allow_tf32 = was


def made(mesh, cell, mode="full", virtual=2, dtype=F64, **more):
    """A network on the device, and a pipeline of a copy of it."""
    network = Network(CELLS[cell], dtype=dtype).to(DEVICE)
    return network, network.pipeline(mesh=mesh, mode=mode, virtual=virtual, **MODES[mode], **more)


def gradients(module):
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def assert_near(found, expected, tolerance):
    """Relative to the largest element of each tensor, or to 1 where that is less."""
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert found[name].device.type == DEVICE
        worst, largest = (float(tensor.detach().abs().max()) for tensor in (found[name] - wanted, wanted))
        assert worst <= tolerance * max(1.0, largest), (name, worst)


def assert_same_step(network, pipe, batch, states=None, mode="full"):
    """A step of both has one loss and one gradient; the states after it. The pipeline gets the batch from the CPU."""
    total, states = network(batch.to(DEVICE), states, cut=3 if mode == "truncated" else None)
    (total * batch.loss_scale).backward()
    result = pipe.step(batch)
    tolerance = TOLERANCE[network.head.weight.dtype]
    assert not batch.data.is_cuda and result.loss.device.type == DEVICE and result.tokens == batch.loss_tokens
    assert float(result.loss) == pytest.approx(float(total.detach()) / max(batch.loss_tokens, 1), rel=tolerance)
    assert_near(gradients(pipe), gradients(network), tolerance)
    return states


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("virtual", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", NAMES)
def test_ragged_batches(mesh, cell, mode, virtual, dtype):
    """Losses, gradients and what three updates make of the parameters, on batches of other shapes each."""
    network, pipe = made(mesh, cell, mode, virtual, dtype)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9) for module in (network, pipe)]
    for seed, lengths in enumerate(LENGTHS):
        assert_same_step(network, pipe, padded(lengths, seed), mode=mode)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_near(dict(pipe.named_parameters()), dict(network.named_parameters()), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", NAMES)
def test_spliced_batches_carry_their_states(mesh, cell, mode, dtype):
    """Resets in the middle of chunks, and states from batch to batch; gradients add up."""
    network, pipe = made(mesh, cell, mode, dtype=dtype)
    batches, states = spliced([5, 9, 2, 7, 3, 8, 4, 6], lanes=2, window=7), None
    assert len(batches) > 2 and any(bool(batch.reset[1:].any()) for batch in batches)
    for batch in batches:
        states = assert_same_step(network, pipe, batch, states, mode)


@pytest.mark.parametrize("cell", NAMES)
def test_autocast_to_bfloat16(mesh, cell):
    """Near float32: the loss, and all gradients together; a step without autocast is exact again."""
    network, pipe = made(mesh, cell, dtype=F32)
    batch, found = padded(LENGTHS[0]), []
    for context in (nullcontext(), torch.autocast(DEVICE, torch.bfloat16)):
        pipe.zero_grad()
        with context:
            loss = float(pipe.step(batch).loss)
        found.append((loss, torch.cat([gradient.flatten() for gradient in gradients(pipe).values()])))
    (loss, exact), (rounded_loss, rounded) = found
    assert rounded.dtype == F32 and loss != rounded_loss
    assert rounded_loss == pytest.approx(loss, rel=0.02)
    assert float((rounded - exact).norm()) <= 0.05 * float(exact.norm())
    pipe.zero_grad()
    assert_same_step(network, pipe, batch)


class Dropped(nn.Module):
    """A layer whose output is dropped by half."""

    def __init__(self, *sizes):
        super().__init__()
        self.rnn, self.drop = seqbatch.rnn.SRU(*sizes), nn.Dropout(0.5)

    def forward(self, x, state=None, *, reset=None, mask=None):
        y, state = self.rnn(x, state, reset=reset, mask=mask)
        return self.drop(y), state


def test_dropout_does_not_depend_on_the_split(mesh):
    """One or two stages draw the same masks, another step others; the device's random numbers go on as they were."""
    network = Network(Dropped).to(DEVICE)
    one, two = (network.pipeline(mesh=mesh, chunk_size=3, seed=7, virtual=virtual) for virtual in (1, 2))
    one.step(padded(LENGTHS[0])), two.step(padded(LENGTHS[0]))
    before, losses, batch = torch.cuda.get_rng_state(), [], padded(LENGTHS[0])
    for _ in range(2):
        one.zero_grad(), two.zero_grad()
        losses.append(float(one.step(batch).loss))
        assert float(two.step(batch).loss) == pytest.approx(losses[-1], rel=TOLERANCE[F64])
        assert_near(gradients(two), gradients(one), TOLERANCE[F64])
    assert abs(losses[0] - losses[1]) > 1e-6
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", NAMES)
def test_evaluation(mesh, cell, mode):
    """The plain loss, with carried states of its own: between training's steps it changes nothing."""
    network, pipe = made(mesh, cell, mode)
    states = others = None
    for batch in spliced([5, 9, 2, 7, 3, 8], lanes=2, window=7):
        with torch.no_grad():
            total, others = network(batch.to(DEVICE), others)
        found = pipe.evaluate(batch)
        assert found.loss.device.type == DEVICE
        assert float(found.loss) == pytest.approx(float(total) / max(batch.loss_tokens, 1), rel=TOLERANCE[F64])
        states = assert_same_step(network, pipe, batch, states, mode)


@pytest.mark.parametrize("cell", NAMES)
def test_a_checkpoint_goes_on_with_another_split(mesh, cell, tmp_path):
    """Parameters, Adam's moments and carried states, from two stages to four."""
    batches = spliced([5, 9, 2, 7, 3, 8, 4, 6], lanes=2, window=5)
    _, pipe = made(mesh, cell)
    other = Network(CELLS[cell], seed=5).to(DEVICE).pipeline(mesh=mesh, virtual=4, **MODES["full"])
    first, second = (torch.optim.Adam(module.parameters(), lr=0.01) for module in (pipe, other))
    for batch in batches[:2]:
        pipe.step(batch)
        first.step()
        first.zero_grad()
    pipe.save(tmp_path / "saved", first, done=2)
    assert other.load(tmp_path / "saved", second) == {"done": 2}
    assert_near(dict(other.named_parameters()), dict(pipe.named_parameters()), 0.0)
    for batch in batches[2:]:
        loss = float(pipe.step(batch).loss)
        assert float(other.step(batch).loss) == pytest.approx(loss, rel=TOLERANCE[F64])
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
    assert_near(dict(other.named_parameters()), dict(pipe.named_parameters()), 1e-8)  # Adam divides by small numbers


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", NAMES)
def test_simulation_and_tuning(mesh, cell, mode):
    """Both measure on the device, and leave no trace."""
    network, pipe = made(mesh, cell, mode, dtype=F32)
    batch = padded(LENGTHS[0])
    assert pipe.simulate(batch, repeats=1).makespan > 0
    found = pipe.tune(batch, chunks=(1, 2), repeats=1)
    assert found.step_s > 0 and found.chunks in (1, 2) and sum(found.split) == 4
    assert not any(gradient is not None for gradient in gradients(pipe).values())
    assert_same_step(network, pipe, batch, mode=mode)
