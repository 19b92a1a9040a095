"""Images to instances: the one path of evaluation, prediction and notebooks."""
