"""``hvd-localsgd doctor``: what is here, how it fits together, and what to change."""
