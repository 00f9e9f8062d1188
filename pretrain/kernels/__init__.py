"""Hand-written accelerator kernels, each folder one operation: api, definition, plan, kernels, block sizes."""
