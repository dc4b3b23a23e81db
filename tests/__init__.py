"""The tests. They are a package, so that an installed library's `tests` cannot take their place."""
