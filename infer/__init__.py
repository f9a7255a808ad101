"""Programs that describe videos."""
