"""One run of the quantizer: what it refuses, how it resumes, its phases, memory and time."""
