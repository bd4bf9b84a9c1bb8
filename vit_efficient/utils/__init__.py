"""What every part of the package uses, and nothing of vision transformers."""
