"""TensorFlow's variables, Keras' included: in place, many small ones together, the rest as tensors."""
