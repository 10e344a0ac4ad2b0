"""Models: loading, precision, attention by layout, the tiled head, and scoring."""
