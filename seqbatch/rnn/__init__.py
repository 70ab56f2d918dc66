"""Recurrent layers that know resets, padding, flat input and carried state, on CPU and CUDA."""

from seqbatch.rnn.checkpoints import from_sru_state_dict, to_sru_state_dict
from seqbatch.rnn.lstm import LSTM, SlowPathWarning
from seqbatch.rnn.sru import SRU, SRULayer

__all__ = ["LSTM", "SRU", "SRULayer", "SlowPathWarning", "from_sru_state_dict", "to_sru_state_dict"]
