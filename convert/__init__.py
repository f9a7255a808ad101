"""Programs that convert checkpoints and prove that nothing was lost."""
