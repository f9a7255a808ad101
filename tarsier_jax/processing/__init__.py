"""The host side: from files and messages to padded numpy batches. Nothing here touches a device."""
