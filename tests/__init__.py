"""Tests; a package, so that the `tests` of some installed library cannot stand in its place."""
