"""The Hydra tree: config.yaml, a folder a group, and the code that reads it strictly."""
