"""Ways of learning, one file each: which groups make an optimizer step, and what their loss is."""
