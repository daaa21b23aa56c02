"""The operating system: files, processes, threads, the terminal, text that is safe to print."""
