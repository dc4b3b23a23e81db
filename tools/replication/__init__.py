"""The papers' tables: their calibration set, and one row by one command."""
