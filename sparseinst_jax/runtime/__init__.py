"""The process and the machine: memory, hosts, files, messages."""
