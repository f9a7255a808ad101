"""Programs that convert checkpoints and compare them with the original."""
