"""The process and the machine: files, hosts, memory, what strangers wrote."""
