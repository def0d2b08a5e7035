"""GPU kernels in Triton. Importing them touches no driver; nothing autotunes behind one's back."""
