"""For all tests of training."""

import torch

# Networks as small as these are slower on more threads.
torch.set_num_threads(1)
