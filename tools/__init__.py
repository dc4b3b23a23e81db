"""The commands of a checkout. They are not part of the installed package."""
