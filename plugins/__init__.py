"""The plugin contract, discovery, the registry and the catalogue of built-ins."""
