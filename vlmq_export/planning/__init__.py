"""What a run would do, from headers alone."""
