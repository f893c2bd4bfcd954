"""What makes a step fast on a GPU. Nothing here is imported on a machine without one: the kernels are Triton's."""
