"""What users of Keras touch."""
