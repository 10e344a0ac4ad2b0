"""The public trainers, with TRL's signatures, each beside its config; a module is named by its stage."""
