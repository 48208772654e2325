"""A draft that learns while jobs run: another process trains the head on their texts."""
