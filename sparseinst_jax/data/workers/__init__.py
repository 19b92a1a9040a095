"""What crosses processes while batches are read: pixels, skipped images, restarts."""
