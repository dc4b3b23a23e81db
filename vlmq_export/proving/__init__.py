"""The parity checks of every format, and what verifies an output folder."""
