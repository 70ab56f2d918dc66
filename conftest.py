"""What pytest leaves out: Triton's kernels where there is no Triton."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("triton") else ["seqbatch/rnn/triton_kernels.py"]
