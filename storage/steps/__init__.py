"""Decoding steps in SQL: packed in memory and in the table `packed_steps`, row by row in the view `decode_steps`."""
