"""What each of several processes checks of a pipeline: run as ``torchrun ... pipeline_ranks.py SUITE FOLDER``.

Every case runs on every rank, and prints its name when it has passed; a rank that waits for more than `LIMIT`
seconds for an error that all ranks should raise ends with an alarm.
"""

import copy
import dataclasses
import faulthandler
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pipelines import (
    CELLS,
    Network,
    assert_same_gradients,
    assert_same_parameters,
    assert_same_step,
    assert_same_training,
    cross_entropy,
    padded,
    spliced,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import ScheduleLoopedBFS

import seqbatch
from seqbatch.pipeline import LayerPipeline

LIMIT, HANGS = 5, 60
F32, F64 = torch.float32, torch.float64
MODES = {"full": {"chunk_size": 3}, "truncated": {"chunk_size": 3}, "microbatch": {"num_microbatches": 2}}
SUITES: dict[str, list[Callable[[Path], None]]] = {}


def suite(*names: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Put a case into suites."""

    def add(function: Callable[[Path], None]) -> Callable[[Path], None]:
        for name in names:
            SUITES.setdefault(name, []).append(function)
        return function

    return add


@contextmanager
def raises(kind: type[Exception] | tuple[type[Exception], ...], match: str, limit: int = LIMIT) -> Iterator[None]:
    """On this rank, within seconds."""
    signal.alarm(limit)
    with pytest.raises(kind, match=match):
        yield
    signal.alarm(0)


def rank() -> int:
    return dist.get_rank()


@suite("two", "four")
def every_cell_in_every_mode(folder: Path) -> None:
    """Three optimizer steps on other shapes each."""
    few = dist.get_world_size() > 2
    for name, cell in CELLS.items():
        for mode, cut in MODES.items():
            for dtype in (F64,) if few else (F64, F32):
                network = Network(cell, dtype=dtype)
                pipe = network.pipeline(mode=mode, **cut)
                if name == "BNLSTM":
                    network.eval(), pipe.eval()
                assert_same_training(network, pipe, cut=3 if mode == "truncated" else None)


@suite("two", "four")
def random_batches(folder: Path) -> None:
    """Ragged and spliced ones whose shape changes every step, and states that are carried."""
    numbers = np.random.default_rng(0)
    for number in range(9 if dist.get_world_size() > 2 else 18):
        mode = ("full", "truncated", "microbatch")[number % 3]
        network = Network(CELLS[("SRU", "LSTM", "GRU")[number // 3 % 3]], seed=number)
        chunk = int(numbers.integers(1, 5))
        lanes = int(numbers.integers(2, 5))
        cut = {"num_microbatches": 1 + chunk % 2} if mode == "microbatch" else {"chunk_size": chunk}
        pipe = network.pipeline(mode=mode, cache=2, **cut)
        every = chunk if mode == "truncated" else None
        for seed in range(4):
            assert_same_step(network, pipe, padded(numbers.integers(1, 12, numbers.integers(2, 6)), seed), cut=every)
        states = None
        for batch in spliced(numbers.integers(2, 9, 12), lanes, int(numbers.integers(1, 9)), number):
            states = assert_same_step(network, pipe, batch, states, cut=every)


@suite("two")
def stages_in_turns(folder: Path) -> None:
    """Two stages on each rank, and other splits."""
    for mode, cut in MODES.items():
        network = Network(nn.GRU)
        pipe = network.pipeline(mode=mode, virtual=2, **cut)
        assert_same_step(network, pipe, padded([9, 3, 5]), cut=3 if mode == "truncated" else None)
    for split in ([1, 3], [3, 1], [4, 0]):
        network = Network(nn.GRU)
        pipe = network.pipeline(split=split, chunk_size=3)
        assert pipe.split == split
        assert_same_step(network, pipe, padded([9, 3, 5]))


@suite("two", "four")
def tied_and_clipped(folder: Path) -> None:
    """The embedding is the softmax too, over several steps and accumulated ones."""
    for shared in (False, True):
        network = Network(nn.GRU)
        network.head.weight = network.embed.weight
        other = network if shared else Network(nn.GRU, seed=rank())  # each rank has drawn values of its own
        pipe = other.pipeline(chunk_size=3, tied=() if shared else [("embed.weight", "head.weight")])
        network.load_state_dict(full_state(pipe))
        optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (network, pipe)]
        for seed in range(3):
            for micro in range(2):
                batch = padded([6, 4, 2], seed + micro)
                loss, _ = network(batch)
                (loss * batch.loss_scale).backward()
                pipe.step(batch)
            expected = torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
            found = pipe.clip_grad_norm_(0.5)
            assert abs(float(found) - float(expected)) < 1e-12
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        state = network.state_dict()
        for name, parameter in pipe.named_parameters():
            assert float((parameter - state[name]).detach().abs().max()) < 1e-12, name


def full_state(pipe: LayerPipeline) -> dict[str, torch.Tensor]:
    """Parameters of all ranks."""
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, pipe.state_dict())
    return {name: value for state in everyone for name, value in state.items()}


@suite("two", "four")
def norms_of_other_orders(folder: Path) -> None:
    for order in (1.0, float("inf")):
        network = Network(nn.GRU)
        pipe = network.pipeline(chunk_size=3)
        assert_same_step(network, pipe, padded([6, 4, 2]))
        expected = torch.nn.utils.clip_grad_norm_(network.parameters(), 0.1, order)
        assert abs(float(pipe.clip_grad_norm_(0.1, order)) - float(expected)) < 1e-12
        assert_same_gradients(network, pipe)


@suite("two", "four")
def evaluation_between_steps(folder: Path) -> None:
    """Before the first step and between steps; it leaves training's states and gradients alone."""
    network = Network(nn.GRU)
    pipe = network.pipeline(chunk_size=2)
    states = None
    for number, batch in enumerate(spliced([5, 7, 3, 4, 6, 2], 2, 4)):
        other = padded([3 + number, 4], number)
        with torch.no_grad():
            expected = network(other)[0] / other.loss_tokens
        assert abs(float(pipe.evaluate(other).loss - expected)) < 1e-12
        assert pipe.training
        states = assert_same_step(network, pipe, batch, states)
    pipe.reset_state()
    states = None
    for batch in spliced([5, 7, 3, 4, 6, 2], 2, 4):
        with torch.no_grad():
            expected, states = network(batch, states)
        assert abs(float(pipe.evaluate(batch).loss - expected / batch.loss_tokens)) < 1e-12


@suite("two", "four")
def dropout_does_not_depend_on_the_split(folder: Path) -> None:
    class Dropped(nn.Module):
        def __init__(self, *sizes: int) -> None:
            super().__init__()
            self.rnn, self.drop = seqbatch.rnn.LSTM(*sizes), nn.Dropout(0.5)

        def forward(self, x, state=None, *, reset=None, mask=None):
            y, state = self.rnn(x, state, reset=reset, mask=mask)
            return self.drop(y), state

    network = Network(Dropped)
    alone = LayerPipeline(
        list(copy.deepcopy(network.layers).values()),
        embed=copy.deepcopy(network.embed),
        head=copy.deepcopy(network.head),
        loss=cross_entropy,
        chunk_size=3,
        seed=7,
        mesh=ALONE[0],
    )
    pipe = network.pipeline(chunk_size=3, seed=7)
    before, losses = torch.get_rng_state(), []
    for seed in range(2):
        batch = padded([9, 4, 6], seed)
        one, many = alone.step(batch), pipe.step(batch)
        assert abs(float(one.loss - many.loss)) < 1e-12
        losses.append(float(one.loss))
        expected = dict(alone.named_parameters())
        for name, parameter in pipe.named_parameters():
            assert float((parameter.grad - expected[name].grad).abs().max()) < 1e-12, name
    assert torch.equal(torch.get_rng_state(), before)
    batch = padded([9, 4, 6], 0)
    assert abs(float(pipe.step(batch).loss) - losses[0]) > 1e-6  # another step, other masks


@suite("two", "four")
def autocast(folder: Path) -> None:
    """What goes over the wire has autocast's dtype; the loss is near that of float32."""
    network = Network(nn.GRU, dtype=F32)
    pipe = network.pipeline(chunk_size=3)
    batch = padded([9, 3, 5])
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = network(batch)
        found = pipe.step(batch).loss
    assert abs(float(loss.detach()) / batch.loss_tokens - float(found)) < 1e-3
    (loss * batch.loss_scale).backward()
    expected = dict(network.named_parameters())
    for name, parameter in pipe.named_parameters():
        assert torch.allclose(parameter.grad, expected[name].grad, atol=0.02), name
    assert float((pipe.step(batch).loss - loss.detach() / batch.loss_tokens).abs()) < 0.05  # without autocast again


@suite("two")
def frozen_parameters(folder: Path) -> None:
    """A whole stage without a gradient of its own."""
    network = Network(nn.GRU)
    for module in (network.embed, network.layers["0"], network.layers["1"]):
        module.requires_grad_(False)
    pipe = network.pipeline(split=[2, 2], chunk_size=3)
    batch = padded([5, 4])
    loss, _ = network(batch)
    (loss * batch.loss_scale).backward()
    pipe.step(batch)
    expected = dict(network.named_parameters())
    for name, parameter in pipe.named_parameters():
        assert (parameter.grad is None) == (expected[name].grad is None), name
        if parameter.grad is not None:
            assert float((parameter.grad - expected[name].grad).abs().max()) < 1e-12


@suite("four")
def pipelines_beside_each_other(folder: Path) -> None:
    """Two replicas of two stages: the gradient of one big batch, by the loader's ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
    words = np.random.default_rng(0)
    data = seqbatch.TokenArray.of_sequences([words.integers(11, size=n) for n in words.integers(2, 12, 40)])
    for mode, cut in MODES.items():
        network = Network(nn.GRU)
        pipe = network.pipeline(mesh=mesh, mode=mode, tied=[("embed.weight", "head.weight")], **cut)
        network.head.weight = network.embed.weight
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (network, pipe)]
        loaders = [
            seqbatch.make_loader(data, seqbatch.Padding(5), next_token=True, rank=r, num_replicas=2) for r in range(2)
        ]
        own = seqbatch.make_loader(data, seqbatch.Padding(5), next_token=True, mesh=mesh)
        for one, two, mine in zip(*loaders, own, strict=True):
            every = 3 if mode == "truncated" else None
            losses = [network(batch, cut=every)[0] for batch in (one, two)]
            (sum(losses) / one.step_loss_tokens).backward()
            result = pipe.step(mine)
            assert result.tokens == one.step_loss_tokens
            assert abs(float(result.loss) - float(sum(losses).detach()) / result.tokens) < 1e-11
            expected = {**dict(network.named_parameters()), "head.weight": network.embed.weight}
            for name, parameter in pipe.named_parameters():
                assert float((parameter.grad - expected[name].grad).abs().max()) < 1e-12, name
            norms = torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5), pipe.clip_grad_norm_(0.5)
            assert abs(float(norms[0]) - float(norms[1])) < 1e-12
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    with raises(ValueError, "shared among 1 replicas, the pipeline has 2"):
        pipe.step(padded([4, 3]))


# What must be refused, on all ranks.


class Wrong(nn.Module):
    """A layer that returns what it is told to."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.rnn, self.what = nn.GRU(5, 5), what

    def forward(self, x, state=None, *, reset=None, mask=None):
        y, state = self.rnn(x, state)
        if self.what == "tuple":
            return (y, y), state
        if self.what == "three":
            return y, state, state
        if self.what == "strided":
            return y.transpose(0, 1).contiguous().transpose(0, 1), state
        if self.what == "short":
            return y[1:], state
        if self.what == "ahead":
            return y + y.flip(0), state
        raise KeyError(self.what)


@suite("two", "four")
def layers_that_do_not_fit(folder: Path) -> None:
    for what, kind, message in (
        ("tuple", TypeError, "layers.1 must be one tensor, got tuple"),
        ("three", TypeError, "layers.1 must return .output, state.*got 3 values"),
        ("strided", ValueError, r"layers.1 has strides .*contiguous\(\)"),
        ("short", ValueError, "layers.1 must have the steps and lanes"),
        ("ahead", ValueError, "layers.1 gives another output.*looks ahead"),
        ("raises", Exception, "raises"),
    ):
        network = Network(nn.GRU, dtype=F32)
        network.layers["1"] = Wrong(what)
        pipe = network.pipeline(chunk_size=2)
        with raises(kind, message):
            pipe.step(padded([5, 3]))
        network.layers["1"] = nn.GRU(5, 5)


@suite("two", "four")
def settings_that_do_not_fit(folder: Path) -> None:
    world = dist.get_world_size()
    with raises(ValueError, "bidirectional.*mode='microbatch'"):
        Network(lambda n, m: nn.GRU(n, m, bidirectional=True), layers=4).pipeline(chunk_size=2)
    with raises(ValueError, "batch_first"):
        Network(lambda n, m: nn.GRU(n, m, batch_first=True)).pipeline(chunk_size=2)
    with raises(ValueError, f"{world} stages.*{world - 1} layer|{world - 1} layer.*{world} stages"):
        Network(nn.GRU, layers=world - 1).pipeline(chunk_size=2, head=None)
    with raises(ValueError, "num_microbatches"):
        Network(nn.GRU).pipeline(mode="microbatch", chunk_size=2)
    with raises(ValueError, "mode must be one of"):
        Network(nn.GRU).pipeline(mode="asynchronous")
    with raises(ValueError, "split must"):
        Network(nn.GRU).pipeline(split=[4] * world)
    with raises(ValueError, "tied parameter 'softmax.weight' does not exist"):
        Network(nn.GRU).pipeline(tied=[("embed.weight", "softmax.weight")])
    with raises(ValueError, "dimension 'pp'"):
        Network(nn.GRU).pipeline(mesh=init_device_mesh("cpu", (world,), mesh_dim_names=("tp",)))


@suite("two", "four")
def batches_that_do_not_fit(folder: Path) -> None:
    """What one rank finds, or has otherwise than the others, is raised on all."""
    last = rank() == dist.get_world_size() - 1
    pipe = Network(nn.GRU).pipeline(chunk_size=2)
    good = padded([5, 3, 4])
    for other, kind, message in (
        (padded([5, 4, 3]), ValueError, r"different things: rank \d.*content="),
        (padded([6, 3, 4]), ValueError, "different things.*grid="),
        (dataclasses.replace(good, data=good.data.int()), ValueError, "dtype='torch.int32'"),
        (good.data, TypeError, "SequenceBatch"),
        (seqbatch.PadCollate()([torch.arange(n) for n in (5, 3, 4)]), ValueError, "no targets"),
    ):
        with raises(kind, message):
            pipe.step(other if last else good)
    with raises(ValueError, "carry=False .True.|carry=True .False."):
        pipe.step(good, carry=False)
        batch = spliced([9, 9, 9], 2, 4)
        pipe.step(batch[0])
        pipe.step(batch[1], carry=not last)
    pipe.reset_state()
    pipe.step(good)
    batch = spliced([9, 9, 9, 9], 4, 4)
    pipe.step(batch[0], carry=True)
    with raises(ValueError, "carried states are of 4 lanes.*batch has 3"):
        pipe.step(spliced([9, 9, 9], 3, 4)[1])
    pipe.reset_state()
    few = Network(nn.GRU).pipeline(mode="microbatch", num_microbatches=2)
    with raises(ValueError, "1 lanes cannot be cut into num_microbatches=2"):
        few.step(padded([5]))
    with raises(ValueError, "one loss for each"):
        Network(nn.GRU).pipeline(chunk_size=2, loss=nn.functional.cross_entropy).step(good)


@suite("two")
def another_order_of_a_future_torch(folder: Path) -> None:
    """The order of backward passes is read from the schedule."""
    original = ScheduleLoopedBFS._calculate_single_rank_operations
    ascending = lambda self, number: sorted(  # noqa: E731
        (a for a in original(self, number) if a is not None),
        key=lambda a: ("BACKWARD" in a.computation_type.name, a.microbatch_index),
    )
    try:
        ScheduleLoopedBFS._calculate_single_rank_operations = ascending
        with raises(RuntimeError, "ScheduleLoopedBFS of torch.*descending"):
            Network(nn.GRU).pipeline(chunk_size=2).step(padded([5, 3, 4]))
    finally:
        ScheduleLoopedBFS._calculate_single_rank_operations = original


@suite("two", "four")
def other_content_and_counts(folder: Path) -> None:
    """Tokens, targets, divisors and settings that differ between ranks, or that a later batch has otherwise."""
    last = rank() == dist.get_world_size() - 1
    pipe = Network(nn.GRU).pipeline(chunk_size=2)
    good, other = padded([5, 3, 4]), padded([5, 3, 4], seed=1)
    pipe.step(good)
    with raises(ValueError, "different things.*content="):
        pipe.step(other if last else good)
    with raises(ValueError, "different things.*scale="):
        pipe.step(good, loss_tokens=7 if last else 8)
    with raises(ValueError, "loss_tokens"):
        pipe.step(good, loss_tokens=0)
    with raises(TypeError, "targets must be a tensor"):
        pipe.step(good, good.targets.tolist() if last else None)
    with raises((RuntimeError, IndexError), "expected|Expected|scalar type"):
        pipe.step(good, good.targets.double())
    with raises(ValueError, "漢{500}"):
        raise_on_last(pipe)
    with raises(ValueError, "mode must be one of"):
        Network(nn.GRU).pipeline(chunk_size=2, mode="asynchronous" if last else "full")
    with raises(ValueError, "different things.*units="):
        Network(nn.GRU).pipeline(chunk_size=3 if last else 2)
    with raises(ValueError, "different things.*parts="):
        Network(nn.GRU, width=6 if last else 5).pipeline(chunk_size=2)
    with raises(ValueError, "different things.*parts="):
        Network(nn.GRU).pipeline(head=nn.Identity() if last else None)
    with raises(ValueError, "different things.*tied="):
        Network(nn.GRU).pipeline(tied=[("embed.weight", "head.weight")] if last else ())
    deep, rest = Network(nn.RNN, layers=400, width=1), [1] * (dist.get_world_size() - 1)
    assert sum(deep.pipeline().split) == 400
    with raises(ValueError, r"different things.*split='\[1, .*\('\[39\d, 1"):
        deep.pipeline(split=[*rest, 400 - len(rest)] if last else [400 - len(rest), *rest])
    with raises(ValueError, "put them into head"):
        Network(nn.GRU).pipeline(loss=nn.Linear(2, 2))
    with raises(ValueError, "bool"):
        pipe.reset_state(torch.tensor([1, 0, 1]))
    network = Network(nn.GRU)
    pipe = network.pipeline(chunk_size=2, tied=[("embed.weight", "head.weight")])
    pipe.step(good)
    before = {name: p.grad.clone() for name, p in pipe.named_parameters()}
    with raises(ValueError, "different things"):
        pipe.step(other if last else good)
    for name, parameter in pipe.named_parameters():  # what is refused leaves what was accumulated
        assert torch.equal(parameter.grad, before[name])
    bidirectional = Network(lambda n, m: nn.GRU(n, m, bidirectional=True), layers=1).layers["0"]
    network = Network(nn.GRU, layers=1 + dist.get_world_size())
    pipe = LayerPipeline(
        [*network.layers.values(), bidirectional], embed=network.embed, loss=lambda y, _: y.sum(1), mode="microbatch",
        num_microbatches=2,
    )  # fmt: skip
    batches = spliced([9, 9, 9, 9], 4, 4)
    pipe.step(batches[0])
    with raises(ValueError, "bidirectional layers cannot go on"):
        pipe.step(batches[1])


def raise_on_last(pipe: LayerPipeline) -> None:
    """An error whose text is too long for a message."""
    error = ValueError("漢" * 4000) if rank() == dist.get_world_size() - 1 else None
    pipe._runner.council.share({}, error)


@suite("two", "four")
def another_dtype(folder: Path) -> None:
    """What goes over the wire follows the layers."""
    network = Network(nn.GRU, dtype=F32)
    pipe = network.pipeline(chunk_size=3)
    assert_same_step(network, pipe, padded([5, 4]))
    network.double(), pipe.double()
    network.zero_grad(), pipe.zero_grad()
    assert_same_step(network, pipe, padded([5, 4]))


@suite("two", "four")
def clipping_beside_a_frozen_stage(folder: Path) -> None:
    network = Network(nn.GRU)
    network.head.requires_grad_(False)
    network.layers[str(len(network.layers) - 1)].requires_grad_(False)
    pipe = network.pipeline(chunk_size=3)
    batch = padded([5, 4])
    (network(batch)[0] * batch.loss_scale).backward()
    pipe.step(batch)
    expected = torch.nn.utils.clip_grad_norm_(network.parameters(), 0.1)
    assert abs(float(pipe.clip_grad_norm_(0.1)) - float(expected)) < 1e-12


@suite("two", "four")
def lanes_that_are_cleared(folder: Path) -> None:
    """As if they had had a reset; once, and over a checkpoint."""
    network = Network(nn.GRU)
    pipe = network.pipeline(chunk_size=2)
    batches = spliced([9, 9, 9, 9], 2, 4)
    states = assert_same_step(network, pipe, batches[0])
    done = torch.tensor([True, False])
    pipe.reset_state(done)
    pipe.save(folder / "cleared")
    again = network.pipeline(chunk_size=2)
    again.load(folder / "cleared")
    reset = batches[1].reset.clone()
    reset[0] |= done
    loss, after = network(dataclasses.replace(batches[1], reset=reset), states)
    for one in (pipe, again):
        assert abs(float(one.step(batches[1]).loss * batches[1].loss_tokens - loss.detach())) < 1e-11
    network.zero_grad(), pipe.zero_grad()
    assert_same_step(network, pipe, batches[2], after)


@suite("two", "four")
def simulated_and_tuned(folder: Path) -> None:
    """Nothing of the training changes; the same answer on all ranks."""
    network = Network(nn.GRU)
    for settings in (
        {"chunk_size": 3},
        {"mode": "truncated", "chunk_size": 3},
        {"mode": "microbatch", "num_microbatches": 2},
    ):
        pipe = network.pipeline(**settings)
        batch = padded([9, 4, 6])
        pipe.step(batch)
        before = {name: p.grad.clone() for name, p in pipe.named_parameters()}
        drawn = torch.get_rng_state()
        line = pipe.simulate(batch, repeats=1)
        found = pipe.tune(batch, chunks=(1, 2), repeats=1)
        assert line.makespan > 0 and line.timetable.ranks == dist.get_world_size()
        assert sum(found.split) == 4 and found.chunks in (1, 2)
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (line.makespan, found))
        assert all(other == everyone[0] for other in everyone)
        assert torch.equal(torch.get_rng_state(), drawn)
        for name, parameter in pipe.named_parameters():
            assert torch.equal(parameter.grad, before[name])
    network.pipeline(chunk_size=2).tune(padded([2]), repeats=1)
    with raises(ValueError, "no token that carries loss"):
        network.pipeline(chunk_size=2).tune(padded([1, 1]))


class Learned(nn.Module):
    """A layer with a first state that is learned, which only the first time chunk has."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.rnn, self.first = nn.GRU(inputs, hidden), nn.Parameter(torch.randn(1, 1, hidden))

    def forward(self, x, state=None, *, reset=None, mask=None):
        return self.rnn(x, self.first.expand(-1, x.shape[1], -1).contiguous() if state is None else state)


@suite("four")
def replicas_of_what_only_the_first_chunk_has(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
    for mode, cut in (("truncated", 3), ("full", 3)):
        network = Network(Learned, seed=0)
        pipe = Network(Learned, seed=rank() // 2 * 7).pipeline(mesh=mesh, mode=mode, chunk_size=cut)  # replica 0's hold
        batches = [padded([6, 6], seed) for seed in range(2)]
        tokens = sum(batch.loss_tokens for batch in batches)
        every = 3 if mode == "truncated" else None
        (sum(network(batch, cut=every)[0] for batch in batches) / tokens).backward()
        pipe.step(batches[rank() // 2], loss_tokens=tokens)
        assert_same_gradients(network, pipe)


@suite("two", "four")
def checkpoints(folder: Path) -> None:
    """Go on equal to what was not interrupted; what is not whole, or of another network, is refused on all ranks."""
    network, pipe, optimizers = trained()
    path = folder / "whole"
    pipe.save(path, optimizers[1], loader={"epoch": 3})
    pipe.save(path, optimizers[1], loader={"epoch": 4})  # replaces it
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith("whole")) == ["whole"]
    again = Network(nn.GRU, seed=5).pipeline(chunk_size=3)
    optimizer = torch.optim.AdamW(again.parameters(), lr=0.5)
    assert again.load(path, optimizer) == {"loader": {"epoch": 4}}
    assert optimizer.param_groups[0]["lr"] == 0.01
    go_on(network, again, (optimizers[0], optimizer))
    with raises(FileNotFoundError, "does not exist"):
        again.load(folder / "none")
    with raises(ValueError, "another network: it has no 'layers"):
        Network(nn.GRU, layers=6).pipeline(chunk_size=3).load(path)
    with raises(ValueError, "another network.*shape"):
        Network(nn.GRU, width=7).pipeline(chunk_size=3).load(path)
    with raises(ValueError, "not of this pipeline's stages"):
        again.save(path, torch.optim.SGD(Network().parameters(), lr=0.1))
    with raises(ValueError, "not of this pipeline's stages"):
        again.load(path, torch.optim.SGD(Network().parameters(), lr=0.1))
    with raises((AttributeError, RuntimeError), "pickle"):
        again.save(path, fn=lambda: 0)
    (folder / "file").touch()
    with raises(ValueError, "is a file"):
        again.save(folder / "file")
    pipe.save(folder / "bare")
    with raises(ValueError, "no optimizer's state"):
        again.load(folder / "bare", optimizer)
    dist.barrier()
    if rank() == 0:
        sorted(path.glob("*.distcp"))[-1].unlink()
    dist.barrier()
    with raises(FileNotFoundError, "incomplete.*is missing: take an older one"):
        again.load(path, optimizer)
    if rank() == 0:
        (folder / "bare" / ".metadata").unlink()
    dist.barrier()
    with raises(FileNotFoundError, "has no .metadata"):
        again.load(folder / "bare")


@suite("two", "four")
def checkpoints_of_other_optimizers(folder: Path) -> None:
    """Without state, with frozen parameters, and with groups of which a rank has no parameter."""
    for number, make in enumerate((torch.optim.SGD, torch.optim.Adam)):
        network = Network(nn.GRU)
        network.embed.weight.requires_grad_(False)
        pipe, other = (network.pipeline(chunk_size=3) for _ in range(2))
        made = [make(p.parameters(), lr=lr) for p, lr in ((pipe, 0.1), (other, 0.3))]
        for seed in range(2):
            pipe.step(padded([5, 4], seed))
            made[0].step()
            made[0].zero_grad()
        pipe.save(folder / f"optimizer{number}", made[0])
        other.load(folder / f"optimizer{number}", made[1])
        for one, optimizer in zip((pipe, other), made, strict=True):
            one.step(padded([3, 4]))
            optimizer.step()
        for one, two in zip(pipe.parameters(), other.parameters(), strict=True):
            assert torch.equal(one, two)


def trained() -> tuple[Network, LayerPipeline, list[torch.optim.Optimizer]]:
    """Both after a few steps of a carried stream."""
    network = Network(nn.GRU)
    pipe = network.pipeline(chunk_size=3)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (network, pipe)]
    train(network, pipe, optimizers, slice(0, 3))
    return network, pipe, optimizers


def go_on(network: Network, pipe: LayerPipeline, optimizers) -> None:
    """From where `trained` has stopped, carried states included."""
    train(network, pipe, optimizers, slice(3, 6))


def train(network: Network, pipe: LayerPipeline, optimizers, part: slice) -> None:
    for batch in spliced([5, 7, 3, 4, 6, 2, 8, 9], 2, 4)[part]:
        network.states = assert_same_step(network, pipe, batch, getattr(network, "states", None))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert_same_parameters(network, pipe)


@suite("two")
def checkpoints_of_a_head_alone(folder: Path) -> None:
    """A stage without layers has no states, and must know that there are some."""
    network = Network(nn.GRU, layers=2)
    batches = spliced([5, 7, 3, 4, 6, 2], 2, 4)
    pipe, other = (network.pipeline(split=[2, 0], chunk_size=2) for _ in range(2))
    states = assert_same_step(network, pipe, batches[0])
    pipe.save(folder / "head")
    other.load(folder / "head")
    network.zero_grad()
    assert_same_step(network, other, batches[1], states)


@suite("write")
def write_for_others(folder: Path) -> None:
    """A checkpoint of two stages for other numbers of them."""
    _, pipe, optimizers = trained()
    pipe.save(folder / "two", optimizers[1])


@suite("read")
def read_of_others(folder: Path) -> None:
    """Training goes on from two stages' checkpoint on as many as there are now."""
    network, *_ = twin = trained()
    pipe = Network(nn.GRU, seed=3).pipeline(chunk_size=3)
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=0.3)
    pipe.load(folder / "two", optimizer)
    go_on(network, pipe, (twin[2][0], optimizer))


class Fails(nn.Module):
    """A layer that kills its process, or raises, in the middle of a step."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.rnn, self.how, self.calls = nn.GRU(5, 5), how, 0

    def forward(self, x, state=None, *, reset=None, mask=None):
        self.calls += len(x) == 3  # units, not trials of one and two steps
        if self.calls == 5:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ArithmeticError("a layer of the user's fails")
        return self.rnn(x, state)


@suite("killed", "failed")
def a_rank_that_is_gone(folder: Path) -> None:
    """In the middle of the second step: the others raise within seconds, and say what to do."""
    network = Network(nn.GRU, dtype=F32)
    last = str(len(network.layers) - 1)
    network.layers[last] = Fails(sys.argv[1])
    pipe = network.pipeline(chunk_size=3)
    batch = padded([10, 10])
    pipe.step(batch)
    if rank() != dist.get_world_size() - 1:
        with raises(RuntimeError, "stopped in mid-step.*start again from the last checkpoint"):
            pipe.step(batch)
        with raises(RuntimeError, "stopped in mid-step"):
            pipe.step(batch)
        (folder / f"raised{rank()}").touch()
        os._exit(0)
    with pytest.raises(RuntimeError):
        pipe.step(batch)
    os._exit(1)


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ALONE.append(_alone())
    for case in SUITES[name]:
        faulthandler.dump_traceback_later(HANGS, exit=True)
        case(folder)
        faulthandler.cancel_dump_traceback_later()
        if rank() == 0:
            sys.stdout.write(f"passed {case.__name__}\n")
            sys.stdout.flush()
    dist.destroy_process_group()


ALONE: list = []


def _alone():
    """A mesh of this rank alone."""
    groups = [dist.new_group([r]) for r in range(dist.get_world_size())]
    return torch.distributed.DeviceMesh.from_group(groups[rank()], "cpu", mesh=[rank()], mesh_dim_names=("pp",))


if __name__ == "__main__":
    main()
