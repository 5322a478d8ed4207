"""2-D neighborhood attention: `op` (public function, checks, registration), `forward` and `backward` (kernels),
`configs`.
"""
