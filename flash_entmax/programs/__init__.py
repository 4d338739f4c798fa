"""What the command `flash-entmax` runs."""
