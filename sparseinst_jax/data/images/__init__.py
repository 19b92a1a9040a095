"""Image files: where they may lie, how they are decoded, OpenCV's way to resize them."""
