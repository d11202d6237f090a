"""helix_compile."""
