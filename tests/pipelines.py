"""Networks, batches and the naive twin of a pipeline: all layers after one another, in one process."""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import seqbatch
from seqbatch.batch import SequenceBatch
from seqbatch.pipeline import LayerPipeline
from seqbatch.pipeline.parts import run_layer
from seqbatch.tensors import detach_state

CELLS = {
    "SRU": seqbatch.rnn.SRU,
    "LSTM": seqbatch.rnn.LSTM,
    "BNLSTM": partial(seqbatch.rnn.BNLSTM, max_steps=8, statistics="age"),
    "GRU": nn.GRU,
}
WIDTH, WORDS = 5, 11
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
cross_entropy = partial(nn.functional.cross_entropy, reduction="none")


class Network(nn.Module):
    """Embedding, layers, head, with the parameters' names that a pipeline uses; and how one process trains it."""

    def __init__(
        self, cell: Any = nn.GRU, layers: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0, width: int = WIDTH
    ):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(WORDS, width)
        self.layers = nn.ModuleDict({str(n): cell(width, width) for n in range(layers)})
        self.head = nn.Linear(width, WORDS)
        self.to(dtype)
        if cell is CELLS["BNLSTM"]:  # evaluation needs statistics
            x = torch.randn(9, 6, width, dtype=dtype)
            for layer in self.layers.values():
                layer(x)

    def pipeline(self, **settings: Any) -> LayerPipeline:
        """A copy of it, pipelined."""
        other = copy.deepcopy(self)
        settings = {"loss": cross_entropy, "embed": other.embed, "head": other.head} | settings
        return LayerPipeline(list(other.layers.values()), **settings)

    def forward(
        self, batch: SequenceBatch, states: Sequence[Any] | None = None, cut: int | None = None
    ) -> tuple[Tensor, list[Any]]:
        """The sum of the losses, and the states after the batch; gradients end after every `cut` steps."""
        total, states = torch.zeros((), dtype=self.head.weight.dtype), list(states or [None] * len(self.layers))
        cut = cut or len(batch.data)
        for begin in range(0, len(batch.data), cut):
            part = slice(begin, begin + cut)
            x, states = self.embed(batch.data[part]), detach_state(states)
            for number, layer in enumerate(self.layers.values()):
                x, states[number] = run_layer(layer, x, states[number], batch.reset[part], batch.mask[part])
            losses = cross_entropy(self.head(x).flatten(0, 1), batch.targets[part].flatten())
            total = total + torch.where(batch.loss_mask[part].flatten(), losses, 0).sum()
        return total, detach_state(states)


def assert_same_step(
    network: Network,
    pipe: LayerPipeline,
    batch: SequenceBatch,
    states: Any = None,
    cut: int | None = None,
    **options: Any,
) -> Any:
    """A step of both has one loss and one gradient; the states after it."""
    loss, after = network(batch, states, cut)
    (loss * batch.loss_scale).backward()
    result = pipe.step(batch, **options)
    tolerance = TOLERANCE[loss.dtype]
    assert result.tokens == batch.loss_tokens
    assert abs(float(result.loss) - float(loss.detach()) / max(batch.loss_tokens, 1)) <= tolerance * 10
    assert_same_gradients(network, pipe)
    return after


def assert_same_training(network: Network, pipe: LayerPipeline, cut: int | None = None) -> None:
    """Losses, gradients and parameters of three optimizer steps, on batches of other shapes each."""
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9) for module in (network, pipe)]
    for seed, lengths in enumerate([(9, 4, 7, 1), (5, 5), (3, 2, 2, 2, 6)]):
        assert_same_step(network, pipe, padded(lengths, seed), cut=cut)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert_same_parameters(network, pipe)


def assert_same_gradients(network: nn.Module, pipe: LayerPipeline) -> None:
    """Of every parameter that a rank holds."""
    expected = dict(network.named_parameters())
    for name, parameter in pipe.named_parameters():
        wanted, found = expected[name].grad, parameter.grad
        assert found is not None, name
        worst = float((found - wanted).abs().max())
        assert worst <= TOLERANCE[found.dtype] * max(1.0, float(wanted.abs().max())), (name, worst)


def assert_same_parameters(network: nn.Module, pipe: LayerPipeline, tolerance: float | None = None) -> None:
    """After optimizer steps."""
    expected = dict(network.named_parameters())
    for name, parameter in pipe.named_parameters():
        worst = float((parameter - expected[name]).detach().abs().max())
        assert worst <= (tolerance or TOLERANCE[parameter.dtype]), (name, worst)


def padded(lengths: Sequence[int], seed: int = 0) -> SequenceBatch:
    """Random sequences of these lengths, zero-padded, with next-token targets."""
    words = np.random.default_rng(seed)
    return seqbatch.PadCollate(next_token=True)([torch.from_numpy(words.integers(WORDS, size=n)) for n in lengths])


def spliced(lengths: Sequence[int], lanes: int, window: int, seed: int = 0) -> list[SequenceBatch]:
    """The same end to end in lanes, with resets, in windows that carry the state."""
    words = np.random.default_rng(seed)
    data = seqbatch.TokenArray.of_sequences([words.integers(WORDS, size=n) for n in lengths])
    strategy = seqbatch.Splicing(num_lanes=lanes, chunk_size=window)
    return list(seqbatch.make_loader(data, strategy, next_token=True, seed=seed, rank=0, num_replicas=1))
