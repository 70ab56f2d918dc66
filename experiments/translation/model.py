"""An encoder, a decoder and attention between them; what a pair gets does not depend on its batch mates."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.translation.pairs import BOS, EOS, UNKNOWN
from seqbatch import SequenceBatch
from seqbatch.rnn import LSTM, SRU

__all__ = ["RNNS", "Encoded", "Translator"]

RNNS: dict[str, type[SRU] | type[LSTM]] = {"SRU": SRU, "LSTM": LSTM}
# The embeddings' standard deviation at the start: SRU, whose highway hands its input on, learns faster from small ones,
# LSTM from torch's own, since its states begin near 0 anyway.
EMBEDDING = {"SRU": 0.1, "LSTM": 1.0}
State = Tensor | tuple[Tensor, Tensor]


class Encoded(NamedTuple):
    """A batch of sources, as the decoder sees it.

    Attributes:
        keys: (B, H, Ts), what the decoder's output is compared with.
        values: (B, Ts, H), what it takes the mean of.
        mask: (B, 1, Ts), false on padding.
        state: The decoder's first.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor
    state: State


class Translator(nn.Module):
    """Bidirectional encoder; decoder that starts from its last states; Luong's general attention.

    As in the SRU paper, neither the attention nor the last output is fed to the decoder as input, so that all
    steps of a layer, and the attention of all steps, are computed together in training.

    Args:
        rnn: ``"SRU"`` or ``"LSTM"``.
        source: Words of the source's vocabulary.
        target: Characters of the target's.
        size: Of embeddings and of each layer; the encoder's directions have half of it each.
        layers: Of the encoder, and of the decoder.
        dropout: On embeddings, between layers and before the last linear layer.
    """

    def __init__(
        self, rnn: str, source: int, target: int, *, size: int = 256, layers: int = 2, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.embed_source, self.embed_target = nn.Embedding(source, size), nn.Embedding(target, size)
        for embed in (self.embed_source, self.embed_target):
            nn.init.normal_(embed.weight, std=EMBEDDING[rnn])
        self.encoder = RNNS[rnn](size, size // 2, num_layers=layers, dropout=dropout, bidirectional=True)
        self.decoder = RNNS[rnn](size, size, num_layers=layers, dropout=dropout)
        self.attend, self.mix = nn.Linear(size, size, bias=False), nn.Linear(2 * size, size)
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(size, target)

    def encode(self, source: Tensor, mask: Tensor) -> Encoded:
        """(Ts, B) words and their mask to what the decoder needs."""
        return self.encode_vectors(self.embed_source(source), mask)

    def encode_vectors(self, x: Tensor, mask: Tensor) -> Encoded:
        """The same of (Ts, B, size) embeddings.

        The mask lets the reverse direction begin at each sentence's last word, and holds the states after it.
        """
        output, state = self.encoder(self.drop(x), mask=mask)
        values = output.transpose(0, 1)
        return Encoded(self.attend(values).mT, values, mask.mT[:, None], _join_directions(state))

    def decode(self, target: Tensor, mask: Tensor | None, encoded: Encoded) -> tuple[Tensor, State]:
        """(Tt, B) characters, their mask (None: all real), and the sources: (Tt, B, size) for `head`, and the state."""
        return self.decode_vectors(self.embed_target(target), mask, encoded)

    def decode_vectors(self, x: Tensor, mask: Tensor | None, encoded: Encoded) -> tuple[Tensor, State]:
        """The same of (Tt, B, size) embeddings."""
        # Not told where sequences start: a reset at step 0 would clear the state that comes from the encoder.
        output, state = self.decoder(self.drop(x), encoded.state, mask=mask)
        scores = output.transpose(0, 1) @ encoded.keys
        weights = scores.masked_fill(~encoded.mask, -torch.inf).softmax(-1)
        context = (weights @ encoded.values).transpose(0, 1)
        return self.drop(torch.tanh(self.mix(torch.cat([output, context], -1)))), state

    def forward(self, source: Tensor, source_mask: Tensor, target: Tensor, target_mask: Tensor) -> Tensor:
        """Sources, and targets as the decoder reads them, to (Tt, B, characters) logits of what comes next."""
        return self.head(self.decode(target, target_mask, self.encode(source, source_mask))[0])

    def losses(self, source: SequenceBatch, target: SequenceBatch) -> Tensor:
        """Return the sum of the cross entropies of a batch's real targets; the head runs on those alone."""
        output, _ = self.decode(target.data, target.mask, self.encode(source.data, source.mask))
        return cross_entropy(self.head(output[target.loss_mask]), target.targets[target.loss_mask], reduction="sum")

    @torch.no_grad()
    def translate(self, source: Tensor, mask: Tensor, max_steps: int = 60) -> list[list[int]]:
        """Return the characters of each lane, at each step the likeliest, until </s> or `max_steps`."""
        encoded = self.encode(source, mask)
        last = torch.full((1, source.shape[1]), BOS, device=source.device)
        ended, found = torch.zeros_like(last, dtype=torch.bool), []
        while len(found) < max_steps and not ended.all():
            output, state = self.decode(last, None, encoded)
            logits = self.head(output)
            logits[..., [UNKNOWN, BOS]] = -torch.inf
            last, encoded = logits.argmax(-1), encoded._replace(state=state)
            ended |= last == EOS
            found.append(torch.where(ended, EOS, last))
        lanes = torch.cat(found).mT.tolist()
        return [lane[: lane.index(EOS)] if EOS in lane else lane for lane in lanes]


def _join_directions(state: State) -> State:
    """(2 * layers, B, H / 2), forward and reverse of each layer, to (layers, B, H)."""
    if isinstance(state, tuple):
        h, c = (_join_directions(part) for part in state)
        return h, c  # type: ignore[return-value]
    return torch.cat([state[0::2], state[1::2]], -1)
