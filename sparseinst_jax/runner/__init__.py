"""What runs an exported file: NumPy, Pillow, pycocotools and a runtime; never JAX."""
