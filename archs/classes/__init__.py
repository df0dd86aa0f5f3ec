"""config.json of target classes, for families whose checkpoints may become one of several classes."""
