"""Pictures: masks on images, letters, curves and matrices."""
