"""The process and the machine: files, hosts, memory, messages."""
