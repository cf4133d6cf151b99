"""What runs inside the sandbox's keeper: nothing of it imports more than the standard library."""
