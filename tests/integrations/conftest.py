"""One thread: the models are small, and the machines that run the tests too."""

import torch

torch.set_num_threads(1)
