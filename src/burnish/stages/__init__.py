"""Training stages, one file each: the groups of an optimizer step and their loss."""
