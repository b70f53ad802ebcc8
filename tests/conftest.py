"""Settings of all tests: offline, one thread, the same random examples every time."""

from __future__ import annotations

import os

# Before torch and the hub client are imported: nothing may be fetched.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from hypothesis import settings

settings.register_profile("rlx", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("rlx")
