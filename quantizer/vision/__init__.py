"""The vision tower and the projector: a walk through them, their solution, and its file."""
