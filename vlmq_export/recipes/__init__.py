"""The description of a run, from flags or YAML."""
