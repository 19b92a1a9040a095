"""Measure masks on a COCO data set."""
