"""Other label formats to COCO: one module for each, `coco_content` is what they share."""
