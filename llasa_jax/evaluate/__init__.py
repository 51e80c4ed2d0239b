"""Measuring speech: scorers behind one interface, the evaluation of checkpoints and its page."""
