"""The reference VLM and its data, which are part of the package. A run without MODEL uses them."""

from pathlib import Path

REFERENCE_VLM = Path(__file__).parent / "reference_vlm"
CALIBRATION = REFERENCE_VLM / "data" / "calibration.json"
HELDOUT = REFERENCE_VLM / "data" / "heldout.json"
