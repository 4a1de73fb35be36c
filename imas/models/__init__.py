"""Networks, the teacher, weight files."""
