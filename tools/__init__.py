"""What is made from the packages for others, run from a clone: no wheel holds it."""
