"""Pictures of masks, batches and data sets; charts of training and evaluation."""
