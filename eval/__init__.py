"""Programs that score descriptions and answers, and clips to score them on."""
