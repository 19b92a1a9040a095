"""Networks: model families, backbones and the building blocks that they share."""
