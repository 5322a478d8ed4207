"""2-D neighborhood attention: `na2d` and `self_attention` (public functions, checks, registration), `dispatch` (which
kernels a call takes), the portable kernels (`triton_…`) and Hopper's own (`hopper_…`).
"""
