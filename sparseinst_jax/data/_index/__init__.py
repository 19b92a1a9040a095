"""The index of a COCO json: read once, kept as columns, seen as records by `data.records`."""
