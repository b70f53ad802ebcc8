"""Two processes with a cache each take reference log-probs, twice. Started by torchrun."""

import json
import os
import sys
from pathlib import Path

import lines
import torch

from rlx.core.peers import connect
from rlx.core.precompute import precompute
from rlx.core.preference_data import PairData

os.environ["RLX_CACHE"] = str(Path(json.loads(sys.argv[1])) / os.environ["RANK"])
state = connect()
prompts = [[3], [4, 5], [6]]
data = PairData(["p"] * 3, prompts, [[7, 8]] * 3, [[9]] * 3, None, [0, 1, 2], "of the data", [])
for number in range(2):
    told: list[str] = []
    found = precompute(data, lambda s: s.ids[s.scored].float(), "of the reference", state, told.append)
    assert torch.equal(found.logps, torch.tensor([7.0, 8, 9] * 3))
    lines.say(state.process_index, f"time {number}: {told[0]}")
