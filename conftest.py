"""What pytest leaves out: Triton's kernels where there is no Triton."""

from importlib.util import find_spec

NEED_TRITON = [
    f"seqbatch/rnn/{name}.py" for name in ("triton_kernels", "norm_triton", "norm_cuda", "linear_scan_triton")
]
collect_ignore = [] if find_spec("triton") else NEED_TRITON
