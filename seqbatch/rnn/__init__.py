"""Recurrent layers that know resets, padding, flat input and carried state, on CPU and CUDA."""

from seqbatch.rnn.bnlstm import BNLSTM
from seqbatch.rnn.checkpoints import from_sru_state_dict, to_sru_state_dict
from seqbatch.rnn.lstm import LSTM, SlowPathWarning
from seqbatch.rnn.norm import MaskedBatchNorm1d, SequenceBatchNorm
from seqbatch.rnn.parallel import Bidirectional, parallelize
from seqbatch.rnn.population import estimate_population
from seqbatch.rnn.sru import SRU, SRULayer

__all__ = [
    "BNLSTM",
    "LSTM",
    "SRU",
    "Bidirectional",
    "MaskedBatchNorm1d",
    "SRULayer",
    "SequenceBatchNorm",
    "SlowPathWarning",
    "estimate_population",
    "from_sru_state_dict",
    "parallelize",
    "to_sru_state_dict",
]
