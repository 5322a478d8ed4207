"""What we compare with: other models and other implementations of the same operators."""
