"""The source model: its family, its checkpoint on disk, and its modules filled part by part."""
