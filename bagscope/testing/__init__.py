"""What third parties share with our own tests."""
