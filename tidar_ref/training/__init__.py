"""Training: the paper's doubled-sequence recipe, its AR and block-diffusion siblings, adapters."""
