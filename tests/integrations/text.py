"""What all integration tests train on - sentences of this repository as bytes - and how they count what was seen."""

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn

import seqbatch
from seqbatch.rnn import LSTM

ROOT = Path(__file__).parents[2]
VOCABULARY = 256


def sentences():
    """Return the distinct sentences and table rows of the licence and the guide for contributors, as bytes."""
    text = "\n\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("LICENSE", "CONTRIBUTING.md"))
    parts = re.split(r"\n\s*\n|(?<=[.;:,])\s+", text)
    return [part.encode()[:400] for part in dict.fromkeys(part.strip() for part in parts) if len(part) > 1]


SENTENCES = sentences()
DATA = seqbatch.TokenArray.of_sequences([list(sentence) for sentence in SENTENCES])
FEW = seqbatch.TokenArray.of_sequences([list(sentence) for sentence in SENTENCES[:23]])


class ByteModel(nn.Module):
    """A small language model of bytes: an LSTM that knows where sequences begin and end."""

    def __init__(self, hidden=12):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, hidden)
        self.rnn = LSTM(hidden, hidden)
        self.head = nn.Linear(hidden, VOCABULARY)

    def forward(self, batch, state=None):
        """Return the sum of the losses and the state to carry on."""
        output, state = self.rnn(self.embed(batch.data), batch.carry_in(state), reset=batch.reset, mask=batch.mask)
        scores, targets = self.head(output[batch.loss_mask]), batch.targets[batch.loss_mask]
        return nn.functional.cross_entropy(scores, targets, reduction="sum"), state


def pieces_of(batch, data=DATA):
    """Return [sequence, start, length] of a batch's pieces, having compared their tokens with the data."""
    placement, pieces = batch.placement, []
    for i, tokens in enumerate(batch.unbatch()):
        sequence, start, length = (int(column[i]) for column in (placement.sequence, placement.start, placement.length))
        assert np.array_equal(tokens, data[sequence][start : start + length])
        pieces.append([sequence, start, length])
    return pieces


def documents_of(inputs, sequences=SENTENCES):
    """Return [sequence, 0, length] of the documents in the inputs of a Hugging Face model."""
    known = {sentence: number for number, sentence in enumerate(sequences)}
    found = []
    for tokens, positions in zip(inputs["input_ids"].tolist(), inputs["position_ids"].tolist(), strict=True):
        begins = [i for i, position in enumerate(positions) if position == 0] + [len(tokens)]
        for begin, end in pairwise(begins):
            if tokens[begin]:  # no sentence has a byte of 0: that is padding
                sentence = bytes(token for token in tokens[begin:end] if token)
                found.append([known[sentence], 0, len(sentence)])
    return found


def assert_exactly_once(batches, data=DATA):
    """Check that lists of pieces (one list a batch) hold every token of `data` once."""
    seen = np.zeros(len(data.tokens), np.int64)
    for sequence, start, length in (piece for batch in batches for piece in batch):
        begin = data.offsets[sequence] + start
        seen[begin : begin + length] += 1
    assert (seen == 1).all(), f"{(seen == 0).sum()} tokens never, {(seen > 1).sum()} tokens several times"


def assert_epochs(epochs, data=DATA):
    """Check that all epochs hold every token once, in other batches and another order each time."""
    for batches in epochs:
        assert_exactly_once(batches, data)
    for one, other in pairwise(epochs):
        assert one != other
        assert {str(sorted(batch)) for batch in one} != {str(sorted(batch)) for batch in other}


def assert_ranks(ranks, data=DATA):
    """Check records of ranks, each a list of epochs of batches of pieces: as many steps, and together all data once."""
    for epochs in zip(*ranks, strict=True):
        assert len({len(batches) for batches in epochs}) == 1
    assert_epochs([[batch for batches in epochs for batch in batches] for epochs in zip(*ranks, strict=True)], data)


def run(*arguments, **options):
    """Run Python on `arguments` with this checkout first on its path."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    settings = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        **options,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


def run_ranks(script, folder, num_replicas):
    """Run a script of this folder in several processes; return what each of them wrote with `report`."""
    launch = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_replicas}")
    run(*launch, Path(__file__).parent / script, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_replicas)]


def report(rank, records):
    """Write a rank's records into the folder that the script was given."""
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(records))


def relative_error(gradients, expected):
    """Return the largest difference of two lists of gradients, relative to the largest entry."""
    largest = max(tensor.abs().max() for tensor in expected)
    return max((a - b).abs().max() / largest for a, b in zip(gradients, expected, strict=True)).item()


def gradients(model):
    """Return copies of the parameters' gradients, zeros for those without."""
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
