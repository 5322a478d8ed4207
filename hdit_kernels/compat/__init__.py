"""The interfaces of other packages, so that code written for them runs on these kernels."""
