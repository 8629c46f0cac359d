"""What papers share: modelling cores and runtime."""
