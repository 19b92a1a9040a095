"""What a COCO json says, read piece by piece into columns; faults, masks, classes."""
