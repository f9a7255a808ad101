"""Processing on the host: converts files and messages to padded numpy batches, without using a device."""
