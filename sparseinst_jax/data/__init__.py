"""COCO data: index, transforms, plan of batches, loader and the drawn demo data set."""
