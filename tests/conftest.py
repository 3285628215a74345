"""Two cores oversubscribe easily: every test process computes with two threads at most."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

torch.set_num_threads(min(2, os.cpu_count() or 1))
