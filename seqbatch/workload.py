"""What `compare` times: forward and backward of a recurrent net over the batches of a plan."""

from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from seqbatch.batch import SequenceBatch
from seqbatch.measure import Job
from seqbatch.ordering import IntArray
from seqbatch.plan import Plan
from seqbatch.rnn import lstm
from seqbatch.strategy import check_choice, check_integer

__all__ = ["CELLS", "VOCABULARY", "Workload"]

CELLS = ("sru", "lstm", "bnlstm", "nn.LSTM")
VOCABULARY = 256
_STATISTICS = 256  # running statistics of a BN-LSTM: their number changes no cost
_DTYPES = ("float32", "bfloat16", "float64")


class Workload:
    """A stack of recurrent layers, as many input features as units, that trains without an optimizer.

    Tokens become features by a look-up in a fixed table. The gradient reaches them and all weights, as it
    would below and in a larger model; embedding, softmax and optimizer cost the same for every strategy's real tokens
    and are left out.

    Args:
        cell: ``"sru"``, ``"lstm"`` and ``"bnlstm"`` are seqbatch's layers with resets and mask, ``"nn.LSTM"`` is
            torch's, without: it computes the padding too, and its final states and reverse direction would contain it.
        hidden: Units of a layer.
        layers: Layers.
        device: Where it runs.
        dtype: Of weights and features: ``"float32"``, ``"bfloat16"`` or ``"float64"``.

    Raises:
        ValueError: unknown names, or a device that is not there.
    """

    def __init__(
        self, cell: str = "sru", *, hidden: int = 256, layers: int = 1, device: str = "cpu", dtype: str = "float32"
    ) -> None:
        check_choice("cell", cell, CELLS)
        check_choice("dtype", dtype, _DTYPES)
        self.cell = cell
        self.hidden = check_integer("hidden", hidden, at_least=1)
        self.layers = check_integer("layers", layers, at_least=1)
        self.device = _check_device(device)
        self.dtype: torch.dtype = getattr(torch, dtype)

    def _make(self, device: torch.device) -> nn.Module:
        from seqbatch.rnn import BNLSTM, LSTM, SRU, SequenceBatchNorm

        kind: Any = {"sru": SRU, "lstm": LSTM, "bnlstm": BNLSTM, "nn.LSTM": nn.LSTM}[self.cell]
        more: dict[str, Any] = {"max_steps": _STATISTICS} if self.cell == "bnlstm" else {}
        made: nn.Module = kind(
            self.hidden, self.hidden, num_layers=self.layers, device=device, dtype=self.dtype, **more
        )
        for norm in made.modules():
            if isinstance(norm, SequenceBatchNorm):  # steps of fewer lanes than statistics need take running ones
                norm.num_batches_tracked.fill_(1)
        return made

    @cached_property
    def module(self) -> nn.Module:
        """The layers, on the device."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            return self._make(self.device)

    @cached_property
    def table(self) -> Tensor:
        """(VOCABULARY, hidden), the features of each token."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(VOCABULARY, self.hidden, generator=generator).to(self.device, self.dtype)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of the weights, of their gradients, and of as many while they are made; nothing is allocated."""
        if self.layers * 3.0 * self.hidden**2 > 1e15:  # larger than any machine, and than torch can count
            return 2**62
        weights = self._make(torch.device("meta")).parameters()
        return 3 * sum(weight.numel() * weight.element_size() for weight in weights)

    def why_not(self, plan: Plan) -> str:
        """Why the cell cannot run a plan's batches; empty if it can."""
        if self.cell != "nn.LSTM":
            return ""
        if (plan.step > 0).any():
            return "nn.LSTM cannot clear its state where a sequence starts inside a lane"
        return "nn.LSTM cannot clear the carried state of single lanes" if plan.carry else ""

    def effort(self, plan: Plan) -> tuple[IntArray, IntArray, IntArray]:
        """Return the steps, the cells and the calls of kernels that each batch costs.

        An LSTM inserts a step for each reset in a lane, and on CPU leaves out lanes that have ended, in several calls.
        A BN-LSTM computes no padding. The two sides of pairs are two runs.
        """
        if plan.pairs:
            source, target = (self.effort(side) for side in plan.sides)
            return source[0] + target[0], source[1] + target[1], source[2] + target[2]
        calls = np.ones_like(plan.steps)
        if self.cell not in ("lstm", "bnlstm") or not len(plan):
            return plan.steps, plan.steps * plan.lanes, calls
        batch = np.repeat(np.arange(len(plan)), np.diff(plan.batch_ptr))
        if self.cell == "bnlstm":
            return plan.steps, np.bincount(batch, plan.length, minlength=len(plan)).astype(np.int64), calls
        first = np.cumsum(plan.lanes) - plan.lanes
        lane = first[batch] + plan.lane
        resets = np.bincount(lane[plan.step > 0], minlength=int(plan.lanes.sum()))
        steps = plan.steps + np.maximum.reduceat(resets, first)
        cells = steps * plan.lanes
        if self.device.type == "cpu":
            held = np.bincount(lane, plan.length, minlength=len(resets)).astype(np.int64)
            large = cells * self.hidden >= lstm.SAVED_AT_LEAST
            for i in np.flatnonzero((steps == plan.steps) & large):
                lengths = torch.from_numpy(held[first[i] : first[i] + plan.lanes[i]])
                ends = lstm.ragged_ends(lengths, int(steps[i]), self.hidden)
                if len(ends) > 2:
                    steps[i], calls[i] = ends[-1], len(ends) - 1
                    cells[i] = sum((end - begin) * int((lengths > begin).sum()) for begin, end in pairwise(ends))
        return steps, cells, calls

    def forget_gradients(self) -> None:
        """Free the memory of all gradients."""
        self.module.zero_grad(set_to_none=True)

    def train(self, batch: SequenceBatch, state: Any = None) -> Any:
        """Run a batch of tokens forward and backward, and return the state after it."""
        return self._train(batch.data, batch.carry_in(state), batch.reset, batch.mask)

    def grid(self, steps: int, lanes: int) -> Job:
        """The job of a full grid, with what a loader's batches have: flags, a cell of padding, and for an LSTM one
        reset inside a lane. That costs a step, so there is one less.
        """
        rows = steps - 1 if self.cell == "lstm" and steps > 2 else steps
        tokens = torch.arange(rows * lanes, device=self.device).view(rows, lanes) % VOCABULARY
        mask = torch.ones(rows, lanes, dtype=torch.bool, device=self.device)
        reset = torch.zeros_like(mask)
        reset[0] = True
        mask[-1, -1] = rows == 1
        reset[rows // 2, 0] = rows < steps or rows == 1
        return lambda: self._train(tokens, None, reset, mask)

    def _train(self, tokens: Tensor, state: Any, reset: Tensor | None, mask: Tensor | None) -> Any:
        self.forget_gradients()
        features = self.table[tokens].requires_grad_()
        flags = {} if self.cell == "nn.LSTM" else {"reset": reset, "mask": mask}
        output, state = self.module(features, state, **flags)
        output.backward(output.detach())
        return state


def _check_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            there = f"{count} CUDA devices, cuda:0 to cuda:{count - 1}" if count else "no CUDA device"
            raise ValueError(f"device {name!r} is not there: torch {torch.__version__} sees {there}; use --device cpu")
    elif device.type != "cpu":
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {name!r}")
    return device
