"""Train the runs whose options are given as JSON; ``rlx.testing.runs`` starts it in several processes."""

from __future__ import annotations

import json
import sys

import torch

from rlx.core.run import run

if __name__ == "__main__":
    torch.set_num_threads(1)
    for options in json.loads(sys.argv[1]):
        run(**options)
