"""The reference VLM and its data, shipped as package data: what the command runs on when no MODEL is given."""

from pathlib import Path

REFERENCE_VLM = Path(__file__).parent / "reference_vlm"
CALIBRATION = REFERENCE_VLM / "data" / "calibration.json"
HELDOUT = REFERENCE_VLM / "data" / "heldout.json"
