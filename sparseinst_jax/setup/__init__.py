"""From a configuration to objects: what the commands and notebooks share."""
