"""The attentive reader, with and without batch normalization; its answer depends on one document and question alone."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from experiments.attentive_reader.data import MARKERS, Batch
from seqbatch.rnn import BNLSTM, SequenceBatchNorm

__all__ = ["VARIANTS", "AttentiveReader", "Variant"]


@dataclass(frozen=True)
class Variant:
    """What is normalized, and how.

    Attributes:
        cell: Whether the readers are BN-LSTMs.
        everywhere: Whether every term that enters a tanh of the attention is normalized too.
        sequence: Whether W_x x has one mean and variance for all steps; else each step has its own, as W_h h and c.
        bidirectional: Whether there are readers from the end to the start as well.
        fill: What BNLSTM does at steps beyond a sequence's end.
        padding: Whether padding counts in the statistics, as it did in the published code.
    """

    cell: bool = True
    everywhere: bool = False
    sequence: bool = False
    bidirectional: bool = False
    fill: Literal["wrap"] | None = None
    padding: bool = False


VARIANTS = {
    "LSTM": Variant(cell=False),
    "BN-LSTM": Variant(),
    "BN-everywhere": Variant(everywhere=True),
    "BN-e*": Variant(everywhere=True, sequence=True),
    "BN-e**": Variant(everywhere=True, sequence=True, bidirectional=True),
    "BN-e**, wrap": Variant(everywhere=True, sequence=True, bidirectional=True, fill="wrap"),
    "LSTM, bidirectional": Variant(cell=False, bidirectional=True),
    "BN-everywhere, padding counted": Variant(everywhere=True, padding=True),
}


class Term(nn.Module):
    """A linear layer whose output enters a tanh, normalized over all real rows if asked to."""

    def __init__(self, inputs: int, outputs: int, normalized: bool, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=bias and not normalized)
        self.norm = SequenceBatchNorm(outputs, statistics="sequence", bias=bias, gamma=0.1) if normalized else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, D) or (T, B, D), with a mask (T, B) of the rows that count."""
        y = self.linear(x)
        return y if self.norm is None else self.norm(y, mask=mask)


class AttentiveReader(nn.Module):
    """Reads a document and a question, and answers with one of the markers (Hermann et al. 2015, arXiv 1506.03340).

    With y_t what the document's reader says after word t and u the last state of the question's reader::

        m_t = tanh(W_y y_t + W_u u + b)      a = softmax over the document of w . m_t      r = sum of a_t y_t
        g = tanh(V_r r + V_u u + d)          the answer's logits = W_g g + e

    As in the code of Cooijmans et al. (arXiv 1603.09025), both readers share word vectors, and the vectors' size is the
    hidden size.

    Args:
        variant: What is normalized.
        words: Numbers of words, the markers and padding among them.
        longest: Steps of the longest document and question in training.
        hidden: Units of a direction of a reader, and all other widths.
        drop: Dropout of word vectors and of g.
    """

    def __init__(self, variant: Variant, words: int, longest: tuple[int, int], hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.variant, self.drop = variant, drop
        self.embed = nn.Embedding(words, hidden, padding_idx=0)
        self.document, self.question = (
            BNLSTM(
                hidden,
                hidden,
                bidirectional=variant.bidirectional,
                variant="bn" if variant.cell else "none",
                input_statistics="sequence" if variant.sequence else None,
                max_steps=steps,
                fill=variant.fill,
            )
            for steps in longest
        )
        wide = hidden * (1 + variant.bidirectional)
        self.attend_y = Term(wide, hidden, variant.everywhere, bias=True)
        self.attend_u = Term(wide, hidden, variant.everywhere, bias=False)
        self.score = nn.Linear(hidden, 1, bias=False)
        self.join_r = Term(wide, hidden, variant.everywhere, bias=False)
        self.join_u = Term(wide, hidden, variant.everywhere, bias=True)
        self.answer = nn.Linear(hidden, MARKERS)

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, MARKERS)."""
        y, _ = self._read(self.document, batch.document, batch.document_mask)
        u = self._read(self.question, batch.question, batch.question_mask)[1]
        counted = None if self.variant.padding else batch.document_mask
        scores = self.score(torch.tanh(self.attend_y(y, counted) + self.attend_u(u))).squeeze(-1)
        weights = scores.masked_fill(~batch.document_mask, -torch.inf).softmax(0)
        r = (weights[..., None] * y).sum(0)
        g = torch.tanh(self.join_r(r) + self.join_u(u))
        return self.answer(dropout(g, self.drop, self.training))

    def _read(self, reader: BNLSTM, words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What a reader says after each word, (T, B, D), and its last states, (B, D)."""
        x = dropout(self.embed(words), self.drop, self.training)
        if self.variant.padding:  # steps of zeros follow each text; its last word's state is taken before them
            y, _ = reader(x)
            return y, y[mask.sum(0) - 1, torch.arange(len(mask.T), device=y.device)]
        y, (h, _) = reader(x, mask=mask)
        return y, h.transpose(0, 1).flatten(1)
