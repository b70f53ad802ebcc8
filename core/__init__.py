"""The core: config, run, loop, primitives (generation, log-probs, batching), models, checkpoints, command line."""
