"""The core: config, run, loop, primitives (generation, log-probs), models, checkpoints, command line."""
