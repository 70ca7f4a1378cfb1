"""Where the tests of the method run: on the CPU, or on the device that `RPSA_TEST_DEVICE` names (`make gpu`: cuda).

The helpers put their models and batches there; rpsa finds out by itself, from the parameters.
"""

import os

import torch

DEVICE = torch.device(os.environ.get("RPSA_TEST_DEVICE", "cpu"))
